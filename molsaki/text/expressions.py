"""Compares answers that are expressions, ``\\sqrt{2}`` or ``(3, 4)``, with math-verify, the extra ``math``."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any


def check(gold: str) -> None:
    """Raise a ValueError unless math-verify is installed and can read this gold answer."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            f"expected a number, a choice, yes or no, or a text, got the expression {gold!r}; to compare expressions, "
            'run pip install "molsaki-kernels[math]"'
        )
    if not _parsed(gold):
        raise ValueError(f"expected an expression that math-verify can read, got {gold!r}")


def same_expression(gold: str, answer: str) -> bool:
    """Return whether an answer has the value of the gold answer, by math-verify's rules."""
    from math_verify import verify

    return bool(verify(list(_parsed(gold)), list(_parsed(answer))))


@functools.lru_cache(4096)
def _parsed(text: str) -> tuple[Any, ...]:
    from math_verify import parse

    return tuple(parse(f"\\boxed{{{text}}}"))
