"""The options of ``molsaki distill``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from molsaki.config.options import (
    COT_TEMPLATE,
    DATA_FILES,
    PREDICT_HELP,
    PREDICT_TEMPLATE,
    DataOptions,
    Dtype,
    MixtureOptions,
    TextOptions,
    option,
)
from molsaki.method.objectives import OBJECTIVES


@dataclasses.dataclass
class DistillOptions(DataOptions, TextOptions, MixtureOptions):
    """``molsaki distill``: train a student. Besides these, it takes every option of transformers' TrainingArguments."""

    student: str | None = option(None, "Folder or hub name of the student.")
    teacher: str | None = option(None, "Folder or hub name of the white-box teacher, to run it live.")
    store: str | None = option(None, "Folder of the teacher's stored maps, instead of a live teacher.")
    train_file: list[str] = option([], f"File with id, question, rationale and answer, or several: {DATA_FILES}.")
    eval_file: list[str] = option([], "File, or several, whose losses are computed with eval_strategy steps or epoch.")
    streaming: bool = option(
        False,
        "Read the training data in order while training, instead of once before it. Needs max_steps; examples are not "
        "shuffled.",
    )
    eval_accuracy: int = option(
        0,
        "Also decode replies to the first N examples of the evaluation data and log the share of right ones as "
        "eval_accuracy; --metric_for_best_model accuracy chooses the checkpoint by it. 0: none.",
    )
    eval_accuracy_mode: Literal["answer", "rationale"] = option(
        "answer", "The reply requested for eval_accuracy: the answer alone, or a rationale that ends in it."
    )
    objective: str | None = option(
        None,
        "The loss: "
        + "; ".join(f"{name} = {one.help}" for name, one in OBJECTIVES.items())
        + "; module:name = your own Objective. Default: molsaki if there is a teacher or a store, else dss. The "
        "attention loss was not clearly better than dss in docs/evidence.md.",
    )
    alpha: float = option(0.5, "Weight of the answer's cross-entropy; the rationale's has 1 - alpha (Eq. 7).")
    beta: float = option(1.0, "Weight of the attention loss (Eq. 7).")
    beta_until: float = option(
        1.0, "The fraction of the training, 0 to 1, after which the weight of the attention loss is 0."
    )
    attention_share: float | None = option(
        None,
        "Change beta during training so that the norm of the attention loss's gradient is this share of the norm of "
        "the other losses' gradient (in the student's weights), such as 0.1. beta is then the weight before the first "
        "measurement, and the weight in eval_loss.",
    )
    share_steps: int = option(
        0, "Number of steps between measurements of that share, which is logged; 0: never, or 20 with attention_share."
    )
    beta_mmi: float = option(0.1, "objective=mmi: weight of the cross-entropy between the two tasks' predictions.")
    beta_logits: float = option(0.3, "objective=logits: weight of the divergence from the teacher's logits.")
    temperature: float = option(2.0, "objective=logits: temperature that softens both models' logits.")
    normalise: Literal["softmax", "sum"] = option(
        "softmax", "How each row of a map becomes a distribution over words (Eq. 6)."
    )
    causal_words: bool = option(False, "Leave out of each row of a map the words after the last token of its step.")
    map_steps: Literal["all", "rationale"] = option(
        "all", "The rows of a map in the attention loss: all steps, or those of the rationale only."
    )
    teacher_temperature: float = option(
        1.0, "Temperature of each row of the teacher's map; below 1 it sharpens the row."
    )
    control: Literal["none", "other_example"] = option(
        "none", "A control: each example gets the teacher's map of another example of its batch (other_example)."
    )
    predict_template: str = option(PREDICT_TEMPLATE, PREDICT_HELP)
    cot_template: str = option(
        COT_TEMPLATE, "objective=cot: the text after the question, with {rationale} and then {answer}."
    )
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

    logging_steps: float = option(10, "Number of steps between log entries; below 1, a fraction of all steps.")
    report_to: None | str | list[str] = option("none", "Trackers to report to, such as tensorboard.")
    remove_unused_columns: bool = option(False, "Must stay False: the batches are nested.")
    ddp_find_unused_parameters: bool | None = option(False, "For models with parameters that some batches do not use.")
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = option(
        {"use_reentrant": False}, "Keyword arguments of the checkpoint function."
    )
