"""The module that is trained: the student and its router, with a forward that returns every loss of a batch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from molsaki.batches.batch import Batch, TextBatch
from molsaki.method import losses
from molsaki.method.mixture import MixtureOfLayers
from molsaki.method.objectives import Prediction, StudentMaps, StudentOutput, objective_of
from molsaki.modeling.capture import capture
from molsaki.modeling.lm_head import Head, label_logits, use_fused
from molsaki.modeling.record import Record
from molsaki.modeling.unwrap import causal_model
from molsaki.training.config import DistillConfig
from molsaki_kernels import StepPlan


class Distiller(nn.Module):
    """The student and, for objectives with maps, the mixture with its router; the forward returns every loss.

    Attributes:
        beta: the weight of the attention loss, which the trainer may change between steps.
        keeps_graph: whether the forward returns ``loss_att`` with its graph, so that its gradient can be measured.

    Args:
        student: a causal language model, or a PEFT model around one.
        mixture: the layer weights of both sides; None for objectives without maps.
        config: the objective and its weights.
    """

    student: PreTrainedModel
    accepts_loss_kwargs = True  # Trainer must not divide the loss again, see DistillTrainer.compute_loss

    def __init__(self, student: PreTrainedModel, mixture: MixtureOfLayers | None, config: DistillConfig):
        super().__init__()
        self.student = student
        self.mixture = mixture
        self.options = config
        self.beta, self.keeps_graph = config.beta, False
        self.objective = objective_of(config.choose_objective(has_teacher=mixture is not None))
        self.head = Head.of(student)
        self.fused = use_fused(config.fused_cross_entropy, config.device)

    @property
    def config(self) -> PretrainedConfig:
        """The student's model config, which trackers log and DeepSpeed reads."""
        return self.student.config

    @property
    def _no_split_modules(self) -> Any:
        """The student's decoder layers, which FSDP shards one by one."""
        return self.student._no_split_modules

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.student.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.student.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """All losses of a batch of N examples.

        Returns:
            ``(N,)`` each: ``loss``, the objective's loss; detached, its terms and other logged values (with
            ``keeps_graph``, ``loss_att`` keeps its graph too). For objectives with maps also ``teacher_weights (N,
            Lt)`` and ``student_weights (N, Ls)``, averaged over the pairs of layers.
        """
        size, record = len(batch), None
        predictions: list[Prediction] = []  # of explain, predict
        for texts in batch.student:
            with self._capture(texts.plan) as captured:
                found = self._label_values(texts)
            record = captured or record
            counts = [sum(texts.counts[n : n + size]) for n in range(0, len(texts.counts), size)]
            values, labels = found.split_with_sizes(counts), texts.labels.split_with_sizes([size] * len(counts))
            predictions += map(_prediction, values, labels)
        student = StudentOutput(
            predict=predictions[-1],
            explain=predictions[0] if self.objective.explain_texts else None,
            maps=None if record is None else self._mixed(record, batch.plan),
            beta=self.beta,
        )
        words = batch.plan.word_mask.sum(1)
        terms = self.objective.loss(student, batch, self.options)
        _check_terms(terms, size)
        terms |= {"steps_mean": batch.plan.step_mask.sum(1), "words_mean": words, "without_words": (words == 0).float()}
        attached = ("loss", "loss_att") if self.keeps_graph else ("loss",)
        return {name: value if name in attached else value.detach() for name, value in terms.items()}

    def _label_values(self, texts: TextBatch) -> Tensor:
        """The cross-entropy ``(n,)`` of each label, or its logits ``(n, V)`` if objective or head need them."""
        if self.head is None:
            return label_logits(self.student, texts)
        hidden = causal_model(self.student).base_model(**texts.model_inputs())[0]
        hidden = hidden.flatten(0, 1)[texts.index]
        if self.objective.student_logits:
            return self.head.logits(self.student, hidden)
        return self.head.cross_entropy(self.student, hidden, texts.targets, self.fused)

    @property
    def _has_router(self) -> bool:
        return self.mixture is not None and self.mixture.router is not None

    def _capture(self, plan: StepPlan | None) -> contextlib.AbstractContextManager[Record | None]:
        """Records maps, and the values that a router reads, if the objective and the texts have any."""
        if plan is None or not self.objective.maps:
            return contextlib.nullcontext()
        model = self.student if self.head is None else causal_model(self.student).base_model
        options = self.options
        how = {"value_heads": options.value_heads, "pooling": options.pooling, "map_heads": options.map_heads}
        return capture(model, plan, values=self._has_router, **how)

    def _mixed(self, record: Record, plan: StepPlan) -> StudentMaps:
        """Eq. 5 and the student's side of Eq. 6 for the texts that have a map, which are the first of the record."""
        assert self.mixture is not None
        with torch.autocast(plan.device.type, enabled=False):  # maps and values are float32
            maps = record.maps[: len(plan)]
            values = record.values[: len(plan)] if self._has_router else None
            weights, mixed = self.mixture.student(maps, values, plan)
            with torch.no_grad():
                return StudentMaps(mixed, self.mixture.uniform(maps), weights)


def _check_terms(terms: Any, size: int) -> None:
    """Refuse invalid return values of a user-defined objective."""
    if not isinstance(terms, dict) or "loss" not in terms:
        got = f"one with {', '.join(map(str, terms))}" if isinstance(terms, dict) else type(terms).__name__
        raise ValueError(f"objective: expected a dict with 'loss' from its loss function, got {got}")
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (size,) or (name == "loss" and value.dim() != 1):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"objective: {name}: expected one number per example, ({size},), got {shape}")


def _prediction(values: Tensor, labels: Tensor) -> Prediction:
    if values.dim() == 1:
        return Prediction(losses.per_example(values, labels), None, labels)
    return Prediction(losses.cross_entropy(values, labels), values, labels)
