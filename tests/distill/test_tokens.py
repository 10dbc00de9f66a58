"""Steps and key words in tokens: small real tokenizers of every family against a brute-force reading of the rules."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from molsaki.text.segment import Spans, segment
from molsaki.text.tokens import TooLong, encode, fit, plan, prompt

DATA = Path(__file__).parents[3] / "shared" / "data"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
FORMAT = "Q: {question}\nA: {rationale}"

PAIRS = [
    (
        "A mailman is tasked with delivering 4 pieces of junk mail to each house in 16 blocks. How many in total?",
        "The mailman delivers 4 pieces to 16 blocks. Therefore, the total is 16 × 4 = 64.",
    ),
    ("Why 4?", "Why 4? 4."),  # the question again in the rationale
    ("7 is what?", "7"),
    ("Tom had $1,200.50 and 3/4 of ½ a pie.\nHow much?", "-5 + 10 = 5\n\n5% of 100 is “5”. Füße 你好 😀 12.\nSo 3.14"),
    ("How many", "4"),
    ("", "4 and 5. Then 9."),
    ("Is it 4?", ""),
]
CORPUS = [" ".join(pair) for pair in PAIRS] + [
    "How many apples are there? There are 12 apples. So the total is 16."
] * 3


def byte_level(split: str | None = None, bos: bool = False, vocabulary: int = 400) -> Tokenizer:
    core = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    parts = [pre_tokenizers.Split(Regex(split), "isolated"), byte] if split else [pre_tokenizers.Digits(True), byte]
    core.pre_tokenizer = pre_tokenizers.Sequence(parts)
    core.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|bos|>"]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=sorted(byte.alphabet()), show_progress=False
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 2)]
        )
    return core


def word_piece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    return core


def unigram() -> Tokenizer:
    """SentencePiece's Unigram: NFKC, a dummy prefix, byte fallback, an end token."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -3.0)] + [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    pieces += [(c, -6.0) for c in "abcdefghijklmnopqrstuvwxyzHTAQW0123456789.,?=:\n"]
    pieces += [(p, -4.0) for p in ["▁How", "▁many", "▁mail", "man", "▁the", "▁to", "tal", "▁4", "▁1", "6.", "▁is"]]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return core


def sentence_piece_bpe() -> Tokenizer:
    """Llama 2's BPE: a prepended space by normalizer, no pre-tokenizer, byte fallback."""
    words = ["▁t", "▁th", "▁the", "▁m", "▁ma", "▁mai", "▁mail", "▁H", "▁Ho", "▁How"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127)), *words]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "m"), ("▁m", "a"), ("▁ma", "i"), ("▁mai", "l"),
              ("▁", "H"), ("▁H", "o"), ("▁Ho", "w")]  # fmt: skip
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return core


def wrap(core: Tokenizer, **options) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


LLAMA3_SPLIT = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"
TOKENIZERS = {
    "gpt2": lambda: wrap(byte_level(), chat_template=CHATML),
    "bytes": lambda: wrap(byte_level(vocabulary=259), chat_template=CHATML),
    "llama3": lambda: wrap(
        byte_level(LLAMA3_SPLIT, bos=True), bos_token="<|bos|>", chat_template="{{ bos_token }}" + CHATML
    ),
    "bert": lambda: wrap(word_piece(), chat_template="User: {{ messages[0].content }} Bot: {{ messages[1].content }}"),
    "t5": lambda: wrap(unigram(), eos_token="</s>", chat_template=CHATML),
    "llama2": lambda: wrap(sentence_piece_bpe(), bos_token="<s>", eos_token="</s>", chat_template=LLAMA2),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: make() for name, make in TOKENIZERS.items()}


def by_pattern(pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the matches of a pattern and what lies between them."""
    core = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return wrap(core)


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


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_is_the_tokenizer_alone(tokenizers, name):
    for pair in PAIRS:
        spans = segment(*pair)
        encoded = encode(spans, tokenizers[name])
        assert encoded.input_ids == tokenizers[name](spans.text).input_ids
        assert len(encoded.steps) == len(spans.steps) and len(encoded.words) == len(spans.words)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2"])
def test_chat_is_the_chat_template(tokenizers, name):
    tokenizer, (question, rationale) = tokenizers[name], PAIRS[0]
    encoded = encode(segment(question, rationale), tokenizer, template="chat")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": rationale}]
    assert encoded.input_ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == (0 if name == "gpt2" else 1)
    reply = tokenizer.decode(encoded.input_ids[encoded.target_start :], skip_special_tokens=True)
    assert reply.strip() == rationale
    if name != "llama2":
        asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        assert prompt(question, tokenizer, template="chat") == asked


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


def test_question_found_where_the_template_puts_it(tokenizers):
    """The texts also occur in the template, in each other, and look like its placeholders."""
    template = "Why 4? {question} Why 4? So. {rationale} So."
    encoded = encode(segment("Why 4?", "So."), tokenizers["bytes"], template=template)
    assert encoded.steps == [(7, 13), (25, 28)]
    assert encoded.words == [[11]]
    spans = segment("{rationale} is 4 %s?", "{question} {0} 5")
    encoded = encode(spans, tokenizers["bytes"], template="{question}|{rationale}")
    assert tokenizers["bytes"].decode(encoded.input_ids) == "{rationale} is 4 %s?|{question} {0} 5"
    assert [encoded.input_ids[t] for word in encoded.words for t in word] == tokenizers["bytes"]("405").input_ids


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


@pytest.mark.parametrize("template", ["plain", "chat", FORMAT])
def test_fit_is_the_longest_text_all_sides_hold(tokenizers, template):
    for pair in (PAIRS[0], PAIRS[3]):
        spans = segment(*pair)
        for tight in TOKENIZERS:
            needed = len(encode(spans, tokenizers[tight], template=template).input_ids)
            lengths = []
            for max_length in range(needed, 0, -3):
                sides = [(tokenizers[tight], template, max_length), (tokenizers["gpt2"], "chat", None)]
                try:
                    fitted = fit(spans, *sides)
                except TooLong:
                    break
                assert fitted is spans or max_length < needed
                assert len(encode(fitted, tokenizers[tight], template=template).input_ids) <= max_length
                assert spans.text.startswith(fitted.text) and fitted.question == spans.question
                assert fitted.text[-1:].strip() and fitted.rationale
                assert fitted.words == tuple(w for w in spans.words if w[1] <= len(fitted.text))
                assert not any(a < len(fitted.text) < b for a, b in spans.words)
                assert [a for a, _ in fitted.steps] == [a for a, _ in spans.steps if a < len(fitted.text)]
                lengths.append(len(fitted.text))
                for tokenizer, form, length in sides:
                    one = encode(fitted, tokenizer, template=form, max_length=length)
                    assert len(one.steps) == len(fitted.steps) and len(one.words) == len(fitted.words)
                    assert all(one.words)
            assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2


def test_fit_exactly(tokenizers):
    tokenizer, spans = tokenizers["bytes"], segment("Why 4?", "Add 12.5 now. Then 16. Go on")
    texts = {
        35: "Add 12.5 now. Then 16. Go on", 34: "Add 12.5 now. Then 16. Go", 32: "Add 12.5 now. Then 16. Go",
        31: "Add 12.5 now. Then 16.", 28: "Add 12.5 now. Then", 27: "Add 12.5 now. Then", 24: "Add 12.5 now.",
        17: "Add 12.5", 15: "Add 12.5", 14: "Add", 10: "Add",
    }  # fmt: skip
    for max_length, rationale in texts.items():
        fitted = fit(spans, (tokenizer, "plain", max_length), (tokenizers["bert"], "plain", 100))
        assert fitted.rationale == rationale
    with pytest.raises(TooLong, match="rationale"):
        fit(spans, (tokenizer, "plain", 7))
    assert fit(spans) is spans
    assert fit(segment("", "abcdefgh"), (tokenizer, "plain", 3)).text == "abc"  # no white space to cut at
    with pytest.raises(TooLong, match="first word"):
        fit(segment("", "12345678"), (tokenizer, "plain", 3))  # a number is never halved
    with pytest.raises(TooLong, match="max_length is 5"):
        fit(segment("Why 4?", ""), (tokenizer, "plain", 5))  # the question is never cut
    assert fit(segment("Why 4?", ""), (tokenizer, "plain", 6)).text == "Why 4?"


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


@pytest.mark.parametrize(
    "chat_template, message",
    [
        (None, "has no chat template"),
        ("{{ messages[0].content }}", "does not show"),
        ("{{ messages[0].content }}{{ messages[0].content }}{{ messages[1].content }}", "does not show"),
        ("{{ messages[1].content }}{{ messages[0].content }}", "does not show"),
        ("{{ messages[0].content | upper }} {{ messages[1].content }}", "does not show"),
        ("{{ raise_exception('only system') }}", "failed: only system"),
        ("{{ messages[0].content }} {{ messages[1].content.split('4')[-1] }}", "changes the texts"),
        ("{{ messages[0].content | replace('Why', 'How') }} {{ messages[1].content }}", "changes the texts"),
    ],
)
def test_bad_chat_templates(chat_template, message):
    tokenizer = wrap(byte_level(), chat_template=chat_template)
    with pytest.raises(ValueError, match=f"template: .*{message}"):
        encode(segment("Why 4?", "So 4 it is."), tokenizer, template="chat")


def test_bad_sides_and_questions(tokenizers):
    with pytest.raises(TypeError, match=r"sides\[1\]: expected \(tokenizer, template, max_length\)"):
        fit(segment("Why?", "So."), (tokenizers["gpt2"], "plain", 5), tokenizers["gpt2"])
    with pytest.raises(TypeError, match="spans: expected Spans"):
        fit("Why?", (tokenizers["gpt2"], "plain", 5))
    with pytest.raises(ValueError, match="max_length"):
        fit(segment("Why?", "So."), (tokenizers["gpt2"], "plain", -1))
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
        rows = [json.loads(line) for line, _ in zip(file, range(300), strict=False)]
    for row in rows:
        spans = segment(row["question"], row["rationale"])
        for template in ("plain", "chat", FORMAT):
            encoded = encode(spans, tokenizer, template=template)
            parts = [tokenizer.decode(encoded.input_ids[a:b]).strip() for a, b in encoded.steps]
            assert parts == [spans.text[a:b].strip() for a, b in spans.steps]
            parts = [tokenizer.decode([encoded.input_ids[t] for t in word]).strip() for word in encoded.words]
            assert all(spans.text[a:b] in part for part, (a, b) in zip(parts, spans.words, strict=True))
            assert sum(map(len, parts)) <= 1.1 * sum(b - a for a, b in spans.words)
            reply = tokenizer.decode(encoded.input_ids[encoded.target_start :], skip_special_tokens=True)
            assert reply.strip() == spans.rationale
            assert prompt(row["question"], tokenizer, template=template) == encoded.input_ids[: encoded.target_start]
        other = plan(spans, tokenizers["bert"], 512)
        assert (other.num_steps, other.num_words) == (len(spans.steps), len(spans.words))
