"""The compute capability that a kernel needs: decides whether a GPU is too old for the engines on tensor cores."""

from __future__ import annotations

import torch

from molsaki_kernels._compile import constant_when_compiled

OLDEST = (8, 0)  # Ampere: bfloat16 products and asynchronous copies


@constant_when_compiled
def why_too_old(device: torch.device) -> str | None:
    """Return the reason why the GPU ``device`` is too old for flash attention and Triton kernels, or None.

    Also None for other devices, for AMD GPUs, and for fake CUDA tensors on a machine without a GPU.
    """
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= OLDEST:
        return None
    return f"needs a GPU of compute capability 8.0 (Ampere) or later, not {major}.{minor}"
