"""The stepwise map by the native library: what `molsaki_kernels.stepmap` computes, in float32 and bfloat16 on a CPU."""

from __future__ import annotations

import ctypes
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Options, PlanTensors
from ..plan_cache import kept
from ..rows import contiguous_rows
from ..scratch import scratch
from .library import library
from .library import why_not as why_no_library

FORWARD_ROWS = 96  # of a task: a multiple of the kernel's tiles
BACKWARD_ROWS = 24  # of a tile; a task's rows are a multiple
TASKS_PER_THREAD = 16  # of the backward, so that threads end together
MAX_HEAD_DIM = 256  # as in stepmap.c
LARGEST_KEPT = 4 << 20  # numbers of dq kept from the first half of the gradient to the second; more are made again
NEVER = 2**31 - 1  # position of a padding token
_CPU = torch.device("cpu")  # whatever the defaults are
_FLOAT32 = {"dtype": torch.float32, "device": _CPU}


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None) -> str | None:
    """Why the native library cannot make this map, or None."""
    if device.type != "cpu":
        return f"it takes CPU tensors, not {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return f"it takes head_dim in multiples of 16 up to {MAX_HEAD_DIM}, not {head_dim}"
    if softcap is not None:
        return "it has no softcap"
    return _why_no_library()


@torch.compiler.assume_constant_result
def _why_no_library() -> str | None:
    return why_no_library()


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    plan: PlanTensors,
    options: Options,
    cu_seqlens: Tensor | None = None,
    per_head: bool = False,
) -> Tensor:
    """The map, ``(N, S, W)`` or per head ``(N, Hq, S, W)``, float32. As :func:`molsaki_kernels.stepmap.forward`."""
    N, S = plan.steps.shape[:2]
    heads = q.shape[1] if per_head else 1
    shape = (N, *((heads,) if per_head else ()), S, plan.num_words)
    if plan.is_empty(q):
        return torch.zeros(shape, **_FLOAT32)
    maps = torch.empty(shape, **_FLOAT32)
    sequences, known = _sequences(plan, q.shape[0], q.shape[2], cu_seqlens)
    q, k, lse = contiguous_rows(q), contiguous_rows(k), lse.contiguous()
    call = _call(known, q, k, lse, plan, options, per_head)
    call.chunk_rows, call.maps = FORWARD_ROWS, maps.data_ptr()
    C, D = sequences.columns, q.shape[3]
    memory = _workspace(call, packed=N * k.shape[1] * D * C, sums=2 * heads * sequences.task_steps * C)  # in float64
    library().molsaki_map_forward(ctypes.byref(call))
    del memory  # not before
    return maps


class Gradient:
    """The map's gradient, in two halves. As :class:`molsaki_kernels.stepmap.Gradient`.

    A thread's working memory is its latest Gradient's: the second half has to come before another one is made.
    """

    def __init__(
        self,
        dmaps: Tensor,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        plan: PlanTensors,
        options: Options,
        cu_seqlens: Tensor | None = None,
    ):
        self.dlse = torch.zeros(lse.shape, **_FLOAT32)
        self._call = None
        if plan.is_empty(q):
            return
        per_head = dmaps.dim() == 4
        dmaps = dmaps.float().contiguous()
        sequences, known = _sequences(plan, q.shape[0], q.shape[2], cu_seqlens)
        q, k, lse = contiguous_rows(q), contiguous_rows(k), lse.contiguous()
        call = _call(known, q, k, lse, plan, options, per_head)
        (N, C), (Hq, D), Hkv = sequences.tokens.shape, q.shape[1::2], k.shape[1]
        tiles = -(-sequences.longest // BACKWARD_ROWS)
        chunks = min(tiles, -(-TASKS_PER_THREAD * call.threads // (N * Hq)))
        call.chunk_rows = -(-tiles // chunks) * BACKWARD_ROWS
        call.chunks = -(-sequences.longest // call.chunk_rows)

        sizes = dict(
            packed=N * Hkv * D * C,
            keys=N * Hkv * C * D,
            upstream=N * (Hq if per_head else 1) * plan.steps.shape[1] * C,
            dk_parts=N * Hq * call.chunks * C * D,
            dk_tokens=N * Hkv * C * D,
        )
        size = N * Hq * sequences.longest * D
        memory = _workspace(call, **sizes, **(dict(kept=size) if size <= LARGEST_KEPT else {}))
        call.dmaps, call.dlse = dmaps.data_ptr(), self.dlse.data_ptr()
        library().molsaki_map_dlse(ctypes.byref(call))
        self._call, self._memory = call, (q, k, lse, sequences, memory)  # what the second half reads

    def add_to(self, dq: Tensor, dk: Tensor) -> None:
        """Add to dq ``(B, Hq, M, D)`` and dk ``(B, Hkv, M, D)`` in place."""
        if self._call is None:
            return
        targets = [x if x.stride(-1) == 1 else x.new_zeros(x.shape) for x in (dq, dk)]
        call = self._call
        call.dq, call.dk = (x.data_ptr() for x in targets)
        call.dq_strides[:], call.dk_strides[:] = (x.stride()[:3] for x in targets)
        library().molsaki_map_add(ctypes.byref(call))
        for x, target in zip((dq, dk), targets, strict=True):
            if target is not x:
                x += target


_PLAN = ("batch", "begin", "length", "tokens_used", "tokens", "word_of_token", "step_of_row")
_TASK = ("sequence", "row", "first", "count", "slot")


class _Call(ctypes.Structure):
    """``Call`` of stepmap.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "sequences", "q_heads", "kv_heads", "head_dim", "columns", "steps", "words", "longest",
            "causal", "window", "is_bf16", "per_head", "threads", "chunk_rows", "chunks", "tasks",
        )),
        *((name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "dq_strides", "dk_strides")),
        ("lse_strides", ctypes.c_int64 * 2), ("scale", ctypes.c_double), ("word_weight", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (
            "q", "k", "lse", *_PLAN, *(f"task_{name}" for name in _TASK), "sums", "packed", "maps",
            "dmaps", "upstream", "keys", "dk_parts", "dk_tokens", "kept", "dlse", "dq", "dk",
        )),
    ]  # fmt: skip


class _Sequences(NamedTuple):
    """What of a call depends on the plan and the sequences' bounds alone; the names are those of ``Call``."""

    columns: int  # the key tokens of the longest sequence, up to a multiple of 16
    longest: int
    task_steps: int  # of all tasks
    batch: Tensor
    begin: Tensor
    length: Tensor
    tokens_used: Tensor
    tokens: Tensor
    word_of_token: Tensor
    step_of_row: Tensor
    tasks: Tensor  # (5, tasks): sequence, row, first, count, slot (in steps)

    def call(self) -> _Call:
        """A call with these filled in."""
        pointers = {name: getattr(self, name).data_ptr() for name in _PLAN}
        pointers |= {f"task_{name}": row.data_ptr() for name, row in zip(_TASK, self.tasks, strict=True)}
        return _Call(
            sequences=len(self.begin), columns=self.columns, longest=self.longest, tasks=self.tasks.shape[1], **pointers
        )

    @classmethod
    def of(cls, plan: PlanTensors, M: int, bounds: tuple[int, ...] | None) -> _Sequences:
        N, C = plan.tokens.shape
        columns = -(-C // 16) * 16
        begin = torch.tensor(bounds[:-1] if bounds else [0] * N, device=_CPU)
        length = torch.tensor(bounds, device=_CPU).diff() if bounds else torch.full((N,), M, device=_CPU)
        _check(plan, M, bounds, length)
        longest = int(length.max())
        is_token = plan.word_of_token >= 0
        tokens = torch.full((N, columns), NEVER, dtype=torch.int32, device=_CPU)
        tokens[:, :C] = torch.where(is_token, plan.tokens, NEVER)
        words = torch.zeros((N, columns), dtype=torch.int32, device=_CPU)
        words[:, :C] = plan.word_of_token.clamp_min(0)
        step_of_row = torch.full((N, longest), -1, dtype=torch.int32, device=_CPU)
        for n, steps in enumerate(plan.steps.tolist()):
            for s, (start, stop) in enumerate(steps):
                step_of_row[n, start:stop] = s
        rows, task_steps = [], 0
        for n in range(N):
            for row in range(0, int(length[n]), FORWARD_ROWS):
                steps = step_of_row[n, row : min(row + FORWARD_ROWS, int(length[n]))]
                steps = steps[steps >= 0]
                first, count = (int(steps.min()), int(steps.max() - steps.min()) + 1) if len(steps) else (0, 0)
                rows.append((n, row, first, count, task_steps))
                task_steps += count
        batch = torch.zeros(N, dtype=torch.int64, device=_CPU) if bounds else torch.arange(N, device=_CPU)
        tasks = torch.tensor(rows, dtype=torch.int64, device=_CPU).reshape(-1, 5).T.contiguous()
        return cls(
            columns, longest, task_steps, batch, begin, length, is_token.sum(1), tokens, words, step_of_row, tasks
        )


def _check(plan: PlanTensors, M: int, bounds: tuple[int, ...] | None, length: Tensor) -> None:
    """What the library takes for granted; nobody has looked at it where a call is traced or a plan made by hand."""
    if bounds and (bounds[0] < 0 or bounds[-1] > M or length.min() < 0):
        raise ValueError(f"cu_seqlens: expected to ascend from 0 to at most {M}, got {list(bounds)}")
    is_token = plan.word_of_token >= 0
    if (is_token & ((plan.tokens < 0) | (plan.tokens >= length[:, None]))).any():
        raise ValueError(f"plan: expected indices within each sequence's tokens {length.tolist()}, got {plan.tokens}")
    first = torch.arange(is_token.shape[1], device=_CPU) < is_token.sum(1, keepdim=True)
    if (is_token != first).any() or (plan.tokens.diff() <= 0)[is_token[:, 1:]].any():
        raise ValueError(f"plan: expected tokens that ascend, padded on the right, got {plan.tokens}")
    if (plan.word_of_token >= plan.num_words).any():
        raise ValueError(f"plan: expected word_of_token below {plan.num_words} words, got {plan.word_of_token}")


def _sequences(plan: PlanTensors, B: int, M: int, cu_seqlens: Tensor | None) -> tuple[_Sequences, _Call]:
    """With a call to copy."""
    bounds = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    if bounds is None and len(plan.tokens) != B:
        raise ValueError(f"plan: expected one entry for each of {B} sequences, got {len(plan.tokens)}")

    def make() -> tuple[_Sequences, _Call]:
        sequences = _Sequences.of(plan, M, bounds)
        return sequences, sequences.call()

    return kept(plan, ("native", M, bounds), make)


def _call(
    known: _Call, q: Tensor, k: Tensor, lse: Tensor, plan: PlanTensors, options: Options, per_head: bool
) -> _Call:
    call = _Call.from_buffer_copy(known)
    (_, call.q_heads, _, call.head_dim), call.kv_heads = q.shape, k.shape[1]
    call.steps, call.words, call.per_head = plan.steps.shape[1], plan.num_words, per_head
    call.causal, call.window, call.scale = options.causal, min(options.window or 0, q.shape[2]), options.scale
    call.is_bf16, call.threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    call.word_weight = 1 if per_head else 1 / q.shape[1]
    call.q, call.k, call.lse = q.data_ptr(), k.data_ptr(), lse.data_ptr()
    call.q_strides[:], call.k_strides[:], call.lse_strides[:] = q.stride()[:3], k.stride()[:3], lse.stride()[:2]
    return call


def _workspace(call: _Call, **sizes: int) -> Tensor:
    """Working memory for fields of the call, so many float32 each; it has to be held for as long as they are used."""
    offsets = [0, *itertools.accumulate(-(-size // 16) * 16 for size in sizes.values())]
    memory = scratch("map workspace", (offsets[-1],), torch.float32, _CPU)
    start = memory.data_ptr()
    for name, offset in zip(sizes, offsets, strict=False):
        setattr(call, name, start + 4 * offset)
    return memory
