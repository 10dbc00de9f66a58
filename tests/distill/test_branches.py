"""Texts that are tails of others in their row: the same hidden states, maps and gradients as the whole texts."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import molsaki
from molsaki.batches.data import Collator, Row, Text
from molsaki.batches.shared_prefix import Branches
from molsaki.modeling import hooks
from molsaki.modeling.forward import can_branch, model_inputs
from tests.distill.test_hooks import make, relative, skip_gpt2_before_transformers_5  # noqa: F401
from tests.helpers.tiny import one_thread  # noqa: F401

ARCHITECTURES = ["Llama", "Mistral", "Gemma2", "GptOss", "GPT2", "Cohere2"]  # windows of 9, softcap, sinks, no rotation


def text(ids: list[int], start: int, steps=(), words=()) -> Text:
    return Text(np.array(ids, np.int32), start, list(steps), [list(word) for word in words])


def rows() -> list[Row]:
    """Questions of several lengths: longer than any window; one that the predict text does not begin with, without
    words; one that is the prefix to its last token; one after which both texts go on alike, labels and all."""
    ids = torch.randint(3, 61, (200,), generator=torch.Generator().manual_seed(4)).tolist()
    a, b, c, d = ids[:40], ids[40:69], ids[69:91], ids[91:111]
    return [
        Row("a", None, text(a, 25, [(0, 12), (12, 25), (25, 40)], [[3], [14, 15], [30]]),
            text(a[:25] + [60, 59, 7, 2], 27), None),
        Row("b", None, text(b, 10, [(0, 10), (12, 29)]), text([61 - b[0], *ids[111:116]], 3), None),
        Row("c", None, text(c, 10, [(0, 22)], [[2], [20]]), text([*c[:10], 63 - c[10], 2], 10), None),
        Row("d", None, text(d, 7, [(1, 7), (7, 20)], [[0], [9]]), text([*d[:11], 63 - d[11], 2], 7), None),
    ]  # fmt: skip


def task(share: bool, items: list[Row] | None = None) -> dict:
    batch = Collator(0, packing=True, share_question=share)([(row, None) for row in items or rows()])
    return batch["tasks"][0]


def hidden(model, task: dict) -> torch.Tensor:
    model.set_attn_implementation("molsaki")
    return model.base_model(**model_inputs(task))[0].flatten(0, 1)[task["index"]]


def results(model, task: dict) -> dict[str, torch.Tensor]:
    """Hidden states where labels are predicted, maps, pooled values, and the gradients of all of them."""
    found = {}
    with molsaki.capture(model.base_model, task["plan"], values=True) as record:
        found["hidden"] = hidden(model, task)
        found["maps"], found["values"] = record.maps[:4], record.values[:4]
        g = torch.Generator().manual_seed(2)
        loss = sum((x * torch.randn(x.shape, generator=g).to(x)).sum() for x in found.values())
        named = dict(model.base_model.named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()))
    return {name: x.detach() for name, x in found.items()} | dict(zip(named, grads, strict=True))


def test_where_tails_are():
    branches = Branches.of(torch.tensor([3, 2]), torch.tensor([2, 0]), torch.tensor([1, 2]))
    assert branches.keys.tolist() == [[0, 1, 5], [6, 7, 7]]
    assert branches.queries.tolist() == [[2, 2], [0, 1]]
    assert branches.tails.tolist() == [0, 2, 3]
    assert len(branches) == 2
    again = pickle.loads(pickle.dumps(branches))
    for field in dataclasses.fields(Branches):
        assert torch.equal(getattr(again, field.name), getattr(branches, field.name))
    assert branches.to("cpu") is branches
    assert branches.to("meta").keys.is_meta


def test_the_row():
    shared, packed = task(True), task(False)
    assert packed["input_ids"].shape[1] - shared["input_ids"].shape[1] == 25 + 0 + 10 + 11
    assert shared["cu_seq_lens_q"].tolist() == [0, 40, 69, 91, 111, 115, 121, 123, 125]
    assert shared["position_ids"][0, 111:].tolist() == [25, 26, 27, 28, 0, 1, 2, 3, 4, 5, 10, 11, 11, 12]
    assert torch.equal(shared["input_ids"][:, :111], packed["input_ids"][:, :111])
    assert (shared["attention_mask"] == 1).all()
    assert len(shared["plan"]) == 4
    for name in ("labels", "counts", "targets"):
        assert torch.equal(torch.as_tensor(shared[name]), torch.as_tensor(packed[name])), name
    # What predicts a label is the same token at the same position, in whichever text it is.
    for name in ("input_ids", "position_ids"):
        assert torch.equal(shared[name][0, shared["index"]], packed[name][0, packed["index"]])
    assert shared["index"][-6:].tolist() == [91 + 6, 91 + 7, 91 + 8, 91 + 9, 91 + 10, 123]


def test_little_to_share_is_not_shared():
    assert "branches" not in task(True, rows()[1:2])
    assert "branches" in task(True, rows()[2:3])
    assert "branches" not in task(False)


def test_a_tail_is_never_empty():
    """Where both texts are the same, all but the last token is shared."""
    same = text(rows()[2].explain.input_ids.tolist(), 10)
    shared = task(True, [Row("s", None, same, same, None), rows()[2]])
    assert shared["cu_seq_lens_q"].tolist() == [0, 22, 44, 45, 47]
    assert shared["position_ids"][0, 44:].tolist() == [21, 10, 11]
    model = make("Llama")
    expected = hidden(model, task(False, [Row("s", None, same, same, None), rows()[2]]))
    assert relative(hidden(model, shared), expected) < 1e-6


@pytest.mark.parametrize("name", ARCHITECTURES)
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
def test_a_tail_sees_its_question_and_nothing_else(dropout):
    model = make("GptOss", torch.float32, attention_dropout=dropout, sliding_window=40).train()
    shared = task(True)

    def tails(changed: slice) -> torch.Tensor:
        row = shared["input_ids"].clone()
        row[0, changed] = 63 - row[0, changed]
        torch.manual_seed(0)
        model.set_attn_implementation("molsaki")
        out = model.base_model(**model_inputs(shared | {"input_ids": row}))[0][0]
        return out[111:115], out[115:121], out[121:123], out[123:]

    expected = tails(slice(0, 0))
    for changed, seen in ((slice(25, 40), None), (slice(50, 69), None), (slice(0, 1), 0), (slice(102, 111), None),
                          (slice(24, 25), 0), (slice(79, 91), None), (slice(78, 79), 2), (slice(91, 92), 3),
                          (slice(111, 112), 0)):  # fmt: skip
        for n, (a, b) in enumerate(zip(tails(changed), expected, strict=True)):
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
    """Tails' queries, keys, values, and where tails of 5 tokens branch off from texts of ``length``, 100 before the
    end."""
    g = torch.Generator().manual_seed(0)
    total = N * (length + 5)
    q, k, v = (torch.randn(1, H, M, D, generator=g, requires_grad=True)
               for H, M in ((Hq, N * 5), (Hkv, total), (Hkv, total)))  # fmt: skip
    return q, k, v, Branches.of(*(torch.tensor([count] * N) for count in (length, length - 100, 5)))


def test_compiles_in_one_graph():
    found = []
    for function in (hooks._branched, torch.compile(hooks._branched, fullgraph=True, backend="aot_eager")):
        q, k, v, branches = tensors()
        out = function(q, k, v, branches, 50, 0.0, None, 5.0, torch.linspace(-1, 1, 8))
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.number = max(self.number, t.numel())
        return out


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_memory_is_that_of_the_tails(softcap):
    """Nothing is as long as the row in two directions, and keys are not repeated over the heads of a group."""
    q, k, v, branches = tensors()
    with Largest() as largest:
        hooks._branched(q, k, v, branches, 50, 0.0, None, softcap, None).sum().backward()
    assert largest.number <= max(k.numel(), 3 * 8 * 5 * 305)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_these_models_can_branch(name):
    model = make(name, torch.float32).train()
    before = model.config._attn_implementation
    assert can_branch(model)
    assert model.training and model.config._attn_implementation == before


def test_a_model_that_keeps_keywords_from_its_attention_cannot():
    model = make("Llama", torch.float32)
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, branches=None, inner=inner, **kwargs: inner(*args, **kwargs)
    assert not can_branch(model)


def test_branches_without_bounds():
    model = make("Llama", torch.float32)
    inputs = model_inputs(task(True))
    del inputs["cu_seq_lens_q"]
    model.set_attn_implementation("molsaki")
    with pytest.raises(ValueError, match="branches: expected with cu_seq_lens_q"):
        model(**inputs)
