"""The protocol of attention engines. An engine is a module."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor

from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    AttentionRequest,
    InputGradients,
    OutputGradients,
    PlanTensors,
)


class RequiredNames(Protocol):
    """What every engine has to define.

    Attributes:
        NAME: the name that ``engine=`` takes.
        COMPUTES_MAP: ``forward`` returns the map, and ``backward`` takes its gradient and returns dsinks. Otherwise the
            map is computed from lse by one of :data:`molsaki_kernels.attention_map.MAP_ENGINES`, ``backward`` gets its
            gradient as part of dlse, and the plan is ignored.
        DIFFERENTIABLE: autograd differentiates ``forward``, lse included, and ``backward`` is never called.
    """

    NAME: str
    COMPUTES_MAP: bool
    DIFFERENTIABLE: bool

    def available(self) -> str | None:
        """Return the reason why this machine cannot run the engine, or None."""

    def why_not(self, request: AttentionRequest) -> str | None:
        """Return the reason why the engine cannot serve a call, or None; the caller also checks ``available``."""

    def takes_value_dim(self, request: AttentionRequest, value_dim: int) -> bool:
        """Return whether v may be ``value_dim`` wide where q and k are ``request.head_dim`` wide, for a request that
        ``why_not`` accepts. If not, the caller pads (:func:`as_served`). out and dv are as wide as v."""

    def forward(self, inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> AttentionOutputs:
        """Compute the attention."""

    def backward(
        self,
        gradients: OutputGradients,
        inputs: AttentionInputs,
        outputs: AttentionOutputs,
        options: AttentionOptions,
        plan: PlanTensors,
    ) -> InputGradients:
        """Compute the gradients of q, k and v; ``gradients.dout`` is None only for engines that compute the map."""


class Engine(RequiredNames, Protocol):
    """One implementation of attention: the required names, and those that it may leave to ``defaults.py``.

    Attributes:
        HEAD_DIM_MULTIPLE: the caller pads q, k and v to multiples of it.
        FUSED_MAP: the name of the map engine whose gradient ``backward_with_map`` computes, or None.
    """

    HEAD_DIM_MULTIPLE: int
    FUSED_MAP: str | None

    def gradient_strides(self, x: Tensor) -> tuple[int, ...]:
        """Return the strides that the gradient of ``x``, one of q, k and v, gets. ``backward`` should return it with
        these, because it is copied otherwise."""

    def folds_dlse(self, inputs: AttentionInputs) -> bool:
        """Return whether ``backward`` takes O' and dO' in place of out and dout, and no dlse, where the map has a
        gradient (``lse_gradient.py``): the map's implementation may fold in the pass that computes dlse."""

    def why_not_fused(self, inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> str | None:
        """Return the reason why ``backward_with_map`` cannot serve a call, or None. It is asked only where the map is
        that of ``FUSED_MAP``."""

    def backward_with_map(
        self,
        gradients: OutputGradients,
        inputs: AttentionInputs,
        outputs: AttentionOutputs,
        options: AttentionOptions,
        plan: PlanTensors,
    ) -> InputGradients:
        """Compute the gradients of attention and map in the engine's own passes; called in place of ``backward``."""


def as_served(engine: Engine, request: AttentionRequest) -> AttentionRequest:
    """Return the request as the engine gets it, with q, k and v padded with zeros, which changes no score.

    They are padded to multiples of the engine's ``HEAD_DIM_MULTIPLE``, and to one width if the engine does not support
    a v whose width differs from that of q and k.
    """
    multiple = engine.HEAD_DIM_MULTIPLE
    D, Dv = request.head_dim, request.value_dim
    if Dv is None and not D % multiple:
        return request
    key_dim, value_dim = (-(-width // multiple) * multiple for width in (D, Dv or D))
    served = dataclasses.replace(request, head_dim=key_dim, value_dim=None if value_dim == key_dim else value_dim)
    if value_dim == key_dim or (engine.why_not(served) is None and engine.takes_value_dim(served, value_dim)):
        return request if (key_dim, value_dim) == (D, Dv) else served
    return dataclasses.replace(request, head_dim=max(key_dim, value_dim), value_dim=None)
