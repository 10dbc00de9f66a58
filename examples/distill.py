"""Distils a teacher into a student on rows of your own, from Python.

    python examples/distill.py                                                    # tiny random models, offline
    python examples/distill.py --student HuggingFaceTB/SmolLM2-135M-Instruct \
        --teacher HuggingFaceTB/SmolLM2-360M-Instruct --output_dir run

`DistillTrainer` is a transformers `Trainer`. The loss has three parts: the cross-entropy of answers (`loss_pre`), that
of rationales (`loss_exp`), and the attention loss (`loss_att`). Needs the extra `train`.
"""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoTokenizer

import molsaki
from molsaki import DistillConfig, DistillTrainer

ROWS = [
    {
        "question": "Tom has 3 boxes of 8 pens. He gives 5 pens away. How many pens does he keep?",
        "rationale": "He has 3 * 8 = 24 pens. After giving 5 away, he keeps 24 - 5 = 19 pens.",
        "answer": "19",
    },
    {
        "question": "A bus has 40 seats. 12 people get in, then 9 more. How many seats are free?",
        "rationale": "Together 12 + 9 = 21 people got in. So 40 - 21 = 19 seats are free.",
        "answer": "19",
    },
    {
        "question": "A book costs 7 dollars and a pen 2. Mia buys 4 books and 3 pens. What does she pay?",
        "rationale": "The books cost 4 * 7 = 28 dollars. The pens cost 3 * 2 = 6. She pays 28 + 6 = 34 dollars.",
        "answer": "34",
    },
    {
        "question": "A rope of 60 metres is cut into 5 equal parts. Two parts are sold. How many metres remain?",
        "rationale": "Each part has 60 / 5 = 12 metres. Two parts are 24 metres, so 60 - 24 = 36 metres remain.",
        "answer": "36",
    },
]


def main(student: str, teacher: str, output_dir: str, learning_rate: str) -> list[dict[str, float]]:
    args = DistillConfig(
        output_dir=output_dir,
        beta=1.0,  # weight of the attention loss
        normalise="sum",  # compare shares of attention; "softmax", the paper's, is flat where attention is small
        causal_words=True,  # leave out words that a step cannot see
        pooling="mean",
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=float(learning_rate),
        save_strategy="no",
    )
    trainer = DistillTrainer(student, teacher, args, train_dataset=ROWS)  # names or models; a list or a Dataset
    trainer.train()
    trainer.save_model()

    logged = [row for row in trainer.state.log_history if "loss_att" in row]
    for name in ("loss_pre", "loss_exp", "loss_att", "map_overlap"):
        first, last = logged[0][name], logged[-1][name]
        print(f"{name}: {first:.3f} in the first {args.logging_steps} steps, {last:.3f} in the last")
    model = AutoModelForCausalLM.from_pretrained(output_dir)  # what was written is an ordinary folder
    text = molsaki.segment(ROWS[0]["question"], ROWS[0]["rationale"])
    print(molsaki.attention_map(model, AutoTokenizer.from_pretrained(output_dir), text))
    return logged


if __name__ == "__main__":
    from tiny_models import arguments

    main(*arguments(__doc__, "student", "teacher", "output_dir", "learning_rate"))
