"""`DistillConfig`: the options of ``molsaki distill``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from molsaki.config import PREDICT_HELP, PREDICT_TEMPLATE, Dtype, MixtureOptions, TextOptions, check_options, option


@dataclasses.dataclass
class DistillConfig(TextOptions, MixtureOptions, TrainingArguments):
    """``molsaki distill``: train a student. The options of transformers' ``TrainingArguments``, and these."""

    student: str | None = option(None, "Folder or hub name of the student.")
    teacher: str | None = option(None, "Folder or hub name of the white-box teacher, to run it live.")
    store: str | None = option(None, "Folder of the teacher's stored maps, in place of a live teacher.")
    train_file: str | None = option(None, "JSON lines file with id, question, rationale and answer.")
    eval_file: str | None = option(None, "JSON lines file whose losses are computed with eval_strategy steps or epoch.")
    objective: Literal["vanilla", "dss", "mmi", "logits", "molsaki"] = option(
        "molsaki",
        "The loss: of answers only (vanilla); of answers and rationales (dss); with the mutual information of the two "
        "(mmi), the teacher's logits (logits) or the teacher's attention (molsaki) added.",
    )
    alpha: float = option(0.5, "Weight of the answer's cross-entropy; the rationale's has 1 - alpha (Eq. 7).")
    beta: float = option(1.0, "Weight of the attention loss (Eq. 7).")
    beta_mmi: float = option(0.1, "objective=mmi: weight of the cross-entropy between the two tasks' predictions.")
    beta_logits: float = option(0.3, "objective=logits: weight of the divergence from the teacher's logits.")
    temperature: float = option(2.0, "objective=logits: temperature that softens both models' logits.")
    normalise: Literal["softmax", "sum"] = option(
        "softmax", "How each row of a map becomes a distribution over words (Eq. 6)."
    )
    causal_words: bool = option(False, "Leave out of each row of a map the words after the last token of its step.")
    predict_template: str = option(PREDICT_TEMPLATE, PREDICT_HELP)
    packing: bool | None = option(
        None, "Pack all texts of a batch, of both tasks, without padding. Default: on if the student supports it."
    )
    share_question: bool | None = option(
        None, "Encode the shared question once per packed example. Default: on if the student supports it."
    )
    fused_cross_entropy: Literal["auto", "torch", "liger"] = option(
        "auto",
        "The implementation of the labels' cross-entropy: torch, in chunks of labels, or liger-kernel's fused kernel. "
        "auto: liger on CUDA if it is installed, else torch.",
    )
    student_dtype: Dtype = option(
        "float32", "The student's floating-point type; float32 with --bf16 is mixed precision."
    )
    teacher_dtype: Dtype = option("auto", "The live teacher's floating-point type.")
    freeze: list[str] = option([], "Regular expressions of the names of the student's parameters that are not trained.")
    lora_rank: int = option(0, "Train LoRA adapters of this rank (needs peft); 0 trains the model itself.")
    lora_alpha: float = option(16.0, "Scale of the LoRA adapters.")
    lora_dropout: float = option(0.0, "Dropout of the LoRA adapters.")
    lora_targets: list[str] = option(["all-linear"], "Modules that get LoRA adapters: names, or all-linear.")
    router_learning_rate: float | None = option(
        None, "Learning rate of the student's router. Default: that of the student."
    )
    resume: bool = option(False, "Continue from the last complete checkpoint in output_dir, if there is one.")
    limit: int | None = option(None, "Use only this many training examples, the first ones.")

    logging_steps: float = option(10, "Log after this many steps, or, below 1, after this fraction of all steps.")
    report_to: None | str | list[str] = option("none", "Trackers to report to, such as tensorboard.")
    remove_unused_columns: bool = option(False, "Must stay False: the batches are nested.")
    ddp_find_unused_parameters: bool | None = option(False, "For models with parameters that some batches do not use.")
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = option(
        {"use_reentrant": False}, "Keyword arguments of the checkpoint function."
    )

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # TrainingArguments refuses bf16 otherwise
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_options(self, beta=0, beta_mmi=0, beta_logits=0)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {self.alpha}")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, the batches are nested")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: expected 0, the losses are the paper's")

    @property
    def device(self) -> torch.device:
        """The device of this process; on a CPU always ``cpu``, since ``torch.load`` refuses ``cpu:0``."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device
