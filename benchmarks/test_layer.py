"""Benchmarks one attention layer with its map on a CPU with pytest-benchmark; prints each ratio beside its target.

pytest benchmarks --benchmark-only
"""

from __future__ import annotations

import statistics

import pytest
import torch

import molsaki_kernels as mk

from .contenders import CPU_FLASH, NATIVE_ALONE, contenders, step
from .measure import interleaved, peak_memory, ratio
from .shapes import CPU, CPU_MORE, Shape

DEVICE = torch.device("cpu")
OURS = f"molsaki, {'native' if mk.engines()['native'].ready else 'sdpa'}"  # the choice of engine="auto"
EXTRA_MIB_LIMIT = 64  # of the map beyond plain attention at 8,192 tokens


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", CPU + CPU_MORE, ids=lambda s: s.name)
def test_layer(benchmark, report, shape, backward):
    """Time ours, and in the same rounds plain attention, for the ratios."""
    inputs = shape.inputs(DEVICE)
    functions = {
        c.name: lambda c=c: step(c, inputs, backward)
        for c in contenders(DEVICE, shape)
        if c.name in (CPU_FLASH, NATIVE_ALONE, OURS)
    }
    times = interleaved(functions, DEVICE, seconds=15)
    over = {c: ratio(times[OURS], times[c]) for c in (CPU_FLASH, NATIVE_ALONE) if c in times}
    benchmark.extra_info["over_plain"] = over[CPU_FLASH]
    target = f"(target {shape.target})" if shape.target and backward else ""
    report(
        f"{shape.name:38s} {'forward+backward' if backward else 'forward':17s} {over[CPU_FLASH]:.3f} x plain SDPA "
        f"{target}{f', {over[NATIVE_ALONE]:.3f} x itself without the map' if NATIVE_ALONE in over else ''}"
    )
    benchmark.pedantic(functions[OURS], rounds=min(len(times[OURS]), 10), warmup_rounds=1)


def test_against_eager(benchmark, report):
    shape = CPU[-1]
    inputs = shape.inputs(DEVICE)
    functions = {
        c.name: lambda c=c: step(c, inputs, True)
        for c in contenders(DEVICE, shape)
        if c.name in (OURS, "eager with weights")
    }
    times = interleaved(functions, DEVICE, seconds=20)
    faster = statistics.median(times["eager with weights"]) / statistics.median(times[OURS])
    benchmark.extra_info["times_faster_than_eager"] = faster
    report(f"{shape.name:38s} forward+backward  {faster:.1f} x faster than eager with weights (target 8)")
    benchmark.pedantic(functions[OURS], rounds=3)


def test_memory(benchmark, report):
    shape = Shape(1, 8192, 200, 60)
    plain = peak_memory(shape, CPU_FLASH, True)
    extra = benchmark.pedantic(peak_memory, (shape, OURS, True)) - plain
    benchmark.extra_info["extra_mib"] = extra
    report(f"{shape.name:38s} forward+backward  {extra:.1f} MiB beyond plain SDPA (limit {EXTRA_MIB_LIMIT})")
    assert extra < EXTRA_MIB_LIMIT
