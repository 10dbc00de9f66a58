"""Convert a plan and the sequences' bounds to the arrays that the C library reads, once per plan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from molsaki_kernels._native.structs import COLUMN_MULTIPLE, NEVER, TASK_ROWS, Plan
from molsaki_kernels._plan_cache import cached
from molsaki_kernels.spec import AttentionInputs, MapInputs, PlanTensors

_CPU = torch.device("cpu")  # also where another default device is set
_PLAN = ("batch", "begin", "length", "tokens_used", "tokens", "word_of_token", "step_of_row")
_TASK = ("sequence", "row", "first", "count", "slot")


class PlanArrays(NamedTuple):
    """The arrays behind the struct ``Plan``; the names are those of its fields."""

    columns: int  # the key tokens of the longest sequence, rounded up to a multiple of COLUMN_MULTIPLE
    longest: int
    total: int  # tokens of all sequences
    task_steps: int  # the steps that each task touches, summed over the tasks
    batch: Tensor
    begin: Tensor
    length: Tensor
    tokens_used: Tensor
    tokens: Tensor
    word_of_token: Tensor
    step_of_row: Tensor
    tasks: Tensor  # (5, tasks): sequence, row, first, count, slot (in steps)

    def struct(self) -> Plan:
        """Return the struct. It points into these arrays, so keep them for as long as it is used."""
        pointers = {name: getattr(self, name).data_ptr() for name in _PLAN}
        pointers |= {f"task_{name}": row.data_ptr() for name, row in zip(_TASK, self.tasks, strict=True)}
        return Plan(len(self.begin), self.columns, self.longest, self.tasks.shape[1], **pointers)


def plan_arrays(inputs: AttentionInputs | MapInputs, plan: PlanTensors) -> tuple[PlanArrays, Plan]:
    """Return the arrays and the struct of a call's sequences; they are cached with the plan.

    Raises:
        ValueError: an index is out of range, or steps or tokens do not ascend; the C library relies on both.
    """
    batch, _, length, _ = inputs.q.shape
    bounds = None if inputs.cu_seqlens is None else inputs.bounds
    if bounds is None and plan.tokens.shape[0] != batch:
        raise ValueError(f"plan: expected one entry for each of {batch} sequences, got {plan.tokens.shape[0]}")

    def compute() -> tuple[PlanArrays, Plan]:
        arrays = _compute(plan, length, bounds)
        return arrays, arrays.struct()

    return cached(plan, ("native", length, bounds), compute)


def _compute(plan: PlanTensors, M: int, bounds: tuple[int, ...] | None) -> PlanArrays:
    N, C = plan.tokens.shape
    columns = -(-C // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    begin = torch.tensor(bounds[:-1] if bounds else [0] * N, dtype=torch.int64, device=_CPU)
    length = torch.tensor(bounds, device=_CPU).diff() if bounds else torch.full((N,), M, device=_CPU)
    _check(plan, M, bounds, length)
    longest, total = int(length.max()) if N else 0, int(length.sum())
    is_token = plan.word_of_token >= 0
    tokens = torch.full((N, columns), NEVER, dtype=torch.int32, device=_CPU)
    tokens[:, :C] = torch.where(is_token, plan.tokens, NEVER)
    words = torch.zeros((N, columns), dtype=torch.int32, device=_CPU)
    words[:, :C] = plan.word_of_token.clamp_min(0)
    step_of_row = torch.full((N, longest), -1, dtype=torch.int32, device=_CPU)
    written, lengths = step_of_row.numpy(), length.tolist()  # a tensor takes ten times as long per step
    for n, steps in enumerate(plan.steps.tolist()):
        before = 0
        for s, (start, stop) in enumerate(steps):
            if start >= stop:
                continue
            if start < before or stop > lengths[n]:
                got = f"({start}, {stop}) after {before}"
                raise ValueError(f"plan: expected steps that ascend within {lengths[n]} tokens, got {got}")
            written[n, start:stop] = s
            before = stop
    rows, task_steps = [], 0
    for n in range(N):
        for row in range(0, lengths[n], TASK_ROWS):
            steps = written[n, row : min(row + TASK_ROWS, lengths[n])]
            steps = steps[steps >= 0]  # they ascend
            first, count = (int(steps[0]), int(steps[-1] - steps[0]) + 1) if len(steps) else (0, 0)
            rows.append((n, row, first, count, task_steps))
            task_steps += count
    batch = torch.zeros(N, dtype=torch.int64, device=_CPU) if bounds else torch.arange(N, device=_CPU)
    tasks = torch.tensor(rows, dtype=torch.int64, device=_CPU).reshape(-1, 5).T.contiguous()
    return PlanArrays(
        columns=columns,
        longest=longest,
        total=total,
        task_steps=task_steps,
        batch=batch,
        begin=begin,
        length=length,
        tokens_used=is_token.sum(1),
        tokens=tokens,
        word_of_token=words,
        step_of_row=step_of_row,
        tasks=tasks,
    )


def _check(plan: PlanTensors, M: int, bounds: tuple[int, ...] | None, length: Tensor) -> None:
    """Check what the library relies on: traced calls and plans built by hand have not been checked."""
    if bounds and (bounds[0] < 0 or bounds[-1] > M or (length < 0).any()):
        raise ValueError(f"cu_seqlens: expected to ascend from 0 to at most {M}, got {list(bounds)}")
    is_token = plan.word_of_token >= 0
    if (is_token & ((plan.tokens < 0) | (plan.tokens >= length[:, None]))).any():
        raise ValueError(f"plan: expected indices within each sequence's tokens {length.tolist()}, got {plan.tokens}")
    first = torch.arange(is_token.shape[1], device=_CPU) < is_token.sum(1, keepdim=True)
    if (is_token != first).any() or (plan.tokens.diff() <= 0)[is_token[:, 1:]].any():
        raise ValueError(f"plan: expected tokens that ascend, padded on the right, got {plan.tokens}")
    if (plan.word_of_token >= plan.num_words).any():
        raise ValueError(f"plan: expected word_of_token below {plan.num_words} words, got {plan.word_of_token}")
