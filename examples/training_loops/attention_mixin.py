"""A mixin that adds the attention loss to transformers' `Trainer` and its subclasses, such as TRL's trainers.

Teacher and student have one tokenizer, so both read the trainer's own batches, which have to be padded, not packed.
Steps and key words are found in these. Checkpoints hold the router; the exported student does not.
"""

from __future__ import annotations

from pathlib import Path

import torch

import molsaki

ROUTER = "attention_loss.pt"  # in every checkpoint


class AttentionMixin:
    """The first base: ``class MyTrainer(AttentionMixin, SFTTrainer)``. Call `add_teacher` before anything else."""

    def add_teacher(self, teacher, beta: float = 0.1, **options) -> None:
        """Use this teacher, with this weight of the loss and these options of `StepwiseAttentionLoss.for_models`."""
        self.attention_teacher, self.attention_beta = teacher.to(self.args.device).eval(), beta
        self.attention_loss = molsaki.StepwiseAttentionLoss.for_models(self.model, teacher, **options)
        self.attention_logs: list[dict[str, torch.Tensor]] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "attention_mask" not in inputs:
            raise ValueError("packing, padding_free: expected False, got batches that are not padded")
        inputs |= molsaki.right_padded({name: inputs[name] for name in ("input_ids", "labels", "attention_mask")})
        plan = molsaki.plan_from_ids(inputs["input_ids"], inputs["labels"], self.processing_class)
        with torch.no_grad(), self.attention_loss.capture(self.attention_teacher, plan) as wanted:
            self.attention_teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        with self.attention_loss.capture(model, plan) as found:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        attention, logs = self.attention_loss(found, wanted)
        weight = self.attention_beta
        if model.training:
            self.attention_logs.append({name: value for name, value in logs.items() if value.dim() == 0})
            if num_items_in_batch is not None:  # else Trainer divides the loss by the steps
                weight /= self.current_gradient_accumulation_steps
        result = result if return_outputs else (result, None)
        loss = result[0] + weight * attention
        return (loss, result[1]) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.attention_logs:
            for name in self.attention_logs[0]:
                logs[name] = torch.stack([each[name] for each in self.attention_logs]).nanmean().item()
            self.attention_logs.clear()
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        is_new, optimizer = self.optimizer is None, super().create_optimizer(*args, **kwargs)
        if is_new:
            optimizer.add_param_group({"params": [*self.attention_loss.parameters()]})  # the router
        return optimizer

    def _save_checkpoint(self, *args, **kwargs):
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=None), f"checkpoint-{self.state.global_step}")
            torch.save(self.attention_loss.state_dict(), folder / ROUTER)

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self.attention_loss.load_state_dict(torch.load(Path(resume_from_checkpoint, ROUTER), weights_only=True))
