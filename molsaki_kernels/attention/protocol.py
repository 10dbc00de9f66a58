"""What every attention engine provides. An engine is a module."""

from __future__ import annotations

from typing import Protocol

from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    AttentionRequest,
    InputGradients,
    OutputGradients,
    PlanTensors,
)


class Engine(Protocol):
    """One implementation of attention.

    Attributes:
        NAME: the name that ``engine=`` takes.
        COMPUTES_MAP: ``forward`` returns the map, and ``backward`` takes its gradient and returns dsinks. Otherwise the
            map is computed from lse by one of :data:`molsaki_kernels.attention_map.MAP_ENGINES`, ``backward`` gets its
            gradient as part of dlse, and the plan is ignored.
        DIFFERENTIABLE: autograd differentiates ``forward``, lse included, and ``backward`` is never called.

    An engine that folds dlse into out (``lse_gradient.py``) may also have ``folds_dlse(inputs) -> bool``. Where it
    returns True and the map has a gradient, ``backward`` gets O' and dO' in place of out and dout, and no dlse: the
    map's implementation may fold in the pass that computes dlse.
    """

    NAME: str
    COMPUTES_MAP: bool
    DIFFERENTIABLE: bool

    def available(self) -> str | None:
        """Return the reason why this machine cannot run the engine, or None."""

    def why_not(self, request: AttentionRequest) -> str | None:
        """Return the reason why the engine cannot serve a call, or None; ``available`` is asked too."""

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
