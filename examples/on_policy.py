"""GKD in a loop of one's own: the student writes half of the rows, the teacher judges every token of both halves.

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

WHERE, FOLDER, STEPS = str(files("potstill.demo") / "teacher"), Path("runs/on_policy"), 30
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


distiller = Distiller(student, teacher, [Logits(JSD(0.5))])
writes = Rollout(tokenizer, Sampling(max_new_tokens=24), share=0.5, prompt_tokens=16)
say()
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
for step in range(STEPS):
    batch = collate([rows[(8 * step + i) % len(rows)] for i in range(8)])
    (batch,) = writes([batch], student, step=step)
    distiller.step(batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
say()
