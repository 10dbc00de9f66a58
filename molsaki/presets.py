"""`PRESETS`: named values of the method's options, for ``--preset`` and for configs that are built in Python.

A preset sets options that are not given explicitly; flags and YAML keys override it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PRESETS: dict[str, dict[str, Any]] = {
    # Every choice as in MoLSAKI, arXiv 2604.15701.
    "paper": {
        "key": "numbers",
        "number_words": False,
        "splitter": "periods",
        "objective": "molsaki",
        "alpha": 0.5,
        "beta": 1.0,
        "beta_until": 1.0,
        "normalise": "softmax",
        "causal_words": False,
        "map_steps": "all",
        "teacher_temperature": 1.0,
        "mixture": "mixture",
        "map_heads": "mean",
        "tau_t": 0.1,
        "tau_s": 0.5,
        "teacher_scale": "none",
        "router": "joint",
        "value_heads": "concat",
        "pooling": "sum",
    },
    # No form of the attention loss made clearly better students in the study of docs/evidence.md.
    "recommended": {"objective": "dss"},
}


def options(preset: str, config_class: type[DataclassInstance]) -> dict[str, Any]:
    """The values of a preset for those options that a config has: ``DistillConfig(**options("paper", DistillConfig))``.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    names = {field.name for field in dataclasses.fields(config_class)}
    return {name: value for name, value in PRESETS[preset].items() if name in names}
