"""The decorators of Triton functions: ``@jit`` for helpers and ``@kernel`` for the kernels that launchers start.

Type checkers skip the functions that they decorate. Triton is untyped, and a parameter may be a pointer, a tile, a
number or None; comments in the signatures give the shapes instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from molsaki_kernels._triton.launch import Kernel

__all__ = ["jit", "kernel"]

# Arguments whose values change from batch to batch: one compiled kernel must serve all of their values.
RAGGED = ["M", "N", "S", "C", "W", "num_slots", "window", "groups", "heads_per_program", "splits"]

if TYPE_CHECKING:
    from typing import no_type_check as jit
    from typing import no_type_check as kernel
else:
    _helpers = []

    def jit(function):
        helper = triton.jit(function)
        _helpers.append(helper)
        return helper

    def kernel(function):
        if triton.knobs.runtime.interpret:
            return triton.jit(function, do_not_specialize=RAGGED)
        # Triton 3.6 leaves a helper's constants (LOG2E) out of its callers' cache key unless the helper has a key
        # itself. Keys in a fixed order make that of a kernel the same in every process, whatever it launches first.
        for helper in _helpers:
            helper.cache_key  # noqa: B018
        _helpers.clear()
        return Kernel(function, do_not_specialize=RAGGED)
