"""The attention loss in transformers' `Trainer`: transformers_trainer.py STUDENT TEACHER TRAIN_FILE OUTPUT_DIR.

Student and teacher have one tokenizer. TRAIN_FILE has objects with `question` and `rationale`, one per line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from attention_mixin import AttentionMixin
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)


class AttentionTrainer(AttentionMixin, Trainer):
    pass


def main(student: str, teacher: str, train_file: str, output_dir: str, **options) -> Trainer:
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="right")
    data = []
    for line in Path(train_file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question, rationale = tokenizer(row["question"]).input_ids, tokenizer(" " + row["rationale"]).input_ids
        data.append({"input_ids": question + rationale, "labels": [-100] * len(question) + rationale})

    trainer = AttentionTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        args=TrainingArguments(output_dir=output_dir, **options),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.add_teacher(AutoModelForCausalLM.from_pretrained(teacher), beta=0.1, normalise="sum", causal_words=True)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
