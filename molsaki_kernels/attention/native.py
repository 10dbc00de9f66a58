"""The project's own attention on a CPU, in C: the map in the same pass, forward and backward."""

from __future__ import annotations

from molsaki_kernels._native.attention import backward, forward
from molsaki_kernels._native.build import why_not as available
from molsaki_kernels._native.build import why_not_for
from molsaki_kernels.spec import AttentionRequest

__all__ = ["NAME", "available", "backward", "forward", "why_not"]

NAME = "native"


def why_not(call: AttentionRequest) -> str | None:
    """Why this engine cannot do ``call``, or None."""
    return why_not_for(call.device, call.dtype, call.head_dim)
