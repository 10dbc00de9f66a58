"""``DistillTrainer``: transformers' ``Trainer`` around a :class:`~molsaki.training.distiller.Distiller`."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from molsaki.batches.batch import Batch
from molsaki.batches.collator import Collator
from molsaki.batches.dataset import DistillDataset, prepare
from molsaki.batches.tokenized import TokenizerSpec
from molsaki.config import require
from molsaki.modeling.attention_hook import NAME
from molsaki.modeling.lm_head import label_logits
from molsaki.modeling.loading import context_length, load_both
from molsaki.modeling.packing_probe import can_pack, can_share_prefix, choose_packing
from molsaki.teacher.fingerprints import describe
from molsaki.teacher.map_store import Store
from molsaki.teacher.teacher_maps import mixture_of, probe, teacher_maps
from molsaki.text.examples import Example, read_examples
from molsaki.training import checkpoints
from molsaki.training.config import DistillConfig
from molsaki.training.distiller import Distiller
from molsaki.training.objectives import OBJECTIVES, Objective
from molsaki.training.trainable import add_lora, freeze

logger = logging.getLogger(__name__)


class DistillTrainer(Trainer):
    """Trains a student. Models, tokenizers, store and data that are not given are loaded as the config says.

    Example:
        >>> config = DistillConfig(student="student", teacher="teacher", train_file="train.jsonl", output_dir="run")
        >>> trainer = DistillTrainer(config)
        >>> trainer.train()
        >>> trainer.save_model()

    Args:
        config: all options, Trainer's own included.
        student, tokenizer: a causal language model and its fast tokenizer.
        teacher, teacher_tokenizer: a white-box teacher, which runs live; its parameters are frozen here.
        store: the teacher's stored maps, instead of a live teacher.
        train_dataset, eval_dataset: a :class:`~molsaki.batches.dataset.DistillDataset`, or a sequence of examples.
        **kwargs: of ``Trainer``: callbacks, optimizers, ...

    Raises:
        ValueError, TypeError, OSError: an argument is missing, of the wrong type or does not fit the others.
    """

    args: DistillConfig
    model: Distiller
    processing_class: PreTrainedTokenizerBase
    objective: Objective
    teacher: PreTrainedModel | None

    def __init__(
        self,
        config: DistillConfig,
        student: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        teacher: PreTrainedModel | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        store: Store | None = None,
        train_dataset: DistillDataset | Sequence[Example] | None = None,
        eval_dataset: DistillDataset | Sequence[Example] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(config, DistillConfig):
            raise TypeError(f"config: expected a DistillConfig, got {type(config).__name__}")
        if config.n_gpu > 1:
            raise ValueError(
                f"{config.n_gpu} GPUs are visible to this one process; start one process per GPU with "
                f"`torchrun --nproc_per_node {config.n_gpu}`, or choose one with CUDA_VISIBLE_DEVICES"
            )
        set_seed(config.seed)
        if config.deepspeed:  # models are loaded whole and probed before ZeRO-3 shards them
            unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        objective = OBJECTIVES[config.objective]
        if config.share_question and (config.packing is False or not objective.explain_texts):
            raise ValueError(
                "share_question: expected packing and an objective of both tasks, got "
                f"packing={config.packing} and objective={config.objective}"
            )
        student, tokenizer = load_both(student, tokenizer, config.student, "--student", config.student_dtype)
        if config.lora_rank:
            student = add_lora(student, config)
        freeze(student, config.freeze)
        limit = config.max_length or context_length(student.config)
        student_spec, teacher_spec = TokenizerSpec(tokenizer, config.student_template, limit), None
        if not objective.has_teacher:
            teacher = None
        elif store is None and config.store is not None:
            store = Store(config.store)
        if objective.has_teacher and (store is None or teacher is not None or config.teacher is not None):
            teacher, teacher_tokenizer = load_both(
                teacher, teacher_tokenizer, config.teacher, "--teacher", config.teacher_dtype
            )
            limit = config.teacher_max_length or context_length(teacher.config)
            teacher_spec = TokenizerSpec(teacher_tokenizer, config.teacher_template, limit)
        if objective.teacher_logits:
            _check_vocabulary(config.objective, store, tokenizer, teacher_tokenizer)

        packing = choose_packing(config.packing, student)
        sharing = (
            objective.explain_texts and packing and config.share_question is not False and can_share_prefix(student)
        )
        if config.share_question and not sharing:
            raise ValueError(
                f"--share_question: {type(student).__name__} gives other results if the shared prefix is not computed "
                "again; use --share_question false"
            )
        mixture = None
        if objective.maps or packing:
            student.set_attn_implementation(NAME)
        if objective.maps:
            student_layers, width = probe(student, config.value_heads)
            if store is not None:
                store.check(describe(config, store.num_layers, store.all_layers, student_layers, teacher, teacher_spec))
                teacher = None
            teacher_layers = store.num_layers if store is not None else probe(cast(PreTrainedModel, teacher))[0]
            mixture = mixture_of(config, teacher_layers, student_layers, width)
        teacher_packing = packing and teacher is not None and can_pack(teacher)
        if teacher is not None:
            teacher.to(config.device).eval().requires_grad_(False)  # type: ignore[arg-type]
            if objective.maps or teacher_packing:
                teacher.set_attn_implementation(NAME)
        if config.deepspeed:
            set_hf_deepspeed_config(config.hf_deepspeed_config)  # type: ignore[no-untyped-call]

        def prepared(
            data: DistillDataset | Sequence[Example] | None, path: str | None, limit: int | None
        ) -> DistillDataset | None:
            if data is None and path is not None:
                data = read_examples(path)[:limit]
            if data is None or isinstance(data, DistillDataset):
                return data
            data = prepare(data, config, student_spec, teacher_spec, config.predict_template, store)
            logger.info("%s: %s", path, data.summary())
            return data

        self.objective, self.teacher = objective, teacher
        self._sums: dict[str, Tensor] = {}
        self._bad_batch: str | None = None
        self._is_in_checkpoint = False
        super().__init__(
            model=Distiller(student, mixture, config),
            args=config,
            data_collator=Collator(  # type: ignore[arg-type]
                student_pad=tokenizer.pad_token_id,
                teacher_pad=0 if teacher_spec is None else teacher_spec.tokenizer.pad_token_id,
                packing=packing,
                teacher_packing=teacher_packing,
                explain=objective.explain_texts,
                share_question=sharing,
            ),
            train_dataset=prepared(train_dataset, config.train_file, config.limit),
            eval_dataset=prepared(eval_dataset, config.eval_file, None),
            processing_class=tokenizer,
            **kwargs,
        )
        asked_for_fsdp = config.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if asked_for_fsdp and not self.is_fsdp_enabled:
            logger.warning("fsdp: accelerate shards on accelerators only; every process here holds the whole model")
        self.add_callback(_LogBeforeSave())
        self.add_callback(_StopIfBad(self))

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # type: ignore[override]
        return inputs.to(self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor:
        """The number of examples of one optimizer step, over accumulation and processes; each counts once."""
        count = torch.tensor(sum(len(batch) for batch in batch_samples), device=device)
        return cast(Tensor, self.accelerator.reduce(count, "sum"))

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This process's share of the mean loss over all examples of the optimizer step."""
        out = self._forward(model, inputs)
        loss = out["loss"].sum() * self.accelerator.num_processes / num_items_in_batch
        if not torch.isfinite(loss):
            self._bad_batch = self._save_bad(inputs, out)
            if self.accelerator.num_processes == 1:
                raise FloatingPointError(self._bad_batch)
        self._add(out)
        return (loss, out) if return_outputs else loss

    def prediction_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            out = self._forward(model, self._prepare_inputs(inputs))
        self._add({name: self.accelerator.gather_for_metrics(value.detach()) for name, value in out.items()})
        return out["loss"].mean(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        training, self._sums = self._sums, {}
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {f"{prefix}_{name}": value for name, value in _means(self._sums)[0].items()}
        self._sums = training
        return output._replace(metrics=(output.metrics or {}) | metrics)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums:
            metrics, weights = _means(self.accelerator.reduce(self._sums, "sum"))
            self._sums = {}
            logs |= metrics | {"loss": logs["loss"]}
            if weights and self.is_world_process_zero():
                with open(self._folder / checkpoints.WEIGHTS_LOG, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": self.state.global_step} | weights) + "\n")
        super().log(logs, *args, **kwargs)

    def _forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The distiller's forward, after what the teacher has to add to the batch."""
        mixture, teacher, live = self.model.mixture, self.teacher, batch.teacher
        if mixture is not None and batch.teacher_layers is not None:
            weights, mixed = mixture.teacher(batch.teacher_layers.float(), batch.plan)
            batch = dataclasses.replace(batch, teacher_map=mixed, teacher_weights=weights)
        elif self.objective.has_teacher and batch.teacher_map is None:
            if teacher is None or live is None or live.plan is None:
                raise ValueError(
                    "train_dataset, eval_dataset: expected the teacher's stored maps or tokens, got neither; "
                    "prepare the data set with store or with teacher"
                )
            if mixture is not None:
                maps = teacher_maps(teacher, plan=live.plan, **live.model_inputs())
                weights, mixed = mixture.teacher(maps, live.plan)
                batch = dataclasses.replace(batch, teacher_map=mixed, teacher_weights=weights)
            elif torch.equal(live.targets, batch.student[0].targets[: len(live.targets)]):
                with torch.no_grad():
                    batch = dataclasses.replace(batch, teacher_logits=label_logits(teacher, live))
            else:
                raise ValueError(
                    f"objective: {self.args.objective} needs the same tokens on both sides; expected equal labels, but "
                    "the two templates give different ones"
                )
        return cast(dict[str, Tensor], model(dataclasses.replace(batch, teacher=None, teacher_layers=None)))

    def _add(self, out: dict[str, Tensor]) -> None:
        for name, value in (out | {"count": torch.ones_like(out["loss"])}).items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double().sum(0)

    def _save_bad(self, batch: Batch, out: dict[str, Tensor]) -> str:
        """Save the batch whose loss is not finite; the error message."""
        path = self._folder / f"bad_batch_step{self.state.global_step}_rank{self.args.process_index}.pt"
        torch.save({"inputs": batch, "losses": out}, path)
        bad = [example for example, loss in zip(batch.ids, out["loss"], strict=True) if not torch.isfinite(loss)]
        return (
            f"the loss is not finite after step {self.state.global_step}, on example(s) {', '.join(bad)}; the batch is "
            f"saved as {path}. The last checkpoint is intact; a lower learning rate or fp32 may help"
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.router_learning_rate is not None and self.model.mixture is not None:
            router = set(self.model.mixture.parameters())
            for group in list(optimizer.param_groups):
                taken = [p for p in group["params"] if p in router]
                group["params"] = [p for p in group["params"] if p not in router]
                if taken:
                    optimizer.add_param_group({**group, "params": taken, "lr": self.args.router_learning_rate})
        return optimizer

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """As ``Trainer.train``, but True (or ``config.resume``) means the last complete checkpoint, if there is one.

        Raises:
            ValueError: ``output_dir`` holds checkpoints already and this does not continue them.
            FloatingPointError: the loss is not finite; the batch is saved first.
        """
        resume = resume_from_checkpoint
        if resume is None:
            resume = self.args.resume_from_checkpoint or self.args.resume
        if resume is True:
            resume = checkpoints.last_checkpoint(self._folder)
        elif not resume and checkpoints.checkpoints(self._folder):
            raise ValueError(
                f"output_dir: {self._folder} holds the checkpoints of another run; continue it with --resume, or "
                "choose another folder"
            )
        if self.is_world_process_zero():
            step = checkpoints.step_of(resume) if resume else 0
            checkpoints.cut_weights_log(self._folder / checkpoints.WEIGHTS_LOG, step)
        return super().train(resume or None, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # old ones go after this one is sealed
        self._is_in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._is_in_checkpoint = limit, False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial))
            checkpoints.seal(folder / f"checkpoint-{self.state.global_step}")
            for old in checkpoints.checkpoints(folder)[limit:] if limit else []:
                if str(old) != self.state.best_model_checkpoint:
                    shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the student, its tokenizer and, into a checkpoint, the router; each file is complete or absent."""
        folder = Path(output_dir or self._folder)
        folder.mkdir(parents=True, exist_ok=True)
        student, mixture, weights = self.model.student, self.model.mixture, None
        router: dict[str, Tensor] = {}
        if state_dict is not None:  # gathered from shards, where tied weights appear twice
            twice = {name for name, _ in student.named_parameters(remove_duplicate=False)}
            twice -= {name for name, _ in student.named_parameters()}
            weights = {name: w for name, w in _part(state_dict, "student.").items() if name not in twice}
        if self._is_in_checkpoint and mixture is not None:
            router = mixture.state_dict() if state_dict is None else _part(state_dict, "mixture.")
        if not self._is_in_checkpoint and self.args.lora_rank:
            student, weights = cast(Any, copy.deepcopy(student)).merge_and_unload(), None
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
            student.save_pretrained(part, state_dict=weights)
            self.processing_class.save_pretrained(part)
            options = self.args.to_json_string()  # type: ignore[no-untyped-call]
            Path(part, checkpoints.CONFIG).write_text(options, encoding="utf-8")
            if router:
                save_file({name: value.contiguous() for name, value in router.items()}, Path(part, checkpoints.ROUTER))
            for path in Path(part).iterdir():
                os.replace(path, folder / path.name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, self.model.student)
        mixture = self.model.mixture
        if mixture is not None and mixture.state_dict():
            mixture.load_state_dict(load_file(Path(resume_from_checkpoint, checkpoints.ROUTER)))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks weights, except those tied to a loaded one."""
        named, missing = dict(self.model.student.named_parameters(remove_duplicate=False)), load_result.missing_keys
        loaded = {id(value) for name, value in named.items() if name not in missing}
        lacking = sorted(name for name in missing if name not in named or id(named[name]) not in loaded)
        extra = sorted(load_result.unexpected_keys)
        if lacking or extra:
            raise ValueError(f"the checkpoint is of another student: it lacks {lacking[:3]} and also has {extra[:3]}")


class _LogBeforeSave(TrainerCallback):
    """Logs at every step that saves, so that a resumed run averages its metrics over the same steps."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


class _StopIfBad(TrainerCallback):
    """Before the weights change, stops all processes if the loss of one was not finite."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        message, accelerator = self.trainer._bad_batch, self.trainer.accelerator
        bad = torch.tensor(float(message is not None), device=accelerator.device)
        if accelerator.num_processes > 1 and accelerator.reduce(bad, "sum") > 0:
            elsewhere = f"the loss of another process is not finite after step {state.global_step}"
            raise FloatingPointError(message or elsewhere)


def distill(config: DistillConfig) -> dict[str, Any]:
    """Train as the config says, and export the student to ``config.output_dir``.

    Returns:
        The trainer's metrics: ``train_runtime``, ``train_loss``, ...
    """
    require(config, "train_file")
    trainer = DistillTrainer(config)
    metrics = trainer.train().metrics
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.end_training()
    return metrics | {"student": config.output_dir}


def _means(sums: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics as means over examples (``without_words``: their number), and the layer weights of both sides."""
    means = {name: value / sums["count"] for name, value in sums.items() if name != "count"}
    weights = {name.removesuffix("_weights"): value.tolist() for name, value in means.items() if value.ndim == 1}
    metrics = {name: value.item() for name, value in means.items() if value.ndim == 0}
    return metrics | {"without_words": int(sums["without_words"])}, weights


def _part(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def _check_vocabulary(
    objective: str, store: Store | None, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None
) -> None:
    if store is not None or teacher is None:
        raise ValueError(f"objective: {objective} needs a live teacher; the store holds maps, not logits")
    if student.get_vocab() != teacher.get_vocab():
        raise ValueError(
            f"objective: {objective} needs one vocabulary; the teacher's has {len(teacher)} tokens and the student's "
            f"{len(student)}, and they differ"
        )
