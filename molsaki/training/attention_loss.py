"""`StepwiseAttentionLoss`: the attention loss as one module, for your own training loop."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from molsaki.config import MixtureOptions, check_options
from molsaki.method import losses
from molsaki.method.mixture import MixtureOfLayers
from molsaki.modeling.capture import capture
from molsaki.modeling.record import Record
from molsaki.modeling.unwrap import input_device
from molsaki.store.fingerprints import describe_mixture
from molsaki.store.map_store import Store
from molsaki.teacher.teacher_maps import mixture_of, probe, probe_student
from molsaki_kernels import StepPlan

HEADS = ("mean", "each")


class StepwiseAttentionLoss(nn.Module):
    """The divergence of the student's stepwise attention from the teacher's (MoLSAKI, arXiv 2604.15701, Eq. 4 to 6).

    It holds the mixture of layers and its router, which is trained with the student: give the module's parameters to
    the optimizer too. Under ``torch.distributed`` the gradients of the router are averaged over all processes as soon
    as they are computed. So every process has to run the backward of this loss, and the module needs no wrapper.

    Example:
        >>> attention_loss = StepwiseAttentionLoss.for_models(student, teacher, normalise="sum")
        >>> with torch.no_grad(), attention_loss.capture(teacher, teacher_plan) as wanted:
        ...     teacher(**teacher_inputs)
        >>> with attention_loss.capture(student, plan) as found:
        ...     output = student(**inputs)
        >>> loss, logs = attention_loss(found, wanted)
        >>> (output.loss + 0.1 * loss).backward()

    Args:
        mixture: the mixture of layers of both models; `for_models` creates it.
        normalise, causal_words, teacher_temperature: as in `molsaki.losses.attention`.
        map_heads: whether the mixture's maps are of layers ("mean") or of single heads ("each").
    """

    def __init__(
        self,
        mixture: MixtureOfLayers,
        *,
        normalise: Literal["softmax", "sum"] = "softmax",
        causal_words: bool = False,
        teacher_temperature: float = 1.0,
        map_heads: Literal["mean", "each"] = "mean",
    ):
        super().__init__()
        for name, value, choices in (("normalise", normalise, ("softmax", "sum")), ("map_heads", map_heads, HEADS)):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if not teacher_temperature > 0:
            raise ValueError(f"teacher_temperature: expected a positive number, got {teacher_temperature}")
        self.mixture = mixture
        self.normalise, self.causal_words, self.map_heads = normalise, causal_words, map_heads
        self.teacher_temperature = teacher_temperature

    @classmethod
    def for_models(
        cls,
        student: nn.Module,
        teacher: nn.Module | Store,
        *,
        normalise: Literal["softmax", "sum"] = "softmax",
        causal_words: bool = False,
        teacher_temperature: float = 1.0,
        **mixture: Any,
    ) -> StepwiseAttentionLoss:
        """The loss for these two models, whose numbers of layers are determined by a forward of two tokens.

        Args:
            student, teacher: Hugging Face models; instead of the teacher also the store of its maps.
            normalise: how a step's masses become a distribution: "softmax", the paper's, which is flat if masses are
                small, or "sum", their shares.
            causal_words: leave out words after the end of the step.
            teacher_temperature: below 1 it sharpens the teacher's distribution.
            **mixture: fields of `molsaki.config.MixtureOptions`: ``mixture``, the kind of mixture, ``map_heads``,
                ``tau_t``, ``tau_s``, ``teacher_layers`` and others.

        Raises:
            TypeError: an unknown field.
            ValueError: a value is out of range, or the store's maps were mixed in another way.
        """
        known = [field.name for field in dataclasses.fields(MixtureOptions)]
        for name in mixture:
            if name not in known:
                own = "normalise, causal_words, teacher_temperature"
                raise TypeError(f"{name}: expected one of {own}, {', '.join(known)}")
        options = MixtureOptions(**mixture)
        check_options(options)
        student_maps, value_layers, width = probe_student(student, options)
        if isinstance(teacher, Store):
            maps = teacher.num_layers
            teacher.check(describe_mixture(options, maps, teacher.all_layers, student_maps))
        else:
            maps = probe(teacher, map_heads=options.map_heads)[0]
        made = cls(
            mixture_of(options, maps, student_maps, value_layers, width),
            normalise=normalise,
            causal_words=causal_words,
            teacher_temperature=teacher_temperature,
            map_heads=options.map_heads,
        )
        return made.to(input_device(student))

    def capture(self, model: nn.Module, plan: StepPlan) -> contextlib.AbstractContextManager[Record]:
        """`molsaki.capture` with the options that this loss needs, for either model; the plan may be on any device."""
        mixture = self.mixture
        how = {"value_heads": mixture.value_heads, "pooling": mixture.pooling, "map_heads": self.map_heads}
        return capture(model, plan.to(input_device(model)), values=mixture.router is not None, **how)

    def forward(
        self, student: Record, teacher: Record | Tensor | tuple[Tensor, Tensor], steps: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss in nats, the mean over N examples, and values to log.

        Args:
            student: the record of the student's forward.
            teacher: the record of the teacher's forward, or its stored maps, as `Store.batch` returns them:
                ``(N, Lt, S, W)`` of every layer, or mixed maps ``(N, K, S, W)`` and weights ``(N, K, Lt)``.
            steps: ``(N, S)`` bool, the steps that count, such as those of the rationale; all if None.

        Returns:
            The loss, and detached: ``loss_att``; ``map_overlap``, see `molsaki.losses.overlap`;
            ``entropy_teacher`` and ``entropy_student`` of the layer weights in nats, 0 if one layer has all the weight;
            and ``teacher_weights (Lt,)`` and ``student_weights (Ls,)``, means over the examples.
        """
        for parameter in self.parameters():  # registered here, since a copy of the module has no hooks
            if not getattr(parameter, "is_averaged", False):
                parameter.register_post_accumulate_grad_hook(_average_over_processes)
                parameter.is_averaged = True  # type: ignore[attr-defined]
        plan = student.plan
        if steps is not None and (steps.dtype != torch.bool or steps.shape != plan.step_mask.shape):
            raise ValueError(
                f"steps: expected bool, (N, S) = {tuple(plan.step_mask.shape)}, got {steps.dtype}, {tuple(steps.shape)}"
            )
        with torch.autocast(plan.device.type, enabled=False):  # maps and values are float32
            values = student.values if self.mixture.router is not None else None
            student_weights, found = self.mixture.student(student.maps, values, plan)
            teacher_weights, wanted = self._teacher(teacher, plan)
            entries = None if steps is None else steps[:, :, None].to(plan.device)
            words, temperature = self.causal_words, self.teacher_temperature
            loss = losses.attention(found, wanted, plan, self.normalise, words, temperature, entries).mean()
            with torch.no_grad():
                overlap = losses.overlap(found, wanted, plan, words, entries).nanmean()
        logs = {"loss_att": loss.detach(), "map_overlap": overlap}
        for side, weights in (("teacher", teacher_weights), ("student", student_weights.detach())):
            logs[f"entropy_{side}"] = torch.special.entr(weights).sum(-1).mean()
            logs[f"{side}_weights"] = weights.mean((0, 1))
        return loss, logs

    def _teacher(self, teacher: Record | Tensor | tuple[Tensor, Tensor], plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Weights and mixed maps of the teacher, on the student's device."""
        if isinstance(teacher, Record):
            for name in ("step_mask", "word_mask"):
                mine, its = getattr(plan, name), getattr(teacher.plan, name).to(plan.device)
                if mine.shape != its.shape or not torch.equal(mine, its):
                    raise ValueError(
                        "teacher: expected a record of the student's texts in the same order, got different numbers of "
                        f"{name.removesuffix('_mask')}s: {its.sum(-1).tolist()}, the student's {mine.sum(-1).tolist()}"
                    )
            weights, maps = self.mixture.teacher(teacher.maps.to(plan.device), teacher.plan.to(plan.device))
        elif isinstance(teacher, Tensor):
            weights, maps = self.mixture.teacher(teacher.to(plan.device, torch.float32), plan)
        else:
            maps, weights = (tensor.to(plan.device, torch.float32) for tensor in teacher)
        return weights, maps

    def extra_repr(self) -> str:
        return f"normalise={self.normalise}, causal_words={self.causal_words}, map_heads={self.map_heads}"


def _average_over_processes(parameter: nn.Parameter) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
