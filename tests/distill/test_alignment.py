"""Steps and key words in tokens: small real tokenizers of every family against a brute-force reading of the rules."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from molsaki.text.alignment import encode, plan, prompt
from molsaki.text.segment import segment
from molsaki.text.spans import Spans
from tests.helpers.small_tokenizers import FORMAT, PAIRS, TOKENIZERS, all_tokenizers, by_pattern, byte_level, wrap  # noqa: F401

DATA = Path(__file__).parents[3] / "shared" / "data"


def rendered(spans: Spans, tokenizer, template: str) -> tuple[str, int, int]:
    """The text a template makes, and where the two texts start in it."""
    if template == "plain":
        return spans.text, 0, spans.rationale_start
    if template == "chat":
        turns = [{"role": "user", "content": spans.question}, {"role": "assistant", "content": spans.rationale}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    else:
        text = template.format(question=spans.question, rationale=spans.rationale)
    return text, text.find(spans.question), text.rfind(spans.rationale)


def brute_force(spans: Spans, tokenizer, template: str) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """ids, the tokens of each step and of each word, by looking at every character of every token."""
    text, question_at, rationale_at = rendered(spans, tokenizer, template)
    place = {}  # a character of the rendered text -> one of spans.text
    for i in range(len(spans.text)):
        if i < spans.question_end:
            place[question_at + i] = i
        elif i >= spans.rationale_start:
            place[rationale_at + i - spans.rationale_start] = i
        elif template == "plain":
            place[i] = i
    output = tokenizer(text, add_special_tokens=template != "chat", return_offsets_mapping=True)
    steps, words = [[] for _ in spans.steps], [[] for _ in spans.words]
    for t, (start, stop) in enumerate(output["offset_mapping"]):
        if start == stop:
            continue
        visible = [i for i in range(start, stop) if not text[i].isspace()]
        head = place.get((visible or [start])[0], -1)
        for s, (a, b) in enumerate(spans.steps):
            if a <= head < b:
                steps[s].append(t)
        inside = {place.get(i, -1) for i in range(start, stop)}
        for w, (a, b) in enumerate(spans.words):
            if inside & set(range(a, b)):
                words[w].append(t)
                break
    return output["input_ids"], steps, words


@pytest.mark.parametrize("template", ["plain", "chat", FORMAT])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_against_brute_force(tokenizers, name, template):
    tokenizer = tokenizers[name]
    for pair in PAIRS[:5]:
        spans = segment(*pair)
        encoded = encode(spans, tokenizer, template=template)
        ids, steps, words = brute_force(spans, tokenizer, template)
        assert encoded.input_ids == ids
        assert [list(range(*step)) for step in encoded.steps] == steps
        assert encoded.words == words
        assert all(steps) and all(words)
        assert encoded.input_ids[: encoded.target_start] == prompt(pair[0], tokenizer, template=template)


# One token a byte: "Why 4? 4." has its steps at tokens 0 to 7 and 7 to 9.
EXACT = {
    "plain": ("plain", [(0, 7), (7, 14), (14, 16)], [[4], [11], [14]], 6),
    "chat": ("chat", [(6, 12), (25, 32), (32, 34)], [[10], [29], [32]], 25),
    "format": (FORMAT, [(3, 9), (13, 20), (20, 22)], [[7], [17], [20]], 12),
    "braces": ("{{{question}}}: {rationale}{{}}", [(1, 7), (10, 17), (17, 19)], [[5], [14], [17]], 9),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_positions(tokenizers, name):
    template, steps, words, target_start = EXACT[name]
    encoded = encode(segment("Why 4?", "Why 4? 4."), tokenizers["bytes"], template=template)
    if name == "chat":  # <|im_start|>user\n is 1 + 5 tokens, <|im_end|>\n<|im_start|>assistant\n is 2 + 1 + 10
        assert len(encoded.input_ids) == 34 + 2
    assert (encoded.steps, encoded.words, encoded.target_start) == (steps, words, target_start)


@pytest.mark.parametrize(
    "pattern, text, key, steps, words",
    [
        # a token across a step's end belongs to the step of its first visible character
        (r"9\.\ So|\w+|\.|\ ", "It 9. So 4. Go", "numbers", [(0, 3), (3, 7), (7, 8)], [[2], [4]]),
        (r"\.\ |\w+", "Up. To. Do", "numbers", [(0, 2), (2, 4), (4, 5)], []),
        (r"\ [A-Z]\w+|\w+|[.]", "Up. To. Do", "numbers", [(0, 2), (2, 4), (4, 5)], []),
        (r".{5}", "Go. A 4. Or 7 now", "numbers", [(0, 1), (1, 2), (2, 4)], [[1], [2]]),
        (r".{8}", "Go. It. Up 7", "numbers", [(0, 1), (1, 1), (1, 2)], [[1]]),
        # a token over two words is the first one's, and the second keeps an empty column
        (r"\d+[+]\d+|\w+|.", "so 4+5 is 9", "numbers", [(0, 7)], [[2], [], [6]]),
        (r"\d[+]|\w+|.", "4+5", "numbers", [(0, 2)], [[0], [1]]),
        # a word of several tokens, spaces inside, and a token that only touches it
        (r"\w+|\W", "an ice cream.", ["ice cream"], [(0, 6)], [[2, 3, 4]]),
        (r"\ ice|\ cream[.]|\w+", "an ice cream.", ["ice cream"], [(0, 3)], [[1, 2]]),
        (r"\ |\w+|.", "4 5", "numbers", [(0, 3)], [[0], [2]]),
    ],
)
def test_tokens_that_do_not_line_up(pattern, text, key, steps, words):
    encoded = encode(segment("", text, key=key), by_pattern(pattern))
    assert (encoded.steps, encoded.words) == (steps, words)


def test_byte_fallback_keeps_every_token(tokenizers):
    spans = segment("", "a 你4 ½ b", key=["你4", "½"])
    encoded = encode(spans, tokenizers["bytes"])
    assert encoded.words == [[2, 3, 4, 5], [7, 8]]
    encoded = encode(spans, tokenizers["llama2"])
    pieces = [
        tokenizers["llama2"].convert_ids_to_tokens([encoded.input_ids[t] for t in word]) for word in encoded.words
    ]
    assert pieces == [["<0xE4>", "<0xBD>", "<0xA0>", "4"], ["<0xC2>", "<0xBD>"]]


def test_normalizers_refer_to_the_text_as_it_was(tokenizers):
    spans = segment("", "ÉCLAIRS cost ５ and ½ of ﬁve.", key=["éclairs", "５", "½", "ﬁve"])
    for name in ("bert", "t5"):
        encoded = encode(spans, tokenizers[name])
        ids, steps, words = brute_force(spans, tokenizers[name], "plain")
        assert encoded.words == words and all(words)
    t5 = tokenizers["t5"]
    assert t5.decode([encoded.input_ids[t] for t in encoded.words[1]]).strip(" ▁") == "5"


@pytest.mark.parametrize("template", ["plain", "chat", FORMAT])
def test_two_tokenizers_one_shape(tokenizers, template):
    for pair in PAIRS:
        if template == "chat" and not all(pair):
            continue
        spans = segment(*pair)
        shapes = set()
        for tokenizer in tokenizers.values():
            for max_length in (None, 12, 30):
                one = plan(spans, tokenizer, max_length, template=template)
                shapes.add((one.num_steps, one.num_words))
        assert shapes == {(len(spans.steps), len(spans.words))}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_truncation(tokenizers, name):
    tokenizer, spans = tokenizers[name], segment(*PAIRS[0])
    whole = encode(spans, tokenizer)
    for max_length in range(2, len(whole.input_ids) + 2):
        cut = encode(spans, tokenizer, max_length=max_length)
        assert cut.input_ids == tokenizer(spans.text, truncation=True, max_length=max_length).input_ids
        body = min(max_length, len(whole.input_ids)) - (name in ("bert", "t5") and max_length < len(whole.input_ids))
        assert [list(range(*s)) for s in cut.steps] == [[t for t in range(*s) if t < body] for s in whole.steps]
        assert cut.words == [[t for t in word if t < body] for word in whole.words]
        fits = whole.target_start < body
        assert cut.target_start == (whole.target_start if fits else len(cut.input_ids))
        plan(spans, tokenizer, max_length)  # is legal


def test_truncation_needs_room_for_special_tokens(tokenizers):
    assert encode(segment("", "4"), tokenizers["bert"], max_length=2).input_ids == [1, 2]
    with pytest.raises(ValueError, match="max_length: expected at least 2, the special tokens"):
        encode(segment("", "4"), tokenizers["bert"], max_length=1)


def test_target_start(tokenizers):
    """A space that is a token by itself is generated with the rationale; a template's newline is not."""
    gpt2 = tokenizers["gpt2"]
    encoded = encode(segment("How many?", "4 apples"), gpt2)
    assert gpt2.decode(encoded.input_ids[encoded.target_start :]) == " 4 apples"
    encoded = encode(segment("How many?", "4 apples"), gpt2, template="chat")
    assert gpt2.decode(encoded.input_ids[encoded.target_start :]) == "4 apples<|im_end|>\n"
    assert encode(segment("How many?", ""), gpt2).target_start == len(gpt2("How many?").input_ids)
    assert encode(segment("", "4 apples"), tokenizers["llama3"]).target_start == 1
    assert prompt("", tokenizers["llama3"]) == [2]
    assert prompt(" How many? ", tokenizers["bert"]) == tokenizers["bert"]("How many?").input_ids[:-1]


def test_plan_of_a_batch(tokenizers):
    tokenizer = tokenizers["gpt2"]
    batch = [segment(*pair) for pair in PAIRS]
    both = plan(batch, tokenizer, template="plain")
    assert len(both) == len(PAIRS)
    for n, spans in enumerate(batch):
        one = plan(spans, tokenizer)
        encoded = encode(spans, tokenizer)
        assert one.steps[0].tolist() == [list(step) for step in encoded.steps]
        assert both.steps[n, : one.num_steps].equal(one.steps[0])
        assert both.step_mask[n].sum() == one.num_steps and both.word_mask[n].sum() == one.num_words
        pairs = sorted((t, w) for w, word in enumerate(encoded.words) for t in word)
        assert one.tokens[0].tolist() == [t for t, _ in pairs]
        assert one.word_of_token[0].tolist() == [w for _, w in pairs]
    assert torch.equal(plan(iter(batch), tokenizer).tokens, both.tokens)
    assert len(plan([], tokenizer)) == 0


class Fake(PreTrainedTokenizerFast):
    """A tokenizer whose offsets are all empty, as those of some releases of Llama 3's tokenizer."""

    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        output["offset_mapping"] = [(start, start) for start, _ in output["offset_mapping"]]
        return output


def test_offsets_that_do_not_cover_the_text_are_refused():
    spans = segment("Why 4?", "So.")
    with pytest.raises(ValueError, match="tokenizer: Fake .*'W' at character 0 .*offsets"):
        encode(spans, Fake(tokenizer_object=byte_level()))
    core = Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # drops what it does not know
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert encode(segment("", "a b"), wrap(core)).input_ids == [0, 1]
    with pytest.raises(ValueError, match="no token for 'c' at character 3"):
        encode(segment("", "ab c"), wrap(core))


def test_characters_that_a_normalizer_drops_are_no_error(tokenizers):
    encoded = encode(segment("", "a\u200b 4e\u0301\u0000 5"), tokenizers["bert"])
    assert (encoded.steps, encoded.words) == ([(1, 5)], [[2], [4]])  # [CLS] a 4 e 5 [SEP]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(spans="Why?"), TypeError, "spans: expected Spans .*got str"),
        (dict(tokenizer=len), TypeError, "tokenizer: expected a transformers tokenizer"),
        (dict(tokenizer=None), TypeError, "tokenizer: .*NoneType"),
        (dict(tokenizer=ByT5Tokenizer()), ValueError, "tokenizer: ByT5Tokenizer .*no character offsets"),
        (dict(max_length=0), ValueError, "max_length: expected at least 1"),
        (dict(max_length=8.0), TypeError, "max_length: .*8.0"),
        (dict(max_length=True), TypeError, "max_length: .*True"),
        (dict(template=None), TypeError, "template: .*NoneType"),
        (dict(template="chatml"), ValueError, "template: expected .*'chatml'"),
        (dict(template="{question}"), ValueError, "template: expected"),
        (dict(template="{question} {question} {rationale}"), ValueError, "template: expected"),
        (dict(template="{rationale} {question}"), ValueError, "template: expected"),
        (dict(template="{question} {rationale} {answer}"), ValueError, "template: expected"),
        (dict(template="{question!r} {rationale}"), ValueError, "template: expected"),
        (dict(template="{question:>9} {rationale}"), ValueError, "template: expected"),
        (dict(template="{question} {rationale"), ValueError, "template: expected"),
        (dict(template="{} {}"), ValueError, "template: expected"),
    ],
)
def test_bad_arguments(tokenizers, arguments, error, message):
    arguments = dict(spans=segment("Why 4?", "So."), tokenizer=tokenizers["gpt2"]) | arguments
    with pytest.raises(error, match=message):
        encode(arguments.pop("spans"), arguments.pop("tokenizer"), **arguments)


def test_bad_batches_and_questions(tokenizers):
    with pytest.raises(TypeError, match="spans: expected Spans"):
        plan(["Why?"], tokenizers["gpt2"])
    with pytest.raises(TypeError, match="spans: expected Spans"):
        plan(None, tokenizers["gpt2"])
    with pytest.raises(TypeError, match="question: expected a str"):
        prompt(None, tokenizers["gpt2"])


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama2"])
def test_time(tokenizers, name):
    batch = [segment(*PAIRS[0])] * 1000
    start = time.process_time()
    for spans in batch:
        encode(spans, tokenizers[name])
    assert time.process_time() - start < 3


def test_time_is_linear(tokenizers):
    spans = segment("Why 4?", "He had 4 apples. Then 5. " * 1000)
    start = time.process_time()
    encoded = encode(spans, tokenizers["gpt2"])
    assert time.process_time() - start < 3
    assert len(encoded.steps) == len(spans.steps) == 2001 and all(encoded.words)


def test_the_real_tokenizer_on_real_texts(tokenizers):
    """SmolLM2's tokenizer, from the model folder that MOLSAKI_MODEL names."""
    folder, path = Path(os.environ.get("MOLSAKI_MODEL", "")), DATA / "gsm8k_train.jsonl"
    if not (folder / "tokenizer.json").is_file() or not path.is_file():
        pytest.skip("no tokenizer or texts here")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line, _ in zip(file, range(300), strict=False)]
    for record in records:
        spans = segment(record["question"], record["rationale"])
        for template in ("plain", "chat", FORMAT):
            encoded = encode(spans, tokenizer, template=template)
            parts = [tokenizer.decode(encoded.input_ids[a:b]).strip() for a, b in encoded.steps]
            assert parts == [spans.text[a:b].strip() for a, b in spans.steps]
            parts = [tokenizer.decode([encoded.input_ids[t] for t in word]).strip() for word in encoded.words]
            assert all(spans.text[a:b] in part for part, (a, b) in zip(parts, spans.words, strict=True))
            assert sum(map(len, parts)) <= 1.1 * sum(b - a for a, b in spans.words)
            reply = tokenizer.decode(encoded.input_ids[encoded.target_start :], skip_special_tokens=True)
            assert reply.strip() == spans.rationale
            assert prompt(record["question"], tokenizer, template=template) == encoded.input_ids[: encoded.target_start]
        other = plan(spans, tokenizers["bert"], 512)
        assert (other.num_steps, other.num_words) == (len(spans.steps), len(spans.words))
