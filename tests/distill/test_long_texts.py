"""Texts of 131,072 tokens: time grows with their length, and memory, pictures and messages stay within bounds."""

from __future__ import annotations

import dataclasses
import sys
import time
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch

from molsaki.batches import dataset as dataset_module
from molsaki.batches.dataset import prepare
from molsaki.batches.tokenized import TokenizerSpec
from molsaki.config import ExtractConfig, TextOptions
from molsaki.method import mixture
from molsaki.modeling.attention_map import AttentionMap
from molsaki.plotting import map_pictures, style
from molsaki.store.map_store import Entry
from molsaki.teacher import extract as extract_module
from molsaki.text.alignment import encode
from molsaki.text.answers import find_choice
from molsaki.text.examples import Example
from molsaki.text.fitting import fit
from molsaki.text.frames import TextChanged
from molsaki.text.segment import segment
from molsaki.text.sentences import SPLITTERS
from molsaki.text.spans import Spans
from molsaki.text.token_ids import steps_and_words
from molsaki_kernels import StepPlan
from tests.helpers import tiny

SENTENCES = (
    "Natalia sold {a} clips to her friends in April, and {b} in May. ",
    "So that is {a} + {b} = {c} clips altogether.\n",
    "Wait, is that right? Each costs $1.50, which makes {c}/2 of them ${d}.75.\n\n",
)
QUESTION = "How many clips did Natalia sell in 2 months?"
SHORT, LONG = 120_000, 480_000  # characters; the longer text has about 131,072 tokens of an ordinary tokenizer
LINEAR = 8.0  # times as long for four times the text: linear is 4, quadratic 16
THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{% if '</think>' in m.content %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}"
    "\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].strip() }}{% endif %}{% endfor %}"
)


def trace(characters: int) -> str:
    pieces: list[str] = []
    length = n = 0
    while length < characters:
        pieces.append(SENTENCES[n % 3].format(a=n, b=n % 97, c=n + n % 97, d=n % 89))
        length, n = length + len(pieces[-1]), n + 1
    return "".join(pieces).strip()


TEXTS = {size: trace(size) for size in (SHORT, LONG)}
SMALLER = {size // 8: trace(size // 8) for size in (SHORT, LONG)}  # for tokenizers of few merges


def grows_linearly(run: Callable[[str], object], texts: dict[int, str] = TEXTS) -> bool:
    """Whether processor time grows with the length alone; another try where something disturbed the measurement."""
    ratios = []
    for _ in range(4):
        seconds = []
        for text in texts.values():
            begin = time.process_time()
            run(text)
            seconds.append(time.process_time() - begin)
        ratios.append(seconds[1] / max(seconds[0], 1e-9))
        if ratios[-1] < LINEAR or seconds[1] < 0.02:
            return True
    print(ratios)
    return False


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """A splitter and a selector of a user."""
    module = types.ModuleType("own_functions")
    module.ends = lambda text: [i + 1 for i, c in enumerate(text) if c == "."]
    module.keys = lambda text: [(i, i + 1) for i, c in enumerate(text) if c == "+"]
    monkeypatch.setitem(sys.modules, "own_functions", module)


@pytest.mark.parametrize("splitter", [*SPLITTERS, "words:40", "own_functions:ends", "sentencex:en"])
def test_splitters(splitter):
    if splitter.startswith("sentencex"):
        pytest.importorskip("sentencex")
    assert grows_linearly(lambda text: segment(QUESTION, text, splitter=splitter, key=()))


@pytest.mark.parametrize("key", ["numbers", "random", "words", "regex:[0-9]+", "own_functions:keys", "keywords"])
def test_selectors(key):
    keywords = ["clips", "Natalia", "that is", "costs"] if key == "keywords" else ()
    assert grows_linearly(lambda text: segment(QUESTION, text, key=key, keywords=keywords, splitter="lines"))


@pytest.mark.parametrize("options", [{"number_words": True}, {"key_occurrence": "last"}, {"max_key_words": 7}], ids=str)
def test_options_of_segment(options):
    assert grows_linearly(lambda text: segment(QUESTION, text, **options))


def test_the_start_of_the_rationale_is_found_without_a_copy():
    spans = [Spans("a b" + "c" * n, ((0, 2), (2, n + 3)), (), 1) for n in (10, 4_000_000)]
    assert [one.rationale_start for one in spans] == [2, 2]
    seconds = []
    for one in spans:
        begin = time.process_time()
        for _ in range(500):
            one.rationale_start  # noqa: B018
        seconds.append(time.process_time() - begin)
    assert seconds[1] < 20 * seconds[0] + 0.01  # a copy of four million characters takes a thousand times as long


@pytest.mark.parametrize("template", ["plain", "Q: {question} A: {rationale}", "chat"])
def test_tokens_of_steps_and_words(template):
    tokenizer = tiny.tokenizer(100)
    tokenizer.chat_template = THINKING

    def run(text: str) -> None:
        spans = segment(QUESTION, f"<think>{text}</think>So 5.")
        encoded = encode(spans, tokenizer, template=template)
        plan = StepPlan.from_spans([encoded.steps], [encoded.words])
        assert plan.num_words == len(spans.words)

    assert grows_linearly(run, SMALLER)


def test_cutting_a_text():
    tokenizer = tiny.tokenizer(100)
    sides = [(tokenizer, template) for template in ("plain", "Question: {question} A: {rationale}")]
    assert grows_linearly(
        lambda text: fit(segment(QUESTION, text), *((*side, len(text) // 4) for side in sides)), SMALLER
    )


def test_steps_and_words_of_ids():
    tokenizer = tiny.tokenizer(100)
    ids = {text: tokenizer(text).input_ids for text in SMALLER.values()}
    assert grows_linearly(lambda text: steps_and_words(ids[text], 40, tokenizer, {}), SMALLER)


def test_choices_in_a_long_reply():
    texts = {n: "They are blue or red; 3 of 5. " * n for n in (500, 2000)}
    assert grows_linearly(lambda text: find_choice(text, ("red", "blue", "3", "5"), last=True), texts)
    assert find_choice(texts[500], ("red", "blue", "3", "5"), last=True) == "5"


def test_sentencex_cuts_every_paragraph_of_a_long_text():
    pytest.importorskip("sentencex")
    paragraph = "She has 3 pears. He has 1.5 apples!"
    for separator in ("\n\n", "\r\n\r\n", "\n\n \n"):
        spans = segment("Why?", separator.join([paragraph] * 2000), splitter="sentencex:en")
        assert len(spans.steps) == 4001 and {spans.text[a:b].strip() for a, b in spans.steps[1:]} == {
            "She has 3 pears.", "He has 1.5 apples!",
        }  # fmt: skip


def test_messages_show_a_part_of_a_long_text():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}"
    with pytest.raises(TextChanged, match=r"characters\)$") as error:
        encode(segment(QUESTION, f"<think>{SMALLER[SHORT // 8]}</think>So 4."), tokenizer, template="chat")
    assert len(str(error.value)) < 1000


def test_kept_examples_have_bounded_size(monkeypatch):
    rows = [Example(r["id"], r["question"], r["rationale"] * 20, r["answer"]) for r in tiny.problems(6)]
    spec = TokenizerSpec(tiny.tokenizer(), "plain", None)
    whole = prepare(rows, TextOptions(), spec)
    size = len(whole._kept[0])
    monkeypatch.setattr(dataset_module, "KEPT_BYTES", 2 * size)
    some = prepare(rows, TextOptions(), spec)
    assert len(whole._kept) == 6 and 2 <= len(some._kept) <= 3
    for n in range(6):
        assert some[n][0].id == f"p{n}" and np.array_equal(some[n][0].explain.input_ids, whole[n][0].explain.input_ids)


def test_a_shard_of_large_maps_has_fewer_examples(tmp_path, monkeypatch):
    rows = [Example(str(n), QUESTION, trace(2000 + n), "5") for n in range(200)]
    config = ExtractConfig(shard_size=100)
    spans = segment(QUESTION, rows[100].rationale)
    entries = len(spans.steps) * len(spans.words)
    monkeypatch.setattr(extract_module, "SHARD_BYTES", 10.5 * 4 * entries)
    size = extract_module._shard_size(rows, config, 4, tmp_path)
    assert 9 <= size <= 11 and extract_module._shard_size(rows, config, 4 * 30, tmp_path) == 1
    assert extract_module._shard_size(rows, dataclasses.replace(config, shard_size=3), 4, tmp_path) == 3
    monkeypatch.undo()
    assert extract_module._shard_size(rows, config, 4, tmp_path) == 100


def test_long_and_short_texts_do_not_share_padded_maps(monkeypatch):
    def pending(steps: int, words: int) -> extract_module._Pending:
        text = types.SimpleNamespace(input_ids=[0] * 10, steps=[(0, 1)] * steps, words=[[0]] * words)
        return extract_module._Pending(0, Entry("a", 0), text)

    texts = [pending(2, 3), pending(2, 3), pending(50, 100), pending(2, 3), pending(2, 3)]
    assert [len(b) for b in extract_module._grouped(texts, 1000, True)] == [5]
    monkeypatch.setattr(extract_module, "MAP_ENTRIES", 9000)
    assert [len(b) for b in extract_module._grouped(texts, 1000, True)] == [2, 1, 2]
    assert [len(b) for b in extract_module._grouped([pending(100, 100)] * 2, 1000, True)] == [1, 1]


def test_layer_scores_of_large_maps(monkeypatch):
    maps, plan = torch.rand(2, 7, 5, 9), tiny.plan_of((5, 9), (3, 4))
    expected = mixture.layer_scores(maps, plan)
    monkeypatch.setattr(mixture, "SCORED_AT_ONCE", 2 * 2 * 5 * 9)
    torch.testing.assert_close(mixture.layer_scores(maps, plan), expected)


def test_a_picture_of_a_large_map(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, *_: figures.append(figure))
    maps = {"teacher": np.zeros((2000, 3501)), "student": np.full((2000, 3501), 0.01)}
    maps["teacher"][1234, 2345] = 0.7
    steps, words = [f"Step {s}." for s in range(2000)], [str(w) for w in range(3501)]
    map_pictures.plot_map(maps, steps, words, tmp_path / "map.png")
    tokens = {"teacher": [9] * 2000, "student": [100] * 2000}
    map_pictures.plot_attention_by_step(maps, tokens, steps, tmp_path / "by.png")
    drawn, by_step = figures
    for figure in figures:
        assert all(side * 150 < 4_000 for side in figure.get_size_inches())  # pixels
    image = drawn.axes[0].images[0].get_array()
    assert image.shape == (400, 876) and image.max() == 0.7
    assert image[1234 // 5, 2345 // 4] == 0.7
    assert "1235. Step 1234." in [label.get_text() for label in drawn.axes[2].get_yticklabels()]
    assert "#2346 2345" in [label.get_text() for label in drawn.axes[2].get_xticklabels()]
    assert by_step.axes[1].patches[0].get_width() == pytest.approx(35.01)  # 3501 x 0.01 of 100 tokens


def test_a_large_map_is_printed_in_part():
    values = np.zeros((1, 3000, 5000), np.float32)
    values[0, 2999, 4999] = 7
    rows = [f"Step {s}." for s in range(2999)] + ["x" * 10_000]
    found = AttentionMap(values, rows, [str(w) for w in range(5000)], (0,), [(s, s + 1) for s in range(3000)], [])
    lines = str(found).splitlines()
    assert len(lines) == 102 and lines[51] == "..." and max(map(len, lines)) < 1000
    assert lines[0].split()[29:32] == ["29", "...", "4970"] and "7.00  xxx" in lines[-1]
