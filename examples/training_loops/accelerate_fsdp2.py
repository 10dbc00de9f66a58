"""The attention loss with Accelerate, on one process, with DDP or with FSDP2 (tested with two processes on a CPU).

    accelerate launch --config_file examples/distributed/fsdp2.yaml \
        examples/training_loops/accelerate_fsdp2.py STUDENT TEACHER TRAIN_FILE OUTPUT_DIR

Student and teacher may have different tokenizers. TRAIN_FILE has objects with `question` and `rationale`, one per line.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import molsaki


def main(student_name: str, teacher_name: str, train_file: str, output_dir: str) -> list[dict[str, float]]:
    accelerator = Accelerator()
    set_seed(0)
    student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in (student_name, teacher_name))
    tokenizer, teacher_tokenizer = (
        AutoTokenizer.from_pretrained(name, padding_side="right") for name in (student_name, teacher_name)
    )
    rows = [json.loads(line) for line in Path(train_file).read_text(encoding="utf-8").splitlines()]
    loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=list)

    attention_loss = molsaki.StepwiseAttentionLoss.for_models(student, teacher, normalise="sum", causal_words=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    # The router is small: every process has all of it, and the module averages its gradients over the processes.
    attention_loss, teacher = attention_loss.to(accelerator.device), teacher.to(accelerator.device)
    router_optimizer = torch.optim.AdamW(attention_loss.parameters(), lr=1e-3)
    logged = []
    for batch in loader:
        spans = [molsaki.segment(row["question"], row["rationale"]) for row in batch]
        texts = [text.text for text in spans]
        with torch.no_grad(), attention_loss.capture(teacher, molsaki.plan(spans, teacher_tokenizer)) as wanted:
            teacher(**teacher_tokenizer(texts, return_tensors="pt", padding=True).to(accelerator.device))
        inputs = tokenizer(texts, return_tensors="pt", padding=True).to(accelerator.device)
        labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
        with attention_loss.capture(student, molsaki.plan(spans, tokenizer)) as found:
            output = student(**inputs, labels=labels)
        attention, logs = attention_loss(found, wanted)
        accelerator.backward(output.loss + 0.1 * attention)
        for each in (optimizer, router_optimizer):
            each.step()
            each.zero_grad()
        logs = {name: value for name, value in logs.items() if value.dim() == 0} | {"loss": output.loss.detach()}
        logged.append({name: accelerator.reduce(value, "mean").item() for name, value in logs.items()})
        accelerator.print({name: round(value, 4) for name, value in logged[-1].items()})
    state = accelerator.get_state_dict(student)
    if accelerator.is_main_process:
        accelerator.unwrap_model(student).save_pretrained(output_dir, state_dict=state)
        tokenizer.save_pretrained(output_dir)
    # The wrapped student goes before the process group: in the other order DDP can wait forever for gloo's threads.
    student, optimizer, loader = accelerator.free_memory(student, optimizer, loader)
    gc.collect()
    accelerator.end_training()
    return logged


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
