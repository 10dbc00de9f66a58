"""Scores one reply: finds the answer in it and compares it with the gold answer."""

from __future__ import annotations

from typing import Any

from molsaki.text.answers import find_choice, find_number, parse_number, same_text
from molsaki.text.examples import Example


def score(example: Example, reply: str, mode: str) -> dict[str, Any]:
    """The record of one reply: ``id, question, gold, reply, prediction, right``.

    The prediction is the first number (or choice) of an answer, the last of a rationale, or None. A gold answer that
    is neither is compared as text.

    Args:
        example: the question with its gold answer, and its choices if it has any.
        reply: the text of the model.
        mode: ``"answer"`` or ``"rationale"``.
    """
    last = mode == "rationale"
    gold = parse_number(example.answer)
    if example.choices:
        prediction = find_choice(reply, example.choices, last)
        right = prediction == example.answer
    elif gold is not None:
        prediction = find_number(reply, last)
        right = prediction is not None and parse_number(prediction) == gold
    else:
        lines = reply.strip().splitlines() or [""]
        prediction = lines[-1 if last else 0].strip() or None
        right = same_text(prediction or "", example.answer)
    record = {"id": example.id, "question": example.question, "gold": example.answer, "reply": reply}
    return record | {"prediction": prediction, "right": right}
