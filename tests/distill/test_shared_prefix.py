"""Shared-prefix packing: hidden states, maps and gradients are those of packing all texts whole."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import molsaki
from molsaki.batches.batch import TextBatch
from molsaki.batches.collator import Collator
from molsaki.batches.shared_prefix import SharedPrefix
from molsaki.batches.tokenized import TokenizedExample, TokenizedText
from molsaki.modeling.masked_attention import suffix_attention
from molsaki.text.spans import Spans
from tests.helpers.architectures import SHARING, make, relative, skip_gpt2_before_transformers_5  # noqa: F401
from tests.helpers.tiny import one_thread  # noqa: F401


def text(ids: list[int], start: int, steps=(), words=()) -> TokenizedText:
    return TokenizedText(np.array(ids, np.int32), start, list(steps), [list(word) for word in words])


BARE = Spans("", (), (), 0)


def texts() -> list[TokenizedExample]:
    """Questions of several lengths: longer than any window; one that the predict text does not begin with, without
    words; one that is a prefix up to its last token; one after which both texts continue with the same labels."""
    ids = torch.randint(3, 61, (200,), generator=torch.Generator().manual_seed(4)).tolist()
    a, b, c, d = ids[:40], ids[40:69], ids[69:91], ids[91:111]
    return [
        TokenizedExample("a", BARE, text(a, 25, [(0, 12), (12, 25), (25, 40)], [[3], [14, 15], [30]]),
            text(a[:25] + [60, 59, 7, 2], 27), None),
        TokenizedExample("b", BARE, text(b, 10, [(0, 10), (12, 29)]), text([61 - b[0], *ids[111:116]], 3), None),
        TokenizedExample("c", BARE, text(c, 10, [(0, 22)], [[2], [20]]), text([*c[:10], 63 - c[10], 2], 10), None),
        TokenizedExample("d", BARE, text(d, 7, [(1, 7), (7, 20)], [[0], [9]]), text([*d[:11], 63 - d[11], 2], 7), None),
    ]  # fmt: skip


def task(share: bool, items: list[TokenizedExample] | None = None) -> TextBatch:
    batch = Collator(0, packing=True, share_question=share)([(row, None) for row in items or texts()])
    return batch.student[0]


def hidden(model, task: TextBatch) -> torch.Tensor:
    model.set_attn_implementation("molsaki")
    return model.base_model(**task.model_inputs())[0].flatten(0, 1)[task.index]


def results(model, task: TextBatch) -> dict[str, torch.Tensor]:
    """Hidden states where labels are predicted, maps, pooled values, and the gradients of all of them."""
    found = {}
    with molsaki.capture(model.base_model, task.plan, values=True) as record:
        found["hidden"] = hidden(model, task)
        found["maps"], found["values"] = record.maps[:4], record.values[:4]
        g = torch.Generator().manual_seed(2)
        loss = sum((x * torch.randn(x.shape, generator=g).to(x)).sum() for x in found.values())
        named = dict(model.base_model.named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()))
    return {name: x.detach() for name, x in found.items()} | dict(zip(named, grads, strict=True))


def test_positions():
    shared = SharedPrefix.from_lengths(torch.tensor([3, 2]), torch.tensor([2, 0]), torch.tensor([1, 2]))
    assert shared.keys.tolist() == [[0, 1, 5], [6, 7, 7]]
    assert shared.queries.tolist() == [[2, 2], [0, 1]]
    assert shared.suffixes.tolist() == [0, 2, 3]
    assert len(shared) == 2
    again = pickle.loads(pickle.dumps(shared))
    for field in dataclasses.fields(SharedPrefix):
        assert torch.equal(getattr(again, field.name), getattr(shared, field.name))
    assert shared.to("cpu") is shared
    assert shared.to("meta").keys.is_meta


def test_the_row():
    shared, packed = task(True), task(False)
    assert packed.input_ids.shape[1] - shared.input_ids.shape[1] == 25 + 0 + 10 + 11
    assert shared.cu_seq_lens_q.tolist() == [0, 40, 69, 91, 111, 115, 121, 123, 125]
    assert shared.position_ids[0, 111:].tolist() == [25, 26, 27, 28, 0, 1, 2, 3, 4, 5, 10, 11, 11, 12]
    assert torch.equal(shared.input_ids[:, :111], packed.input_ids[:, :111])
    assert (shared.attention_mask == 1).all()
    assert len(shared.plan) == 4
    for name in ("labels", "counts", "targets"):
        assert torch.equal(torch.as_tensor(getattr(shared, name)), torch.as_tensor(getattr(packed, name))), name
    # The same token at the same position predicts a label, even if it is in the other text.
    for name in ("input_ids", "position_ids"):
        assert torch.equal(getattr(shared, name)[0, shared.index], getattr(packed, name)[0, packed.index])
    assert shared.index[-6:].tolist() == [91 + 6, 91 + 7, 91 + 8, 91 + 9, 91 + 10, 123]


def test_little_to_share_is_not_shared():
    assert task(True, texts()[1:2]).shared_prefix is None
    assert task(True, texts()[2:3]).shared_prefix is not None
    assert task(False).shared_prefix is None


def test_a_suffix_is_never_empty():
    """Where both texts are the same, all but the last token is shared."""
    same = text(texts()[2].explain.input_ids.tolist(), 10)
    shared = task(True, [TokenizedExample("s", BARE, same, same, None), texts()[2]])
    assert shared.cu_seq_lens_q.tolist() == [0, 22, 44, 45, 47]
    assert shared.position_ids[0, 44:].tolist() == [21, 10, 11]
    model = make("Llama")
    expected = hidden(model, task(False, [TokenizedExample("s", BARE, same, same, None), texts()[2]]))
    assert relative(hidden(model, shared), expected) < 1e-6


@pytest.mark.parametrize("name", SHARING)
def test_sharing_changes_nothing(name):
    model = make(name)
    expected, got = results(model, task(False)), results(model, task(True))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if value.norm() > 1e-9:  # norms and rotary embeddings are float32 on both sides
            assert relative(got[key], value) < 1e-6, key


@pytest.mark.parametrize("name", ["Llama", "GptOss"])
def test_gradient_checkpointing_changes_nothing(name):
    model = make(name)
    expected = results(model, task(True))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = results(model.train(), task(True))
    for key, value in expected.items():
        assert torch.equal(got[key], value), key


def test_gradients_are_bitwise_the_same_when_run_twice():
    model = make("GptOss", torch.float32)
    first, second = results(model, task(True)), results(model, task(True))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_suffix_sees_its_question_and_nothing_else(dropout):
    model = make("GptOss", torch.float32, attention_dropout=dropout, sliding_window=40).train()
    shared = task(True)

    def suffixes(changed: slice) -> torch.Tensor:
        row = shared.input_ids.clone()
        row[0, changed] = 63 - row[0, changed]
        torch.manual_seed(0)
        model.set_attn_implementation("molsaki")
        out = model.base_model(**dataclasses.replace(shared, input_ids=row).model_inputs())[0][0]
        return out[111:115], out[115:121], out[121:123], out[123:]

    expected = suffixes(slice(0, 0))
    for changed, seen in ((slice(25, 40), None), (slice(50, 69), None), (slice(0, 1), 0), (slice(102, 111), None),
                          (slice(24, 25), 0), (slice(79, 91), None), (slice(78, 79), 2), (slice(91, 92), 3),
                          (slice(111, 112), 0)):  # fmt: skip
        for n, (a, b) in enumerate(zip(suffixes(changed), expected, strict=True)):
            same = n != seen
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5) == same, (changed, n)


@pytest.mark.parametrize("name", ["GptOss", "GPT2"])
def test_dropout_of_nothing(name):
    """The explicit masks of dropout hide what the kernels hide."""
    model = make(name, torch.float64, **{"attn_pdrop" if name == "GPT2" else "attention_dropout": 1e-12})
    expected, got = results(model.eval(), task(True)), results(model.train(), task(True))
    for key in ("hidden", "maps", "values"):
        assert relative(got[key], expected[key]) < 1e-6, key


def test_autocast():
    model = make("GptOss", torch.float32)
    expected = hidden(model, task(True))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(hidden(model, task(True)), expected) < 0.05


def tensors(N: int = 3, length: int = 400, Hq: int = 8, Hkv: int = 2, D: int = 16):
    """Queries of suffixes of 5 tokens, keys, values, and the positions; the prefix is all but the last 100 tokens."""
    g = torch.Generator().manual_seed(0)
    total = N * (length + 5)
    q, k, v = (torch.randn(1, H, M, D, generator=g, requires_grad=True)
               for H, M in ((Hq, N * 5), (Hkv, total), (Hkv, total)))  # fmt: skip
    return q, k, v, SharedPrefix.from_lengths(*(torch.tensor([count] * N) for count in (length, length - 100, 5)))


def test_compiles_in_one_graph():
    found = []
    for function in (suffix_attention, torch.compile(suffix_attention, fullgraph=True, backend="aot_eager")):
        q, k, v, shared = tensors()
        out = function(q, k, v, shared, window=50, dropout=0.0, scale=None, softcap=5.0, sinks=torch.linspace(-1, 1, 8))
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.number = max(self.number, t.numel())
        return out


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_memory_is_that_of_the_suffixes(softcap):
    """No tensor is as long as the packed sequence in two dimensions, and no key is repeated for a group's heads."""
    q, k, v, shared = tensors()
    with Largest() as largest:
        suffix_attention(
            q, k, v, shared, window=50, dropout=0.0, scale=None, softcap=softcap, sinks=None
        ).sum().backward()
    assert largest.number <= max(k.numel(), 3 * 8 * 5 * 305)


def test_shared_prefix_without_bounds():
    model = make("Llama", torch.float32)
    inputs = task(True).model_inputs()
    del inputs["cu_seq_lens_q"]
    model.set_attn_implementation("molsaki")
    with pytest.raises(ValueError, match="shared_prefix: expected with cu_seq_lens_q"):
        model(**inputs)
