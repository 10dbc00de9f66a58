"""Benchmarks an optimizer step of a random model on a CPU with pytest-benchmark; prints each ratio beside its target.

pytest benchmarks --benchmark-only. For SmolLM2-135M: python -m benchmarks.step --model FOLDER.
"""

from __future__ import annotations

import pytest
import torch

from .measure import ratio
from .step import BATCHES, OURS, TARGETS, Setup, measure_memory, timed

DEVICE = torch.device("cpu")


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: b.name)
def test_step(benchmark, report, batch):
    setup = Setup("small", "small", batch, False, "cpu", "float32")
    steps = {name: setup.step(name) for name in ("dss", OURS, "dss, padded", "molsaki, padded", "eager")}
    for step in steps.values():
        step()
    times = timed(steps, DEVICE, seconds=20)
    over, faster = ratio(times[OURS], times["dss"]), ratio(times["eager"], times[OURS])
    padded = ratio(times["molsaki, padded"], times[OURS])
    benchmark.extra_info.update(over_dss=over, times_faster_than_eager=faster)
    report(
        f"{batch.name:14s} a step with stored maps: {over:.3f} x DSS (target {TARGETS[OURS, 'time over dss']}), "
        f"{faster:.1f} x faster than two eager models, {padded:.2f} x faster than with padding"
    )
    benchmark.pedantic(steps[OURS], rounds=3)


def test_memory(benchmark, report):
    setup = Setup("small", "small", BATCHES[-1], False, "cpu", "float32")
    found = benchmark.pedantic(lambda: list(measure_memory(setup, [OURS, "eager"], 0)), rounds=1)
    (share,) = (value for name, quantity, value in found if quantity == "share of eager's peak")
    benchmark.extra_info["share_of_eager_memory"] = share
    report(f"{BATCHES[-1].name:14s} a step's peak memory: {share:.2f} of two eager models (target 0.33)")
