"""Teacher and student with different tokenizers.

    python examples/two_tokenizers.py                                            # tiny random models, offline
    python examples/two_tokenizers.py --student HuggingFaceTB/SmolLM2-135M-Instruct \
        --other_teacher Qwen/Qwen2.5-0.5B-Instruct --train_file train.jsonl --output_dir run

Steps and key words are found in characters, before any tokenizer is used. So the maps of both models have the same
shape, (layers, steps, words), however many tokens a text has, and no tokens are aligned. Needs the extra `train`.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import molsaki
from molsaki import DistillConfig, DistillTrainer


def main(student: str, other_teacher: str, train_file: str, output_dir: str, learning_rate: str) -> dict:
    row = json.loads(Path(train_file).read_text(encoding="utf-8").splitlines()[0])
    spans = molsaki.segment(row["question"], row["rationale"])
    shapes = {}
    for name in (student, other_teacher):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        tokens = len(tokenizer(spans.text).input_ids)
        shapes[name] = tokens, molsaki.attention_map(model, tokenizer, spans).values.shape
        print(f"{name}: {tokens} tokens, maps (layers, steps, words) = {shapes[name][1]}")

    args = DistillConfig(
        output_dir=output_dir, train_file=[train_file], normalise="sum", causal_words=True, pooling="mean",
        max_steps=20, per_device_train_batch_size=4, learning_rate=float(learning_rate), save_strategy="no",
    )  # fmt: skip
    trainer = DistillTrainer(student, other_teacher, args)  # each with its own tokenizer
    trainer.train()
    trainer.save_model()
    return {"shapes": shapes, "logged": [row for row in trainer.state.log_history if "loss_att" in row]}


if __name__ == "__main__":
    from tiny_models import arguments

    main(*arguments(__doc__, "student", "other_teacher", "train_file", "output_dir", "learning_rate"))
