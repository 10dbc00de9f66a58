"""Shared by all tests. Without a GPU the Triton kernels are interpreted; Triton wants to know before its import."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# tqdm's lock is shared with forked processes: one that a test kills while it holds it would stop everything after.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread that might hold it at a fork


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def without_native(monkeypatch):
    """The map on a CPU in plain PyTorch, as on a machine without a C compiler."""
    from molsaki_kernels._native import build as library

    monkeypatch.setattr(library, "_loaded", lambda: (None, "switched off by a test"))


@pytest.fixture(params=["native", "torch"])
def cpu_map(request):
    """Both ways to make the map on a CPU."""
    from molsaki_kernels._native import build as library

    if request.param == "torch":
        request.getfixturevalue("without_native")
    elif library.why_not():
        pytest.skip(library.why_not())
