"""Key words by a teacher's attention or gradient: against eager weights and plain autograd, and what is written."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import molsaki
from molsaki.batches.tokenized import LeftOut, spans_of
from molsaki.cli import main
from molsaki.config import ExtractConfig, KeysConfig, TextOptions
from molsaki.flags import parse
from molsaki.teacher import keys as keys_module
from molsaki.teacher.extract import extract
from molsaki.teacher.keys import candidates, key_words_of, keys, scored_text, select
from molsaki.teacher.word_scores import NO_SCORE, attention_scores, gradient_scores
from molsaki.text.examples import Example, read_examples
from tests.helpers import tiny
from tests.helpers.architectures import make, softmax_in_float64
from tests.helpers.small_tokenizers import all_tokenizers  # noqa: F401
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import TOKENIZER, logged, trainer

VOCABULARY = len(TOKENIZER)  # a token is a byte: in ASCII texts tokens are counted as characters
QUESTIONS = [
    ("Ann has 3 bags of 12 nuts. How many nuts?", "There are 3 bags. So 3 * 12 = 36 nuts.", "36"),
    ("Is 7 odd?", "7 = 2 * 3 + 1 and 6 is even. So 7 is odd, as 5 is.\nAll odd numbers end in 1, 3, 5, 7 or 9.", "yes"),
    ("Bob eats 2.", "It is 2.", "2"),
]
EXAMPLES = [Example(str(n), *texts) for n, texts in enumerate(QUESTIONS)]
MODELS = {"Llama": {}, "Mistral": {"sliding_window": 9}, "Gemma3Text": {"sliding_window": 9}}  # all with GQA


def teacher_of(name: str):
    return make(name, vocab_size=VOCABULARY, max_position_embeddings=512, **MODELS[name])


def scored(example: Example, tokenizer=TOKENIZER, **options):
    config = KeysConfig(top=3, **options)
    spans = candidates(example, config)
    return spans, scored_text(example, spans, config, tokenizer, None)


def text_of(example: Example) -> str:
    return f"{example.question} {example.rationale} The answer is {example.answer}"


def attention_by_hand(model, example: Example, layers: list[int]) -> list[float]:
    """By the definition, from eager attention's weights, with positions that are characters."""
    text, spans = text_of(example), spans_of(example, TextOptions(key="words"))
    model.set_attn_implementation("eager")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax_in_float64)
        found = model(torch.tensor([TOKENIZER(text).input_ids]), output_attentions=True).attentions
    weights = torch.stack([found[layer][0].double().mean(0) for layer in layers]).mean(0)
    ends = [stop for _, stop in spans.steps]
    scores = []
    for start, stop in spans.words:
        own_end = next(end for end in ends if start < end)
        first = max(own_end, len(example.question) + 1)  # the queries of the later steps, up to the text's end
        first += first == len(spans.text)  # the space after the rationale belongs to the token that follows it
        queries = list(range(first, len(text)))
        mass = sum(weights[i, j].item() for i in queries for j in range(start, stop))
        scores.append(NO_SCORE if start == 0 else mass / len(queries))
    return scores


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_that_of_eager_weights(name):
    model = teacher_of(name)
    texts = [scored(example)[1] for example in EXAMPLES]
    for layers in ([], [1, 3]):
        expected = [attention_by_hand(model, example, layers or [0, 1, 2, 3]) for example in EXAMPLES]
        found = attention_scores(model, texts, 0, layers)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)
    with pytest.raises(ValueError, match=r"layers: expected some of \(0, 1, 2, 3\), got 4"):
        attention_scores(model, texts, 0, [4])


def gradient_by_hand(model, example: Example, labels: str) -> list[float]:
    text, spans = text_of(example), spans_of(example, TextOptions(key="words"))
    ids = torch.tensor([TOKENIZER(text).input_ids])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits[0]
    first = len(text) - len(example.answer) if labels == "answer" else len(example.question)
    cross_entropy(logits[first - 1 : -1], ids[0, first:]).backward()
    norms = [embedded.grad[0, start:stop].norm().item() for start, stop in spans.words]
    return [NO_SCORE if start == 0 else norm for norm, (start, _) in zip(norms, spans.words, strict=True)]


@pytest.mark.parametrize("labels", ["answer", "reply"])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_that_of_plain_autograd(name, labels):
    """Also of texts of three lengths in one batch. Nothing of the model changes."""
    model = teacher_of(name).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    texts = [scored(example, by="gradient", labels=labels)[1] for example in EXAMPLES]
    found = gradient_scores(model, texts, 0)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    assert not model.get_input_embeddings()._forward_hooks
    model.eval()
    for a, example in zip(found, EXAMPLES, strict=True):
        np.testing.assert_allclose(a, gradient_by_hand(model, example, labels), rtol=1e-9)


@pytest.mark.parametrize("score", [attention_scores, gradient_scores])
def test_padding_and_other_texts_change_nothing(score):
    model, texts = teacher_of("Mistral"), [scored(example)[1] for example in EXAMPLES]
    together = score(model, texts, 0)
    for pad in (0, 77):
        for text, found in zip(texts, together, strict=True):
            np.testing.assert_allclose(score(model, [text], pad)[0], found, rtol=1e-9)
            np.testing.assert_allclose(score(model, [texts[1], text], pad)[1], found, rtol=1e-9)


@pytest.mark.parametrize("score", [attention_scores, gradient_scores])
def test_every_mode_is_evaluation_mode(score):
    model = tiny.model(2, attention_dropout=0.7).train()
    text = scored(EXAMPLES[0])[1]
    np.testing.assert_array_equal(score(model, [text], 0)[0], score(model, [text], 0)[0])
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama2"])
@pytest.mark.parametrize("template", ["chat", "Q: {question}\nA: {rationale}"])
def test_templates(tokenizers, name, template):
    """The tokens of words, steps and labels are those of the texts; after a template the first word has a score."""
    tokenizer = tokenizers[name]
    spans, text = scored(EXAMPLES[0], tokenizer, teacher_template=template)
    ids = text.tokens.input_ids
    read = [tokenizer.decode(ids[tokens]).strip() for tokens in text.tokens.words]
    assert read == [spans.text[a:b] for a, b in spans.words]
    steps = [tokenizer.decode(ids[a:b]).strip() for a, b in text.tokens.steps]
    assert steps == ["There are 3 bags.", "So 3 * 12 = 36 nuts.", "The answer is 36"]
    assert tokenizer.decode(ids[text.tokens.target_start :]).strip() == "36"
    _, reply = scored(EXAMPLES[0], tokenizer, teacher_template=template, by="gradient", labels="reply")
    assert tokenizer.decode(ids[reply.tokens.target_start :]).strip() == " ".join(steps)
    assert text.seen_from == [0] * 10 + [1] * 4 + [2] * 5
    model = tiny.model(2, len(tokenizer))
    for score in (attention_scores, gradient_scores):
        assert np.isfinite(score(model, [text], 0)[0]).all()


def test_another_form_of_the_reply():
    """White space around the texts, and a template with words before the rationale."""
    example = Example("x", "  Is 4 even? ", "\n2 * 2 = 4.  ", " yes\n")
    spans, text = scored(example, cot_template=" So: {rationale} Thus {answer}! ")
    assert TOKENIZER.decode(text.tokens.input_ids) == "Is 4 even? So: 2 * 2 = 4. Thus yes"
    read = [TOKENIZER.decode(text.tokens.input_ids[tokens]) for tokens in text.tokens.words]
    assert read == ["Is", "4", "even", "2", "2", "4"] == [spans.text[a:b] for a, b in spans.words]
    steps = [TOKENIZER.decode(text.tokens.input_ids[a:b]) for a, b in text.tokens.steps]
    assert steps == ["So: 2 * 2 = 4. ", "Thus yes"] and text.seen_from == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ([1, 3, 2, 3], {"top": 1}, [1]),  # of equal scores the first
        ([1, 3, 2, 3], {"top": 3}, [1, 2, 3]),
        ([1, 3, NO_SCORE, 3], {"top": 9}, [0, 1, 3]),
        ([1, 3, NO_SCORE, 3], {"top_share": 0.5}, [1, 3]),
        ([1, 3, 2, 3], {"top_share": 0.01}, [1]),
        ([NO_SCORE], {"top": 1}, []),
        ([], {"top_share": 1.0}, []),
    ],
)
def test_selection(scores, options, expected):
    assert select(np.array(scores, float), options.get("top"), options.get("top_share")) == expected


@pytest.mark.parametrize(("scores", "reason"), [([1, np.nan], "not finite"), ([0, NO_SCORE], "every score is 0")])
def test_scores_that_tell_nothing(scores, reason):
    with pytest.raises(LeftOut, match=reason):
        select(np.array(scores, float), 1, None)


TEACHER = tiny.model(3, VOCABULARY, seed=1)
RECORDS = [
    {"question": "Ann has 3 bags of 12 nuts. How many?", "answer": "3*12 = <<3*12=36>>36 nuts.\n#### 36", "level": 2},
    {"instruction": "Add the numbers.", "input": "5 and 12", "output": " 5 + 12 = 17 "},
    {"messages": [{"role": "user", "content": " What is 5 plus 12? "}, {"role": "assistant", "content": "It is 17."}]},
    {"conversations": [{"from": "human", "value": "What is 1 + 1?"}, {"from": "gpt", "value": "1 + 1 = 2."}]},
    {"input": "A box has 5 pens. How many?", "label": "5", "rationale": "  The box has 5 pens.", "note": "\ud800 é"},
    {"problem": "What is $2 \\cdot 3$?", "solution": "It is $2 \\cdot 3 = \\boxed{6}$."},
    {"id": 7, "question": "我有3个苹果,又买2个?", "rationale": "3 + 2 = 5。", "answer": 5, "gold": "5"},
]


def run(folder, records=RECORDS, teacher=TEACHER, **options):
    data, output = folder / "train.json", folder / "new/train.keys.jsonl"
    data.write_text(json.dumps(records))
    config = KeysConfig(data_file=str(data), output_file=str(output), **{"top": 2} | options)
    return keys(config, teacher, TOKENIZER), output


@pytest.mark.parametrize("by", ["attention", "gradient"])
def test_what_is_written_is_what_key_given_reads(tmp_path, by):
    """Of records of every format, which keep all their fields."""
    summary, output = run(tmp_path, by=by)
    old, new = read_examples(tmp_path / "train.json"), read_examples(output)
    assert summary["examples"] == len(old) == len(new) == 7 and not summary["left_out"]
    assert summary["key_words"] == 14 < summary["words"] and summary["tokens"] > 100
    config = KeysConfig(by=by, top=2)
    for number, (a, b) in enumerate(zip(old, new, strict=True)):
        assert dataclasses.replace(b, key_spans=None) == a
        record = new.record(number)
        assert record.pop("key_spans") and record == {"id": a.id} | RECORDS[number]
        spans, text = scored(a)
        score = attention_scores if by == "attention" else gradient_scores
        chosen = select(score(TEACHER, [text], 0)[0], 2, None)
        assert spans_of(b, TextOptions(key="given")).words == tuple(spans.words[w] for w in chosen)
        assert key_words_of([a], config, TEACHER, TOKENIZER)[0]["words"] == len(spans.words)
    assert [path.name for path in output.parent.iterdir()] == ["train.keys.jsonl"]


def test_among_and_of(tmp_path):
    """Only numbers of the question, then only those that an earlier run has chosen."""
    _, output = run(tmp_path, among="numbers", of="question", top=9)
    for example in read_examples(output):
        candidates = spans_of(example, TextOptions(key_of="question"))
        given = spans_of(example, TextOptions(key="given")).words
        assert given == tuple(word for word in candidates.words if word[0] > 0)
    again = tmp_path / "again.jsonl"
    keys(KeysConfig(data_file=str(output), output_file=str(again), among="given", top_share=0.3), TEACHER, TOKENIZER)
    for a, b in zip(read_examples(output), read_examples(again), strict=True):
        assert set(b.key_spans[0]) <= set(a.key_spans[0]) and len(b.key_spans[0]) == min(len(a.key_spans[0]), 1)


def test_a_store_and_a_student_of_them(tmp_path):
    """From the shell; extract and distill run with the written words, which are a part of a store's identity."""
    teacher, data = tiny.save(tmp_path / "teacher", 3, TOKENIZER, seed=1), tmp_path / "train.jsonl"
    tiny.write_jsonl(data, tiny.problems(8))
    for by in ("attention", "gradient"):
        words = ["keys", "--teacher", teacher, "--data_file", data, "--output_file", tmp_path / f"{by}.jsonl"]
        assert main([str(word) for word in [*words, "--by", by, "--top", 3]]) == 0
    files = [tmp_path / f"{by}.jsonl" for by in ("attention", "gradient")]
    assert files[0].read_text() != files[1].read_text()
    store = str(tmp_path / "store")
    options = ExtractConfig(teacher=str(teacher), data_files=[str(files[0])], store=store, key="given")
    extract(options)
    assert molsaki.Store(store)["p0"].maps.shape[-1] == 3
    with pytest.raises(ValueError, match="another"):
        extract(dataclasses.replace(options, data_files=[str(files[1])]))
    live = trainer(tmp_path / "live", data=read_examples(files[0]), key="given", max_steps=1, save_strategy="no")
    live.train()
    assert logged(live, "words_mean") == [(3,)]


def test_interrupted_and_continued(tmp_path, monkeypatch):
    """The output is that of a whole run, and no finished part is computed again."""
    monkeypatch.setattr(keys_module, "PART", 2)
    (tmp_path / "whole").mkdir()
    _, whole = run(tmp_path / "whole")
    calls = []

    def interrupted(examples, *args):
        calls.append(len(examples))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return key_words_of(examples, *args)

    monkeypatch.setattr(keys_module, "key_words_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    work = tmp_path / "new/train.keys.work.jsonl"
    assert len(work.read_text().splitlines()) == 3 and not work.with_name("train.keys.jsonl").exists()
    with pytest.raises(ValueError, match="train.keys.work.jsonl: was begun with another top; run the old command"):
        run(tmp_path, top=3)
    with pytest.raises(ValueError, match="was begun with another teacher"):
        run(tmp_path, teacher=tiny.model(3, VOCABULARY, seed=2))
    with pytest.raises(ValueError, match="was begun with another data"):
        run(tmp_path, RECORDS[::-1])
    work.write_text(work.read_text() + '{"first": 4, "resu')
    _, output = run(tmp_path, batch_tokens=100)
    assert output.read_bytes() == whole.read_bytes() and calls == [2, 2, 2, 2, 1] and not work.exists()
    output.unlink()
    work.write_text("{}\n{}\n")
    with pytest.raises(ValueError, match="train.keys.work.jsonl: damaged; delete it to start over"):
        run(tmp_path)


def test_left_out(tmp_path, caplog):
    more = [
        {"id": "long", "question": "Why 1?", "rationale": "So 2. " * 99, "answer": "2"},
        {"id": "none", "question": "Why 1?", "rationale": " ", "answer": "2"},
        {"id": "wrong", "question": "Why 1?", "rationale": "So 2.", "answer": "2", "gold": "3"},
        {"id": "few", "question": "Who?", "rationale": "So 2.", "answer": "2"},
    ]
    summary, output = run(tmp_path, RECORDS + more, among="numbers", teacher_max_length=200, drop_wrong=True)
    too_long = "text longer than the teacher's context or teacher_max_length"
    assert summary["left_out"] == {too_long: 1, "no rationale": 1, "wrong answer": 1}
    assert summary["examples"] == 11 and f"1 left out: {too_long} (long)" in caplog.text
    written = read_examples(output)
    assert [example.id for example in written] == ["1", "2", "3", "4", "5", "6", "7", "few"]
    assert written[7].key_spans == ((), ((3, 4),))
    with pytest.raises(ValueError, match=r"all 1 examples were left out: 1 no rationale"):
        (tmp_path / "b").mkdir()
        run(tmp_path / "b", [more[1] | {"question": "Why 1 or 2?"}])
    assert not (tmp_path / "b/new/train.keys.jsonl").exists()


def test_texts_that_a_chat_template_refuses(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'pens' in m.content %}{{ raise_exception('no pens') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}"
    )
    data = tiny.write_jsonl(tmp_path / "a.jsonl", RECORDS)
    output = tmp_path / "b.jsonl"
    config = KeysConfig(data_file=str(data), output_file=str(output), top=2, teacher_template="chat")
    assert keys(config, TEACHER, tokenizer)["left_out"] == {"the template or the tokenizer refuses its text": 1}
    assert [example.id for example in read_examples(output)] == ["1", "2", "3", "4", "6", "7"]


@pytest.mark.parametrize("by", ["attention", "gradient"])
def test_a_teacher_on_the_disk(tmp_path, by):
    teacher, outputs = tiny.save(tmp_path / "teacher", 3, TOKENIZER, seed=1), []
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(3))
    for name, device_map in (("plain", None), ("disk", {"": "disk"})):
        outputs.append(tmp_path / f"{name}.jsonl")
        files = {"data_file": str(data), "output_file": str(outputs[-1])}
        keys(KeysConfig(teacher=str(teacher), by=by, top=4, device_map=device_map, **files))
    assert outputs[0].read_text() == outputs[1].read_text()


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_quantised_teacher(tmp_path, quantize):
    """Gradients pass through its weights: they are near those of the same weights dequantised."""
    pytest.importorskip("bitsandbytes")
    from molsaki.modeling.loading import load_model

    teacher, text = tiny.save(tmp_path / "teacher", 3, TOKENIZER, seed=1), scored(EXAMPLES[0])[1]
    model = load_model(str(teacher), quantize=quantize)
    found = gradient_scores(model, [text], 0)[0]
    exact = gradient_scores(model.dequantize().float(), [text], 0)[0]
    assert np.corrcoef(found[1:], exact[1:])[0, 1] > 0.99


def test_weights_without_a_gradient_are_refused():
    model = tiny.model(2)
    model.hf_quantizer = SimpleNamespace(is_trainable=False)
    model.config.quantization_config = SimpleNamespace(quant_method="mine")
    with pytest.raises(ValueError, match="by: gradient needs weights that gradients pass through, got .* mine"):
        gradient_scores(model, [scored(EXAMPLES[0])[1]], 0)
    with pytest.raises(ValueError, match=r"layers: expected none with gradients, got \[1\]"):
        gradient_scores(tiny.model(2), [scored(EXAMPLES[0])[1]], 0, [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "top, top_share: expected one of them, got None and None"),
        ({"top": 1, "top_share": 0.1}, "top, top_share: expected one of them, got 1 and 0.1"),
        ({"top": 0}, "top: expected at least 1, got 0"),
        ({"top_share": 1.5}, "top_share: expected a share above 0, at most 1, got 1.5"),
        ({"top_share": float("nan")}, "top_share: expected a share above 0, at most 1, got nan"),
        ({"top": 1, "by": "loss"}, "by: expected one of attention, gradient, got 'loss'"),
        ({"top": 1, "among": "digits"}, "among: expected one of numbers, keywords, .* got 'digits'"),
        ({"top": 1, "of": "answer"}, "of: expected one of all, question, got 'answer'"),
        ({"top": 1, "splitter": "x"}, "splitter: expected "),
        ({"top": 1, "number_words": True}, 'number_words: needs among="numbers" or among="random", got words'),
        ({"top": 1, "by": "gradient", "layers": [1]}, r"layers: expected none with by=gradient, got \[1\]"),
        ({"top": 1, "labels": "reply"}, "labels: reply needs by=gradient, got by=attention"),
        ({"top": 1, "cot_template": "{answer} {rationale}"}, "cot_template: expected a text with {rationale} and then"),
        ({"top": 1, "cot_template": "{rationale} {answer} {answer}"}, "cot_template: expected a text .* once each"),
        ({"top": 1, "batch_tokens": 0}, "batch_tokens: expected at least 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        KeysConfig(**options)


def test_bad_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--output_file: required"):
        keys(KeysConfig(data_file="x.jsonl", top=1))
    with pytest.raises(ValueError, match="--output_file: expected a name for JSON lines, .* got a.csv"):
        keys(KeysConfig(data_file="x.jsonl", output_file="a.csv", top=1))
    data = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.problems(2))
    with pytest.raises(ValueError, match="--output_file: .*a.jsonl exists already; choose another name, or delete it"):
        keys(KeysConfig(data_file=str(data), output_file=str(data), top=1))
    with pytest.raises(ValueError, match=r"--among: regex:x\{9\} finds no word in any of the 7 examples"):
        run(tmp_path, among="regex:x{9}")
    with pytest.raises(ValueError, match="--layers: expected some of 0 1 2, got 3"):
        run(tmp_path, layers=[3])
    assert run(tmp_path, layers=[2])[0]["examples"] == 7  # nothing is left of the run before
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE: keys runs in one process, got 2"):
        keys(KeysConfig(data_file=str(data), output_file=str(tmp_path / "n.jsonl"), top=1))


def test_the_command_line():
    flags = ["--by", "gradient", "--top_share", "0.2", "--among", "numbers", "--of", "question", "--labels", "reply"]
    config = parse(KeysConfig, flags)
    assert (config.top, config.top_share, config.among, config.of) == (None, 0.2, "numbers", "question")
    assert parse(KeysConfig, ["--top", "3", "--layers", "0", "2"]).layers == [0, 2]


def test_conversations_and_traces(tmp_path):
    """Spans are those of the record's own fields: not of the turns before the question, nor of a <think> put before
    the rationale; no tag is a key word."""
    trace = "5 plus 12 is 17, I think.\n</think>\n\nIt is 17."
    context = [{"role": "user", "content": "Think of 5 and 12."}, {"role": "assistant", "content": "I do."}]
    record = {"question": "What is 5 plus 12?", "rationale": trace, "answer": "17", "earlier_turns": context}
    messages = [*context, {"role": "user", "content": record["question"]}, {"role": "assistant", "content": trace}]
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [record, {"messages": messages, "answer": "17"}])
    out = tmp_path / "o.jsonl"
    config = KeysConfig(data_file=str(data), output_file=str(out), top=99)
    keys(config, tiny.model(2), TOKENIZER)
    for row, example in zip(map(json.loads, out.read_text().splitlines()), read_examples(out), strict=True):
        words = [record["question"][a:b] for a, b in row["key_spans"]["question"]]
        assert words == ["What", "is", "5", "plus", "12"]
        told = [trace[a:b] for a, b in row["key_spans"]["rationale"]]
        assert told == ["5", "plus", "12", "is", "17", "I", "think", "It", "is", "17"]
        spans = spans_of(example, TextOptions(key="given"))
        assert [spans.text[a:b] for a, b in spans.words] == words + told
