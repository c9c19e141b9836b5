"""A training loop of one's own that accumulates: four batches, one optimiser step, one exact normaliser.

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

WHERE, FOLDER, STEPS = str(files("potstill.demo") / "teacher"), Path("runs/own_loop"), 30
FOLDER.mkdir(parents=True, exist_ok=True)
write_jsonl(FOLDER / "train.jsonl", "transfer", 40_000)
write_jsonl(FOLDER / "dev.jsonl", "dev", 4_000)

teacher, tokenizer = AutoModelForCausalLM.from_pretrained(WHERE, dtype="float32"), AutoTokenizer.from_pretrained(WHERE)
shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 2}
student = random_student(student_config(teacher.config, shape, len(tokenizer)), seed=0)
collate = PaddingCollator(pad_token_id(tokenizer)[0])
rows, held_out = (
    encode(Source(str(FOLDER / name)), tokenizer, max_length=64, packing=True).dataset
    for name in ("train.jsonl", "dev.jsonl")
)
dev = list(in_batches(held_out, collate, 8))


def say() -> None:
    found = compare(teacher, {"student": student}, dev)["student"]
    print(f"KL to the teacher, held out: {found.kl:.3f} nats a token")


distiller = Distiller(student, teacher, [Logits(ForwardKL(), weight=0.9, temperature=2.0), Labels(weight=0.1)])
say()
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
for step in range(STEPS):
    parts = [collate([rows[(8 * step + 2 * part + i) % len(rows)] for i in (0, 1)]) for part in range(4)]
    counting = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)  # of the whole step
    for part in parts:
        distiller(part, normalizer=counting, at=step).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
say()
