"""Fold dlse into O by the C library, in one pass over O and dO."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from molsaki_kernels._native.build import library, why_not
from molsaki_kernels._native.structs import HEAD_DIM_MULTIPLE, LseGradientCall

_NAMES = ("out", "dout", "folded", "dlse")


def fold_in_one_pass(out: Tensor, dout: Tensor, dlse: Tensor, folded: Tensor, vanished: float) -> bool:
    """Write O' to ``folded``.

    Args:
        out, dout, folded: ``(B, H, M, D)``. dlse: ``(B, H, M)``.
        vanished: dlse is not folded along a row of dO whose norm is smaller than this.

    Returns:
        False if ``folded`` is not usable: a row of dO vanishes, or the library does not support these tensors.
    """
    tensors = (out, dout, folded, dlse)
    for x in tensors:
        if x.dtype != torch.float32 or x.device.type != "cpu" or (x is not dlse and x.stride(-1) != 1):
            return False
    if out.shape[-1] % HEAD_DIM_MULTIPLE or out.numel() == 0 or why_not() is not None:
        return False
    call = LseGradientCall(threads=torch.get_num_threads(), vanished=vanished**2)
    call.batches, call.heads, call.rows, call.head_dim = out.shape
    for name, x in zip(_NAMES, tensors, strict=True):
        setattr(call, name, x.data_ptr())
        getattr(call, f"{name}_strides")[:] = x.stride()[:3]
    done: int = library().molsaki_lse_gradient(ctypes.byref(call))
    return done == 0
