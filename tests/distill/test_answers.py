"""Answers in texts: numbers by value, choices and other texts by their words."""

from __future__ import annotations

from fractions import Fraction

import pytest

from molsaki.text.answers import (
    final_answer,
    find_choice,
    gold_choice,
    kind_of,
    parse_number,
    quantity,
    same_answer,
    stated_answer,
)
from molsaki.text.numbers import find_numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("12.0", 12), ("1,200", 1200), ("$1,200.50", Fraction("1200.5")), ("-5", -5), ("−5", -5), ("+7", 7),
        ("3/4", Fraction(3, 4)), ("1 1/2", Fraction(3, 2)), ("⅓", Fraction(1, 3)), ("1½", Fraction(3, 2)),
        (".5", Fraction(1, 2)), ("5%", 5), ("1e3", 1000), ("12.", 12),
        ("1e99999999", None), ("1/0", None), ("twelve", None), ("1 2", None),
        ("1,20", None), ("", None), ("5 apples", None), ("十五", None), ("8-10", None), ("1" * 5000, None),
        ("-$5", -5), ("$-5", -5), ("- 5", -5), ("−€1,000.5", Fraction("-1000.5")), ("\\$36", 36), ("5\\%", 5),
        ("9{,}000", 9000), ("12\\,000", 12000), ("1,\\!000", 1000), ("$\\frac{3}{4}$", Fraction(3, 4)),
        ("-\\frac34", Fraction(-3, 4)), ("\\dfrac{-3}{4}", Fraction(-3, 4)), ("2\\frac{1}{2}", Fraction(5, 2)),
        ("1,00,000", 100000), ("१,००,०००", 100000), ("１，２００", 1200), ("１２．５", Fraction(25, 2)), ("5 €", 5),
        ("٣٫٥", Fraction(7, 2)),
        ("1.234,56", Fraction("1234.56")), ("1.234.567", 1234567), ("12\u00a0345,6", Fraction("12345.6")),
        ("1'234.5", Fraction("1234.5")), ("3万", 30000), ("1万2千", 12000), ("1.5亿", 150_000_000), ("2万3000", 23000),
        ("\u061c-٥", -5), ("15。", 15),
    ],
)  # fmt: skip
def test_parse_number(text, value):
    assert parse_number(text) == value


def test_numbers_as_they_are_written():
    text = " So 3 * 4 = 12, or 1,200.0 cents."
    assert [text[start:stop] for start, stop in find_numbers(text, number_words=False)] == ["3", "4", "12", "1,200.0"]
    assert find_numbers("no idea", number_words=False) == []


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


PLACES = ("desk", "river", "cloud")


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("Answer: B", "river", "river"), ("The answer is A.", "desk", "desk"), ("the answer is a.", "desk", "desk"),
        ("The answer is a cloud", "cloud", "cloud"), ("A cloud is wet.", "cloud", "cloud"), ("**B**", "river", "river"),
        ("B. I think so", "river", None), ("Answer: B. Unlike the desk", "river", "river"), ("(b)", "river", "river"),
        ("C is correct", "cloud", "cloud"), ("I choose (C).", "cloud", "cloud"), ("option B", "river", "river"),
        ("Not the desk but a river.", "desk", "river"), ("So, the answer is the river, not a cloud.", "river", "river"),
        ("apple(s)", None, None), ("Answer: D", None, None), ("答案是B。", "river", "river"),
        ("选Ｃ", "cloud", "cloud"),
        ("（Ｂ）", "river", "river"), ("a river", "river", "river"), ("riverside", None, None),
    ],
)  # fmt: skip
def test_choices_by_letter_and_statement(text, first, last):
    assert (find_choice(text, PLACES), find_choice(text, PLACES, last=True)) == (first, last)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("1.5", None),
        ("-5", "-5"),
        ("5.0", "5"),
        ("$5", "5"),
        ("15", "15"),
        ("1,5", "5"),
        ("0.5 km", None),
        ("7 km", "7 km"),
    ],
)
def test_choices_that_are_numbers(text, choice):
    assert find_choice(text, ("5", "15", "-5", "5 km", "7 km"), last=True) == choice


def test_gold_choices():
    assert [gold_choice(gold, PLACES) for gold in ("Desk", "B", "(c)", "b.", "(B) river", "(B) desk", "D", "2")] == [
        "desk", "river", "cloud", "river", "river", None, None, None
    ]  # fmt: skip
    assert gold_choice("1", ("0.5", "1.0")) == "1.0"


def test_final_and_stated_answers():
    assert final_answer("48/2 = <<48/2=24>>24\n#### 72") == "72"
    assert final_answer("\\boxed{1} or \\boxed{\\frac{3}{4}}.") == "\\frac{3}{4}"
    assert final_answer("a <<1+1=2>>2") == "a 2" and final_answer("<think>7</think> 5") == "5"
    assert stated_answer("5 + 12 = 17. The answer is **17** apples.") == "17"
    assert stated_answer("The answer is Rome. Not 5.") == "Rome"
    assert stated_answer("答案是15。") == "15" and stated_answer("So 5.") is None


def test_quantities():
    assert (
        quantity("5 apples") == (5, "apples")
        and quantity("15个") == (15, "个")
        and quantity("9 (apples)") == (9, "apples")
    )
    assert quantity("1.5 million") == (1_500_000, "") and quantity("90°") == (90, "°") and quantity("5 m") == (5, "m")
    assert [quantity(text) for text in ("2x", "8-10", "7:2", "Apollo 11", "2020-01-05")] == [None] * 5
    assert same_answer("5 apples", "5") and not same_answer("5 apples", "5 pears") and same_answer("A", "desk", PLACES)


@pytest.mark.parametrize("gold", ["\\sqrt{2}", "(3,4)", "[0,1)", "2x+1", "3,5", "x^2", "2\\pi", "x - 5"])
def test_expressions_need_the_extra(gold, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'the expression .*run pip install "molsaki-kernels\[math\]"'):
        kind_of(gold, None)


@pytest.mark.parametrize("gold", ["Rome", "and/or", "mother-in-law", "8-10", "7:2", "2020-01-05", "C++", "vitamin B12"])
def test_texts_are_no_expressions(gold):
    assert kind_of(gold, None) == "text"
