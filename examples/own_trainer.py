"""The attention loss in your own trainer: one method of transformers' `Trainer`.

    python examples/own_trainer.py                                               # tiny random models, offline
    python examples/own_trainer.py --student HuggingFaceTB/SmolLM2-135M-Instruct \
        --teacher HuggingFaceTB/SmolLM2-360M-Instruct --train_file train.jsonl --output_dir run

Teacher and student have one tokenizer here. The pairing of layers is fixed (`mixture="uniform"`), so the loss has no
parameters to train and to save; `examples/training_loops` has the paper's mixture, whose router is trained, in a plain
loop, in `Trainer`, in TRL's trainers and under Accelerate. Needs the extra `train`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import molsaki

BETA = 1.0  # weight of the attention loss


class AttentionTrainer(Trainer):
    def add_teacher(self, teacher: torch.nn.Module) -> None:
        self.teacher = teacher.to(self.args.device).eval()
        self.attention_loss = molsaki.StepwiseAttentionLoss.for_models(
            self.model, self.teacher, mixture="uniform", normalise="sum", causal_words=True
        )
        self.attention_logs: list[dict] = []
        self.model_accepts_loss_kwargs = False  # the loss of each batch is a mean, which Trainer divides

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = molsaki.right_padded(inputs)
        plan = molsaki.plan_from_ids(inputs["input_ids"], inputs["labels"], self.processing_class)
        with torch.no_grad(), self.attention_loss.capture(self.teacher, plan) as wanted:
            self.teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        with self.attention_loss.capture(model, plan) as found:
            output = model(**inputs)
        attention, logs = self.attention_loss(found, wanted)
        self.attention_logs.append({name: logs[name].item() for name in ("loss_att", "map_overlap")})
        loss = output.loss + BETA * attention
        return (loss, output) if return_outputs else loss


def main(student: str, teacher: str, train_file: str, output_dir: str, learning_rate: str) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(student)
    data = []
    for line in Path(train_file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question, rationale = tokenizer(row["question"]).input_ids, tokenizer(" " + row["rationale"]).input_ids
        data.append({"input_ids": question + rationale, "labels": [-100] * len(question) + rationale})
    trainer = AttentionTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        args=TrainingArguments(
            output_dir, max_steps=20, per_device_train_batch_size=4, learning_rate=float(learning_rate),
            logging_steps=10, save_strategy="no", report_to="none",
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.add_teacher(AutoModelForCausalLM.from_pretrained(teacher))
    trainer.train()
    trainer.save_model()
    for name in ("loss_att", "map_overlap"):
        first, last = trainer.attention_logs[0][name], trainer.attention_logs[-1][name]
        print(f"{name}: {first:.3f} at the first step, {last:.3f} at the last")
    return trainer.attention_logs


if __name__ == "__main__":
    from tiny_models import arguments

    main(*arguments(__doc__, "student", "teacher", "train_file", "output_dir", "learning_rate"))
