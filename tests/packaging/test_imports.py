"""Measures the cost of imports and of ``--help`` in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU_TIME = "\nimport os; times = os.times(); print(times.user + times.system)"


def python(source: str, *arguments: str) -> str:
    """The standard output of a new process that runs ``source`` with one thread."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def cpu_seconds(source: str) -> float:
    return float(python(source + CPU_TIME).splitlines()[-1])


def loaded(source: str, *modules: str) -> list[str]:
    """Those of ``modules`` that are loaded in a new process after it ran ``source``."""
    return python(f"{source}\nimport sys; print(*(m for m in {modules} if m in sys.modules))").split()


KERNELS = "from molsaki_kernels import StepPlan, pool_values, stepwise_attention, stepwise_map"


def test_the_kernels_import_nothing_heavier_than_torch():
    heavy = ("torch._dynamo", "torch._inductor", "sympy", "triton", "transformers", "molsaki")
    assert loaded(KERNELS, *heavy) == []


def test_importing_the_kernels_takes_at_most_ten_percent_longer_than_torch():
    """In one of a few pairs of runs, one right after the other, so that other work on the machine does not decide."""
    kernels, torch = [], []
    for _ in range(8):
        kernels.append(cpu_seconds(KERNELS))
        torch.append(cpu_seconds("import torch"))
        if kernels[-1] <= 1.1 * torch[-1]:
            return
    pytest.fail(f"CPU seconds of importing molsaki_kernels {kernels}, and torch alone {torch}")


def test_help_takes_less_than_a_second():
    source = """
import contextlib
from molsaki.cli import main
with contextlib.suppress(SystemExit):
    main(["--help"])
"""
    assert loaded(source, "torch", "transformers", "numpy") == python(source).split()  # the help, then no module
    assert min(cpu_seconds(source) for _ in range(2)) < 1


ANOTHER_PLATFORM = """
import builtins, os, platform, sys
import filelock, peft, scipy.stats, torch
from transformers import AutoModelForCausalLM, Trainer

system, machine = sys.argv[1:]
platform.system, platform.machine = (lambda: system), (lambda: machine)
if system == "Windows":  # what Python lacks there
    sys.modules.update(dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios"]))
    for name in ("fork", "geteuid", "getpgid", "getuid", "killpg", "uname"):
        delattr(os, name)
opened = builtins.open
def open_without_proc(file, *args, **options):
    if str(file).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return opened(file, *args, **options)
builtins.open = open_without_proc
import molsaki_kernels as mk

print(mk.engines()["native"])
torch.manual_seed(0)
q, k, v = (torch.randn(1, heads, 48, 32).requires_grad_() for heads in (4, 2, 2))
plan = mk.StepPlan.from_spans([[(0, 20), (20, 48)]], [[[3], [7, 30]]])
found = []
for attention in (mk.stepwise_attention, mk.reference.stepwise_attention):
    out, maps = attention(q, k, v, plan)
    found.append([out, maps, *torch.autograd.grad(out.square().sum() + maps.square().sum(), (q, k, v))])
print(max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) < 1e-5)
import molsaki

molsaki.DistillTrainer, molsaki.StoreWriter
print(len(molsaki.segment("Why 4?", "So 5.").words))
from molsaki.measuring import peak_of_process, resident
print(peak_of_process() is None, resident())
"""


@pytest.mark.parametrize(("system", "machine"), [("Windows", "AMD64"), ("Darwin", "arm64")])
def test_another_platform_runs_a_layer_and_imports_the_training_layer(system, machine):
    """A simulation on this machine. Libraries are imported before, because theirs are those of this platform."""
    lines = python(ANOTHER_PLATFORM, system, machine).splitlines()
    memory = f"{system == 'Windows'} None"  # the peak and the present; macOS has the module resource for the peak
    assert lines == [f"written for Linux on x86-64, not {system} on {machine}", "True", "2", memory]


def test_a_missing_extra_is_named():
    source = """
import sys
sys.modules.update(dict.fromkeys(["transformers", "matplotlib"]))
from molsaki import extras
for extra in ("train", "plot"):
    try:
        extras.require(extra)
    except ImportError as error:
        print(error)
"""
    assert python(source).splitlines() == [
        'transformers: expected to be installed; run pip install "molsaki-kernels[train]"',
        'matplotlib: expected to be installed; run pip install "molsaki-kernels[plot]"',
    ]


def test_a_checkout_that_is_not_installed_has_an_unknown_version():
    """As on a machine where the checkout is on Python's path: a study writes the version into every result."""
    source = """
import importlib.metadata
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = missing
import molsaki, molsaki_kernels
print(molsaki.__version__, molsaki_kernels.__version__)
"""
    assert python(source).split() == ["unknown", "unknown"]
