"""The score of one reply."""

from __future__ import annotations

import pytest

from molsaki.evaluation.scoring import score
from molsaki.text.examples import Example


@pytest.mark.parametrize(
    ("reply", "mode", "gold", "choices", "prediction", "right"),
    [
        (" 12.0\n13", "answer", "12", None, "12.0", True),
        (" 12\n13", "rationale", "12", None, "13", False),
        (" hm", "answer", "12", None, None, False),
        (" So a park.", "rationale", "park", ("park", "tree"), "park", True),
        (" Paris.\nBerlin", "answer", "paris", None, "Paris.", True),
        ("", "answer", "paris", None, None, False),
    ],
)
def test_score(reply, mode, gold, choices, prediction, right):
    record = score(Example("i", "q", "", gold, None, choices), reply, mode)
    assert (record["prediction"], record["right"], record["gold"]) == (prediction, right, gold)
