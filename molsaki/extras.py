"""The check that an optional part of the package is installed, with an error that names the extra to install."""

from __future__ import annotations

import importlib.util

MODULES = {
    "train": ("transformers", "accelerate", "safetensors", "filelock", "yaml", "tqdm", "scipy", "regex"),
    "plot": ("matplotlib",),
    "math": ("math_verify",),
    "completion": ("shtab",),
}


def require(extra: str) -> None:
    """Check that the modules of an extra can be imported, without importing them."""
    missing = [name for name in MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{", ".join(missing)}: expected to be installed; run pip install "molsaki-kernels[{extra}]"')
