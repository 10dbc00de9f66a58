"""The fold by the native library, in one pass over O and dO."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from molsaki_kernels._native.build import library, why_not


def fold_in_one_pass(out: Tensor, dout: Tensor, dlse: Tensor, folded: Tensor, vanished: float) -> bool:
    """O' into ``folded``; False if that cannot be done: dO vanishes in some row, or the library does not take the call.

    Args:
        out, dout, folded: ``(B, H, M, D)``. dlse: ``(B, H, M)``.
        vanished: a row of dO with a norm below this is no direction to fold along.
    """
    tensors = (out, dout, folded)
    if any(t.dtype != torch.float32 for t in (*tensors, dlse)) or any(t.stride(-1) != 1 for t in tensors):
        return False
    if out.device.type != "cpu" or out.shape[-1] % 16 or out.numel() == 0 or why_not() is not None:
        return False
    B, H, M, D = out.shape
    call = _Fold(
        batches=B, heads=H, rows=M, head_dim=D, threads=torch.get_num_threads(), vanished=vanished**2,
        **{f"{name}_strides": _Strides(*t.stride()[:3]) for name, t in zip(_NAMES, (*tensors, dlse), strict=True)},
        **{name: t.data_ptr() for name, t in zip(_NAMES, (*tensors, dlse), strict=True)},
    )  # fmt: skip
    return library().molsaki_fold(ctypes.byref(call)) == 0


_NAMES = ("out", "dout", "folded", "dlse")
_Strides = ctypes.c_int64 * 3


class _Fold(ctypes.Structure):
    """``Fold`` of fold.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batches", "heads", "rows", "head_dim", "threads")),
        *((f"{name}_strides", _Strides) for name in _NAMES),
        ("vanished", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _NAMES),
    ]
