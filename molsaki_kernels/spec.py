"""The dataclasses of a call: its inputs, its options and the plan's tensors, and what engines return.

The public functions and every engine take them in one order: ``inputs, options, plan``, preceded by incoming gradients
or the outputs of the forward. Only ``ops/`` flattens them, because a PyTorch operator takes tensors and
numbers.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

BoundsRead = dict[Tensor, tuple[int, ...]]  # the numbers of a cu_seqlens; empty before they were read


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """The tensors of one attention call.

    Attributes:
        q: ``(B, Hq, M, D)`` queries.
        k: ``(B, Hkv, M, D)`` keys. v: ``(B, Hkv, M, Dv)`` values; an engine gets Dv != D only where its
            ``takes_value_dim`` says so.
        sinks: ``(Hq,)`` logits in the softmax's denominator, or None.
        cu_seqlens: ``(N + 1,)`` int32 boundaries of packed sequences (then B is 1 and M is their total), or None.
        bounds_read: what :attr:`bounds` has read; inputs derived from these (``dataclasses.replace``,
            :meth:`map_inputs`) share it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None
    cu_seqlens: Tensor | None = None
    bounds_read: BoundsRead = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where each sequence begins and the last one ends, on the host.

        Reading it waits for the device of cu_seqlens, once for all inputs that are derived from one another.
        """
        if self.cu_seqlens is None:
            return 0, self.q.shape[2]
        if (found := self.bounds_read.get(self.cu_seqlens)) is None:
            found = self.bounds_read[self.cu_seqlens] = tuple(self.cu_seqlens.tolist())
        return found

    def request(self, options: AttentionOptions) -> AttentionRequest:
        """Return the properties of a call with these tensors, by which its engine is chosen."""
        q, k, v, sinks = self.q, self.k, self.v, self.sinks
        differentiable = (
            q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
        )
        return AttentionRequest(
            device=q.device,
            dtype=q.dtype,
            batch=q.shape[0],
            q_heads=q.shape[1],
            kv_heads=k.shape[1],
            length=q.shape[2],
            head_dim=q.shape[3],
            options=options,
            sinks=sinks is not None,
            packed=self.cu_seqlens is not None,
            backward=differentiable and torch.is_grad_enabled(),
            value_dim=None if v.shape[3] == q.shape[3] else v.shape[3],
        )

    def map_inputs(self, lse: Tensor) -> MapInputs:
        """Return the inputs of the map of this attention, whose log-sum-exp is ``lse``."""
        inputs = MapInputs(self.q, self.k, lse, self.cu_seqlens, self.bounds_read)
        if "bounds" in self.__dict__:
            inputs.__dict__["bounds"] = self.bounds
        return inputs


@dataclasses.dataclass(frozen=True)
class MapInputs:
    """The tensors that the map needs when the attention was computed before.

    Attributes:
        q: ``(B, Hq, M, D)``. k: ``(B, Hkv, M, D)``.
        lse: ``(B, Hq, M)`` float32 (float64 for float64 inputs), natural logarithm, sinks counted.
        cu_seqlens, bounds_read: as in :class:`AttentionInputs`.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    cu_seqlens: Tensor | None = None
    bounds_read: BoundsRead = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def bounds(self) -> tuple[int, ...]:
        """As :attr:`AttentionInputs.bounds`."""
        if self.cu_seqlens is None:
            return 0, self.q.shape[2]
        if (found := self.bounds_read.get(self.cu_seqlens)) is None:
            found = self.bounds_read[self.cu_seqlens] = tuple(self.cu_seqlens.tolist())
        return found


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """How weights are computed from scores, ``P = softmax(mask(softcap(scale q k^T)), sinks)``, and how the map is
    reduced.

    Attributes:
        causal: a query sees no key after itself.
        scale: of the scores.
        window: a query sees its last ``window`` keys, itself included; None: no limit.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask; None: no cap.
        per_head: the map has one entry per query head; otherwise it is the mean over the heads.
    """

    causal: bool
    scale: float
    window: int | None = None
    softcap: float | None = None
    per_head: bool = False


@dataclasses.dataclass(frozen=True)
class PlanTensors:
    """The tensors of a :class:`~molsaki_kernels.StepPlan` for N sequences.

    Attributes:
        steps: ``(N, S, 2)`` int64. tokens, word_of_token: ``(N, C)`` int64.
        num_words: W.
        keep: whether tensors derived from the plan may be kept on its device for later calls; not inside an operator,
            whose memory may belong to a CUDA graph.
    """

    steps: Tensor
    tokens: Tensor
    word_of_token: Tensor
    num_words: int
    keep: bool = True

    def is_empty(self, q: Tensor) -> bool:
        """Return whether there is no query, key token, step or word, so that the map and its gradient are zero."""
        return 0 in (self.num_words, q.numel(), self.steps.numel(), self.tokens.numel())


@dataclasses.dataclass(frozen=True)
class AttentionOutputs:
    """What an engine's ``forward`` returns.

    Attributes:
        out: ``(B, Hq, M, Dv)`` in q's dtype.
        lse: ``(B, Hq, M)`` float32 (float64 for float64 inputs), natural logarithm, sinks counted.
        maps: ``(N, [Hq,] S, W)`` in lse's dtype, or None from an engine that does not compute the map.
    """

    out: Tensor
    lse: Tensor
    maps: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class OutputGradients:
    """The gradients of :class:`AttentionOutputs`; None where there is none.

    Attributes:
        dout: ``(B, Hq, M, Dv)``. dlse: ``(B, Hq, M)``. dmaps: ``(N, [Hq,] S, W)``.
    """

    dout: Tensor | None
    dlse: Tensor | None = None
    dmaps: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class InputGradients:
    """The gradients of :class:`AttentionInputs`.

    Attributes:
        dq, dk, dv: in the shapes and dtypes of q, k, v.
        dsinks: ``(Hq,)`` from an engine that computes it, else None.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsinks: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class AttentionRequest:
    """The properties of a call that decide which engine can serve it. It holds no tensors, so no device is touched."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    q_heads: int
    kv_heads: int
    length: int  # M; the total of packed sequences
    head_dim: int
    options: AttentionOptions
    sinks: bool
    packed: bool
    backward: bool  # whether a gradient will be needed
    value_dim: int | None = None  # of v, where it is not head_dim


@dataclasses.dataclass(frozen=True)
class PoolingOptions:
    """How value vectors are pooled (Eq. 5).

    Attributes:
        eps: of the RMS norm.
        mean: the mean over a sequence's tokens; otherwise their sum.
        mean_heads: the heads are averaged before the norm; otherwise they are concatenated.
    """

    eps: float
    mean: bool
    mean_heads: bool
