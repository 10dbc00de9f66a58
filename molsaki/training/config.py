"""`DistillConfig`: all options of ``molsaki distill``, checked."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any, cast

import torch
from transformers import TrainingArguments

from molsaki.config import DistillOptions, MixtureOptions, check_options
from molsaki.extras import require
from molsaki.method.objectives import objective_of

logger = logging.getLogger(__name__)

# Options of TrainingArguments that must keep their default, with the reason. See docs/training-options.md.
_NO_METRICS = "only losses are evaluated; molsaki evaluate scores replies"
_NO_HUB = "nothing is uploaded during training; use `hf upload REPO OUTPUT_DIR` after it"
_NO_APEX = "mixed precision is PyTorch's own; use --bf16 or --fp16"
_NO_SEARCH = "there is no hyperparameter search"
REFUSED = {
    "label_smoothing_factor": "the losses are the paper's",
    "remove_unused_columns": "the batches are nested",
    "label_names": "the collator makes the labels",
    "length_column_name": "group_by_length knows the lengths",
    "parallelism_config": "each process needs whole texts and a whole model; use DDP, FSDP or DeepSpeed",
    "use_liger_kernel": "it would not reach the student; use --fused_cross_entropy liger",
    "liger_kernel_config": "it would not reach the student; use --fused_cross_entropy liger",
    "do_predict": "use molsaki evaluate",
    "include_for_metrics": _NO_METRICS,
    "include_inputs_for_metrics": _NO_METRICS,
    "batch_eval_metrics": _NO_METRICS,
    "eval_do_concat_batches": _NO_METRICS,
    "eval_use_gather_object": _NO_METRICS,
    "push_to_hub": _NO_HUB,
    "hub_token": _NO_HUB,
    "hub_private_repo": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "hub_always_push": _NO_HUB,
    "hub_revision": _NO_HUB,
    "push_to_hub_model_id": _NO_HUB,
    "push_to_hub_organization": _NO_HUB,
    "push_to_hub_token": _NO_HUB,
    "overwrite_output_dir": "use --resume to continue, or another folder",
    "save_safetensors": "weights are always saved as safetensors",
    "past_index": "the losses use no past state",
    "use_legacy_prediction_loop": "the losses are averaged in the other loop",
    "jit_mode_eval": "use --torch_compile",
    "torchdynamo": "use --torch_compile",
    "half_precision_backend": _NO_APEX,
    "fp16_backend": _NO_APEX,
    "fp16_opt_level": _NO_APEX,
    "tpu_num_cores": "TPUs are not supported",
    "tpu_metrics_debug": "TPUs are not supported",
    "mp_parameters": "SageMaker's model parallelism is not supported; use FSDP",
    "ray_scope": _NO_SEARCH,
}

# Options that only the attention loss reads, besides those of the mixture.
OF_ATTENTION = (
    "beta", "beta_until", "attention_share", "share_steps", "normalise", "causal_words", "map_steps",
    "teacher_temperature", "control",
)  # fmt: skip


@dataclasses.dataclass
class DistillConfig(DistillOptions, TrainingArguments):
    """``molsaki distill``: train a student. The options of transformers' ``TrainingArguments``, and ours."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            default = [] if field.default is dataclasses.MISSING else field.default
            if field.name in REFUSED and (value := getattr(self, field.name)) != default:
                raise ValueError(f"{field.name}: expected {default}, got {value!r}: {REFUSED[field.name]}")
        for name in ("train_file", "eval_file"):  # one name alone is a list of it
            value = getattr(self, name) or []
            setattr(self, name, list(map(os.fspath, [value] if isinstance(value, (str, os.PathLike)) else value)))
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # otherwise TrainingArguments refuses bf16
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_options(self, beta=0, beta_mmi=0, beta_logits=0, share_steps=0, eval_accuracy=0)
        self._check_inherited()
        self._check_trackers()
        self._check_attention()
        if self.teacher is not None or self.store is not None:
            self.choose_objective(has_teacher=True)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {self.alpha}")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")

    def _check_trackers(self) -> None:
        """Refuse a tracker that is not installed; the Trainer would detect it only after loading the models."""
        from transformers.integrations.integration_utils import get_reporting_integration_callbacks

        try:
            for callback in get_reporting_integration_callbacks(self.report_to):  # type: ignore[no-untyped-call]
                callback()
        except (RuntimeError, ValueError) as error:
            if "tensorboard" in (self.report_to or ()):
                require("train", "tensorboard", by="report_to: tensorboard")
            raise ValueError(f"report_to: {error}") from error

    def choose_objective(self, has_teacher: bool) -> str:
        """The objective. If it is not given, it is set: molsaki if there is a teacher or its maps, else dss.

        Raises:
            ValueError: there is no teacher, but an option of the attention loss differs from its default.
        """
        if self.objective is None and has_teacher:
            self.objective = "molsaki"
        elif self.objective is None:
            fields = {field.name: field for field in dataclasses.fields(self)}
            for name in (*(field.name for field in dataclasses.fields(MixtureOptions)), *OF_ATTENTION):
                default = [] if fields[name].default is dataclasses.MISSING else fields[name].default
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}: an option of the attention loss, which needs a teacher; expected --teacher, --store, "
                        "or --objective dss"
                    )
            if self.process_index == 0:
                logger.warning("objective: dss, answer and rationale alone, since there is no teacher and no store")
            self.objective = "dss"
        return self.objective

    def _check_attention(self) -> None:
        """Refuse invalid options of the attention loss."""
        for name in ("teacher_temperature", "attention_share"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 0 <= self.beta_until <= 1:
            raise ValueError(f"beta_until: expected a fraction of the training, from 0 to 1, got {self.beta_until}")
        if "{rationale}" not in self.cot_template.partition("{answer}")[0] or "{answer}" not in self.cot_template:
            raise ValueError(
                f"cot_template: expected a text with {{rationale}} and then {{answer}}, got {self.cot_template!r}"
            )
        sizes = (self.per_device_train_batch_size, self.per_device_eval_batch_size)
        if self.control == "other_example" and (min(sizes) < 2 or self.auto_find_batch_size):
            raise ValueError(
                "control: other_example needs another example in the batch; expected per_device_train_batch_size and "
                f"per_device_eval_batch_size of at least 2, and no auto_find_batch_size; got {sizes[0]} and {sizes[1]}"
            )
        if self.attention_share is not None and self.share_steps == 0:
            self.share_steps = 20
        if self.share_steps and self.objective is not None and not objective_of(self.objective).attention_loss:
            raise ValueError(
                f"share_steps, attention_share: expected an objective with attention_loss, such as molsaki, got "
                f"{self.objective}, which has none"
            )
        for name, why in (("deepspeed", "it shards"), ("fsdp", "it shards"), ("torch_compile", "it compiles"),
                          ("fp16", "it scales")):  # fmt: skip
            if self.share_steps and getattr(self, name):
                raise ValueError(
                    f"share_steps, attention_share: expected no {name}: a gradient that {why} is not measured"
                )

    def _check_inherited(self) -> None:
        """Refuse unsupported values of inherited options other than those in `REFUSED`."""
        if self.neftune_noise_alpha is not None:
            if self.packing:
                raise ValueError(
                    "neftune_noise_alpha: expected packing=False, got packing=True: the noise is scaled by the length "
                    "of a text, which a packed batch does not have"
                )
            self.packing = False
        checkpointing = cast(dict[str, Any], self.gradient_checkpointing_kwargs or {})
        if checkpointing.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs: expected use_reentrant False, got True: the maps would have no gradient"
            )
        self.gradient_checkpointing_kwargs = checkpointing | {"use_reentrant": False}
        if cast(Any, self.accelerator_config).dispatch_batches:
            raise ValueError(
                "accelerator_config: expected dispatch_batches False, got True: the batches are nested; every process "
                "reads its own"
            )
        if not self.average_tokens_across_devices and self.world_size > 1:
            raise ValueError(
                "average_tokens_across_devices: expected True, got False: each example counts once over all processes"
            )
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16: expected a GPU, got a CPU, where it has no effect; use --bf16")
        sampling = getattr(self, "train_sampling_strategy", "random")  # transformers 4 has group_by_length
        if sampling == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy: expected random, sequential or group_by_length, got 'batch_rebalance'"
            )
        optimizer = str(cast(Any, self.optim).value)
        if "lomo" in optimizer or optimizer.endswith("layerwise"):
            raise ValueError(
                f"optim: {optimizer} changes weights within the backward, before gradients are accumulated, clipped "
                "and checked; use another optimizer"
            )
        if self.do_eval and self.eval_strategy == "no":
            raise ValueError("do_eval: got True with eval_strategy no; use --eval_strategy steps or epoch")
        if self.save_only_model and self.resume:
            raise ValueError("resume: checkpoints of save_only_model hold no optimizer to continue with")

    @property
    def device(self) -> torch.device:
        """The device of this process; on a CPU always ``cpu``, since ``torch.load`` refuses ``cpu:0``."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device
