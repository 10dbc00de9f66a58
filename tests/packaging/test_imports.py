"""Measures the cost of imports and of ``--help`` in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU_TIME = "\nimport os; times = os.times(); print(times.user + times.system)"


def python(source: str) -> str:
    """The standard output of a new process that runs ``source`` with one thread."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
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


def test_the_training_layer_imports_without_fcntl():
    """Windows has no fcntl."""
    source = "import sys; sys.modules['fcntl'] = None\nimport molsaki\nmolsaki.StoreWriter, molsaki.DistillTrainer"
    python(source)


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
