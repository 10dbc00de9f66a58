"""The availability of Triton on this machine, and the reasons against it."""

from __future__ import annotations

import importlib.util
import os

import torch

from molsaki_kernels._capability import why_too_old

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton does


def why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why no Triton kernel can run on tensors of ``device`` and ``dtype``, or None."""
    if not INSTALLED:
        return "triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"Triton kernels need a GPU (TRITON_INTERPRET=1 runs them slowly on a CPU), not {device.type} tensors"
    if (reason := why_too_old(device)) is not None:
        return reason
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the Triton kernels take bfloat16, float16 and float32, not {dtype}"
    return None
