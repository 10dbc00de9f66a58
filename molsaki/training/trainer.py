"""``DistillTrainer``: transformers' ``Trainer`` around a :class:`~molsaki.training.distiller.Distiller`."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from molsaki import run_files
from molsaki.batches.batch import Batch
from molsaki.batches.dataset import DistillDataset
from molsaki.batches.sampler import ByLengthSampler
from molsaki.batches.streamed import StreamedDataset
from molsaki.config import EvaluateConfig
from molsaki.method.objectives import Objective
from molsaki.modeling.lm_head import label_logits
from molsaki.store.map_store import Store
from molsaki.teacher.teacher_maps import teacher_maps
from molsaki.training import checkpoints
from molsaki.training.accuracy import count_right
from molsaki.training.attention_share import AttentionShare
from molsaki.training.callbacks import LogBeforeSave, StartOfRun, StopIfBad
from molsaki.training.config import DistillConfig
from molsaki.training.data import TrainingData
from molsaki.training.distiller import Distiller
from molsaki.training.example_means import ExampleMeans
from molsaki.training.export import export, load_router
from molsaki.training.run_record import RunRecord
from molsaki.training.setup import Given, model_or_name, prepare, store_or_folder
from molsaki.training.stop_signal import StopOnSignal, keep_workers
from molsaki.training.watch import IdleLoss, LayerWeightPictures

logger = logging.getLogger(__name__)


class DistillTrainer(Trainer):
    """Trains a student. Its arguments are those of transformers' and TRL's trainers.

    Models, tokenizers, store and data that are not given are loaded as ``args`` say.

    Example:
        >>> args = DistillConfig(output_dir="run")
        >>> trainer = DistillTrainer("student", "teacher", args, train_dataset=rows)
        >>> trainer.train()
        >>> trainer.save_model()

    Args:
        model: the student, a causal language model, a PEFT model around one, or a folder or hub name.
        teacher_model: a white-box teacher, which runs live, or its folder or hub name; its parameters are frozen here.
        args: all options, Trainer's own included; `DistillConfig` with its defaults if None.
        train_dataset, eval_dataset: a :class:`~molsaki.batches.dataset.DistillDataset`, or a sequence of examples or of
            dicts such as a ``datasets.Dataset``; for evaluation also a dict of them by name. For training also rows
            without a length, such as a ``datasets.IterableDataset``, which are read in their order as they are needed.
        processing_class, teacher_processing_class: the fast tokenizers of both; loaded by the models' names if None.
        store: the teacher's stored maps, or their folder, instead of a live teacher.
        peft_config: a ``peft.PeftConfig`` whose adapters are added to the student and trained.
        **kwargs: of ``Trainer``: ``callbacks``, ``optimizer_cls_and_kwargs``, ``optimizers``. An optimizer must hold
            parameters of the student; those of the router are added to it.

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
        model: PreTrainedModel | str | None = None,
        teacher_model: PreTrainedModel | str | None = None,
        args: DistillConfig | None = None,
        train_dataset: DistillDataset | Sequence[Any] | Iterable[Any] | None = None,
        eval_dataset: DistillDataset | Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        store: Store | str | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        if args is not None and not isinstance(args, DistillConfig):
            raise TypeError(f"args: expected a DistillConfig, got {type(args).__name__}")
        config = DistillConfig() if args is None else copy.copy(args)  # names and the objective are written into it
        given = Given(
            student=model_or_name(model, "model", config, "student"),
            tokenizer=processing_class,
            teacher=model_or_name(teacher_model, "teacher_model", config, "teacher"),
            teacher_tokenizer=teacher_processing_class,
            store=store_or_folder(store, config),
            peft_config=peft_config,
        )
        if config.n_gpu > 1:
            raise ValueError(
                f"{config.n_gpu} GPUs are visible to this one process; start one process per GPU with "
                f"`torchrun --nproc_per_node {config.n_gpu}`, or choose one with CUDA_VISIBLE_DEVICES"
            )
        for name in ("model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: expected None: only the objective's losses are computed and kept")
        set_seed(config.seed)
        parts = prepare(config, given)

        self._data = TrainingData(config, parts.objective, parts.tokenization, parts.store)
        train_dataset, eval_dataset = self._data.for_training(train_dataset), self._data.for_evaluation(eval_dataset)
        self.objective, self.teacher = parts.objective, parts.teacher
        self._vocabulary = parts.vocabulary
        self._means = ExampleMeans()
        self._share = AttentionShare(config)
        unit = "head" if config.map_heads == "each" else "layer"
        learns_router = parts.mixture is not None and parts.mixture.router is not None
        self._idle = IdleLoss(learns_router, unit)
        self._is_in_checkpoint = False
        distiller: Any = Distiller(parts.student, parts.mixture, config)
        if (
            config.neftune_noise_alpha is not None
        ):  # only if set, since accelerate's FSDP would shard the embedding separately
            distiller.get_input_embeddings = parts.student.get_input_embeddings
        super().__init__(
            model=distiller,
            args=config,
            data_collator=parts.collator,  # type: ignore[arg-type]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=parts.tokenizer,
            **kwargs,
        )
        asked_for_fsdp = config.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if asked_for_fsdp and not self.is_fsdp_enabled:
            logger.warning("fsdp: accelerate shards on accelerators only; every process here holds the whole model")
        for names, value, why in (
            ("share_steps, attention_share", config.share_steps, "which shard the gradient"),
            ("eval_accuracy", config.eval_accuracy, "under which every process would have to decode the same text"),
        ):
            if value and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                raise ValueError(f"{names}: expected no FSDP and no DeepSpeed, {why}")
        self._complete_optimizer(*kwargs.get("optimizers", (None, None)))
        self._clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self._clip_apart
        self._stop_if_bad = StopIfBad(self.accelerator)
        self.add_callback(StartOfRun(self._folder, self._start))
        self.add_callback(LogBeforeSave())
        self.add_callback(self._stop_if_bad)
        self.add_callback(RunRecord(self._folder, self.train_dataset))
        if parts.mixture is not None:
            self.add_callback(
                LayerWeightPictures(self._folder / run_files.WEIGHTS_LOG, self.callback_handler.callbacks)
            )

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _start(self, state: TrainerState) -> None:
        """Forget the sums of an attempt that auto_find_batch_size abandoned."""
        self._means.clear()
        self._share.start(state)

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
        if self._share.is_due(self.state):
            self._share.measure(lambda: self._forward(self.model, inputs), self.model, self.accelerator)
        self.model.beta = self._share.beta_at(self.state)
        out = self._forward(model, inputs)
        loss = out["loss"].sum() * self.accelerator.num_processes / num_items_in_batch
        if not torch.isfinite(loss):
            self._stop_if_bad.message = self._save_bad(inputs, out)
            if self.accelerator.num_processes == 1:
                raise FloatingPointError(self._stop_if_bad.message)
        self._means.add(out)
        return (loss, out) if return_outputs else loss

    def prediction_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            out = self._forward(model, self._prepare_inputs(inputs))
        self._means.add({name: self.accelerator.gather_for_metrics(value.detach()) for name, value in out.items()})
        return out["loss"].mean(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        training, self._means = self._means, ExampleMeans()
        beta, self.model.beta = self.model.beta, self.args.beta  # so that eval_loss is comparable over the training
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.model.beta = beta
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = {f"{prefix}_{name}": value for name, value in self._means.take()[0].items()}
        self._means = training
        if self.args.eval_accuracy:
            loader = cast("DataLoader[Any]", args[0] if args else kwargs["dataloader"])
            metrics[f"{prefix}_accuracy"] = self._accuracy(cast(DistillDataset, loader.dataset))
        return output._replace(metrics=(output.metrics or {}) | metrics)

    def _accuracy(self, data: DistillDataset) -> float:
        """The share of right replies to the first ``eval_accuracy`` examples, divided among the processes."""
        config, accelerator = self.args, self.accelerator
        chosen = [data.examples[int(number)] for number in data.used[: config.eval_accuracy]]
        options = EvaluateConfig(
            mode=config.eval_accuracy_mode,
            template=config.student_template,
            predict_template=config.predict_template,
            thinking=2 * data.thinking > len(data),
            batch_size=config.per_device_eval_batch_size,
        )
        mine = chosen[config.process_index :: config.world_size]
        counts = count_right(self.model.student, self.processing_class, mine, options) if mine else (0, 0)
        right, asked = accelerator.reduce(torch.tensor(counts, device=accelerator.device), "sum").tolist()
        if asked == 0:
            raise ValueError(
                f"eval_accuracy: none of {len(chosen)} examples could be asked: with the reply, their questions are "
                "longer than the student's context, a template refuses them, or no reply can match their answers; "
                "expected others, or eval_accuracy_mode answer"
            )
        if asked < len(chosen) and self.is_world_process_zero():
            logger.warning(
                "eval_accuracy: computed on %d of %d examples; the others could not be asked", asked, len(chosen)
            )
        return float(right / asked)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._means:
            metrics, weights = self._means.take(lambda sums: self.accelerator.reduce(sums, "sum"))
            logs |= metrics | self._share.logs() | {"loss": logs["loss"]}
            if self.is_world_process_zero():
                self._idle.look(self.state.global_step, logs, weights.get("student"), self.args.beta)
            if weights and self.is_world_process_zero():
                with open(self._folder / run_files.WEIGHTS_LOG, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": self.state.global_step} | weights) + "\n")
        super().log(logs, *args, **kwargs)

    def _forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The distiller's forward on the batch with the teacher's part added."""
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
                inputs = live.model_inputs()
                maps = teacher_maps(teacher, plan=live.plan, map_heads=self.args.map_heads, **inputs)
                weights, mixed = mixture.teacher(maps, live.plan)
                batch = dataclasses.replace(batch, teacher_map=mixed, teacher_weights=weights)
            elif torch.equal(live.targets, batch.student[0].targets[: len(live.targets)]):
                with torch.no_grad():  # the logits may have more rows than the tokenizer has tokens
                    logits = label_logits(teacher, live)[:, : self._vocabulary]
                batch = dataclasses.replace(batch, teacher_logits=logits)
            else:
                raise ValueError(
                    f"objective: {self.args.objective} needs the same tokens on both sides; expected equal labels, but "
                    "the two templates give different ones"
                )
        if self.model.training and self.is_world_process_zero():
            self._idle.add_maps(batch, self.args)
        if self.args.control == "other_example" and batch.teacher_map is not None:
            batch = batch.with_other_maps()
        return cast(dict[str, Tensor], model(dataclasses.replace(batch, teacher=None, teacher_layers=None)))

    def _save_bad(self, batch: Batch, out: dict[str, Tensor]) -> str:
        """Save the batch whose loss is not finite and return the error message."""
        path = self._folder / f"bad_batch_step{self.state.global_step}_rank{self.args.process_index}.pt"
        torch.save({"inputs": batch, "losses": out}, path)
        bad = [example for example, loss in zip(batch.ids, out["loss"], strict=True) if not torch.isfinite(loss)]
        return (
            f"the loss is not finite after step {self.state.global_step}, on example(s) {', '.join(bad)}; the batch is "
            f"saved as {path}. The last checkpoint is intact; a lower learning rate or fp32 may help"
        )

    def _complete_optimizer(self, optimizer: torch.optim.Optimizer | None, scheduler: Any) -> None:
        """Add the router to an optimizer that the caller has built; refuse one that would not train the student."""
        if optimizer is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self.model.student.parameters() if p.requires_grad):
            raise ValueError(
                "optimizers: the optimizer holds no parameter of the student that is trained, such as its LoRA "
                "adapters; give optimizer_cls_and_kwargs instead"
            )
        router = [p for p in self.model.parameters() if self._is_router(p) and id(p) not in held]
        if router and scheduler is not None:
            raise ValueError(
                "optimizers: the router's parameters cannot join an optimizer that has a scheduler already; give "
                "(optimizer, None) with lr_scheduler_type, or optimizer_cls_and_kwargs"
            )
        if router:
            rate = self.args.router_learning_rate
            optimizer.add_param_group({"params": router} | ({} if rate is None else {"lr": rate}))

    def _is_router(self, parameter: nn.Parameter) -> bool:
        mixture = self.model.mixture
        return mixture is not None and any(parameter is p for p in mixture.parameters())

    def _clip_apart(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2) -> Any:
        """Clip the student's gradient by its own norm, which is returned, and the router's by its own.

        DeepSpeed and the first FSDP, which keep both in one flat tensor, clip them together.
        """
        parameters = list(parameters)
        router = [p for p in parameters if self._is_router(p)]
        student = [p for p in parameters if not self._is_router(p)]
        is_flat = self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2)
        norm = self._clip(parameters if is_flat else student, max_norm, norm_type)  # unscales fp16's gradients, all
        if not is_flat and any(p.grad is not None for p in router):
            nn.utils.clip_grad_norm_(router, max_norm, norm_type)
        return norm

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = keep_workers(super().get_train_dataloader())
        if isinstance(self.train_dataset, StreamedDataset):
            return loader
        if len(loader) == 0:
            raise ValueError(
                f"dataloader_drop_last: expected at least one whole batch, got {len(cast(Any, self.train_dataset))} "
                f"examples and {self._train_batch_size} per batch on {self.args.world_size} process(es)"
            )
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in ``Trainer``, also for examples and dicts. No batch is dropped: every example counts once."""
        if not isinstance(eval_dataset, str):
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)  # it may be of another data set
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            if eval_dataset is not None and not isinstance(eval_dataset, str):
                eval_dataset = self._data.whole(eval_dataset, "eval_dataset")
            return keep_workers(super().get_eval_dataloader(eval_dataset))
        finally:
            self.args.dataloader_drop_last = drop

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        return self.get_eval_dataloader(test_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args, dataset = self.args, cast(Any, self.train_dataset if train_dataset is None else train_dataset)
        strategy = getattr(args, "train_sampling_strategy", None)  # transformers 4: group_by_length
        if strategy != "group_by_length" and not getattr(args, "group_by_length", False):
            return super()._get_train_sampler(dataset)
        return ByLengthSampler(
            args.train_batch_size * args.gradient_accumulation_steps,
            lengths=dataset.lengths.tolist(),
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.router_learning_rate is not None and self.model.mixture is not None:
            for group in list(optimizer.param_groups):
                taken = [p for p in group["params"] if self._is_router(p)]
                group["params"] = [p for p in group["params"] if not self._is_router(p)]
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
        elif not resume and run_files.checkpoints(self._folder):
            raise ValueError(
                f"output_dir: {self._folder} holds the checkpoints of another run; continue it with --resume, or "
                "choose another folder"
            )
        if resume and not any(Path(str(resume)).glob("rng_state*.pth")):
            raise ValueError(f"resume_from_checkpoint: {resume} was saved with save_only_model: it has no optimizer")
        if self.is_world_process_zero():
            step = run_files.step_of(resume) if resume else 0
            checkpoints.cut_weights_log(self._folder / run_files.WEIGHTS_LOG, step)
        return super().train(resume or None, **kwargs)

    def end_training(self) -> None:
        """Free the student's DDP wrapper, then leave the process group.

        Call it last, after ``save_model()``, in place of ``trainer.accelerator.end_training()``, and keep no reference
        of your own to ``trainer.model_wrapped``. If the group is destroyed first, the process can wait forever:
        freeing DDP then waits, holding Python's lock, for a thread of gloo that needs this lock (seen with torch
        2.13). ``trainer.model`` stays usable, except under FSDP and DeepSpeed. In an ``except`` block, the exception's
        frames, which hold the wrapped model, lose their local variables.
        """
        error = sys.exc_info()[1]
        if error is not None:
            traceback.clear_frames(error.__traceback__)
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()  # free_memory collects before it drops its own references
        self.accelerator.end_training()

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """As ``Trainer``'s, which saves after an evaluation only the best with save_strategy best, or when stopping."""
        is_best = bool(super()._determine_best_metric(*args, **kwargs))
        stops = [one for one in self.callback_handler.callbacks if isinstance(one, StopOnSignal)]
        return is_best or any(one.is_stopping for one in stops)

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
            best = self.state.best_model_checkpoint
            for old in run_files.checkpoints(folder)[limit:] if limit else []:
                if best is None or not os.path.samefile(old, best):
                    shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        options = json.loads(self.args.to_json_string())  # type: ignore[no-untyped-call]
        options["thinking"] = self._data.mostly_thinks
        folder = Path(output_dir or self._folder)
        export(folder, self.model, self.processing_class, options, self._is_in_checkpoint, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, self.model.student)
        mixture = self.model.mixture
        if mixture is not None and mixture.state_dict():
            load_router(resume_from_checkpoint, mixture, self.args.teacher_layers)

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
            raise ValueError(
                f"resume_from_checkpoint: the checkpoint belongs to another student: it lacks {lacking[:3]} and also "
                f"has {extra[:3]}; use the student and the LoRA options of that run, or another output_dir"
            )
