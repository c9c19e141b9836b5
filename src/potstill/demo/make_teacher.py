"""Train the demo's teacher: python -m potstill.demo.make_teacher --out src/potstill/demo/teacher

Trains a byte-level BPE and a 5.3M-parameter Llama on the teacher's split of the standard library's source. The same
command continues an interrupted run from its last snapshot. Muon was chosen for the hidden matrices by the dev loss
after 400 steps: 3.46 at a learning rate of 3e-3 and at 1e-2, against 4.51 for AdamW at 3e-3.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from potstill.demo.corpus import Split, documents
from potstill.files import atomic_path

VOCABULARY = 2048
CONTEXT = 256
END, PAD = "<|endoftext|>", "<|pad|>"
LEARNING_RATE = 5e-3


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the teacher's split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text for _, text in documents("teacher")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=2 * CONTEXT
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, split: Split) -> torch.Tensor:
    """Concatenate the token ids of all documents of a split, with an end token after each."""
    rows = tokenizer([text for _, text in documents(split)], verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


def build_model() -> LlamaForCausalLM:
    layers: dict[str, Any] = {"num_hidden_layers": 6, "num_attention_heads": 4}
    widths: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688}
    tokens: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    config = LlamaConfig(max_position_embeddings=2 * CONTEXT, tie_word_embeddings=True, **layers, **widths, **tokens)
    # At this size eager attention is faster on a CPU than the fused kernel's backward pass.
    model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    return model


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Apply dropout on both residual branches: to the outputs of attention and feed-forward layers."""

    def drop(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return nn.functional.dropout(output[0], rate, module.training), *output[1:]
        return nn.functional.dropout(output, rate, module.training)

    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            part.register_forward_hook(drop)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Make Muon for the hidden matrices, and AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or not name.startswith("model.layers.")]
    muon: dict[str, Any] = {"weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, **muon),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batch_at(stream: torch.Tensor, step: int, rows: int, seed: int) -> torch.Tensor:
    """Sample windows at random offsets that depend on seed and step alone, so that a run can resume."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, len(stream) - CONTEXT, (rows,), generator=generator)
    return torch.stack([stream[start : start + CONTEXT] for start in starts.tolist()])


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Compute the cross-entropy over windows that do not overlap, in nats per token."""
    model.eval()
    rows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = sum(float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in rows.split(32))
    model.train()
    return total / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for flag, default in (("--steps", 4500), ("--rows", 16), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    tokenizer = train_tokenizer()
    stream, dev = token_stream(tokenizer, "teacher"), token_stream(tokenizer, "dev")
    model = build_model()
    add_dropout(model, 0.1)  # for seven epochs over the corpus
    optimizers = make_optimizers(model)

    def scale(step: int) -> float:
        return min((step + 1) / 200, 1.0, (args.steps - step) / (0.7 * args.steps))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    stateful: list[Any] = [model, *optimizers, *schedulers]
    snapshot = args.out / "snapshot.pt"
    start = 0
    if snapshot.exists():
        saved = torch.load(snapshot, weights_only=True)
        start = saved["step"]
        for item, state in zip(stateful, saved["states"], strict=True):
            item.load_state_dict(state)
    torch.manual_seed(args.seed + start)

    compiled = torch.compile(model)
    log = (args.out / "training.log").open("a")
    start_time, total = time.monotonic(), 0.0
    for step in range(start, args.steps):
        rows = batch_at(stream, step, args.rows, args.seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = compiled(input_ids=rows, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for item in stateful[1:]:
            item.step()
        model.zero_grad()
        total += loss.item()
        if (step + 1) % 250 == 0:
            minutes = (time.monotonic() - start_time) / 60
            line = f"step {step + 1} train {total / 250:.4f} dev {mean_loss(model, dev[:40_000]):.4f} {minutes:.1f} min"
            print(line, file=log, flush=True)
            print(line, flush=True)
            total = 0.0
            with atomic_path(snapshot) as partial:
                torch.save({"step": step + 1, "states": [item.state_dict() for item in stateful]}, partial)

    facts = {
        "seed": args.seed,
        "steps": args.steps,
        "tokens_per_step": args.rows * CONTEXT,
        "parameters": model.num_parameters(),
        "teacher_tokens": len(stream),
        "heldout_loss_nats": round(mean_loss(model, token_stream(tokenizer, "heldout")), 4),
        "dev_loss_nats": round(mean_loss(model, dev), 4),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
