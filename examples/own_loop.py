"""A training loop of your own with gradient accumulation: four batches, one optimizer step, one exact normalizer.

python examples/own_loop.py
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill import Distiller, ForwardKL, Labels, Logits, PaddingCollator, Source, compare, encode, in_batches
from potstill.data.batches import pad_token_id
from potstill.demo.corpus import write_jsonl
from potstill.models.design import student_config
from potstill.models.initialize import random_student

TEACHER, FOLDER, STEPS = str(files("potstill.demo") / "teacher"), Path("runs/own_loop"), 30
FOLDER.mkdir(parents=True, exist_ok=True)
write_jsonl(FOLDER / "train.jsonl", "transfer", 40_000)
write_jsonl(FOLDER / "dev.jsonl", "dev", 4_000)

teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(TEACHER)
shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 2}
student = random_student(student_config(teacher.config, shape, len(tokenizer)), seed=0)
train, dev = (
    encode(Source(FOLDER / file), tokenizer, max_length=64, packing=True).dataset
    for file in ("train.jsonl", "dev.jsonl")
)
collate = PaddingCollator(pad_token_id(tokenizer)[0])
held_out = list(in_batches(dev, tokenizer, 8))


def print_quality() -> None:
    quality = compare(teacher, {"student": student}, held_out)["student"]
    print(f"KL to the teacher, held out: {quality.kl:.3f} nats a token")


distiller = Distiller(student, teacher, [Logits(ForwardKL(), weight=0.9, temperature=2.0), Labels(weight=0.1)])
print_quality()
distiller.train()  # the student; its teacher stays in evaluation mode
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
for step in range(STEPS):
    batches = [collate([train[(8 * step + 2 * j + i) % len(train)] for i in (0, 1)]) for j in range(4)]
    num_tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)  # target tokens of the step
    for batch in batches:
        distiller.step(batch, normalizer=num_tokens, last=batch is batches[-1]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print_quality()
