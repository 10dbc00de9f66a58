"""Keep memory for temporaries on a CPU between calls.

The page faults of fresh megabytes cost as much as the thin products they hold: at 8 x 256 tokens, a tenth of a layer's
time. At most ``LIMIT`` bytes are kept per name, dtype and thread. Larger temporaries are allocated for each call: they
occur where attention is quadratic and page faults do not matter.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

LIMIT = 32 << 20
_kept = threading.local()


def workspace(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised contiguous tensor; on a CPU it is valid until the next call with its name and dtype."""
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize > LIMIT:
        return torch.empty(shape, dtype=dtype, device=device)
    key = f"{name} {dtype}"
    memory: Tensor | None = _kept.__dict__.get(key)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):  # else it could not be written to later, outside inference mode
            memory = _kept.__dict__[key] = torch.empty(size, dtype=dtype, device=device)
    return memory[:size] if len(shape) == 1 else memory[:size].view(shape)
