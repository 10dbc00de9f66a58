"""A mixin that adds the attention loss to transformers' `Trainer` and to what is derived from it, such as TRL's.

Teacher and student have one tokenizer, so both read the trainer's own batches. Steps and key words are found in these.
"""

from __future__ import annotations

import torch

import molsaki


class AttentionMixin:
    """Put it first: ``class MyTrainer(AttentionMixin, SFTTrainer)``; and call `add_teacher` before `train`."""

    def add_teacher(self, teacher, beta: float = 0.1, **options) -> None:
        """Use this teacher, with this weight of the loss and these options of `StepwiseAttentionLoss.for_models`."""
        self.attention_teacher, self.attention_beta = teacher.to(self.args.device).eval(), beta
        self.attention_loss = molsaki.StepwiseAttentionLoss.for_models(self.model, teacher, **options)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.add_param_group({"params": [*self.attention_loss.parameters()]})  # the router
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs |= molsaki.right_padded({name: inputs[name] for name in ("input_ids", "labels", "attention_mask")})
        plan = molsaki.plan_from_ids(inputs["input_ids"], inputs["labels"], self.processing_class)
        with torch.no_grad(), self.attention_loss.capture(self.attention_teacher, plan) as wanted:
            self.attention_teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        with self.attention_loss.capture(model, plan) as found:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        attention, logs = self.attention_loss(found, wanted)
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        extra = self.attention_beta / steps * attention  # Trainer divides the loss by the steps if the number is None
        self.attention_logs = {name: value.item() for name, value in logs.items() if value.dim() == 0}
        return (result[0] + extra, result[1]) if return_outputs else result + extra

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs |= self.attention_logs
        super().log(logs, *args, **kwargs)
