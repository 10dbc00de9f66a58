"""Registers the attention implementation "molsaki" with transformers as soon as transformers is imported.

Importing transformers takes seconds, so ``import molsaki`` does not import it. transformers looks up attention
implementations in ``transformers.modeling_utils``; the finder below registers "molsaki" right after that module is
loaded.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

TRIGGER = "transformers.modeling_utils"


def register_on_import() -> None:
    """Register now if transformers is loaded already, else right after `TRIGGER` is loaded. Safe to call repeatedly."""
    if TRIGGER in sys.modules:
        _register()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    importlib.import_module("molsaki.modeling.attention_hook")  # registers when it is imported


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `TRIGGER` as Python would, and adds a call of `_register` after its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
