"""Templates: the rendered text is that of the tokenizer or its chat template, and unusable ones are refused."""

from __future__ import annotations

import pytest

from molsaki.text.alignment import encode, prompt
from molsaki.text.segment import segment
from tests.helpers.small_tokenizers import FORMAT, PAIRS, TOKENIZERS, all_tokenizers, byte_level, wrap  # noqa: F401


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
