"""Settings and fixtures of all tests.

Without a GPU, Triton kernels are interpreted. Each process of `pytest -n` has one thread. Both are set before PyTorch
and Triton are imported.
"""

from __future__ import annotations

import os
import threading

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# tqdm's lock is shared with forked processes. A process that is killed while it holds the lock would block all others.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no monitor thread, which could hold the lock at a fork


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def without_native(monkeypatch):
    """Disables the C library, as on a machine without a C compiler."""
    from molsaki_kernels._native import build

    monkeypatch.setattr(build, "_loaded", lambda: (None, "switched off by a test"))


@pytest.fixture(params=["native", "torch"])
def cpu_map(request):
    """Runs a test with each of the two map engines for a CPU."""
    from molsaki_kernels._native import build

    if request.param == "torch":
        request.getfixturevalue("without_native")
    elif build.why_not():
        pytest.skip(build.why_not())
