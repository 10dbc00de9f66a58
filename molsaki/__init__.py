"""Distil where a teacher looks while it reasons (MoLSAKI, arXiv 2604.15701)."""

from __future__ import annotations

import importlib

from molsaki.modeling.registration import register_on_import

_LATER = {
    "DistillConfig": "molsaki.config",
    "DistillTrainer": "molsaki.training.trainer",
    "MixtureOfLayers": "molsaki.training.mixture",
    "Spans": "molsaki.text.segment",
    "Store": "molsaki.teacher.store",
    "StoreWriter": "molsaki.teacher.store",
    "capture": "molsaki.modeling.capture",
    "encode": "molsaki.text.tokens",
    "fit": "molsaki.text.tokens",
    "plan": "molsaki.text.tokens",
    "segment": "molsaki.text.segment",
}
__all__ = [*_LATER, "losses"]


def __getattr__(name: str):
    if name == "losses":
        return importlib.import_module("molsaki.training.losses")
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_on_import()
