"""The project's own attention on a CPU, in C: the map in the same pass, forward and backward."""

from __future__ import annotations

from ..call import AttentionCall
from ..native.attention import backward, forward
from ..native.library import why_not as available
from ..native.library import why_not_for

__all__ = ["NAME", "available", "backward", "forward", "why_not"]

NAME = "native"


def why_not(call: AttentionCall) -> str | None:
    """Why this engine cannot do ``call``, or None."""
    return why_not_for(call.device, call.dtype, call.head_dim)
