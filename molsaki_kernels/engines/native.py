"""The project's own attention on a CPU, in C: the map in the same pass, forward and backward."""

from __future__ import annotations

import torch

from ..call import AttentionCall
from ..native.attention import backward, forward
from ..native.library import why_not as why_no_library

__all__ = ["NAME", "available", "backward", "forward", "why_not"]

NAME = "native"
MAX_HEAD_DIM = 256  # as in tiles.h


@torch.compiler.assume_constant_result
def available() -> str | None:
    """Why this machine cannot compile the library, or None."""
    return why_no_library()


def why_not(call: AttentionCall) -> str | None:
    """Why this engine cannot do ``call``, or None."""
    if call.device.type != "cpu":
        return f"it takes CPU tensors, not {call.device.type}"
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {call.dtype}"
    if call.head_dim % 16 or call.head_dim > MAX_HEAD_DIM:
        return f"it takes head_dim in multiples of 16 up to {MAX_HEAD_DIM}, not {call.head_dim}"
    return None
