"""The attention loss in TRL's `GKDTrainer`: trl_gkd.py STUDENT TEACHER TRAIN_FILE OUTPUT_DIR; needs the package trl.

On-policy distillation (Agarwal et al. 2023, arXiv 2306.13649): the student writes some of the texts itself, and steps
and numbers are found in what it wrote. TRAIN_FILE has objects with `messages`, one per line; the last one is the reply.
"""

from __future__ import annotations

import sys

from attention_mixin import AttentionMixin
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer


class AttentionGKDTrainer(AttentionMixin, GKDTrainer):
    pass


def main(student: str, teacher: str, train_file: str, output_dir: str, **options) -> GKDTrainer:
    teacher_model = AutoModelForCausalLM.from_pretrained(teacher)
    trainer = AttentionGKDTrainer(
        model=student,
        teacher_model=teacher_model,
        args=GKDConfig(output_dir=output_dir, **options),
        train_dataset=load_dataset("json", data_files=train_file, split="train"),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    trainer.add_teacher(teacher_model, beta=0.1, normalise="sum", causal_words=True)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
