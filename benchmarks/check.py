"""Compares a contender's results and gradients with eager attention's before it is timed, and measures its memory.

:func:`expected` is the oracle's computation on blocks of queries, so it fits in memory even if the weights of all
queries do not. It does not depend on any engine of the project.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import math
import multiprocessing
import time
import types
import warnings
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from molsaki_kernels import StepPlan

from .candidates import candidates
from .contenders import Contender, step, with_lse
from .measure import cuda_peak, memory_status
from .shapes import Inputs, Shape

ROWS = 1024  # queries of a block
MMAP_THRESHOLD = -3  # of mallopt
CLEAR = Path("/proc/self/clear_refs")  # Linux only
# Largest root-mean-square error relative to the expected result's; the largest single error may be MAX_OVER_RMS of it.
LIMITS = {"float64": 1e-9, "float32": 1e-4, "float16": 4 * 2**-10, "bfloat16": 4 * 2**-7}
MAX_OVER_RMS = 30.0


class Expected(NamedTuple):
    """Results and gradients in at least float32. Gradients through the output and through the map are separate."""

    out: Tensor
    maps: Tensor
    of_out: tuple[Tensor, Tensor, Tensor]  # dq, dk, dv
    of_maps: tuple[Tensor, Tensor, Tensor]  # the same, through the map; dv is zero
    alone: tuple[Tensor, Tensor, Tensor]  # dq, dk, dlse of the map at a given log-sum-exp

    def results(self, kind: str) -> dict[str, Tensor]:
        """Return what a contender of this kind computes, in the order of :func:`contenders.step`."""
        if kind == "map alone":
            return {"map": self.maps, **dict(zip(("dq", "dk", "dlse"), self.alone, strict=True))}
        if kind == "plain":
            return {"out": self.out, **dict(zip(("dq", "dk", "dv"), self.of_out, strict=True))}
        both = (a + b for a, b in zip(self.of_out, self.of_maps, strict=True))
        return {"out": self.out, "map": self.maps, **dict(zip(("dq", "dk", "dv"), both, strict=True))}


@dataclasses.dataclass(frozen=True)
class Probe:
    """One checked call. ``error`` is the largest relative error of its results; ``reason``: why it is not measured."""

    error: float | None = None
    seconds: float | None = None
    peak_mib: float | None = None
    reason: str | None = None
    wrong: bool = False  # it ran, but its result is wrong


def indicators(plan: StepPlan, length: int) -> tuple[Tensor, Tensor]:
    """Return the rows of each step ``(N, S, M)`` and the columns of each word ``(N, M, W)`` as zeros and ones."""
    row = torch.arange(length, device=plan.device)
    steps = (row >= plan.steps[..., :1]) & (row < plan.steps[..., 1:])
    words = torch.zeros(len(plan), length, plan.num_words, device=plan.device)
    for n in range(len(plan)):
        own = plan.word_of_token[n] >= 0
        words[n, plan.tokens[n][own], plan.word_of_token[n][own]] = 1
    return steps.float(), words


def expected(x: Inputs, rows: int = ROWS) -> Expected:
    """Compute one causal layer, its map and all gradients as eager attention does, ``rows`` queries at a time.

    With the weights P, of scores S: the gradient of S is ``P * (dP - sum(P * dP))``, where dP comes from the output or
    from the map; at a given log-sum-exp it is ``P * dP``, and the log-sum-exp has the gradient ``-sum(P * dP)``.
    """
    dtype = torch.promote_types(x.q.dtype, torch.float32)
    q, k, v, dout, dmaps = (t.detach().to(dtype) for t in (x.q, x.k, x.v, x.dout, x.dmaps))
    (B, H, M, D), group = q.shape, q.shape[1] // k.shape[1]
    in_step, in_word = (t.to(dtype) for t in indicators(x.plan, M))
    d_words = dmaps @ in_word.transpose(1, 2) / H  # (N, S, M): the gradient of the weights of any row in a step
    out, maps = torch.empty_like(dout), torch.zeros_like(dmaps)
    of_out, of_maps = ([torch.zeros_like(t) for t in (q, k, v)] for _ in range(2))
    alone = [torch.zeros_like(q), torch.zeros_like(k), q.new_zeros(q.shape[:3])]
    position = torch.arange(M, device=q.device)
    for n in range(B):
        for h in range(H):
            g = h // group
            for begin in range(0, M, rows):
                here, end = slice(begin, begin + rows), min(begin + rows, M)
                q_h, k_g, v_g, dout_h = q[n, h, here], k[n, g, :end], v[n, g, :end], dout[n, h, here]
                scores = q_h @ k_g.T * D**-0.5
                weights = scores.masked_fill_(position[:end] > position[here, None], -math.inf).softmax(-1)
                out[n, h, here] = weights @ v_g
                maps[n] += in_step[n, :, here] @ weights @ in_word[n, :end] / H
                of_out[2][n, g, :end] += weights.T @ dout_h
                through_map = in_step[n, :, here].T @ d_words[n, :, :end]
                for sums, d_weights in ((of_out, dout_h @ v_g.T), (of_maps, through_map)):
                    d_scores = d_weights.mul_(weights)
                    total = d_scores.sum(-1, keepdim=True)
                    if sums is of_maps:
                        alone[0][n, h, here] += d_scores @ k_g * D**-0.5
                        alone[1][n, g, :end] += d_scores.T @ q_h * D**-0.5
                        alone[2][n, h, here] -= total[:, 0]
                    d_scores.addcmul_(weights, total, value=-1)
                    sums[0][n, h, here] += d_scores @ k_g * D**-0.5
                    sums[1][n, g, :end] += d_scores.T @ q_h * D**-0.5
    return Expected(out, maps, tuple(of_out), tuple(of_maps), tuple(alone))


def largest_error(
    result: object, grads: tuple[Tensor, ...] | None, kind: str, right: Expected, dtype: str
) -> tuple[float, str | None]:
    """Return the largest relative error of a contender's results, and what is wrong with them or None."""
    found = [*(result if isinstance(result, tuple) else (result,)), *(grads or ())]
    names = right.results(kind)
    worst, limit = 0.0, LIMITS[dtype]
    for (name, b), a in zip(names.items(), found, strict=grads is not None):
        if a.shape != b.shape:
            return math.inf, f"{name} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        a, b = a.detach().to(b.dtype), b
        scale = b.norm()
        error = ((a - b).norm() / scale).item() if scale > 0 else a.norm().item()
        largest = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-30)
        if not error <= limit or not largest <= MAX_OVER_RMS * limit:  # NaN, too
            return error, f"{name} is wrong: relative error {error:.1e}, largest {largest:.1e}, allowed {limit:.1e}"
        worst = max(worst, error)
    return worst, None


def probe(shape: Shape, name: str, backward: bool, device: torch.device, threads: int | None = None) -> Probe:
    """Run one contender once and check it. On a CPU call it in a separate process, for the peak memory."""
    if threads:
        torch.set_num_threads(threads)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            inputs, right = _case(shape, device)
            contender = _contender(shape, name, device)
            result, seconds, peak = _observed(contender, shape, inputs, backward, device)
        except Exception as reason:  # the other contenders are still measured
            return Probe(reason=_why(reason, said))
    error, fault = largest_error(*result, contender.kind, right, shape.dtype)
    return Probe(error, seconds, peak, fault, wrong=fault is not None)


def _observed(
    contender: Contender, shape: Shape, inputs: Inputs, backward: bool, device: torch.device
) -> tuple[tuple, float, float | None]:
    """Return the result of one call, its seconds, and its peak MiB beyond what is allocated before."""
    if device.type == "cuda":
        result = step(contender, inputs, backward)  # compiles
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        peak = cuda_peak(lambda: step(contender, inputs, backward), device)
        return result, time.perf_counter() - begin, peak
    small = dataclasses.replace(shape, batch=1, tokens=256, words=4, steps=2)
    step(_contender(small, contender.name, device), with_lse(small.inputs(device)), backward)  # libraries allocate
    with _peak_counted() as before:
        begin = time.perf_counter()
        result = step(contender, inputs, backward)
        seconds = time.perf_counter() - begin
        peak = None if before is None else max(memory_status("VmHWM") - before, 0.0)
    return result, seconds, peak


@contextlib.contextmanager
def _peak_counted() -> Iterator[float | None]:
    """Reset the peak of this process's resident memory; yield the MiB in use, or None where that is unknown.

    Inside, glibc returns freed memory to the system at once, so that the peak counts each allocation anew.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 1 << 18)
        libc.malloc_trim(0)
        CLEAR.write_text("5")  # resets the peak (getrusage cannot)
        before = memory_status("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux, or another libc
        yield None
        return
    try:
        yield before
    finally:
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)


@functools.lru_cache(1)
def _case(shape: Shape, device: torch.device) -> tuple[Inputs, Expected]:
    inputs = with_lse(shape.inputs(device))
    return inputs, expected(inputs)


def _contender(shape: Shape, name: str, device: torch.device) -> Contender:
    found = (c.contender for c in candidates(device, shape, slow_builds=True) if c.name == name)
    contender = next(found)
    assert contender is not None, name
    return contender


def _why(reason: Exception, said: list[warnings.WarningMessage]) -> str:
    """Return why a call failed in one line; PyTorch's attention gives its reasons as warnings."""
    first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
    if "available kernel" in first or "viable backend" in first:
        texts = (str(one.message).split(" (Triggered internally")[0].strip() for one in said)
        told = [
            text for text in texts if text and not text.endswith("because:") and "has been runtime disabled" not in text
        ]
        first = told[0] if told else first
    return first


class Worker:
    """A process that probes on a CPU, replaced if it dies; on CUDA the probes run in this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._close()

    def probe(self, shape: Shape, name: str, backward: bool) -> Probe:
        if self.device.type != "cpu":
            return probe(shape, name, backward, self.device)
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")  # in this process freed memory may not have been returned
            self._pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)
        try:
            threads = torch.get_num_threads()
            return self._pool.submit(probe, shape, name, backward, self.device, threads).result()
        except BrokenProcessPool:
            self._close()
            return Probe(reason="its process was killed, as happens where memory is short")

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
