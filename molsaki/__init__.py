"""Distils a teacher's attention to key words, step by step (MoLSAKI, arXiv 2604.15701).

The names below are imported on first use: ``import molsaki`` imports neither torch nor transformers. When transformers
is imported, before or after, the attention implementation "molsaki" is registered with it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from molsaki.modeling.registration import register_on_import

if TYPE_CHECKING:
    from molsaki.modeling.capture import capture
    from molsaki.teacher.map_store import Store
    from molsaki.teacher.map_store_writer import StoreWriter
    from molsaki.text.alignment import encode, plan
    from molsaki.text.fitting import fit
    from molsaki.text.segment import segment
    from molsaki.text.spans import Spans
    from molsaki.training import losses
    from molsaki.training.config import DistillConfig
    from molsaki.training.mixture import MixtureOfLayers
    from molsaki.training.trainer import DistillTrainer

    __version__: str

__all__ = [
    "DistillConfig",
    "DistillTrainer",
    "MixtureOfLayers",
    "Spans",
    "Store",
    "StoreWriter",
    "__version__",
    "capture",
    "encode",
    "fit",
    "losses",
    "plan",
    "segment",
]

_MODULES = {
    "DistillConfig": "molsaki.training.config",
    "DistillTrainer": "molsaki.training.trainer",
    "MixtureOfLayers": "molsaki.training.mixture",
    "Spans": "molsaki.text.spans",
    "Store": "molsaki.teacher.map_store",
    "StoreWriter": "molsaki.teacher.map_store_writer",
    "capture": "molsaki.modeling.capture",
    "encode": "molsaki.text.alignment",
    "fit": "molsaki.text.fitting",
    "plan": "molsaki.text.alignment",
    "segment": "molsaki.text.segment",
}

register_on_import()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("molsaki-kernels")
    if name != "losses" and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name == "losses":
            return importlib.import_module("molsaki.training.losses")
        return getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError:
        from molsaki.extras import require

        require("train")
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
