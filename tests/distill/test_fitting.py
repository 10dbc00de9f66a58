"""A text is cut so that it fits every tokenizer, and no further."""

from __future__ import annotations

import pytest

from molsaki.text.alignment import encode
from molsaki.text.fitting import TooLong, fit
from molsaki.text.segment import segment
from tests.helpers.small_tokenizers import FORMAT, PAIRS, TOKENIZERS, all_tokenizers  # noqa: F401


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


def test_bad_sides(tokenizers):
    with pytest.raises(TypeError, match=r"sides\[1\]: expected \(tokenizer, template, max_length\)"):
        fit(segment("Why?", "So."), (tokenizers["gpt2"], "plain", 5), tokenizers["gpt2"])
    with pytest.raises(TypeError, match="spans: expected Spans"):
        fit("Why?", (tokenizers["gpt2"], "plain", 5))
    with pytest.raises(ValueError, match="max_length"):
        fit(segment("Why?", "So."), (tokenizers["gpt2"], "plain", -1))
