"""Memory for temporaries on a CPU, kept between calls.

Fresh megabytes cost page faults that rival the thin products they hold: at 8 x 256 tokens, a tenth of a whole layer.
What is kept is at most LIMIT bytes for each name and dtype of a thread; larger temporaries are fresh every time, since
attention is quadratic where they are and the faults do not show.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

LIMIT = 32 << 20
_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor; on a CPU it is valid until the next call with the same name and dtype."""
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize > LIMIT:
        return torch.empty(shape, dtype=dtype, device=device)
    key = f"{name} {dtype}"
    memory = _kept.__dict__.get(key)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):  # else it could not be written to outside of it later
            memory = _kept.__dict__[key] = torch.empty(size, dtype=dtype)
    return memory[:size].view(shape)
