"""Tests the driver that launches nothing, in processes that do not interpret Triton kernels."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

LAYER = """
import torch
from benchmarks.null_driver import null_driver
from molsaki_kernels import StepPlan, pool_values, stepwise_attention
from molsaki_kernels._triton import lse_gradient

def layer(engine):
    q, k, v = (torch.randn(1, 63, h, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for h in (4, 2, 2))
    plan = StepPlan.from_spans([[(0, 8), (8, 16)]], [[[1], [5]]])
    out, maps = stepwise_attention(q, k, v, plan, engine=engine)
    torch.autograd.grad((out, maps), (q, k, v), (torch.randn_like(out), torch.randn_like(maps)))
"""


def run(source: str, cache: Path) -> list[str]:
    """The lines that a new process prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", LAYER + source]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_counts_of_a_layer(tmp_path):
    """Second calls launch as much and compile nothing; another context starts anew; the driver before it comes back."""
    source = """
from triton.runtime.driver import driver
for chip in (90, 80):
    with null_driver(chip, compile_kernels=False) as record:
        layer("triton")
        print(*record.launched)
        compiled = len(record.compiled)
        layer("triton")
        assert record.launches == 10 and len(record.compiled) == compiled == len(record.keys) == 5
        layer("sdpa")
        print(*record.launched[10:])
        pool_values(torch.randn(1, 2, 63, 64))
        print(*record.launched[-2:])
assert driver._active is None
"""
    fused = "flash_forward_kernel map_reduce_kernel flash_dq_kernel map_dk_kernel flash_dkv_kernel"
    beside = "plan_tables_kernel map_partials_kernel map_reduce_kernel map_dlse_kernel map_dq_kernel map_dk_kernel"
    assert run(source, tmp_path) == [fused, f"{beside} map_dk_add_kernel", "pool_tiles_kernel add_tiles_kernel"] * 2
    assert not list(tmp_path.iterdir())


def test_keys_are_those_of_the_cache(tmp_path):
    """A kernel compiled here is stored under the key that a process without compilation computes."""
    source = """
x = torch.zeros(1, 2, 63, 64, dtype=torch.bfloat16)
for compile_kernels in (False, True):
    with null_driver(90, compile_kernels=compile_kernels) as record:
        lse_gradient.fold_dlse_into_out(x, x, torch.zeros(1, 2, 63))
        (compiled,) = record.compiled
        print(compiled.key, compiled.shared)
"""
    (key, none), (same, shared) = (line.split() for line in run(source, tmp_path))
    assert key == same and none == "None" and int(shared) >= 0
    assert base64.b32encode(bytes.fromhex(key)).decode().rstrip("=") in os.listdir(tmp_path)


def test_host_benchmark(tmp_path):
    """A line for each subject; the launches alone are a part of their layer."""
    lines = run("from benchmarks import host\nhost.main(['--rounds', '3', '--calls', '3'])", tmp_path)
    table = {line[28:].strip(): line[:28].split() for line in lines[1:]}
    assert list(table) == ["no-op", "attention", "triton", "triton: its launches", "sdpa", "sdpa: its launches"]
    for engine in ("triton", "sdpa"):
        launches = table[f"{engine}: its launches"]
        assert 0 < float(launches[0]) < float(table[engine][0]) and 5 <= int(launches[1]) <= 7


def test_interpreted_kernels_are_refused(monkeypatch):
    import triton

    from benchmarks.null_driver import null_driver

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        with null_driver():
            pass
