"""Thinking traces are found under templates that keep, move or drop them, taught completely, and counted if broken."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from molsaki.batches.dataset import prepare
from molsaki.batches.tokenized import TokenizerSpec
from molsaki.config import TextOptions
from molsaki.text.alignment import encode, prompt
from molsaki.text.examples import Example, example_of, read_examples
from molsaki.text.fitting import TooLong, fit
from molsaki.text.frames import TextChanged
from molsaki.text.segment import segment
from molsaki.text.thinking import NOT_CLOSED, UNBALANCED, split_trace, state_of, without_traces
from tests.helpers import tiny
from tests.helpers.small_tokenizers import CHATML, byte_level, wrap

QUESTION = "What is 5 plus 12?"
THINKING = "<think>\nOkay. 5 plus 12 is 17.\n</think>\n\nThe answer is **17**."
# DeepSeek-R1's: drops the trace of a reply, and asks for one.
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>"
    "{{ m.content.split('</think>')[-1] }}<E>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
R1_BEFORE = R1.replace("<A><think>\n{% endif %}", "<A>{% endif %}")  # as it was first published
# gpt-oss's: the trace is a field of the message and a channel of the text.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'user' %}<start>user<message>{{ m.content }}<end>{% else %}"
    "{% if loop.last and m.thinking %}<start>assistant<channel>analysis<message>{{ m.thinking }}<end>{% endif %}"
    "<start>assistant<channel>final<message>{{ m.content }}<return>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant{% endif %}"
)
# Kimi K2's and others: reasoning_content, and the trace in tags of the template.
FIELD = (
    "{% for m in messages %}<{{ m.role }}>{% if m.reasoning_content is defined %}"
    "<think>{{ m.reasoning_content | trim }}</think>{% endif %}{{ m.content | trim }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_of(template: str):
    return wrap(byte_level(vocabulary=259), chat_template=template)


@pytest.mark.parametrize(
    "template, text, taught",
    [
        (R1, f"<U>{QUESTION}<A>{THINKING}<E>", THINKING[8:] + "<E>"),
        (R1_BEFORE, f"<U>{QUESTION}<A>{THINKING}<E>", THINKING + "<E>"),
        (
            HARMONY,
            f"<start>user<message>{QUESTION}<end><start>assistant<channel>analysis<message>Okay. 5 plus 12 is 17.<end>"
            "<start>assistant<channel>final<message>The answer is **17**.<return>",
            "<channel>analysis<message>Okay. 5 plus 12 is 17.<end><start>assistant<channel>final<message>The answer is "
            "**17**.<return>",
        ),
        (
            FIELD,
            f"<user>{QUESTION}<end><assistant><think>Okay. 5 plus 12 is 17.</think>The answer is **17**.<end>",
            "<think>Okay. 5 plus 12 is 17.</think>The answer is **17**.<end>",
        ),
        (
            CHATML,
            f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{THINKING}<|im_end|>\n",
            THINKING + "<|im_end|>\n",
        ),
    ],
)  # fmt: skip
def test_where_a_trace_is_shown_and_what_is_taught(template, text, taught):
    """All of the trace is there, taught are the tokens that the model writes itself, and the prompt is the rest."""
    tokenizer, spans = tokenizer_of(template), segment(QUESTION, THINKING)
    encoded = encode(spans, tokenizer, template="chat")
    assert tokenizer.decode(encoded.input_ids) == text
    assert tokenizer.decode(encoded.input_ids[encoded.target_start :]) == taught
    assert prompt(QUESTION, tokenizer, template="chat", thinking=True) == encoded.input_ids[: encoded.target_start]
    for (a, b), word in zip(spans.words, encoded.words, strict=True):
        assert tokenizer.decode([encoded.input_ids[t] for t in word]) == spans.text[a:b]
    for (a, b), (start, stop) in zip(spans.steps, encoded.steps, strict=True):
        step = spans.text[a:b].strip()
        found = tokenizer.decode(encoded.input_ids[start:stop]).strip()
        assert found == step or (step in ("<think>", "</think>") and found == "")  # the template has its own tags


def real_templates() -> list[str]:
    """Copies of the chat templates of some models, which TRL has."""
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates" if found and found.origin else Path("none")
    return [path.stem for path in sorted(folder.glob("*.jinja"))] or [
        pytest.param("", marks=pytest.mark.skip("no trl"))
    ]


TRACES = {
    "lines": THINKING,
    "tight": "<think>Okay. 5 plus 12 is 17.</think>The answer is **17**.",
    "blank lines": "<think>\n\nOkay. 5 plus 12 is 17.\n\n</think>\n\n\nThe answer is **17**.",
    "empty": "<think>\n\n</think>\n\nThe answer is **17**.",
    "alone": "<think>\nOkay. 5 plus 12 is 17.\n</think>",
    "two": "<think>5 and</think>so 12<think>or 3</think>The answer is **17**.",
    "none": "5 plus 12 is 17.",
}


@pytest.mark.parametrize("name", real_templates())
def test_the_templates_of_real_models(name):
    """Each rationale is refused, or all of it is taught after the very prompt that generation gives. The prompt is the
    same for all traces of a template, and one trace at the start is always taken."""
    import trl

    text = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_of(text)
    for context in ((), (("user", "What is 1 plus 1?"), ("assistant", "<think>Hm.</think>2."))):
        try:
            encode(segment(QUESTION, "It is 17.", context=context), tokenizer, template="chat")
        except ValueError:
            continue  # takes pictures only, or needs a special token that this tokenizer has not
        opened = prompt(QUESTION, tokenizer, template="chat", thinking=True, context=context)
        for kind, rationale in TRACES.items():
            spans = segment(QUESTION, rationale, context=context)
            try:
                encoded = encode(spans, tokenizer, template="chat")
            except TextChanged:
                assert kind in ("empty", "alone", "two"), kind
                continue
            masked, taught = encoded.input_ids[: encoded.target_start], encoded.input_ids[encoded.target_start :]
            assert kind == "none" or masked == opened, kind
            assert kind != "none" or masked == prompt(QUESTION, tokenizer, template="chat", context=context)
            missing = re.sub(r"\s|</?think>", "", rationale)
            for character in re.sub(r"\s", "", tokenizer.decode(taught)):
                missing = missing.removeprefix(character)
            assert not missing, kind
            for (a, b), word in zip(spans.words, encoded.words, strict=True):
                assert tokenizer.decode([encoded.input_ids[t] for t in word]) == spans.text[a:b]


def test_a_prompt_that_ends_the_trace_is_not_trained_with_one():
    closed = R1.replace("<A><think>\n{% endif %}", "<A></think>{% endif %}")
    with pytest.raises(TextChanged):
        encode(segment(QUESTION, THINKING), tokenizer_of(closed), template="chat")
    option = R1.replace("<A><think>\n{% endif %}", "<A>{{ '<think>' if thinking else '</think>' }}{% endif %}")
    encoded = encode(segment(QUESTION, THINKING), tokenizer_of(option), template="chat")  # as DeepSeek-V3.1's
    assert tokenizer_of(option).decode(encoded.input_ids).endswith("<A><think>" + THINKING[8:] + "<E>")


def test_a_key_word_in_a_tag_that_the_template_moves():
    """It has no token, and the other words keep theirs."""
    tokenizer, spans = (
        tokenizer_of(HARMONY),
        segment("Why?", "<think>\nI think 5.\n</think>\n\nSo 5.", key=["think", "5"]),
    )
    encoded = encode(spans, tokenizer, template="chat")
    found = [tokenizer.decode([encoded.input_ids[t] for t in word]) for word in encoded.words]
    assert found == ["", "think", "5", "", "5"]


def test_a_trace_is_not_cut():
    tokenizer = tokenizer_of(CHATML)
    spans = segment(QUESTION, THINKING)
    for side in ((tokenizer, "chat"), (tokenizer, "plain"), (tokenizer_of(HARMONY), "chat")):
        total = len(encode(spans, side[0], template=side[1]).input_ids)
        assert fit(spans, (*side, total - 8)).rationale.startswith(THINKING[:41])
        with pytest.raises((TooLong, TextChanged)):
            fit(spans, (*side, total - 38))


@pytest.mark.parametrize("template", [R1, HARMONY, FIELD, CHATML])
def test_a_context_before_a_trace(template):
    tokenizer = tokenizer_of(template)
    context = [("user", "What is 1 plus 1?"), ("assistant", "<think>Hm.</think>2.")]
    encoded = encode(segment(QUESTION, THINKING, context=context), tokenizer, template="chat")
    text = tokenizer.decode(encoded.input_ids)
    assert "Hm." not in text and "1 plus 1?" in text and "Okay. 5 plus 12 is 17." in text
    asked = [{"role": role, "content": t.split("</think>")[-1]} for role, t in [*context, ("user", QUESTION)]]
    opened = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(encoded.input_ids[: encoded.target_start]) == opened


def test_states():
    states = {
        "none": ["So 4.", ""],
        "whole": [THINKING, "<think></think>", "<think>a</think>b<think>c</think>d"],
        "not closed": ["<think>a", "<think>a</think>b<think>c"],
        "not opened": ["a</think>b"],
        "unbalanced": ["<think><think>a</think>", "a</think>b</think>", "</think><think>", "<think>a</think></think>"],
    }
    for state, texts in states.items():
        assert [state_of(text) for text in texts] == [state] * len(texts)
    assert without_traces("a</think>b<think>c</think>d<think>e") == "bd"
    assert split_trace(THINKING) == ((8, THINKING.index("\n</think>")), THINKING.index("The answer"))
    assert split_trace("So. <think>a</think>b") is None and split_trace("<think>a</think>b<think>c</think>") is None


def test_a_reply_to_a_prompt_that_opens_the_trace():
    """Its <think> was in the prompt, so the text of the data lacks it."""
    rationale = THINKING.removeprefix("<think>\n")
    record = {"question": QUESTION, "rationale": rationale, "answer": "17"}
    example = example_of(record | {"key_spans": {"rationale": [[6, 7]]}}, "a", True, False)
    assert example.rationale == THINKING
    spans = segment(QUESTION, example.rationale, key="given", key_spans=example.key_spans)
    assert [spans.text[a:b] for a, b in spans.words] == ["5"] == [rationale[6:7]]


def test_broken_traces_are_left_out_and_counted():
    rationales = {"a": THINKING, "b": "<think>\nOkay. 5 plus", "c": "<think>5<think>12</think>17", "d": "It is 17."}
    examples = [Example(id, QUESTION, rationale, "17") for id, rationale in rationales.items()]
    data = prepare(examples, TextOptions(), TokenizerSpec(tiny.tokenizer(), "plain", None))
    assert data.left_out == {NOT_CLOSED: ["b"], UNBALANCED: ["c"]} and len(data) == 2
    assert data.summary() == (
        "2 examples, 0 without key words, 1 with a thinking trace; 1 left out: thinking trace without its end </think> "
        "(b); 1 left out: <think> and </think> do not match (c)"
    )


def test_the_reasoning_of_messages(tmp_path):
    for name in ("reasoning_content", "reasoning", "thinking"):
        reply = {"role": "assistant", name: "Okay. 5 plus 12 is 17.", "content": "The answer is **17**."}
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({"messages": [{"role": "user", "content": QUESTION}, reply]}))
        assert read_examples(path)[0].rationale == THINKING


def test_a_broken_trace_of_a_reply_is_called_that(tmp_path):
    for reply, reason in (("<think>I add 3", NOT_CLOSED), ("<think>a<think>b</think>7", UNBALANCED)):
        path = tmp_path / "d.jsonl"
        path.write_text(json.dumps({"prompt": QUESTION, "completion": reply}))
        with pytest.raises(ValueError, match=f"format prompt-completion: {reason}"):
            read_examples(path)
