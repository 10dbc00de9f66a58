"""The modules that each extra of pyproject.toml installs, and the error without them.

An error of this module names the extra to install. `molsaki.exits` tells it from other failed imports, which are faults
of the program.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import regex as regex

MODULES = {  # the extras that molsaki and molsaki_kernels import; a test compares them with pyproject.toml
    "train": (
        "transformers", "accelerate", "safetensors", "filelock", "httpx", "yaml", "tqdm", "scipy", "regex", "peft",
        "tensorboard",
    ),
    "plot": ("matplotlib",),
    "math": ("math_verify",),
    "triton": ("triton",),
    "flash": ("flash_attn",),
    "fused": ("liger_kernel",),
    "quantize": ("bitsandbytes",),
    "parquet": ("pyarrow",),
    "languages": ("sentencex",),
    "completion": ("shtab",),
    "notebook": ("pandas",),
}  # fmt: skip
FOR_ONE_OPTION = ("peft", "tensorboard")  # of the extra train; a command without that option runs without them


class MissingExtra(ImportError):
    """A package is not installed; the message names the extra that installs it."""


def missing(extra: str, *modules: str) -> list[str]:
    """Those modules of an extra that are not installed, without importing any.

    Args:
        modules: the ones to look for. Default: all but those of `FOR_ONE_OPTION`.
    """
    names = modules or [name for name in MODULES[extra] if name not in FOR_ONE_OPTION]
    return [name for name in names if importlib.util.find_spec(name) is None]


def require(extra: str, *modules: str, by: str = "") -> None:
    """Check that the modules of an extra are installed, without importing them.

    Args:
        modules: the ones to look for, as in `missing`.
        by: what needs them, such as ``--quantize: 4bit``; the message begins with it.

    Raises:
        MissingExtra: one is not.
    """
    names = ", ".join(missing(extra, *modules))
    if names and by:
        raise MissingExtra(
            f'{by} needs the package {names}, which is not installed; run pip install "molsaki-kernels[{extra}]"'
        )
    if names:
        raise MissingExtra(f'{names}: expected to be installed; run pip install "molsaki-kernels[{extra}]"')


class _NoRegex:
    """Stands for the package regex where it is not installed.

    Modules that compile patterns can then be imported, which ``--help`` needs for the names of selectors and formats;
    a search is refused.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "compile":
            return lambda *args: self
        return 0 if name.isupper() else self._refuse  # a flag such as VERBOSE, or a function

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        require("train", "regex")
        raise AssertionError("regex was not installed when it was imported, and now is")


def __getattr__(name: str) -> Any:
    """``from molsaki.extras import regex``: the package, or its stand-in."""
    if name != "regex":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _NoRegex() if missing("train", "regex") else importlib.import_module("regex")
