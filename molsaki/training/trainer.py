"""``DistillTrainer``: transformers' ``Trainer`` around a :class:`Distiller`, the student and its router in one module.

A checkpoint is a Hugging Face folder of the student (or of its LoRA adapter) plus ``router.safetensors``, and
``sealed.json``, which is written last and holds a checksum of every other file. The exported student has neither.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from molsaki.batches.data import Collator, DistillDataset, Example, Side, prepare, read_examples
from molsaki.config import DistillConfig, require
from molsaki.modeling.forward import Head, can_branch, can_pack, causal_model, label_logits, model_inputs, use_fused
from molsaki.modeling.hooks import NAME, Record, capture
from molsaki.modeling.loading import check_tokenizer, context_length, load_model, load_tokenizer
from molsaki.teacher.extract import describe, mixture_of, probe, teacher_maps
from molsaki.teacher.store import Store
from molsaki.training import losses
from molsaki.training.mixture import MixtureOfLayers
from molsaki_kernels import StepPlan

logger = logging.getLogger(__name__)

ROUTER, SEAL, WEIGHTS_LOG, CONFIG = "router.safetensors", "sealed.json", "layer_weights.jsonl", "distill.json"
SIDES = ("teacher", "student")


class Distiller(nn.Module):
    """The student and, for ``objective="molsaki"``, the mixture with its router; the forward computes every loss.

    Args:
        student: a causal language model, or a PEFT model around one.
        mixture: the layer weights of both sides; None for the other objectives.
        config: the objective and its weights.
    """

    accepts_loss_kwargs = True  # tells Trainer that the losses are weighed by examples, see DistillTrainer.compute_loss

    def __init__(self, student: nn.Module, mixture: MixtureOfLayers | None, config: DistillConfig):
        super().__init__()
        self.student = student
        self.mixture = mixture
        self.options = config
        self.head = Head.of(student)
        self.fused = use_fused(config.fused_cross_entropy, config.device)

    @property
    def config(self):
        """The student's model config, which trackers log and DeepSpeed reads."""
        return self.student.config

    @property
    def _no_split_modules(self):
        """The student's decoder layers, which FSDP shards one by one."""
        return self.student._no_split_modules

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        self.student.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.student.gradient_checkpointing_disable()

    def forward(
        self,
        tasks: list[dict],
        plan: StepPlan,
        teacher_map: Tensor | None = None,
        teacher_weights: Tensor | None = None,
        teacher_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All losses of a batch of N examples, as :class:`molsaki.data.Collator` makes them.

        Args:
            tasks: the texts of explain and predict, or of predict alone for ``vanilla``.
            teacher_map: ``(N, K, S, W)`` with ``teacher_weights (N, K, Lt)``, for ``molsaki``.
            teacher_logits: ``(n, V)`` for the n labels of explain, for ``logits``.

        Returns:
            ``(N,)`` each: ``loss``, the objective's; detached, its parts and what else is logged. For ``molsaki`` also
            ``teacher_weights (N, Lt)`` and ``student_weights (N, Ls)``, averaged over the pairs of layers.
        """
        options = self.options
        record, found, labels = None, [], []
        for task in tasks:
            if options.objective == "molsaki" and "plan" in task:
                record, rows = self._captured(task)
            else:
                rows = self._rows(task)
            counts = [sum(task["counts"][n : n + len(plan)]) for n in range(0, len(task["counts"]), len(plan))]
            found += rows.split(counts)  # of explain, predict
            labels += task["labels"].split(len(plan))
        entropies = [
            losses.per_example(rows, label) if rows.dim() == 1 else losses.cross_entropy(rows, label)
            for rows, label in zip(found, labels, strict=True)
        ]

        loss_pre = entropies[-1]
        out = {"loss": loss_pre, "loss_pre": loss_pre}
        out |= {"steps_mean": plan.step_mask.sum(1), "words_mean": plan.word_mask.sum(1)}
        out["without_words"] = (out["words_mean"] == 0).float()
        if options.objective == "vanilla":
            return _detached(out)
        out["loss_exp"] = entropies[0]
        out["loss"] = options.alpha * loss_pre + (1 - options.alpha) * out["loss_exp"]
        if options.objective == "mmi":
            out["loss_mmi"] = losses.mutual_information(found[1], labels[1], found[0], labels[0])
            out["loss"] = out["loss"] + options.beta_mmi * out["loss_mmi"]
        elif options.objective == "logits":
            out["loss_logits"] = losses.logits(found[0], teacher_logits, labels[0], options.temperature)
            out["loss"] = out["loss"] + options.beta_logits * out["loss_logits"]
        elif options.objective == "molsaki":
            with torch.autocast(plan.device.type, enabled=False):  # maps and values are float32
                attention = self._attention(record, plan, teacher_map, teacher_weights)
            out |= attention
            out["loss"] = out["loss"] + options.beta * out["loss_att"]
        return _detached(out)

    def _rows(self, task: dict) -> Tensor:
        """For each label of a task its cross-entropy ``(n,)`` or, where more is needed, its logits ``(n, V)``."""
        if self.head is None:
            return label_logits(self.student, task)
        hidden = causal_model(self.student).base_model(**model_inputs(task))[0]
        hidden = hidden.flatten(0, 1)[task["index"]]
        if self.options.objective in ("mmi", "logits"):
            return self.head.logits(self.student, hidden)
        return self.head.cross_entropy(self.student, hidden, task["targets"], self.fused)

    def _captured(self, task: dict) -> tuple[Record, Tensor]:
        """The record of a forward, and its rows."""
        options = self.options
        model = self.student if self.head is None else causal_model(self.student).base_model
        pooling = dict(value_heads=options.value_heads, pooling=options.pooling)
        with capture(model, task["plan"], values=True, **pooling) as record:
            return record, self._rows(task)

    def _attention(
        self, record: Record, plan: StepPlan, teacher_map: Tensor, teacher_weights: Tensor
    ) -> dict[str, Tensor]:
        """Eq. 5 and 6, and what is logged of them."""
        options = (self.options.normalise, self.options.causal_words)
        maps, values = record.maps[: len(plan)], record.values[: len(plan)]  # texts without a map may come after
        student_weights, student_map = self.mixture.student(maps, values, plan)
        out = {"loss_att": losses.attention(student_map, teacher_map, plan, *options)}
        with torch.no_grad():
            out["loss_att_uniform"] = losses.attention(self.mixture.uniform(maps), teacher_map, plan, *options)
            for side, weights in zip(SIDES, (teacher_weights, student_weights), strict=True):
                out[f"entropy_{side}"] = torch.special.entr(weights).sum(-1).mean(1)
                out[f"{side}_weights"] = weights.mean(1)
        return out


class DistillTrainer(Trainer):
    """Trains a student. What is not given is loaded as the config says.

    Example:
        >>> config = DistillConfig(student="student", teacher="teacher", train_file="train.jsonl", output_dir="run")
        >>> trainer = DistillTrainer(config)
        >>> trainer.train()
        >>> trainer.save_model()

    Args:
        config: everything else.
        student, tokenizer: a causal language model and its fast tokenizer.
        teacher, teacher_tokenizer: a white-box teacher, run live; frozen here.
        store: the teacher's stored maps, in place of a live teacher.
        train_dataset, eval_dataset: a :class:`~molsaki.data.DistillDataset`, or a list of examples.
        **kwargs: as ``Trainer``'s: callbacks, optimizers, ...

    Raises:
        ValueError, TypeError, OSError: something is missing, of the wrong kind or does not fit the rest.
    """

    args: DistillConfig
    model: Distiller

    def __init__(
        self,
        config: DistillConfig,
        student: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        teacher: nn.Module | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        store: Store | None = None,
        train_dataset: DistillDataset | Sequence[Example] | None = None,
        eval_dataset: DistillDataset | Sequence[Example] | None = None,
        **kwargs,
    ):
        if not isinstance(config, DistillConfig):
            raise TypeError(f"config: expected a DistillConfig, got {type(config).__name__}")
        if config.n_gpu > 1:
            raise ValueError(
                f"{config.n_gpu} GPUs are visible to this one process; start one process a GPU with "
                f"`torchrun --nproc_per_node {config.n_gpu}`, or choose one with CUDA_VISIBLE_DEVICES"
            )
        set_seed(config.seed)
        if config.deepspeed:  # models are loaded whole and tried out before ZeRO-3 shards them
            unset_hf_deepspeed_config()
        student, tokenizer = _load(student, tokenizer, config.student, "--student", config.student_dtype)
        check_tokenizer(tokenizer, "--student")
        if config.lora_rank:
            student = _with_lora(student, config)
        _freeze(student, config.freeze)
        student_side = Side(tokenizer, config.student_template, config.max_length or context_length(student.config))

        is_taught = config.objective in ("molsaki", "logits")
        if is_taught and store is None and config.store is not None:
            store = Store(config.store)
        teacher_side = None
        if is_taught and (store is None or teacher is not None or config.teacher is not None):
            teacher, teacher_tokenizer = _load(
                teacher, teacher_tokenizer, config.teacher, "--teacher", config.teacher_dtype
            )
            check_tokenizer(teacher_tokenizer, "--teacher")
            limit = config.teacher_max_length or context_length(teacher.config)
            teacher_side = Side(teacher_tokenizer, config.teacher_template, limit)
        if config.objective == "logits":
            _check_vocabulary(store, tokenizer, teacher_tokenizer)

        packing = config.packing is not False and can_pack(student)
        if config.packing and not packing:
            raise ValueError(f"--packing: texts that share a row change one another in {type(student).__name__}")
        has_both = config.objective != "vanilla"
        sharing = has_both and packing and config.share_question is not False and can_branch(student)
        if config.share_question and not sharing:
            raise ValueError(
                f"--share_question: the end of a text, run by itself, comes out otherwise in {type(student).__name__}"
            )
        mixture = None
        if config.objective == "molsaki" or packing:
            student.set_attn_implementation(NAME)
        if config.objective == "molsaki":
            student_layers, width = probe(student, config.value_heads)
            if store is not None:
                store.check(describe(config, store.num_layers, store.all_layers, student_layers, teacher, teacher_side))
                teacher = None
            teacher_layers = probe(teacher)[0] if store is None else store.num_layers
            mixture = mixture_of(config, teacher_layers, student_layers, width)
        teacher_packing = packing and teacher is not None and can_pack(teacher)
        if teacher is not None:
            teacher.to(config.device).eval().requires_grad_(False)
            if config.objective == "molsaki" or teacher_packing:
                teacher.set_attn_implementation(NAME)

        if config.deepspeed:
            set_hf_deepspeed_config(config.hf_deepspeed_config)
        self.teacher = teacher if is_taught else None
        self._sums: dict[str, Tensor] = {}
        self._bad_batch: str | None = None
        self._is_in_checkpoint = False
        datasets = []
        for data, path, limit in (
            (train_dataset, config.train_file, config.limit), (eval_dataset, config.eval_file, None),
        ):  # fmt: skip
            if data is None and path is not None:
                data = read_examples(path)[:limit]
            if data is not None and not isinstance(data, DistillDataset):
                data = prepare(data, config, student_side, teacher_side, config.predict_template, store)
                logger.info("%s: %s", path, data.summary())
            datasets.append(data)
        super().__init__(
            model=Distiller(student, mixture, config),
            args=config,
            data_collator=Collator(
                tokenizer.pad_token_id, teacher_side and teacher_side.tokenizer.pad_token_id, packing, teacher_packing,
                explain=has_both, share_question=sharing,
            ),
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            processing_class=tokenizer,
            **kwargs,
        )  # fmt: skip
        asked_for_fsdp = config.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if asked_for_fsdp and not self.is_fsdp_enabled:
            logger.warning("fsdp: accelerate shards on accelerators only; every process here holds the whole model")
        self.add_callback(_LogBeforeSave())
        self.add_callback(_StopIfBad(self))

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> Tensor:
        """How many examples one optimizer step sees, over accumulation and processes: each counts once."""
        count = torch.tensor(sum(len(batch["plan"]) for batch in batch_samples), device=device)
        return self.accelerator.reduce(count, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This process's share of the loss over all examples of the optimizer step."""
        out = self._forward(model, inputs)
        loss = out["loss"].sum() * self.accelerator.num_processes / num_items_in_batch
        if not torch.isfinite(loss):
            self._bad_batch = self._save_bad(inputs, out)
            if self.accelerator.num_processes == 1:
                raise FloatingPointError(self._bad_batch)
        self._add(out)
        return (loss, out) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            out = self._forward(model, self._prepare_inputs(inputs))
        self._add({name: self.accelerator.gather_for_metrics(value.detach()) for name, value in out.items()})
        return out["loss"].mean(), None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        training, self._sums = self._sums, {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics, _ = _means(self._sums)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self._sums = training
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._sums:
            metrics, weights = _means(self.accelerator.reduce(self._sums, "sum"))
            self._sums = {}
            logs.update({name: value for name, value in metrics.items() if name != "loss"})
            if weights and self.is_world_process_zero():
                with open(Path(self.args.output_dir) / WEIGHTS_LOG, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": self.state.global_step} | weights) + "\n")
        super().log(logs, *args, **kwargs)

    def _forward(self, model: nn.Module, inputs: dict) -> dict[str, Tensor]:
        inputs = {name: value for name, value in inputs.items() if name != "ids"}
        side = None if self.teacher is None else inputs.pop("teacher")
        if "teacher_layers" in inputs:
            maps = inputs.pop("teacher_layers").float()
            inputs["teacher_weights"], inputs["teacher_map"] = self.model.mixture.teacher(maps, inputs["plan"])
        if side is not None and self.args.objective == "molsaki":
            maps = teacher_maps(self.teacher, plan=side["plan"], **model_inputs(side))
            inputs["teacher_weights"], inputs["teacher_map"] = self.model.mixture.teacher(maps, side["plan"])
        elif side is not None:
            if not torch.equal(side["targets"], inputs["tasks"][0]["targets"][: len(side["targets"])]):
                raise ValueError("objective: logits needs the same tokens on both sides; the two templates give others")
            with torch.no_grad():
                inputs["teacher_logits"] = label_logits(self.teacher, side)
        return model(**inputs)

    def _add(self, out: dict[str, Tensor]) -> None:
        out = out | {"count": torch.ones_like(out["loss"])}
        for name, value in out.items():
            value = value.detach().double().sum(0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _save_bad(self, inputs: dict, out: dict[str, Tensor]) -> str:
        """Save the batch whose loss is not finite; the error message."""
        path = Path(self.args.output_dir) / f"bad_batch_step{self.state.global_step}_rank{self.args.process_index}.pt"
        torch.save({"inputs": inputs, "losses": _detached(out)}, path)
        bad = [example for example, loss in zip(inputs["ids"], out["loss"], strict=True) if not torch.isfinite(loss)]
        return (
            f"the loss is not finite after step {self.state.global_step}, on example(s) {', '.join(bad)}; the batch is "
            f"saved as {path}. The last checkpoint is unharmed; a lower learning rate or fp32 may help"
        )

    def _stop_if_bad(self) -> None:
        """Before the weights change: all processes stop if the loss of one was not finite."""
        bad = torch.tensor(float(self._bad_batch is not None), device=self.args.device)
        if self.accelerator.num_processes > 1 and self.accelerator.reduce(bad, "sum") > 0:
            elsewhere = f"the loss of another process is not finite after step {self.state.global_step}"
            raise FloatingPointError(self._bad_batch or elsewhere)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
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

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As ``Trainer.train``, but True (or ``config.resume``) means: from the last whole checkpoint, if there is one.

        Raises:
            ValueError: ``output_dir`` holds checkpoints already and this does not continue them.
            FloatingPointError: the loss is not finite; the batch is saved first.
        """
        folder = self.args.output_dir
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint or self.args.resume
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(folder)
        elif not resume_from_checkpoint and checkpoints(folder):
            raise ValueError(
                f"output_dir: {folder} holds the checkpoints of another run; continue it with --resume, or choose "
                "another folder"
            )
        if self.is_world_process_zero():
            step = 0 if not resume_from_checkpoint else _step_of(Path(resume_from_checkpoint))
            _cut_weights_log(Path(folder) / WEIGHTS_LOG, step)
        return super().train(resume_from_checkpoint or None, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go when this one is sealed
        self._is_in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._is_in_checkpoint = limit, False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial))
            seal(folder / f"checkpoint-{self.state.global_step}")
            for old in checkpoints(folder)[limit or None :] if limit else []:
                if str(old) != self.state.best_model_checkpoint:
                    shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the student, its tokenizer and, into a checkpoint, the router; a file is there whole or not at all."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        student, router = self.model.student, {}
        weights = None if state_dict is None else _part(state_dict, "student.")
        if weights is not None:  # gathered from shards, weights that are tied are there twice
            once = {name for name, _ in student.named_parameters()}
            for name, _ in student.named_parameters(remove_duplicate=False):
                if name not in once:
                    weights.pop(name, None)
        if self._is_in_checkpoint and self.model.mixture is not None:
            router = self.model.mixture.state_dict() if state_dict is None else _part(state_dict, "mixture.")
        if not self._is_in_checkpoint and self.args.lora_rank:
            student = copy.deepcopy(student).merge_and_unload()
            weights = None
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
            student.save_pretrained(part, state_dict=weights)
            self.processing_class.save_pretrained(part)
            Path(part, CONFIG).write_text(self.args.to_json_string())
            if router:
                save_file({name: value.contiguous() for name, value in router.items()}, Path(part, ROUTER))
            for path in Path(part).iterdir():
                os.replace(path, folder / path.name)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, self.model.student)
        mixture = self.model.mixture
        if mixture is not None and mixture.state_dict():
            mixture.load_state_dict(load_file(Path(resume_from_checkpoint, ROUTER)))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Refuse a checkpoint that lacks weights; those tied to a loaded one are not lacking."""
        named = dict(self.model.student.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(value) for name, value in named.items() if name not in missing}
        lacking = [name for name in missing if name not in named or id(named[name]) not in loaded]
        if lacking or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint is of another student: it lacks {sorted(lacking)[:3]} and has, besides, "
                f"{sorted(load_result.unexpected_keys)[:3]}"
            )


class _LogBeforeSave(TrainerCallback):
    """Logs at every step that saves, so that a resumed run averages its metrics over the same steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


class _StopIfBad(TrainerCallback):
    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._stop_if_bad()


def distill(config: DistillConfig) -> dict:
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


def checkpoints(folder: str | Path) -> list[Path]:
    """The ``checkpoint-STEP`` folders of a run, the last one first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def last_checkpoint(folder: str | Path) -> str | None:
    """The last whole checkpoint of a run, or None; a warning names every later one that is not whole, and why."""
    for path in checkpoints(folder):
        fault = _fault(path)
        if fault is None:
            return str(path)
        logger.warning("%s is not whole (%s): going back to the one before", path, fault)
    return None


def seal(folder: Path) -> None:
    """Write ``sealed.json``, with a checksum of every file, which says that a checkpoint is whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    part = folder / (SEAL + ".part")
    part.write_text(json.dumps({str(path.relative_to(folder)): _checksum(path) for path in files}, indent=1))
    os.replace(part, folder / SEAL)


def _fault(folder: Path) -> str | None:
    try:
        sums = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        return f"no {SEAL}, so its writing was interrupted"
    except ValueError:
        return f"{SEAL} cannot be read"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _checksum(folder / name) != expected:
            return f"{name} has changed since it was written"
    return None


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _cut_weights_log(path: Path, step: int) -> None:
    """Drop the lines after ``step``, which a resumed run writes again."""
    if path.is_file():
        kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in kept if json.loads(line)["step"] <= step]
        part = path.with_name(path.name + ".part")
        part.write_text("".join(kept))
        os.replace(part, path)


def _means(sums: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics as means over examples (``without_words``: their number), and the layer weights of both sides."""
    count = sums["count"]
    weights = {side: (sums[f"{side}_weights"] / count).tolist() for side in SIDES if f"{side}_weights" in sums}
    metrics = {name: (value / count).item() for name, value in sums.items() if value.ndim == 0 and name != "count"}
    metrics["without_words"] = int(sums["without_words"])
    return metrics, weights


def _detached(out: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with gradients only in ``loss``."""
    return {name: value if name == "loss" else value.detach() for name, value in out.items()}


def _part(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def _load(model, tokenizer, name: str | None, flag: str, dtype: str):
    """The model and its tokenizer, loaded from ``name`` where they are not given."""
    if model is None:
        if name is None:
            raise ValueError(f"{flag}: required: a folder or hub name, or the model itself from Python")
        model = load_model(name, flag, dtype)
    if tokenizer is None:
        tokenizer = load_tokenizer(name or model.name_or_path, flag)
    return model, tokenizer


def _freeze(student: nn.Module, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        found = [p for name, p in student.named_parameters() if re.search(pattern, name)]
        if not found:
            raise ValueError(f"--freeze: {pattern!r} is the name of no parameter of the student")
        for parameter in found:
            parameter.requires_grad_(False)


def _with_lora(student: nn.Module, config: DistillConfig) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("--lora_rank: needs the package peft, which is not installed") from None
    targets = config.lora_targets[0] if config.lora_targets == ["all-linear"] else config.lora_targets
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules=targets,
    )  # fmt: skip
    return get_peft_model(student, lora)


def _check_vocabulary(store: Store | None, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    if store is not None:
        raise ValueError("objective: logits needs a live teacher; the store holds maps, not logits")
    if student.get_vocab() != teacher.get_vocab():
        raise ValueError(
            f"objective: logits needs one vocabulary; the teacher's has {len(teacher)} tokens and the student's "
            f"{len(student)}, and they differ"
        )
