"""Other ways to choose key words and steps: patterns, spans of the data, user-defined functions, and policies."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

import molsaki
from molsaki.batches.tokenized import spans_of
from molsaki.config import ExtractConfig, TextOptions
from molsaki.teacher.extract import extract
from molsaki.text.examples import read_examples
from molsaki.text.key_words import selector_of
from molsaki.text.segment import segment
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import OTHER, TOKENIZER, config, examples, logged, trainer

QUESTION, RATIONALE = " Ann has 3 nuts. Bob eats 3.", "They have 3 and 3.\nSo 6, says ann.\n\nAnn is right. "


def steps(**options) -> list[str]:
    spans = segment(QUESTION, RATIONALE, **options)
    assert "".join(spans.text[a:b] for a, b in spans.steps) == spans.text
    return [spans.text[a:b] for a, b in spans.steps]


def words(**options) -> list[str]:
    spans = segment(QUESTION, RATIONALE, **options)
    return [spans.text[a:b] for a, b in spans.words]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"key": "regex:[A-Z][a-z]+"}, ["Ann", "Bob", "They", "So", "Ann"]),
        ({"key": "regex:(?i)(ann) (?:has|is)"}, ["Ann", "Ann"]),
        ({"key": "regex:x*"}, []),
        ({"key": "regex:[A-Z][a-z]+", "key_of": "question"}, ["Ann", "Bob"]),
        ({"key": "regex:(?i)ann|bob", "key_occurrence": "first"}, ["Ann", "Bob"]),
        ({"key": "regex:(?i)ann|bob", "key_occurrence": "last"}, ["Bob", "Ann"]),
        ({"key_occurrence": "first"}, ["3", "6"]),
        ({"key_of": "question"}, ["3", "3"]),
        ({"max_key_words": 3}, ["3", "3", "3"]),
        ({"key_occurrence": "last", "max_key_words": 1}, ["3"]),
        ({"key": "words", "max_key_words": 5}, ["Ann", "has", "3", "nuts", "Bob"]),
        ({"key": "given", "key_spans": ([[1, 4], [17, 20]], [[5, 9]])}, ["Ann", "Bob", "have"]),
        ({"key": "given", "key_spans": ((), ())}, []),
    ],
)
def test_key_words(options, expected):
    assert words(**options) == expected


def test_the_last_occurrence_is_the_last():
    spans = segment(QUESTION, RATIONALE, key="regex:(?i)ann", key_occurrence="last")
    assert spans.words[0][0] == spans.text.rindex("Ann")
    assert segment(QUESTION, RATIONALE, key="regex:(?i)ann", key_occurrence="first").words[0][0] == 0


def test_words_of_scripts_without_spaces():
    spans = segment("我有3个苹果", "Don't ไป naïve", key="words")
    found = [spans.text[a:b] for a, b in spans.words]
    assert found[:6] == ["我", "有", "3", "个", "苹", "果"] and "Don't" in found and found[-1] == "naïve"


@pytest.mark.parametrize(
    ("splitter", "expected"),
    [
        ("lines", ["Ann has 3 nuts. Bob eats 3. ", "They have 3 and 3.\n", "So 6, says ann.\n\n", "Ann is right."]),
        ("paragraphs", ["Ann has 3 nuts. Bob eats 3. ", "They have 3 and 3.\nSo 6, says ann.\n\n", "Ann is right."]),
        (
            "words:4",
            ["Ann has 3 nuts. ", "Bob eats 3. ", "They have 3 and ", "3.\nSo 6, says ", "ann.\n\nAnn is right."],
        ),
        ("words:100", ["Ann has 3 nuts. Bob eats 3. ", "They have 3 and 3.\nSo 6, says ann.\n\nAnn is right."]),
        ("sentencex:en", None),
    ],
)
def test_steps(splitter, expected):
    if splitter.startswith("sentencex"):
        pytest.importorskip("sentencex")
        expected = ["Ann has 3 nuts. ", "Bob eats 3. ", "They have 3 and 3.\n", "So 6, says ann.\n\n", "Ann is right."]
    assert steps(splitter=splitter) == expected
    assert segment("", "", splitter=splitter).steps == ()
    assert len(segment("One", "Two", splitter=splitter).steps) == 2


def test_sentencex_in_other_languages():
    pytest.importorskip("sentencex")
    spans = segment("Herr Dr. Müller kam z.B. am 3. Mai. Er ging.", "彼は来た。行った。", splitter="sentencex:de")
    first = spans.text[slice(*spans.steps[0])]
    assert "".join(spans.text[a:b] for a, b in spans.steps) == spans.text and first.startswith("Herr Dr. Müller")


MINE = """
import re

def names(text):
    return [match.span() for match in re.finditer("Ann|Bob", text)]

def wrong(text):
    return [(4, 2)]

def commas(text):
    return [match.end() for match in re.finditer(",", text)]

def backwards(text):
    return [5, 3]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_selectors.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    yield tmp_path
    sys.modules.pop("my_selectors", None)
    from molsaki.text import key_words, sentences

    key_words._own_selector.cache_clear()
    sentences._own_splitter.cache_clear()


def test_functions_of_ones_own(mine):
    assert words(key="my_selectors:names") == ["Ann", "Bob", "Ann"]
    assert steps(splitter="my_selectors:commas")[1:] == ["They have 3 and 3.\nSo 6, ", "says ann.\n\nAnn is right."]
    with pytest.raises(
        ValueError, match="key: expected ascending, disjoint spans within 0 to .* from my_selectors:wrong"
    ):
        words(key="my_selectors:wrong")
    with pytest.raises(
        ValueError, match="splitter: expected ascending ends within 1 to .* from my_selectors:backwards"
    ):
        steps(splitter="my_selectors:backwards")
    with pytest.raises(ValueError, match="key: expected module:name that can be imported, got 'my_selectors:none'"):
        words(key="my_selectors:none")


def test_spans_in_the_data(tmp_path):
    """They are read from the file, checked, used for the map, and a part of a store's identity."""
    rows = tiny.problems(8)
    for row in rows:
        row["key_spans"] = {"question": [[0, 3]], "rationale": [[0, 5]]}
    path = tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    data = read_examples(path)
    spans = spans_of(data[0], TextOptions(key="given"))
    assert [spans.text[a:b] for a, b in spans.words] == ["Ann", "There"]
    teacher = tiny.model(3, len(OTHER), seed=1)
    options = ExtractConfig(data_files=[str(path)], store=str(tmp_path / "store"), key="given")
    extract(options, teacher, OTHER)
    store = molsaki.Store(tmp_path / "store")
    assert store["p0"].maps.shape[-1] == 2
    live = trainer(tmp_path / "live", data=data, key="given", max_steps=1, save_strategy="no")
    live.train()
    assert logged(live, "words_mean") == [(2,)]
    rows[3]["key_spans"]["question"] = [[4, 7]]
    tiny.write_jsonl(path, rows)
    with pytest.raises(ValueError, match="another"):
        extract(options, teacher, OTHER)
    for wrong, message in (
        ([[0, 3]], "key_spans: expected an object with question and rationale"),
        ({"question": [[0]]}, "key_spans: question[0]: expected [start, stop], two ints, got [0]"),
        ({"answer": []}, "key_spans: expected an object with question and rationale"),
    ):
        rows[0]["key_spans"] = wrong
        tiny.write_jsonl(path, rows)
        found = read_examples(path)
        assert len(found) == 7 and message in found.left_out[0]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (("ab", []), r"key_spans: question\[0\]: expected \[start, stop\], two ints, got 'a'"),
        (([[0.9, 2]], []), r"key_spans: question\[0\]: expected \[start, stop\], two ints"),
        ((["03"], []), r"key_spans: question\[0\]: expected \[start, stop\], two ints, got '03'"),
        (
            ([[0, 99]], []),
            r"key_spans: question\[0\]: expected a span that is not empty within \(0, 28\), got \(0, 99\)",
        ),
        (([[3, 6], [5, 7]], []), r"key_spans: question\[1\]: expected a span that is not empty within \(6, 28\)"),
        (([], [[2, 2]]), r"key_spans: rationale\[0\]: expected a span that is not empty"),
        (([[0, 1]], []), r"key_spans: question\[0\]: \(0, 1\) is blank"),
    ],
)
def test_bad_spans(spans, message):
    with pytest.raises((TypeError, ValueError), match=message):
        segment(QUESTION, RATIONALE, key="given", key_spans=spans)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028"])
def test_line_ends_of_every_kind(end):
    text = f"One line here{end}second line{end}{end}new para{end} {end}{end}last"
    for splitter, expected in (("lines", 4), ("paragraphs", 3)):
        assert len(segment("", text, splitter=splitter).steps) == expected


@pytest.mark.parametrize("key", ["words", "regex:x", "given", "my_selectors:names"])
def test_number_words_are_for_numbers(mine, key):
    with pytest.raises(ValueError, match='number_words: needs key="numbers" or key="random", got'):
        segment(QUESTION, RATIONALE, key=key, number_words=True, key_spans=((), ()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": "given"}, ValueError, "key_spans: required by key='given'"),
        ({"key": r"regex:(?=(\w\w\w))"}, ValueError, "key: expected ascending, disjoint spans within 0 to 27"),
        ({"splitter": "sentencex:klingon"}, ValueError, "splitter: expected sentencex:LANGUAGE with a code such as de"),
        ({"splitter": "sentencex:"}, ValueError, "splitter: expected sentencex:LANGUAGE with a code such as de"),
        ({"splitter": None}, TypeError, "splitter: expected a name, got NoneType"),
        ({"max_key_words": None}, ValueError, "max_key_words: expected an int of at least 0, got None"),
        ({"max_key_words": True}, ValueError, "max_key_words: expected an int of at least 0, got True"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        segment(QUESTION, RATIONALE, **options)


def test_what_functions_must_not_do(mine):
    (mine / "odd_selectors.py").write_text(
        "import numpy as np\nnumber = 3\n"
        "def none(text):\n    pass\n"
        "def numpy_spans(text):\n    return np.array([[0, 3]])\n"
        "def numpy_ends(text):\n    return np.array([4, 9])\n"
    )
    for option, find in (("key", words), ("splitter", steps)):
        with pytest.raises(TypeError, match=f"{option}: expected odd_selectors:number to be a function, got int"):
            find(**{option: "odd_selectors:number"})
        with pytest.raises(TypeError, match=f"{option}: expected .* from odd_selectors:none"):
            find(**{option: "odd_selectors:none"})
    assert words(key="odd_selectors:numpy_spans")[0] == "Ann"
    assert steps(splitter="odd_selectors:numpy_ends")[0] == "Ann "
    (mine / "broken.py").write_text("def names(text:\n")
    with pytest.raises(ValueError, match="key: expected module:name that can be imported, got 'broken:names'"):
        words(key="broken:names")
    sys.modules.pop("odd_selectors")


def test_they_are_parts_of_a_stores_identity(tmp_path, mine):
    """Policies, splitters and the source of functions; a store without the new keys is one with their defaults."""
    data, teacher = (
        [str(tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(8)))],
        tiny.model(3, len(OTHER), seed=1),
    )
    options = ExtractConfig(
        data_files=data,
        store=str(tmp_path / "store"),
        key="my_selectors:names",
        splitter="lines",
        key_occurrence="first",
    )
    extract(options, teacher, OTHER)
    again = {"key": "my_selectors:names", "splitter": "lines", "key_occurrence": "first", "store": options.store}
    from molsaki.training.trainer import DistillTrainer

    def made(**changes):
        args = config(tmp_path / "run", **again | changes)
        return DistillTrainer(tiny.model(2), args=args, processing_class=TOKENIZER, train_dataset=examples())

    assert made().train_dataset.store is not None
    for change, name in (({"splitter": "rules"}, "splitter"), ({"key_occurrence": "all"}, "key occurrence"),
                         ({"max_key_words": 2}, "max key words"), ({"key": "regex:Ann|Bob"}, "key")):  # fmt: skip
        with pytest.raises(ValueError, match=f"this store was written with another {name}"):
            made(**change)
    (mine / "my_selectors.py").write_text(MINE.replace("Ann|Bob", "Ann"))
    sys.modules.pop("my_selectors")
    with pytest.raises(ValueError, match="this store was written with another source of key"):
        made()
    plain = dataclasses.replace(
        options, key="numbers", splitter="rules", key_occurrence="all", store=str(tmp_path / "old")
    )
    extract(plain, teacher, OTHER)
    description = json.loads((tmp_path / "old/store.json").read_text())
    assert description["max_key_words"] == 0 and "source_of_key" not in description


def test_an_error_in_the_module_of_a_selector_is_raised_as_it_is(tmp_path, monkeypatch):
    """It is the traceback that the author needs; an error of the option begins with the option's name."""
    (tmp_path / "failing_selector.py").write_text("x = 1 + 'a'\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="^unsupported operand"):
        selector_of("failing_selector:f", option="among")
    with pytest.raises(ValueError, match="^among: expected module:name that can be imported, got 'nowhere:f'"):
        selector_of("nowhere:f", option="among")
    with pytest.raises(ValueError, match="^among: 'regex:[(]' is not a regular expression"):
        selector_of("regex:(", option="among")
