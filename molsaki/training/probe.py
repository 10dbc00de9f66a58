"""`Probe`: runs a few training steps to measure time and memory, the one with the longest texts first."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from molsaki.measuring import bytes_of, synchronize
from molsaki.training.config import DistillConfig
from molsaki.training.trainer import DistillTrainer

TYPICAL = 2  # steps that are timed after the first


@dataclasses.dataclass(frozen=True)
class Plan:
    """The number of optimizer steps of a training, and the examples and tokens in each, over all processes."""

    steps: int
    epochs: float | None
    per_step: int
    tokens_per_step: float

    @classmethod
    def of(cls, config: DistillConfig, examples: int | None, tokens: float) -> Plan:
        """As ``Trainer`` counts them.

        Args:
            examples: in the training data; None if they are streamed.
            tokens: of all examples, or the mean per example if they are streamed.
        """
        size, world = config.train_batch_size, config.world_size
        per_step = size * world * config.gradient_accumulation_steps
        if examples is None:
            return cls(config.max_steps, None, per_step, per_step * tokens / world)
        batches = examples // size if config.dataloader_drop_last else -(-examples // size)
        batches = batches // world if config.dataloader_drop_last else -(-batches // world)
        steps = max(-(-batches // config.gradient_accumulation_steps), 1)
        total = config.max_steps if config.max_steps > 0 else -int(-config.num_train_epochs * steps // 1)
        return cls(total, total / steps, min(per_step, examples), tokens / steps / world)


class Probe(DistillTrainer):
    """A trainer of three steps without accumulation, evaluation and checkpoints.

    Args:
        config: the config of the training to measure.
        folder: a temporary folder for all output.

    Attributes:
        activations: bytes that the backward of the longest batch needs, the model's weights left out.
        optimizer_seconds: of one step of the optimizer; known after `rate`.
    """

    def __init__(self, config: DistillConfig, folder: str):
        probe = copy.copy(config)
        probe.output_dir, probe.max_steps, probe.gradient_accumulation_steps = folder, 1 + TYPICAL, 1
        probe.save_strategy, probe.logging_strategy = SaveStrategy.NO, IntervalStrategy.NO
        probe.eval_strategy, probe.load_best_model_at_end, probe.do_eval = IntervalStrategy.NO, False, False
        probe.report_to, probe.resume, probe.resume_from_checkpoint, probe.disable_tqdm = [], False, None, True
        self.activations, self.optimizer_seconds = 0, 0.0
        self._order: list[int] | None = None
        self._tokens: list[float] = []
        self._clock = _Clock(config.device)
        super().__init__(args=probe)
        self.remove_callback(PrinterCallback)
        self.add_callback(self._clock)

    def choose_batches(self, tokens: float) -> None:
        """Choose the batch of the longest texts and typical batches; for a stream, the first ones.

        Args:
            tokens: of one example, on average.
        """
        size, world = self.args.train_batch_size, self.args.world_size
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is None:
            self._tokens = [size * tokens] * (1 + TYPICAL)
            return
        each, generator = size * world, torch.Generator().manual_seed(0)
        longest = (lengths.argsort()[::-1][:each].tolist() * each)[:each]
        shuffled = torch.randperm(len(lengths), generator=generator).tolist()
        typical = (shuffled * (TYPICAL * each))[: TYPICAL * each]
        self._order = longest + typical
        batches = [self._order[first : first + each] for first in range(0, len(self._order), each)]
        self._tokens = [float(lengths[batch].sum()) / world for batch in batches]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self._order is None else _InOrder(self._order)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.activations:
            return super().compute_loss(model, inputs, *args, **kwargs)
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def pack(tensor: Any) -> Any:
            with contextlib.suppress(RuntimeError, NotImplementedError):  # a tensor without storage
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = super().compute_loss(model, inputs, *args, **kwargs)
        self.activations = sum(kept.values())
        return result

    def rate(self) -> float:
        """Tokens per second of forward and backward in this process, in the steps after the first."""
        timed = self._clock.times[1:]
        self.optimizer_seconds = statistics.fmean(after for _, after in timed)
        return sum(self._tokens[1:]) / sum(before for before, _ in timed)

    def parts(self, before: int | None) -> dict[str, int]:
        """Bytes of weights, gradients, optimizer and activations in this process.

        Args:
            before: of the process without them, used on a CPU; None if it is not known.
        """
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        state = [v for one in cast(Any, self.optimizer).state.values() for v in one.values()]
        found = {"program": before} if before is not None and self.args.device.type == "cpu" else {}
        found["student"] = bytes_of(self.model)
        if self.teacher is not None:
            found["teacher"] = bytes_of(self.teacher)
        found["gradients"] = trained
        found["optimizer"] = sum(v.numel() * v.element_size() for v in state if torch.is_tensor(v))
        found["activations_of_the_longest_batch"] = self.activations
        return found | {"sum": sum(found.values())}

    def time_evaluation(self) -> tuple[float, int]:
        """Seconds of one evaluation, from its first batches, and its number of examples."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        total, count = 0.0, 0
        self.model.eval()
        for data in sets.values():
            if data is None:
                continue
            loader, seconds, timed = self.get_eval_dataloader(data), 0.0, 0
            for batch in loader:
                synchronize(self.args.device)
                start = time.perf_counter()
                self.prediction_step(self.model, batch, True)
                synchronize(self.args.device)
                seconds, timed = seconds + time.perf_counter() - start, timed + 1
                if timed == TYPICAL:
                    break
            total += seconds * len(loader) / timed
            count += len(cast(Any, data))
        return total, count


class _InOrder(Sampler[int]):
    def __init__(self, order: Sequence[int]):
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class _Clock(TrainerCallback):
    """Seconds of each step: forward and backward, and the optimizer."""

    def __init__(self, device: Any):
        self.device = device
        self.times: list[tuple[float, float]] = []
        self._begin = self._backward = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self._begin = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self._backward = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.times.append((self._backward - self._begin, time.perf_counter() - self._backward))
