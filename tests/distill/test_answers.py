"""Answers in texts: numbers by value, choices and other texts by their words."""

from __future__ import annotations

from fractions import Fraction

import pytest

from molsaki.text.answers import find_choice, find_number, parse_number, same_answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("12.0", 12), ("1,200", 1200), ("$1,200.50", Fraction("1200.5")), ("-5", -5), ("−5", -5), ("+7", 7),
        ("3/4", Fraction(3, 4)), ("1 1/2", Fraction(3, 2)), ("⅓", Fraction(1, 3)), ("1½", Fraction(3, 2)),
        (".5", Fraction(1, 2)), ("5%", 5), ("1e3", 1000), ("12.", 12),
        ("1e99999999", None), ("1/0", None), ("twelve", None), ("1 2", None),
        ("1,20", None), ("", None), ("5 apples", None),
    ],
)  # fmt: skip
def test_parse_number(text, value):
    assert parse_number(text) == value


def test_find_number():
    text = " So 3 * 4 = 12, or 1,200.0 cents."
    assert (find_number(text), find_number(text, last=True)) == ("3", "1,200.0")
    assert find_number("no idea") is None


def test_find_choice():
    choices = ("park", "coloring book", "math problem")
    assert find_choice("Not a park but a Math problem.", choices) == "park"
    assert find_choice("Not a park but a Math  problem.", choices, last=True) == "math problem"
    assert find_choice("The answer is (b)", choices) == "coloring book"
    assert find_choice("c", choices) == "math problem"
    assert find_choice("(z)", choices) is None
    assert find_choice("parking", choices) is None


def test_same_answer():
    assert same_answer("12", "12.0")
    assert same_answer("Math Problem.", "math problem")
    assert not same_answer("12", "13")
    assert not same_answer("12", "")
