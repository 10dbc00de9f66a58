"""Plans of existing token ids, against the plans of the original texts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import molsaki
from molsaki.text.token_ids import decode_with_offsets
from molsaki_kernels import StepPlan
from tests.helpers.small_tokenizers import CHATML, PAIRS, all_tokenizers, byte_level, wrap  # noqa: F401

LOSSLESS = ["gpt2", "bytes", "llama3", "llama2"]  # the others change the text or cannot decode it
TEXTS = [" ".join(pair) for pair in PAIRS] + ["  two\n\nlines 😀😀 ", "é́ 12 ﬁ 好3个", "\ufffd 3\ufffd"]
TRAINED = [pair for pair in PAIRS if pair[1]]


def batch(tokenizer, template: str = "plain", pairs=TRAINED, **options):
    """Right-padded ids and labels of the rationales, and what `molsaki.encode` found in their texts."""
    encoded = [molsaki.encode(molsaki.segment(*pair, **options), tokenizer, template=template) for pair in pairs]
    ids = [torch.tensor(e.input_ids) for e in encoded]
    labels = [
        torch.where(torch.arange(len(row)) < e.target_start, -100, row) for row, e in zip(ids, encoded, strict=True)
    ]
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100), encoded


def steps_of(plan: StepPlan) -> list[list[tuple[int, int]]]:
    return [[tuple(step) for step in plan.steps[n][plan.step_mask[n]].tolist()] for n in range(len(plan))]


def words_of(plan: StepPlan) -> list[list[list[int]]]:
    found = []
    for n in range(len(plan)):
        count = int(plan.word_mask[n].sum())
        found.append([sorted(plan.tokens[n][plan.word_of_token[n] == w].tolist()) for w in range(count)])
    return found


def equal(a: StepPlan, b: StepPlan) -> bool:
    return steps_of(a) == steps_of(b) and words_of(a) == words_of(b)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("text", TEXTS)
def test_offsets(tokenizers, name, text):
    output = tokenizers[name](text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, special = output["input_ids"], output["special_tokens_mask"]
    found, offsets = decode_with_offsets(ids, special, tokenizers[name])
    shift = len(found) - len(text)  # Llama 2 decodes its prepended space
    assert found[shift:] == text
    for t, (start, stop) in enumerate(output["offset_mapping"]):
        if not special[t] and offsets[t][1] > shift:
            got = text[max(offsets[t][0] - shift, 0) : offsets[t][1] - shift]
            assert text[start:stop] in got and ("\ufffd" in got or got == text[start:stop])


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("options", [{}, {"splitter": "numbers"}, {"key": ["mail", "total"]}, {"number_words": True}])
def test_a_plan_of_ids_is_that_of_the_text(tokenizers, name, options):
    pairs = TRAINED
    if name == "llama2":  # in a text that begins with a number, the space before it is in the number
        pairs = [pair for pair in TRAINED if not "".join(pair)[0].isdigit()]
    ids, labels, encoded = batch(tokenizers[name], pairs=pairs, **options)
    expected = StepPlan.from_spans([e.steps for e in encoded], [e.words for e in encoded])
    assert equal(molsaki.plan_from_ids(ids, labels, tokenizers[name], **options), expected)
    assert equal(molsaki.plan_from_ids(ids.tolist(), labels.tolist(), tokenizers[name], **options), expected)


@pytest.mark.parametrize("name", ["gpt2", "bytes", "llama3"])
def test_under_a_chat_template(tokenizers, name):
    """The words of the template are a part of the question, its special tokens are not."""
    core = byte_level(bos=name == "llama3", vocabulary=259 if name == "bytes" else 400)
    tokenizer = wrap(core, chat_template=CHATML, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    ids, labels, encoded = batch(tokenizer, "chat")
    plan = molsaki.plan_from_ids(ids, labels, tokenizer, question_steps=False)
    for n, e in enumerate(encoded):
        assert words_of(plan)[n] == e.words
        assert steps_of(plan)[n] == [step for step in e.steps if step[0] >= e.target_start]
    special = torch.tensor([[tokenizer.convert_tokens_to_ids("<|im_start|>")]])
    whole = molsaki.plan_from_ids(ids, labels, tokenizer)
    for n, steps in enumerate(steps_of(whole)):
        assert len(steps) >= len(encoded[n].steps)
        assert not any((ids[n, slice(*step)] == special).all() for step in steps)


def test_what_a_model_generated(tokenizers):
    """Ids that the tokenizer itself would not choose, with an end token and broken characters."""
    tokenizer = tokenizers["bytes"]
    ids = tokenizer("How many?").input_ids
    start = len(ids)
    for piece in (" There", " are 1", "6", ". So ", "\N{GRINNING FACE}", " 4."):
        ids += [token for letter in piece for token in tokenizer(letter).input_ids]
    ids.insert(-3, tokenizer("\N{GRINNING FACE}").input_ids[0])  # one byte of four
    labels = [-100] * start + ids[start:]
    plan = molsaki.plan_from_ids([ids], [labels], tokenizer)
    texts = [tokenizer.decode(ids[a:b]) for a, b in steps_of(plan)[0]]
    assert texts == ["How many? ", "There are 16. ", texts[2]] and texts[2].startswith("So")
    assert [tokenizer.decode([ids[t] for t in word]) for word in words_of(plan)[0]] == ["16", "4"]


def test_texts_without_labels_and_bad_input(tokenizers):
    tokenizer = tokenizers["gpt2"]
    ids, labels, encoded = batch(tokenizer, pairs=TRAINED[:2])
    plan = molsaki.plan_from_ids(ids, torch.stack([labels[0], torch.full_like(labels[1], -100)]), tokenizer)
    assert steps_of(plan) == [encoded[0].steps, []] and words_of(plan)[1] == []
    with pytest.raises(ValueError, match=r"labels: expected the shape of input_ids, .* tokens, got"):
        molsaki.plan_from_ids(ids, labels[:, :-1], tokenizer)
    with pytest.raises(ValueError, match="splitter: expected one of rules"):
        molsaki.plan_from_ids(ids, labels, tokenizer, splitter="words")
    with pytest.raises(TypeError, match="tokenizer: expected a fast tokenizer"):
        from transformers import ByT5Tokenizer

        molsaki.plan_from_ids(ids, labels, ByT5Tokenizer())


def test_broken_texts_take_linear_time(tokenizers):
    """Bytes that are no characters are not collected until the end of a text."""
    tokenizer = tokenizers["bytes"]
    broken = tokenizer("\N{GRINNING FACE}").input_ids[0]
    ids = tokenizer("5 ").input_ids + [broken] * 5000 + tokenizer(" 7.").input_ids
    calls = []

    class Backend:
        def decode(self, tokens, **options):
            calls.append(len(tokens))
            return tokenizer.backend_tokenizer.decode(tokens, **options)

    stand_in = type("Tokenizer", (), {"backend_tokenizer": Backend()})()
    text, offsets = decode_with_offsets(ids, [0] * len(ids), stand_in)
    assert sum(calls) < 20 * len(ids)
    assert (
        text.startswith("5 ")
        and text.endswith(" 7.")
        and offsets[-2:] == [(len(text) - 2, len(text) - 1), (len(text) - 1, len(text))]
    )
