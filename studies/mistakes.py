"""Scores rationales of the study's world: exact or not, and where a wrong one first departs from the right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# plan: which fact comes next; base: the first amount; carry: the amount of the step before; operand: which number of
# the question, or its sign; sum: the result; form: anything else, such as a missing step.
KINDS = ("plan", "base", "carry", "operand", "sum", "form")


def score(rows: Sequence[dict[str, Any]], replies: Sequence[str]) -> dict[str, list[float]]:
    """Per example: ``exact`` (1 if the rationale is the right one) and one number per kind of first mistake."""
    kinds = [first_mistake(reply, row["rationale"]) for row, reply in zip(rows, replies, strict=True)]
    found = {f"first_mistake_{kind}": [float(kind == one) for one in kinds] for kind in KINDS}
    return {"exact": [float(kind is None) for kind in kinds]} | found


def first_mistake(reply: str, rationale: str) -> str | None:
    """The kind of the first step that differs, None if none does. What follows the rationale is not compared."""
    steps, wanted = (text.strip().removesuffix(".").split(". ") for text in (reply, rationale))
    for step, right in zip(steps, wanted, strict=False):
        if step == right:
            continue
        if "=" not in right:
            return "base" if right.split()[-1].isdigit() else "plan"
        found, expected = step.split(), right.split()  # name amount sign number = result
        if len(found) != 6 or found[4] != "=":
            return "form"
        if found[0] != expected[0]:
            return "plan"
        if found[1] != expected[1]:
            return "carry"
        return "operand" if found[2:4] != expected[2:4] else "sum"
    return None if len(steps) >= len(wanted) else "form"
