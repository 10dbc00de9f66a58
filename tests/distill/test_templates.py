"""Templates: the rendered text is that of the tokenizer or its chat template, and unusable ones are refused."""

from __future__ import annotations

import pytest

from molsaki.text.alignment import encode, prompt
from molsaki.text.fitting import TooLong, fit
from molsaki.text.frames import TextChanged
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


THINKING = "<think>\nOkay. 5 plus 12 is 17.\n</think>\n\nThe answer is **17**."
# As Qwen 3's: the trace on lines of its own, and an empty one where there is none.
QWEN3 = (
    "{% for m in messages %}{% if m.role=='user' %}<|im_start|>user\n{{m.content}}<|im_end|>\n{% else %}{% set rc='' %}"
    "{% set c=m.content %}{% if '</think>' in c %}{% set rc=c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c=c.split('</think>')[-1] %}{% endif %}<|im_start|>assistant\n<think>\n{{rc}}\n</think>\n\n"
    "{{c.lstrip('\\n')}}<|im_end|>\n{% endif %}{% endfor %}"
)
# Puts the trace between marks of its own.
CHANNELS = (
    "{% for m in messages %}{% if m.role=='user' %}<U>{{m.content}}{% else %}{% if '</think>' in m.content %}<T>"
    "{{m.content.split('</think>')[0].split('<think>')[-1].strip()}}{% endif %}<F>"
    "{{m.content.split('</think>')[-1].strip()}}<E>{% endif %}{% endfor %}"
)
# Leaves the trace out.
STRIPS = "{% for m in messages %}<{{m.role}}>{{m.content.split('</think>')[-1]}}{% endfor %}"


@pytest.mark.parametrize("rationale", [THINKING, "<think>5 plus 12 is 17</think>The answer is 17.", "5 + 12 is 17."])
@pytest.mark.parametrize("chat_template", [QWEN3, CHANNELS])
def test_thinking_traces_are_found_where_the_template_puts_them(chat_template, rationale):
    tokenizer = wrap(byte_level(vocabulary=259), chat_template=chat_template)
    question = "What is 5 plus 12?"
    spans = segment(question, rationale)
    encoded = encode(spans, tokenizer, template="chat")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": rationale}]
    assert encoded.input_ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    for (a, b), (start, stop) in zip(spans.steps, encoded.steps, strict=True):
        there = tokenizer.decode(encoded.input_ids[start:stop])
        if chat_template == QWEN3:
            assert there.replace("\n", "") == spans.text[a:b].replace("\n", "").strip()
    for (a, b), word in zip(spans.words, encoded.words, strict=True):
        assert tokenizer.decode([encoded.input_ids[t] for t in word]) == spans.text[a:b]
    target = tokenizer.decode(encoded.input_ids[encoded.target_start :])
    assert chat_template == CHANNELS or target.startswith(rationale[:7])  # <think> is the student's to write
    asked = prompt(question, tokenizer, template="chat", thinking=rationale.startswith("<think>"))
    assert asked == encoded.input_ids[: encoded.target_start]


def test_a_trace_that_the_template_leaves_out_is_refused():
    tokenizer = wrap(byte_level(vocabulary=259), chat_template=STRIPS)
    encode(segment("Why 4?", "So 4."), tokenizer, template="chat")
    with pytest.raises(TextChanged, match="changes the texts .* the question 'Why 4\\?' and the rationale '<think>"):
        encode(segment("Why 4?", "<think>4</think>So 4."), tokenizer, template="chat")


def test_a_moved_trace_is_cut_after_its_end_only():
    tokenizer = wrap(byte_level(vocabulary=259), chat_template=QWEN3)
    spans = segment("What is 5 plus 12?", THINKING)
    total = len(encode(spans, tokenizer, template="chat").input_ids)
    assert fit(spans, (tokenizer, "chat", total)) == spans
    cut = fit(spans, (tokenizer, "chat", total - 8))
    assert cut.rationale == THINKING[: THINKING.index(" **17")]
    assert len(encode(cut, tokenizer, template="chat").input_ids) <= total - 8
    with pytest.raises(TooLong, match="the thinking trace is longer"):
        fit(spans, (tokenizer, "chat", total - 30))
