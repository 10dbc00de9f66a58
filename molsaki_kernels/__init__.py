"""Stepwise attention on key information, without materialising attention (MoLSAKI, arXiv 2604.15701)."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from molsaki_kernels.api import EngineStatus, engines, pool_values, stepwise_attention, stepwise_map
from molsaki_kernels.engine_selection import register_engine
from molsaki_kernels.plan import StepPlan

if TYPE_CHECKING:
    from molsaki_kernels import reference

__all__ = [
    "EngineStatus",
    "StepPlan",
    "__version__",
    "engines",
    "pool_values",
    "reference",
    "register_engine",
    "stepwise_attention",
    "stepwise_map",
]


def __getattr__(name: str) -> Any:
    if name == "reference":  # the oracle is for tests and benchmarks
        return importlib.import_module("molsaki_kernels.reference")
    if name == "__version__":
        try:
            return importlib.metadata.version("molsaki-kernels")
        except importlib.metadata.PackageNotFoundError:  # a checkout on Python's path, not installed
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
