"""docs/key-words.md: every line of its tables is what the flags do to the page's samples.

MOLSAKI_PIN=1 writes the tables again; with the slow test, also that of the teacher's words.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from molsaki.batches.tokenized import spans_of
from molsaki.config import KeysConfig, TextOptions
from molsaki.flags import parse
from molsaki.text.examples import example_of, read_examples
from molsaki.text.key_words import KEY_WORDS
from molsaki.text.segment import segment
from molsaki.text.spans import Spans
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/key-words.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


SAMPLE = json.loads(blocks("json")[0])
TEXT = blocks("text")[0].strip().replace("⏎", "\n")


def lines(begin: str) -> list[tuple[str, str]]:
    """The flags of each line of a table whose flags begin so, and the cell beside them."""
    found = re.findall(rf"^\| `({begin}.*?)`(?: \(.*?\))? \|(.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [(flags.replace("\\|", "|"), cell.strip()) for flags, cell in found]


def in_bold(spans: Spans) -> str:
    parts, end = [], 0
    for start, stop in spans.words:
        parts += [spans.text[end:start], f"**{spans.text[start:stop]}**"]
        end = stop
    return "".join(parts) + spans.text[end:]


def check(flags: str, cell: str, expected: str) -> None:
    """Compare a cell of the page, or write it."""
    if os.environ.get("MOLSAKI_PIN"):
        flags, text = flags.replace("|", "\\|"), PAGE.read_text(encoding="utf-8")
        line = re.compile(rf"^(\| `{re.escape(flags)}`(?: \(.*?\))? \|).*\|$", re.MULTILINE)
        PAGE.write_text(line.sub(lambda match: f"{match[1]} {expected} |", text), encoding="utf-8")
    else:
        assert cell == expected, flags


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield
    sys.modules.pop("mine", None)
    from molsaki.text import key_words, sentences

    key_words._own_selector.cache_clear()
    sentences._own_splitter.cache_clear()


@pytest.mark.parametrize(("flags", "cell"), lines("--key "))
def test_key_words(mine, flags, cell):
    example = example_of(SAMPLE, "1", rationale=True, compared=False)
    check(flags, cell, in_bold(spans_of(example, parse(TextOptions, shlex.split(flags)))))


@pytest.mark.parametrize(("flags", "cell"), lines("--splitter "))
def test_steps(mine, flags, cell):
    if "sentencex" in flags:
        pytest.importorskip("sentencex")
    spans = segment("", TEXT, splitter=parse(TextOptions, shlex.split(flags)).splitter)
    check(flags, cell, " ‖ ".join(spans.text[a:b].strip().replace("\n", "⏎") for a, b in spans.steps))


def test_nothing_is_missing():
    """Every selector, policy and splitter has a line; and what the page does not run is valid Python."""
    flags = " ".join(flags for begin in ("--key ", "--splitter ", "--by ") for flags, _ in lines(begin))
    for name in (*KEY_WORDS, "'regex:", "mine:names"):
        assert f"--key {name}" in flags, name
    for name in ("rules", "periods", "numbers", "lines", "paragraphs", "words:", "sentencex:", "mine:"):
        assert f"--splitter {name}" in flags, name
    for name in ("number_words", "key_of", "key_occurrence", "max_key_words", "top", "top_share", "among", "of"):
        assert f"--{name} " in flags, name
    for source in blocks("python"):
        ast.parse(source)


@pytest.mark.slow
def test_words_that_matter_to_a_teacher(smollm2, tmp_path):
    from molsaki.modeling.loading import load_model, load_tokenizer
    from molsaki.teacher.keys import keys

    teacher, tokenizer = load_model(str(smollm2)), load_tokenizer(str(smollm2))
    data = tiny.write_jsonl(tmp_path / "sample.jsonl", [SAMPLE])
    for number, (flags, cell) in enumerate(lines("--by ")):
        output = tmp_path / f"{number}.jsonl"
        files = ["--data_file", str(data), "--output_file", str(output)]
        keys(parse(KeysConfig, [*shlex.split(flags), *files]), teacher, tokenizer)
        check(flags, cell, in_bold(spans_of(read_examples(output)[0], TextOptions(key="given"))))
