"""Imports user-defined functions and objects that an option names as ``module:name``, such as ``mine:objective``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast


def is_named(value: object) -> bool:
    """True for ``module:name``."""
    return isinstance(value, str) and ":" in value


def named(option: str, value: str, folder: str | Path | None = None) -> Any:
    """The object that ``module:name`` names. Modules are also looked for in ``folder``, or in the current directory.

    Raises:
        ValueError: it cannot be imported; the message begins with ``option``.
    """
    module, _, name = value.partition(":")
    look_in(folder or ".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(f"{option}: expected module:name that can be imported, got {value!r}: {error}") from error


def named_function(option: str, value: str) -> Callable[..., Any]:
    """The function that ``module:name`` names, see `named`.

    Raises:
        TypeError: it is not a function.
    """
    found = named(option, value)
    if not callable(found):
        raise TypeError(f"{option}: expected {value} to be a function, got {type(found).__name__}")
    return cast("Callable[..., Any]", found)


def look_in(folder: str | Path) -> None:
    """Search this folder for modules before all others."""
    place = str(Path(folder).resolve())
    if place not in sys.path:
        sys.path.insert(0, place)


def source(option: str, value: str, folder: str | Path | None = None) -> str:
    """The source of the module of ``module:name``, by which changes are detected; empty if there is none."""
    named(option, value, folder)
    try:
        return inspect.getsource(sys.modules[value.partition(":")[0]])
    except (OSError, TypeError):
        return ""
