"""Conversations: the last turn of the assistant is taught, earlier turns are context, under every kind of template."""

from __future__ import annotations

import json

import pytest

from molsaki.batches.tokenized import Tokenization, TokenizerSpec, predict_prompt, spans_of
from molsaki.config import TextOptions
from molsaki.modeling.attention_map import _read
from molsaki.store.fingerprints import fingerprint_examples, fingerprint_spans
from molsaki.text.alignment import encode, prompt
from molsaki.text.conversations import checked_context, split_turns, turns_of
from molsaki.text.examples import Example, example_of, read_examples
from molsaki.text.fitting import fit
from molsaki.text.frames import TextChanged
from molsaki.text.segment import segment
from molsaki.text.spans import Spans
from tests.helpers.small_tokenizers import CHATML, byte_level, wrap

CONTEXT = [("system", "Be brief."), ("user", "Ann has 3 nuts. Bob has 4. How many?"), ("assistant", "3 + 4 = 7.")]
QUESTION, RATIONALE = "And if Ann eats 2?", "7 - 2 = 5. The answer is 5."
# Gemma's: no turn of the system, and roles have to take turns.
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DROPS_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


def bytes_tokenizer(template: str | None = None):
    return wrap(byte_level(vocabulary=259), chat_template=template)


def decoded(tokenizer, encoded, spans):
    """The texts of steps and words by their tokens, and those that the spans have."""
    ids = encoded.input_ids
    found = (
        [tokenizer.decode(ids[a:b]) for a, b in encoded.steps],
        [tokenizer.decode([ids[t] for t in word]) for word in encoded.words],
    )
    return found, ([spans.text[a:b] for a, b in spans.steps], [spans.text[a:b] for a, b in spans.words])


def test_segment_takes_the_context_as_part_of_the_question():
    spans = segment(QUESTION, RATIONALE, context=CONTEXT)
    whole = "Be brief.\n\nAnn has 3 nuts. Bob has 4. How many?\n\n3 + 4 = 7.\n\nAnd if Ann eats 2?"
    assert (spans.question, spans.rationale) == (whole, RATIONALE)
    assert [(role, spans.text[a:b]) for role, (a, b) in spans.turns] == [*CONTEXT, ("user", QUESTION)]
    assert [spans.text[a:b].strip() for a, b in spans.steps] == [
        "Be brief.", "Ann has 3 nuts.", "Bob has 4.", "How many?", "3 + 4 = 7.", "And if Ann eats 2?", "7 - 2 = 5.",
        "The answer is 5.",
    ]  # fmt: skip
    assert [spans.text[a:b] for a, b in spans.words] == ["3", "4", "3", "4", "7", "2", "7", "2", "5", "5"]
    of_question = segment(QUESTION, RATIONALE, context=CONTEXT, key_of="question")
    assert [spans.text[a:b] for a, b in of_question.words] == ["3", "4", "3", "4", "7", "2"]
    given = segment(QUESTION, RATIONALE, key="given", key_spans=([(7, 10)], [(0, 1)]), context=CONTEXT)
    assert [given.text[a:b] for a, b in given.words] == ["Ann", "7"]
    assert segment(QUESTION, RATIONALE).turns == () and segment(QUESTION, RATIONALE, context=[]).turns == ()


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, DROPS_SYSTEM])
@pytest.mark.parametrize("context", [CONTEXT, CONTEXT[1:], CONTEXT[:1]])
def test_a_chat_template_shows_every_turn_in_its_role(template, context):
    tokenizer = bytes_tokenizer(template)
    spans = segment(QUESTION, RATIONALE, context=context)
    encoded = encode(spans, tokenizer, template="chat")
    turns = [{"role": role, "content": text} for role, text in [*context, ("user", QUESTION), ("assistant", RATIONALE)]]
    if template != CHATML and context[0][0] == "system":  # the template has no such turn: it begins the user's
        turns = [{"role": "user", "content": f"Be brief.\n\n{turns[1]['content']}"}, *turns[2:]]
    assert encoded.input_ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    (steps, words), (expected, expected_words) = decoded(tokenizer, encoded, spans)
    assert [step.strip() for step in steps] == [step.strip() for step in expected] and words == expected_words
    asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt(QUESTION, tokenizer, template="chat", context=context) == asked
    assert encoded.input_ids[: encoded.target_start] == asked


@pytest.mark.parametrize("template", ["plain", "Q: {question}\nA: {rationale}"])
def test_other_templates_show_the_turns_as_one_text(template):
    tokenizer = bytes_tokenizer()
    spans = segment(QUESTION, RATIONALE, context=CONTEXT)
    encoded = encode(spans, tokenizer, template=template)
    text = tokenizer.decode(encoded.input_ids)
    joined = "\n\n".join(text for _, text in [*CONTEXT, ("user", QUESTION)])
    assert text == (
        f"{joined} {RATIONALE}" if template == "plain" else template.format(question=joined, rationale=RATIONALE)
    )
    (steps, words), (expected, expected_words) = decoded(tokenizer, encoded, spans)
    assert [step.strip() for step in steps] == [step.strip() for step in expected] and words == expected_words
    ids = prompt(QUESTION, tokenizer, template=template, context=CONTEXT)
    assert ids == encoded.input_ids[: encoded.target_start]


def test_roles_that_a_template_refuses_are_named():
    spans = segment(QUESTION, RATIONALE, context=[("user", "Hello.")])
    with pytest.raises(ValueError, match="template: the chat template .* failed: alternate"):
        encode(spans, bytes_tokenizer(NO_SYSTEM), template="chat")
    changes = CHATML.replace("m['content'] | trim", "m['content'] | replace('nuts', 'figs')")
    with pytest.raises(TextChanged, match="changes the texts"):
        encode(segment(QUESTION, RATIONALE, context=CONTEXT), bytes_tokenizer(changes), template="chat")


def test_the_whole_example_both_tasks_and_the_cut():
    tokenizer = bytes_tokenizer(CHATML)
    tokenizer.eos_token = "<|im_end|>"
    example = Example("a", QUESTION, RATIONALE, "5", context=tuple(CONTEXT))
    options = TextOptions(student_template="chat")
    tokenization = Tokenization(options, TokenizerSpec(tokenizer, "chat", None), None, "{question}\nAnswer: {answer}")
    tokenized = tokenization(example)
    text = tokenizer.decode(tokenized.predict.input_ids)
    assert "<|im_start|>system\nBe brief." in text and f"{QUESTION}\nAnswer:<|im_end|>" in text
    assert tokenizer.decode(tokenized.predict.input_ids[tokenized.predict.target_start :]).startswith("5")
    asked = predict_prompt(example, tokenizer, "chat", "{question}\nAnswer: {answer}")
    assert asked == tokenized.predict.input_ids[: tokenized.predict.target_start].tolist()
    said = tokenization.describe_labels(tokenized)
    assert "labels of example a: explain: " in said and "taught, '7 - 2 = 5. The answer is 5.<|im_end|>" in said
    spans = spans_of(example, options)
    cut = fit(spans, (tokenizer, "chat", len(tokenized.explain.input_ids) - 10))
    assert cut.turns == spans.turns and cut.rationale != spans.rationale


def test_a_store_tells_roles_and_contexts_apart():
    plain = segment(QUESTION, RATIONALE)
    assert fingerprint_spans(plain) == fingerprint_spans(
        Spans(plain.text, plain.steps, plain.words, plain.question_end)
    )
    one, other = (segment(QUESTION, RATIONALE, context=[(role, "Ann has 7.")]) for role in ("user", "assistant"))
    assert one.text == other.text and fingerprint_spans(one) != fingerprint_spans(other)
    examples = [Example("a", QUESTION, RATIONALE, "5", context=context) for context in ((), (("user", "Hi."),))]
    assert fingerprint_examples(examples[:1]) != fingerprint_examples(examples[1:])


def test_data_sets_with_several_turns(tmp_path):
    messages = [{"role": role, "content": text} for role, text in [*CONTEXT, ("user", QUESTION)]]
    reply = {"role": "assistant", "content": RATIONALE}
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in [*messages, reply]]
    records = [
        {"messages": [*messages, reply]},
        {"messages": [*messages, reply, {"role": "user", "content": "Thanks."}]},
        {"conversations": shared},
        {"conversations": shared[1:], "system": "Be brief."},
        {"prompt": messages, "completion": [reply]},
        {"question": QUESTION, "rationale": RATIONALE, "answer": "5", "earlier_turns": messages[:-1]},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for example in read_examples(path):
        assert (example.question, example.rationale, example.answer) == (QUESTION, RATIONALE, "5")
        assert example.context == tuple(CONTEXT)


def test_messages_as_data_sets_have_them():
    """Blank turns of the system, null columns, turns after the reply, and a trace that is there twice."""
    ask, reply = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>a</think>b", "reasoning": "a"},
    )
    after = [{"role": "user", "content": ""}, {"role": "tool", "content": None}]
    found = turns_of([{"role": "system", "content": ""}, ask, reply, *after], "m", until_reply=True)
    assert found == [("user", "q"), ("assistant", "<think>a</think>b")]
    mixed = [{"from": "human", "value": "q", "content": None, "role": None, "thinking": "no"}]
    assert turns_of(mixed, "m") == [("user", "q")]
    alpaca = {"instruction": "q", "output": "So 2.", "system": "s", "history": [["a", "b"]]}
    example = example_of(alpaca, "1", True, False)
    assert example.context == (("system", "s"), ("user", "a"), ("assistant", "b"))
    passage = {"question": "q", "rationale": "So 2.", "answer": "2", "context": "A passage, of another format."}
    assert example_of(passage, "1", True, False).context == ()


def test_a_question_without_a_reply(tmp_path):
    """To be asked, not trained on: the last turn of the user is the question."""
    messages = [{"role": role, "content": text} for role, text in [*CONTEXT, ("user", QUESTION)]]
    shared = [{"from": m["role"], "value": m["content"]} for m in messages]
    path = tmp_path / "d.jsonl"
    records = [{"messages": messages, "answer": "5"}, {"conversations": shared, "gold": 5}, {"messages": messages}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = read_examples(path, rationale=False)
    assert [(e.question, e.context, e.answer) for e in read] == [(QUESTION, tuple(CONTEXT), "5")] * 2
    assert "expected its answer in a field answer or gold" in read.left_out[0]
    whole = [*messages, {"role": "assistant", "content": RATIONALE}]
    path.write_text(json.dumps({"messages": whole, "answer": "5"}))
    assert read_examples(path, rationale=False)[0].question == QUESTION
    path.write_text(json.dumps({"messages": messages, "answer": "7"}))
    assert read_examples(path)[0].question == CONTEXT[1][1]  # for training, what follows the reply is not used


def test_a_turn_of_the_system_elsewhere_is_refused():
    """As Mistral-Nemo's template, which shows it before the last question."""
    template = (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages if m.role != "
        "'system' %}{% if m.role == 'user' %}[INST]{{ s if loop.index0 == loop.length - 2 }}{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    tokenizer = bytes_tokenizer(template)
    assert encode(segment(QUESTION, RATIONALE, context=CONTEXT[:1]), tokenizer, template="chat").steps
    with pytest.raises(ValueError, match="does not show all turns in their order"):
        encode(segment(QUESTION, RATIONALE, context=CONTEXT), tokenizer, template="chat")


def test_the_map_of_a_prompt_has_its_roles():
    tokenizer, spans = bytes_tokenizer(CHATML), segment(QUESTION, "", context=CONTEXT)
    ids, _, _ = _read(spans, tokenizer, "chat", {}, is_prompt=True)
    assert ids == prompt(QUESTION, tokenizer, template="chat", context=CONTEXT)


def test_the_traces_of_earlier_turns_are_dropped():
    turns = [
        ("user", "3 + 4?"),
        ("assistant", "<think>\nHm, 7.\n</think>\n\n7."),
        ("user", "+ 1?"),
        ("assistant", "8."),
    ]
    assert split_turns(turns, "messages") == ([("user", "3 + 4?"), ("assistant", "7.")], "+ 1?", "8.")
    with pytest.raises(ValueError, match=r"context\[0\]: expected a text of the assistant, got a blank one"):
        checked_context([("assistant", "<think>only this</think>")])


@pytest.mark.parametrize(
    "messages, message",
    [
        ("hello", "expected a list of messages, got str"),
        (["hello"], r"messages\[0\]: expected an object with role and content, got 'hello'"),
        ([{"role": "tool", "content": "4"}], "expected the role system, user or assistant, got 'tool'"),
        ([{"content": "4"}], "got None"),
        ([{"role": "user", "content": None}], r"messages\[0\]: expected text in the turn of the user, got none"),
        ([{"role": "assistant", "content": None, "tool_calls": [1]}], "got a turn of tools"),
        ([{"role": "user", "content": [{"type": "image"}]}], "expected text in the turn of the user"),
        ([{"role": "assistant", "content": "4", "reasoning": 3}], "expected a text of the thinking, got '3'"),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises((ValueError, TypeError), match=message):
        turns_of(messages, "messages")


@pytest.mark.parametrize("roles", ["", "u", "a", "uua"[1:2], "uaa", "sa", "aau"])
def test_a_reply_follows_a_question(roles):
    names = {"u": "user", "a": "assistant", "s": "system"}
    with pytest.raises(
        ValueError, match="m: expected a turn of the user and then one of the assistant at the end, got"
    ):
        split_turns([(names[role], "text") for role in roles], "m")


def test_bad_contexts():
    for context, message in (
        ([("user", "a"), ("system", "b")], r"context\[1\]: expected the role user or assistant after the first turn"),
        ([("tool", "a")], r"context\[0\]: expected the role system, user or assistant, got 'tool'"),
        ([("user", 3)], r"context\[0\]: expected a text, got int"),
        (["user"], r"context\[0\]: expected a role and a text, got 'user'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            segment("q", "r", context=context)
    with pytest.raises(ValueError, match="question: expected a text after a context"):
        segment("", "r", context=[("user", "a")])
    with pytest.raises(ValueError, match=r"turns\[1\]: expected a non-empty span"):
        Spans("ab", ((0, 2),), (), 2, (("user", (0, 1)), ("user", (0, 2))))
    with pytest.raises(ValueError, match="turns: expected the last to be the user's"):
        Spans("ab", ((0, 2),), (), 2, (("user", (0, 1)),))
