"""The key-word selectors."""

from __future__ import annotations

import pytest

from molsaki.cli import main
from molsaki.text import key_words
from molsaki.text.segment import segment
from molsaki.text.spans import Spans
from tests.helpers import processes


def steps(spans: Spans) -> list[str]:
    return [spans.text[a:b] for a, b in spans.steps]


def words(spans: Spans) -> list[str]:
    return [spans.text[a:b] for a, b in spans.words]


@pytest.mark.parametrize(
    "keywords, text, expected",
    [
        (["light"], "Light, lights, LIGHT; daylight (light)-light_", ["Light", "LIGHT", "light"]),
        (["rubber stamp", "stamp"], "a rubber  stamp, a Stamp", ["rubber  stamp", "Stamp"]),
        (["new york", "york city hall"], "new york city hall, New York", ["york city hall", "New York"]),
        (["b a", "a b"], "a b a", ["a b"]),  # as long: the first wins
        (["C++", "$5", "é"], "C++ or c++11, $5 and $55, É", ["C++", "c++", "$5", "É"]),
        (["getting drunk"], "Getting\ndrunk", ["Getting\ndrunk"]),
        (["a", "a", "A"], "a A", ["a", "A"]),
        ([], "nothing 5", []),
        (("x.y",), "xzy x.y", ["x.y"]),
        (["苹果"], "苹果有苹果汁", ["苹果", "苹果"]),
        (["apple"], "我有apple和Apple汁, pineapple", ["apple", "Apple"]),
        (["राम"], "राम और रामायण, राम।", ["राम", "राम"]),  # a mark goes on with the word
        (["사과"], "사과가 3개, 풋사과, 사과주스", ["사과", "사과"]),  # a particle may follow
        (["น"], "น้ำ นม", ["น"]),
        (["café"], "cafe\u0301 CAFÉ cafe", ["cafe\u0301", "CAFÉ"]),
        (["ガ", "abc", "12"], "ｶﾞ ガ ＡＢＣ １２", ["ｶﾞ", "ガ", "ＡＢＣ", "１２"]),
        (["2"], "½ x² 2", ["2"]),
        (["ice cream"], "ice\u3000cream", ["ice\u3000cream"]),
        (["苹果"], "😀苹果e\u0301苹果", ["苹果", "苹果"]),
    ],
)
def test_keywords(keywords, text, expected):
    assert words(segment("", text, key=keywords)) == expected


def test_keywords_of_a_real_example():
    question = (
        "The receptionist loved to use a rubber stamp, she was pleasant in the whole what?\n(a) class\n(c) office"
    )
    spans = segment(question, "Of the above choices, only office makes sense.", key=["rubber stamp", "office"])
    assert words(spans) == ["rubber stamp", "office", "office"]
    assert steps(spans)[1:] == ["(a) class\n", "(c) office ", "Of the above choices, only office makes sense."]


def test_keywords_by_name():
    """``key="keywords"`` with the example's own words is a list of keywords; without any there are no key words."""
    text = ("Ann has 3 red apples.", "3 apples are red.")
    assert segment(*text, key="keywords", keywords=("apples", "red")) == segment(*text, key=["apples", "red"])
    assert segment(*text, key="keywords").words == ()
    assert segment(*text, keywords=("apples",)) == segment(*text)  # numbers do not use them


def test_a_new_selector_is_one_entry(monkeypatch):
    """An entry of the table is a value of ``key``, in Python and on the command line."""

    def capitals(keywords, number_words):
        return lambda text: [(i, i + 1) for i, c in enumerate(text) if c.isupper()]

    monkeypatch.setitem(key_words.KEY_WORDS, "capitals", key_words.Selector("every capital letter", capitals))
    assert words(segment("Ann and Bob?", "Cid.", key="capitals")) == ["A", "B", "C"]
    known = "numbers, keywords, random, words, given, capitals, regex:PATTERN or module:name, got 'digits'"
    with pytest.raises(ValueError, match=f"key: expected one of {known}"):
        segment("Why?", "So.", key="digits")


def test_the_option_lists_the_table(capsys):
    assert main(["extract", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    expected = (
        "--key VALUE The key words: numbers = every number; keywords = each example's own keywords field; random = "
    )
    assert expected in shown


def test_random_words_are_as_many_and_no_numbers():
    """The control: the same words in every process, others for another text."""
    text = "Ann has 12 nuts and 3.5 bags. She gives 4 away, how many does she have after 2 days?"
    spans = segment(text, "Ann has 12 - 4 = 8.", key="random")
    numbers = segment(text, "Ann has 12 - 4 = 8.")
    assert words(spans) == words(segment(text, "Ann has 12 - 4 = 8.", key="random"))
    in_question = [one for one in spans.words if one[1] <= spans.question_end]
    assert len(in_question) == sum(stop <= numbers.question_end for _, stop in numbers.words)
    assert not any(character.isdigit() for word in words(spans) for character in word)
    assert len(spans.words) < len(numbers.words)  # the rationale has two other words only
    program = (
        f"from molsaki import segment; s = segment({text!r}, 'Ann has 12 - 4 = 8.', key='random'); print(list(s.words))"
    )
    run = processes.python("-c", program)
    assert run.stdout.strip() == str(list(spans.words)), run.stderr
    assert segment(text + " So?", "", key="random").words != spans.words
