"""Attention maps of one text: against eager attention's weights, summed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import molsaki
from tests.helpers import small_tokenizers, tiny
from tests.helpers.tiny import one_thread  # noqa: F401

TOKENIZER, MODEL = tiny.tokenizer(), tiny.model(2, seed=1)
PROBLEM = tiny.problems(1)[0]
SPANS = molsaki.segment(PROBLEM["question"], PROBLEM["rationale"])
IDS = TOKENIZER(SPANS.text).input_ids


def weights_of(ids, model=MODEL) -> np.ndarray:
    """``(L, H, M, M)``."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.cat(found).numpy()


def summed(weights: np.ndarray, rows, columns) -> np.ndarray:
    """``(L, H, S, W)``."""
    table = [[weights[:, :, a:b][..., tokens].sum((-1, -2)) for tokens in columns] for a, b in rows]
    return np.moveaxis(np.array(table), (0, 1), (2, 3))


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_steps_and_words(heads):
    found = molsaki.attention_map(MODEL, TOKENIZER, SPANS, heads=heads)
    assert found.layers == (0, 1)
    assert found.rows == [SPANS.text[a:b].strip() for a, b in SPANS.steps]
    assert found.columns == [SPANS.text[a:b] for a, b in SPANS.words]
    expected = summed(weights_of(IDS), found.row_tokens, found.column_tokens)
    np.testing.assert_allclose(found.values, expected if heads == "each" else expected.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.mean(), expected.mean((0, 1)), rtol=1e-4, atol=1e-6)
    each = molsaki.attention_map(MODEL, TOKENIZER, SPANS, heads=heads, layers=[1], per_token=True)
    lengths = np.array([b - a for a, b in found.row_tokens])[:, None]
    np.testing.assert_allclose(each.values, found.values[[1]] / lengths, rtol=1e-5)
    assert MODEL.config._attn_implementation == "sdpa" and each.layers == (1,)


@pytest.mark.parametrize("rows", ["all", 5, "tokens", [(0, 3), (7, 9)]])
def test_every_key_at_once(rows):
    """The accumulated scores of H2O, the votes of SnapKV's window, single tokens, and ranges."""
    found = molsaki.attention_map(MODEL, TOKENIZER, SPANS, rows=rows, keys="tokens")
    count = len(IDS)
    chosen = {"all": [(0, count)], 5: [(count - 5, count)], "tokens": [(t, t + 1) for t in range(count)]}
    chosen = rows if isinstance(rows, list) else chosen[rows]
    expected = summed(weights_of(IDS), chosen, [[t] for t in range(count)]).mean(1)
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-6)
    assert "".join(found.columns) == SPANS.text
    total = sum(b - a for a, b in chosen)
    np.testing.assert_allclose(found.values.sum((1, 2)), total, rtol=1e-5)  # every query's weights sum to 1


def test_texts_messages_and_ids():
    """The same text in four forms; under a chat template its special tokens are columns with their names."""
    question, rationale = SPANS.question, SPANS.rationale
    whole = molsaki.attention_map(MODEL, TOKENIZER, SPANS.text)
    assert whole.columns == [SPANS.text[a:b] for a, b in SPANS.words]
    for ids in (IDS, torch.tensor(IDS), torch.tensor([IDS]), np.array(IDS), list(np.array(IDS))):
        again = molsaki.attention_map(MODEL, TOKENIZER, ids)
        np.testing.assert_array_equal(again.values, whole.values)
        assert again.rows == whole.rows
    core = small_tokenizers.byte_level(vocabulary=259)
    ends = ["<|im_start|>", "<|im_end|>"]
    chat = small_tokenizers.wrap(core, chat_template=small_tokenizers.CHATML, additional_special_tokens=ends)
    model = tiny.model(2, len(chat))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": rationale}]
    found = molsaki.attention_map(model, chat, messages)
    spans = molsaki.attention_map(model, chat, SPANS, template="chat")
    assert found.columns == spans.columns == whole.columns
    np.testing.assert_allclose(found.values[:, -2:], spans.values[:, -2:], rtol=1e-6)  # the rationale's steps
    assert found.rows[-2:] == spans.rows[-2:]
    tokens = molsaki.attention_map(model, chat, messages, keys="tokens", rows="all")
    assert tokens.columns[0] == "<|im_start|>" and tokens.columns.count("<|im_end|>") == 2
    longer = [
        {"role": "system", "content": "Use 1 line."},
        *messages[:1],
        {"role": "assistant", "content": "7?"},
        *messages,
    ]
    assert molsaki.attention_map(model, chat, longer).columns[:1] == ["1"]


def test_what_comes_out():
    pandas = pytest.importorskip("pandas")
    found = molsaki.attention_map(MODEL, TOKENIZER, SPANS, heads="each")
    frame = found.to_pandas()
    assert list(frame.columns) == found.columns and frame.index.names == ["layer", "head", "row"]
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 2 * 4 * len(found.rows)
    row = frame.loc[(1, 2, found.rows[3])]
    np.testing.assert_array_equal(np.ravel(row), found.values[1, 2, 3])
    lines = str(found).splitlines()
    assert len(lines) == 1 + len(found.rows) and lines[0].split() == found.columns
    assert lines[1].endswith(found.rows[0])


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    found = molsaki.attention_map(MODEL, TOKENIZER, SPANS, heads="each")
    for number, options in enumerate(({}, {"layer": 1}, {"layer": 0, "head": 3})):
        path = found.plot(tmp_path / f"{number}.png", **options)
        assert path.is_file()
    with pytest.raises(ValueError, match=r"layer: expected one of \(0, 1\), got 2"):
        found.plot(tmp_path / "x.png", layer=2)
    with pytest.raises(ValueError, match="head: expected one of 4 heads .*, got 4"):
        found.plot(tmp_path / "x.png", head=4)


def test_bertviz():
    found = molsaki.attention_map(MODEL, TOKENIZER, SPANS, rows="tokens", keys="tokens", heads="each")
    attention, tokens = found.to_bertviz()
    np.testing.assert_allclose(torch.cat(attention).numpy(), weights_of(IDS), rtol=1e-4, atol=1e-6)
    assert len(tokens) == len(IDS) and attention[0].shape == (1, 4, len(IDS), len(IDS))
    with pytest.raises(ValueError, match="BertViz needs rows='tokens', keys='tokens' and heads='each'"):
        molsaki.attention_map(MODEL, TOKENIZER, SPANS, heads="each").to_bertviz()
    bertviz = pytest.importorskip("bertviz")
    assert bertviz.head_view(attention, tokens, html_action="return").data


@pytest.mark.parametrize("heads", ["mean", "each"])
def test_while_generating(heads):
    """Against the weights that generate returns with eager attention, step by step."""
    found = molsaki.attention_while_generating(
        MODEL, TOKENIZER, SPANS.question, heads=heads, generate={"max_new_tokens": 6, "min_new_tokens": 6}
    )
    MODEL.set_attn_implementation("eager")
    ids = torch.tensor([TOKENIZER(SPANS.question).input_ids])
    output = MODEL.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False,
        pad_token_id=TOKENIZER.pad_token_id, output_attentions=True, return_dict_in_generate=True,
    )  # fmt: skip
    MODEL.set_attn_implementation("sdpa")
    assert len(found.rows) == 6 and len(found.columns) == ids.shape[1] + 6
    assert found.rows[0] == TOKENIZER.decode(output.sequences[0, ids.shape[1]])
    for step, layers in enumerate(output.attentions):
        last = torch.cat(layers)[:, :, -1].numpy()  # (L, H, keys so far)
        got = found.values[..., step, : last.shape[-1]]
        np.testing.assert_allclose(got, last if heads == "each" else last.mean(1), rtol=1e-3, atol=1e-6)
        assert not found.values[..., step, last.shape[-1] :].any()  # what was not written yet
    words = molsaki.attention_while_generating(
        MODEL, TOKENIZER, SPANS.question, keys="words", generate={"max_new_tokens": 3}
    )
    assert words.columns[:3] == ["3", "2", "1"] and len(words.rows) <= 3


def test_a_model_with_dropout():
    """It generates and is read in evaluation mode, and every module is in its own mode afterwards."""
    model = tiny.model(2, attention_dropout=0.7).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(
            molsaki.attention_while_generating(model, TOKENIZER, SPANS.question, generate={"max_new_tokens": 8})
        )
    assert found[0].rows == found[1].rows
    np.testing.assert_array_equal(found[0].values, found[1].values)
    assert [module.training for module in model.modules()] == before
    output = {"return_dict_in_generate": True, "max_new_tokens": 8}
    again = molsaki.attention_while_generating(model, TOKENIZER, SPANS.question, generate=output)
    np.testing.assert_array_equal(found[0].values, again.values)
    with pytest.raises(ValueError, match=r"max_new_tokens: expected it in generate=dict\(max_new_tokens=...\)"):
        molsaki.attention_while_generating(model, TOKENIZER, SPANS.question, max_new_tokens=3)


def test_a_model_whose_layers_have_other_numbers_of_heads():
    from tests.distill.test_teacher_maps import uneven

    assert molsaki.attention_map(uneven(), TOKENIZER, SPANS).values.shape[0] == 2
    with pytest.raises(ValueError, match=r"heads: expected layers with one number of heads for 'each', got \[4, 2\]"):
        molsaki.attention_map(uneven(), TOKENIZER, SPANS, heads="each")


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        (SPANS, {"rows": "sentences"}, ValueError, 'rows: expected "steps", "tokens", "all", a number or ranges'),
        (SPANS, {"rows": 0}, ValueError, r"rows: expected 1 to \d+ tokens, got 0"),
        (SPANS, {"keys": "numbers"}, ValueError, 'keys: expected "words" or "tokens", got'),
        (SPANS, {"heads": "all"}, ValueError, 'heads: expected "mean" or "each"'),
        (SPANS, {"layers": []}, ValueError, "layers: expected some, or None for all, got none"),
        (SPANS, {"rows": True}, ValueError, r"rows: expected 1 to \d+ tokens, got True"),
        (SPANS, {"rows": [(3, 1)]}, ValueError, r"rows: expected ascending, disjoint ranges within 0 to \d+, got"),
        (SPANS, {"rows": [3, 1]}, TypeError, r"rows: expected ranges \(start, stop\) of token positions"),
        (SPANS, {"layers": [2]}, ValueError, r"layers: expected some of \(0, 1\), got 2"),
        (
            SPANS,
            {"splitter": "rules"},
            ValueError,
            "splitter: expected it in molsaki.segment, since text has its steps",
        ),
        ("no number", {}, ValueError, "text: has no key word, so the map has no column"),
        (7, {}, TypeError, "text: expected a text, molsaki.Spans, messages or token ids, got int"),
        ([], {}, TypeError, "text: expected a text, molsaki.Spans, messages or token ids, got list"),
    ],
)
def test_bad_input(text, options, error, message):
    with pytest.raises(error, match=message):
        molsaki.attention_map(MODEL, TOKENIZER, text, **options)
