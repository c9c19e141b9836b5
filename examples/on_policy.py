"""GKD in a training loop of your own: the student generates half of the rows, and the teacher scores every token.

python examples/on_policy.py
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from potstill import JSD, Distiller, Logits, PaddingCollator, Rollout, Sampling, Source, compare, encode, in_batches
from potstill.data.batches import pad_token_id
from potstill.demo.corpus import write_jsonl
from potstill.models.design import student_config
from potstill.models.initialize import random_student

TEACHER, FOLDER, STEPS = str(files("potstill.demo") / "teacher"), Path("runs/on_policy"), 30
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


distiller = Distiller(student, teacher, [Logits(JSD(0.5))])
rollout = Rollout(tokenizer, Sampling(max_new_tokens=24), share=0.5, prompt_tokens=16)
print_quality()
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
for step in range(STEPS):
    batch = collate([train[(8 * step + i) % len(train)] for i in range(8)])
    (batch,) = rollout([batch], student, step=step)
    distiller.step(batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print_quality()
