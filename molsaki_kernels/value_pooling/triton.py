"""Value pooling by the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from molsaki_kernels._triton.support import why_no_triton
from molsaki_kernels.spec import PoolingOptions
from molsaki_kernels.strides import with_contiguous_head_dim

NAME = "triton"


def why_not(v: Tensor) -> str | None:
    """Return the reason why ``v`` cannot be pooled, or None."""
    return why_no_triton(v.device, v.dtype)


def forward(v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions) -> Tensor:
    """Compute h, ``(N, width)`` float32."""
    from molsaki_kernels._triton.value_pooling import pool_values_forward

    return pool_values_forward(with_contiguous_head_dim(v), lengths, cu_seqlens, options)


def backward(
    dpooled: Tensor, v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: PoolingOptions
) -> Tensor:
    """Compute dv in v's dtype."""
    from molsaki_kernels._triton.value_pooling import pool_values_backward

    return pool_values_backward(dpooled, with_contiguous_head_dim(v), lengths, cu_seqlens, options)
