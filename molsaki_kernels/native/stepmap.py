"""The stepwise map by the native library: what `molsaki_kernels.stepmap` computes, in float32 and bfloat16 on a CPU."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Options, PlanTensors
from ..plan_cache import kept
from ..scratch import scratch
from .library import library
from .library import why_not as why_no_library

FORWARD_ROWS = 96  # of a task: a multiple of the kernel's tiles
BACKWARD_ROWS = 24  # of a tile; a task's rows are a multiple
TASKS_PER_THREAD = 16  # of the backward, so that threads end together
MAX_HEAD_DIM = 256  # as in stepmap.c
LARGEST_KEPT = 4 << 20  # numbers of dq kept from the first half of the gradient to the second, 16 MiB; more are made again
NEVER = 2**31 - 1  # position of a padding token


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
    if _is_empty(q, plan):
        return torch.zeros(shape)
    maps = torch.empty(shape)
    sequences = _sequences(plan, q.shape[2], cu_seqlens)
    q, k, lse = _rows(q), _rows(k), lse.contiguous()
    call = _call(q, k, lse, plan, options, sequences, per_head)
    call.chunk_rows = FORWARD_ROWS
    call.sums = scratch(
        "map sums", (heads * sequences.task_steps * sequences.columns,), torch.float64, q.device
    ).data_ptr()
    call.maps = maps.data_ptr()
    library().molsaki_map_forward(ctypes.byref(call))
    return maps


class Gradient:
    """The map's gradient, in two halves. As :class:`molsaki_kernels.stepmap.Gradient`."""

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
        self.dlse = torch.zeros(lse.shape)
        self._call = None
        if _is_empty(q, plan):
            return
        per_head = dmaps.dim() == 4
        dmaps = dmaps.float().contiguous()
        sequences = _sequences(plan, q.shape[2], cu_seqlens)
        q, k, lse = _rows(q), _rows(k), lse.contiguous()
        call = _call(q, k, lse, plan, options, sequences, per_head)
        (N, C), (Hq, D), Hkv = sequences.tokens.shape, q.shape[1::2], k.shape[1]
        tiles = -(-sequences.longest // BACKWARD_ROWS)
        chunks = min(tiles, -(-TASKS_PER_THREAD * call.threads // (N * Hq)))
        call.chunk_rows = -(-tiles // chunks) * BACKWARD_ROWS
        call.chunks = -(-sequences.longest // call.chunk_rows)

        def memory(name: str, *shape: int) -> Tensor:
            return scratch(f"map {name}", shape, torch.float32, q.device)

        upstream = memory("upstream", N, Hq if per_head else 1, plan.steps.shape[1], C)
        keys, parts = memory("keys", N, Hkv, C, D), memory("dk parts", N, Hq, call.chunks, C, D)
        dk = memory("dk", N, Hkv, C, D)
        dq = None
        if N * Hq * sequences.longest * D <= LARGEST_KEPT:
            dq = memory("dq", N, Hq, sequences.longest, D)
        call.dmaps, call.upstream, call.keys = dmaps.data_ptr(), upstream.data_ptr(), keys.data_ptr()
        call.dk_parts, call.dk_tokens, call.dlse = parts.data_ptr(), dk.data_ptr(), self.dlse.data_ptr()
        call.kept = None if dq is None else dq.data_ptr()
        library().molsaki_map_dlse(ctypes.byref(call))
        self._call, self._memory = call, (q, k, lse, sequences, upstream, keys, parts, dk, dq)

    def add_to(self, dq: Tensor, dk: Tensor) -> None:
        """Add to dq ``(B, Hq, M, D)`` and dk ``(B, Hkv, M, D)`` in place."""
        if self._call is None:
            return
        targets = [x if x.stride(-1) == 1 else torch.zeros(x.shape, dtype=x.dtype) for x in (dq, dk)]
        call = self._call
        call.dq, call.dk = (x.data_ptr() for x in targets)
        call.dq_strides, call.dk_strides = (_Strides(*x.stride()[:3]) for x in targets)
        library().molsaki_map_add(ctypes.byref(call))
        for x, target in zip((dq, dk), targets, strict=True):
            if target is not x:
                x += target


_Strides = ctypes.c_int64 * 3


class _Call(ctypes.Structure):
    """``Call`` of stepmap.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "sequences", "q_heads", "kv_heads", "head_dim", "columns", "steps", "words", "longest",
            "causal", "window", "is_bf16", "per_head", "threads", "chunk_rows", "chunks", "tasks",
        )),
        *((name, _Strides) for name in ("q_strides", "k_strides", "dq_strides", "dk_strides")),
        ("lse_strides", ctypes.c_int64 * 2), ("scale", ctypes.c_double), ("word_weight", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (
            "q", "k", "lse", "batch", "begin", "length", "tokens_used", "tokens", "word_of_token", "step_of_row",
            "task_sequence", "task_row", "task_first", "task_count", "task_slot", "sums", "packed", "maps",
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

    @classmethod
    def of(cls, plan: PlanTensors, M: int, bounds: list[int] | None) -> _Sequences:
        N, C = plan.tokens.shape
        columns = -(-C // 16) * 16
        begin = torch.tensor(bounds[:-1] if bounds else [0] * N)
        length = torch.tensor(bounds).diff() if bounds else torch.full((N,), M)
        longest = int(length.max())
        is_token = plan.word_of_token >= 0
        outside = is_token & ((plan.tokens < 0) | (plan.tokens >= length[:, None]))
        if outside.any():
            raise ValueError(
                f"plan: expected indices within each sequence's tokens {length.tolist()}, got {plan.tokens}"
            )
        tokens = torch.full((N, columns), NEVER, dtype=torch.int32)
        tokens[:, :C] = torch.where(is_token, plan.tokens, NEVER)
        words = torch.zeros((N, columns), dtype=torch.int32)
        words[:, :C] = plan.word_of_token.clamp_min(0)
        step_of_row = torch.full((N, longest), -1, dtype=torch.int32)
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
        batch = torch.zeros(N, dtype=torch.int64) if bounds else torch.arange(N)
        tasks = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5).T.contiguous()
        return cls(
            columns, longest, task_steps, batch, begin, length, is_token.sum(1), tokens, words, step_of_row, tasks
        )


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _is_empty(q: Tensor, plan: PlanTensors) -> bool:
    return 0 in (*q.shape, *plan.steps.shape[:2], plan.tokens.shape[1], plan.num_words)


def _sequences(plan: PlanTensors, M: int, cu_seqlens: Tensor | None) -> _Sequences:
    bounds = None if cu_seqlens is None else tuple(cu_seqlens.tolist())
    return kept(plan, ("native", M, bounds), lambda: _Sequences.of(plan, M, bounds))


def _call(
    q: Tensor, k: Tensor, lse: Tensor, plan: PlanTensors, options: Options, sequences: _Sequences, per_head: bool
) -> _Call:
    N, C = sequences.tokens.shape
    packed = scratch("map packed keys", (N * k.shape[1] * q.shape[3] * C,), torch.float32, q.device)
    tasks = sequences.tasks
    return _Call(
        sequences=N, q_heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[3], columns=C, steps=plan.steps.shape[1],
        words=plan.num_words, longest=sequences.longest, causal=options.causal, window=options.window or 0,
        is_bf16=q.dtype == torch.bfloat16, per_head=per_head, threads=torch.get_num_threads(), tasks=tasks.shape[1],
        q_strides=_Strides(*q.stride()[:3]), k_strides=_Strides(*k.stride()[:3]),
        lse_strides=(ctypes.c_int64 * 2)(*lse.stride()[:2]), scale=options.scale,
        word_weight=1 if per_head else 1 / q.shape[1], q=q.data_ptr(), k=k.data_ptr(), lse=lse.data_ptr(),
        batch=sequences.batch.data_ptr(), begin=sequences.begin.data_ptr(), length=sequences.length.data_ptr(),
        tokens_used=sequences.tokens_used.data_ptr(), tokens=sequences.tokens.data_ptr(),
        word_of_token=sequences.word_of_token.data_ptr(), step_of_row=sequences.step_of_row.data_ptr(),
        task_sequence=tasks[0].data_ptr(), task_row=tasks[1].data_ptr(), task_first=tasks[2].data_ptr(),
        task_count=tasks[3].data_ptr(), task_slot=tasks[4].data_ptr(), packed=packed.data_ptr(),
    )  # fmt: skip
