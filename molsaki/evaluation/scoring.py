"""Scores one reply: finds the answer in it and compares it with the gold answer."""

from __future__ import annotations

from typing import Any

from molsaki.extras import regex
from molsaki.text.answers import (
    TRUTHS,
    final_answer,
    find_choice,
    gold_choice,
    kind_of,
    quantity,
    same_text,
    stated_answer,
    value_at,
    without_latex,
)
from molsaki.text.examples import Example
from molsaki.text.expressions import same_expression
from molsaki.text.numbers import find_numbers


def score(example: Example, reply: str, mode: str) -> dict[str, Any]:
    """The record of one reply: ``id, question, gold, reply, prediction, right``.

    The prediction is the first number (or choice, or yes or no) of an answer, the last one of a rationale, or None. If
    the reply has a ``\\boxed{}`` or ``####``, the prediction is taken from there. A thinking trace is skipped; an
    unfinished one gives no answer. Expressions and other texts are compared with the first line of an answer, the last
    line of a rationale, or the text after "the answer is".

    Args:
        example: the question with its gold answer, and its choices if it has any.
        reply: the text of the model.
        mode: ``"answer"`` or ``"rationale"``.

    Raises:
        ValueError: no reply can match the gold answer; `read_examples` leaves such examples out.
    """
    last = mode == "rationale"
    kind = kind_of(example.answer, example.choices)
    gold = without_latex(final_answer(example.answer))
    given = "" if "<think>" in reply and "</think>" not in reply else final_answer(reply)
    prediction: str | None
    if kind == "choice":
        assert example.choices is not None
        prediction = find_choice(without_latex(given), example.choices, last)
        right = prediction is not None and prediction == gold_choice(gold, example.choices)
    elif kind == "truth":
        prediction = find_choice(given, tuple(TRUTHS), last, letters=False)
        right = prediction is not None and TRUTHS[prediction] == TRUTHS[gold.casefold().strip(" .")]
    elif kind == "number":
        prediction, right = _number(gold, given, last)
    else:
        lines = given.splitlines() or [""]
        line = lines[-1 if last else 0].strip()
        prediction = (stated_answer(line) if line == given.strip() or last else None) or line or None
        if kind == "expression":
            right = prediction is not None and same_expression(final_answer(example.answer), prediction)
        else:
            right = any(same_text(without_latex(one or ""), gold) for one in (line, prediction))
    record = {"id": example.id, "question": example.question, "gold": example.answer, "reply": reply}
    return record | {"prediction": prediction, "right": right}


def _number(gold: str, given: str, last: bool) -> tuple[str | None, bool]:
    """The first or last number, and whether it equals the gold answer; it must not be followed by a different unit."""
    wanted = quantity(gold)
    numbers = find_numbers(given, number_words=False)
    if wanted is None or not numbers:
        return None, False
    start, stop = numbers[-1 if last else 0]
    value, following = value_at(given, (start, stop))
    following = without_latex(following).casefold() if wanted[1] else ""
    is_other_unit = bool(regex.match(r"\p{L}", following)) and not following.startswith(wanted[1].casefold())
    return given[start:stop], value == wanted[0] and not is_other_unit
