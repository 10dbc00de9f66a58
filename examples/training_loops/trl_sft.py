"""The attention loss in TRL's `SFTTrainer`: trl_sft.py STUDENT TEACHER TRAIN_FILE OUTPUT_DIR; needs the package trl.

Student and teacher have one tokenizer. TRAIN_FILE has objects with `prompt` and `completion`, one per line.
"""

from __future__ import annotations

import sys

from attention_mixin import AttentionMixin
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer


class AttentionSFTTrainer(AttentionMixin, SFTTrainer):
    pass


def main(student: str, teacher: str, train_file: str, output_dir: str, **options) -> SFTTrainer:
    trainer = AttentionSFTTrainer(
        model=student,
        args=SFTConfig(output_dir=output_dir, **options),
        train_dataset=load_dataset("json", data_files=train_file, split="train"),
    )
    trainer.add_teacher(AutoModelForCausalLM.from_pretrained(teacher), beta=0.1, normalise="sum", causal_words=True)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
