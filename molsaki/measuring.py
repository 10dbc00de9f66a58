"""Measurements of the current process: its memory, and the completion of its work on a GPU."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


def synchronize(device: Any) -> None:
    import torch

    if getattr(device, "type", device) == "cuda":
        torch.cuda.synchronize()


def bytes_of(model: Any) -> int:
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(found.values())


def peak_of_process() -> int | None:
    """The peak resident memory of this process, in bytes; None where the system does not report it."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="utf-8") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident() -> int | None:
    """The resident memory of this process, in bytes; None if the system does not report it."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status", encoding="utf-8") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmRSS")).split()[1])
    return None
