"""Distil where a teacher looks while it reasons (MoLSAKI, arXiv 2604.15701).

Importing the package registers the attention implementation "molsaki" with transformers.
"""

from __future__ import annotations

import importlib

from molsaki.modeling.hooks import capture
from molsaki.text.segment import Spans, segment
from molsaki.text.tokens import encode, fit, plan
from molsaki.training import losses
from molsaki.training.mixture import MixtureOfLayers

# Imported when asked for: transformers' Trainer takes seconds, and who only wants maps never needs it.
_LATER = {
    "DistillConfig": "molsaki.config",
    "DistillTrainer": "molsaki.training.trainer",
    "Store": "molsaki.teacher.store",
    "StoreWriter": "molsaki.teacher.store",
}

__all__ = [
    "DistillConfig",
    "DistillTrainer",
    "MixtureOfLayers",
    "Spans",
    "Store",
    "StoreWriter",
    "capture",
    "encode",
    "fit",
    "losses",
    "plan",
    "segment",
]


def __getattr__(name: str):
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
