"""Distillation of a teacher's stepwise attention on key words (MoLSAKI, arXiv 2604.15701).

The names below are imported on first use: ``import molsaki`` imports neither torch nor transformers. The attention
    implementation "molsaki" is registered with transformers when that is imported, before or after.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from molsaki.modeling.registration import register_on_import

if TYPE_CHECKING:
    from molsaki.method import losses as losses
    from molsaki.method.mixture import MixtureOfLayers as MixtureOfLayers
    from molsaki.modeling.attention_map import AttentionMap as AttentionMap
    from molsaki.modeling.attention_map import attention_map as attention_map
    from molsaki.modeling.attention_map import attention_while_generating as attention_while_generating
    from molsaki.modeling.capture import capture as capture
    from molsaki.store.map_store import Store as Store
    from molsaki.store.map_store_writer import StoreWriter as StoreWriter
    from molsaki.text.alignment import encode as encode
    from molsaki.text.alignment import plan as plan
    from molsaki.text.examples import Example as Example
    from molsaki.text.fitting import fit as fit
    from molsaki.text.segment import segment as segment
    from molsaki.text.spans import Spans as Spans
    from molsaki.text.token_ids import plan_from_ids as plan_from_ids
    from molsaki.text.token_ids import right_padded as right_padded
    from molsaki.training.attention_loss import StepwiseAttentionLoss as StepwiseAttentionLoss
    from molsaki.training.config import DistillConfig as DistillConfig
    from molsaki.training.trainer import DistillTrainer as DistillTrainer

    __version__: str

_MODULES = {
    "AttentionMap": "molsaki.modeling.attention_map",
    "DistillConfig": "molsaki.training.config",
    "DistillTrainer": "molsaki.training.trainer",
    "Example": "molsaki.text.examples",
    "MixtureOfLayers": "molsaki.method.mixture",
    "Spans": "molsaki.text.spans",
    "StepwiseAttentionLoss": "molsaki.training.attention_loss",
    "Store": "molsaki.store.map_store",
    "StoreWriter": "molsaki.store.map_store_writer",
    "attention_map": "molsaki.modeling.attention_map",
    "attention_while_generating": "molsaki.modeling.attention_map",
    "capture": "molsaki.modeling.capture",
    "encode": "molsaki.text.alignment",
    "fit": "molsaki.text.fitting",
    "losses": "molsaki.method.losses",
    "plan": "molsaki.text.alignment",
    "plan_from_ids": "molsaki.text.token_ids",
    "right_padded": "molsaki.text.token_ids",
    "segment": "molsaki.text.segment",
}
__all__ = ["__version__", *_MODULES]

register_on_import()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return importlib.metadata.version("molsaki-kernels")
        except importlib.metadata.PackageNotFoundError:  # a checkout on Python's path, not installed
            return "unknown"
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError:
        from molsaki.extras import require

        require("train")
        raise
    return module if name == "losses" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
