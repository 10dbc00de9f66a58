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
        ("So it is.\nThe answer is Paris.", "rationale", "paris", None, "Paris", True),
        ("72", "answer", "48/2 = <<48/2=24>>24\n48+24 = <<48+24=72>>72\n#### 72", None, "72", True),
        ("72", "answer", "#### 72", None, "72", True),
        ("In total <<48+24=72>>72", "answer", "72", None, "72", True),
        ("5 + 67\n#### 72", "answer", "72", None, "72", True),
        ("desk", "answer", "Desk", ("desk", "river"), "desk", True),
        ("Answer: B", "answer", "B", ("desk", "river"), "river", True),
        ("1.5", "answer", "5", ("5", "15"), None, False),
        ("$9{,}000$", "answer", "9000", None, "9{,}000", True),
        ("\\frac{3}{4}", "answer", "3/4", None, "\\frac{3}{4}", True),
        ("So \\boxed{9{,}000} (step 2)", "rationale", "9,000", None, "9{,}000", True),
        ("答案是15", "rationale", "15", None, "15", True),
        ("<think>1 2</think>\n\nThe answer is **17**.", "answer", "17", None, "17", True),
        ("<think>so 17", "rationale", "17", None, None, False),
        ("Yes, since no one can", "answer", "yes", None, "yes", True),
        ("There is no way, so no.", "rationale", "yes", None, "no", False),
        ("True", "answer", "yes", None, "true", True),
        ("So 3+2=5 apples.", "rationale", "5 apples", None, "5", True),
        ("5 pears", "answer", "5 apples", None, "5", False),
        ("5 cm", "answer", "5\\text{ cm}", None, "5", True),
        ("3 million", "answer", "3", None, "3", False),
        ("-5", "answer", "-$5", None, "-5", True),
    ],
)
def test_score(reply, mode, gold, choices, prediction, right):
    record = score(Example("i", "q", "", gold, None, choices), reply, mode)
    assert (record["prediction"], record["right"], record["gold"]) == (prediction, right, gold)


@pytest.mark.parametrize("gold", ["?", "first line\nsecond line", "..."])
def test_a_gold_answer_that_nothing_can_match_is_an_error(gold):
    with pytest.raises(ValueError, match="expected"):
        score(Example("i", "q", "", gold), "anything", "answer")


@pytest.mark.parametrize(
    ("gold", "reply", "right"),
    [
        ("\\frac{\\sqrt{3}}{2}", "So $\\boxed{\\frac{\\sqrt 3}{2}}$", True),
        ("x^2+1", "The answer is $1+x^2$.", True),
        ("(3,4)", "\\boxed{(3, 5)}", False),
        ("[0,1)", "\\boxed{[0, 1)}", True),
        ("2\\pi", "I do not know", False),
    ],
)
def test_expressions(gold, reply, right):
    pytest.importorskip("math_verify")
    assert score(Example("i", "q", "", gold), reply, "rationale")["right"] is right
