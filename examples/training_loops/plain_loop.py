"""The attention loss in your own loop: plain_loop.py STUDENT TEACHER TRAIN_FILE OUTPUT_DIR.

Student and teacher may have different tokenizers. TRAIN_FILE has objects with `question` and `rationale`, one per line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import molsaki

BETA = 0.1  # weight of the attention loss
EPOCHS, BATCH_SIZE = 1, 4


def load(name: str):
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name), tokenizer


def main(student_name: str, teacher_name: str, train_file: str, output_dir: str) -> list[dict[str, float]]:
    (student, tokenizer), (teacher, teacher_tokenizer) = load(student_name), load(teacher_name)
    rows = [json.loads(line) for line in Path(train_file).read_text(encoding="utf-8").splitlines()]
    batches = [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)] * EPOCHS

    attention_loss = molsaki.StepwiseAttentionLoss.for_models(student, teacher, normalise="sum", causal_words=True)
    optimizer = torch.optim.AdamW([*student.parameters(), *attention_loss.parameters()], lr=1e-4)
    student.train()
    logged = []
    for batch in batches:
        spans = [molsaki.segment(row["question"], row["rationale"]) for row in batch]  # steps and numbers
        texts = [text.text for text in spans]
        with torch.no_grad(), attention_loss.capture(teacher, molsaki.plan(spans, teacher_tokenizer)) as wanted:
            teacher(**teacher_tokenizer(texts, return_tensors="pt", padding=True))
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
        with attention_loss.capture(student, molsaki.plan(spans, tokenizer)) as found:
            output = student(**inputs, labels=labels)
        attention, logs = attention_loss(found, wanted)
        (output.loss + BETA * attention).backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append({"loss": output.loss.item()} | {name: x.item() for name, x in logs.items() if x.dim() == 0})
        print({name: round(value, 4) for name, value in logged[-1].items()})
    student.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return logged


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
