"""Tests that the contenders of benchmarks/step.py compute the same losses and gradients, so that times compare."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.step import BATCHES, CONTENDERS, Batch, Setup, load_config, measured, model_flops
from tests.helpers.tiny import one_thread  # noqa: F401


@pytest.mark.parametrize("batch", BATCHES[1:], ids=lambda b: b.name)
def test_contenders_agree(batch):
    losses = {}
    for name in CONTENDERS:
        step = Setup("tiny-teacher", "tiny", batch, False, "cpu", "float32").step(name)
        losses[name] = [step() for _ in range(2)]  # the second one after an update of the weights
    for a, b in (
        ("molsaki, live teacher", "eager"),
        ("dss", "dss, padded"),
        ("dss", "dss, sdpa"),
        ("dss", "dss, packed"),
        ("molsaki, stored maps", "molsaki, padded"),
        ("molsaki, stored maps", "molsaki, packed"),
    ):
        torch.testing.assert_close(losses[a][0], losses[b][0], rtol=2e-6, atol=0)
        # Adam turns gradients that are only rounding error into full steps: the second loss differs more.
        torch.testing.assert_close(losses[a][1], losses[b][1], rtol=2e-5, atol=0)
    assert losses["eager"][0] > losses["dss"][0] + 1e-3  # it includes L_att


@pytest.mark.parametrize("name", ["eager", "molsaki, live teacher", "molsaki, padded", "dss"])
def test_every_contender_computes_in_the_dtype(name):
    """The MLPs of student (32 wide) and teacher (48) run in the dtype; the loss is float32's up to its rounding."""
    found = []
    for dtype in ("float32", "bfloat16"):
        seen = set()

        def watch(module, args, out, seen=seen):
            if isinstance(module, LlamaMLP):
                seen.add((out.shape[-1], out.dtype))

        step = Setup("tiny-teacher", "tiny", BATCHES[0], False, "cpu", dtype).step(name)
        hook = register_module_forward_hook(watch)
        found.append(step())
        hook.remove()
        widths = (32, 48) if name in ("eager", "molsaki, live teacher") else (32,)
        assert seen == {(width, getattr(torch, dtype)) for width in widths}
    assert found[1].dtype == torch.float32 and not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("dtype", "said"), [("float32", "float32"), ("bfloat16", "bf16 autocast")])
def test_records(dtype, said, capsys):
    setup = Setup("tiny-teacher", "tiny", BATCHES[0], False, "cpu", dtype)
    records = measured("time", setup, ["dss", "molsaki, stored maps"], 0.0, {"device": "here"})
    profile = measured("profile", setup, ["molsaki, stored maps"], 0.0, {"device": "here"})
    assert {"seconds, maps and what joins them to attention", "seconds, pooled values", "seconds, linear layers"} <= {
        record["quantity"] for record in profile
    }
    records += profile
    assert {record["dtype"] for record in records} == {said}
    found = {(record["contender"], record["quantity"]): record for record in records}
    assert found["molsaki, stored maps", "time over dss"]["target"] == 1.1
    parts = sum(r["value"] for r in records if r["quantity"].startswith("seconds, "))
    assert 0 < parts < 60
    assert "time over dss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "batch", [Batch(2, 64, 5, 3), Batch(1, 200, 5, 3), Batch(1, 200, 5, 3, is_trace=True)], ids=lambda b: b.name
)
def test_model_flops(batch):
    """The products that PyTorch counts in a step, and attention's: four per row, visible key and dimension."""
    setup = Setup("tiny-teacher", "tiny", batch, False, "cpu", "float32")
    step, config = setup.step("dss"), load_config("tiny")
    with FlopCounterMode(display=False) as counter:
        step()
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    question, answer = batch.question(batch.tokens), 4
    keys = sum(range(1, batch.tokens + 1)) + sum(range(question + 1, question + answer + 1))
    attention = 3 * 4 * batch.size * config.num_hidden_layers * config.hidden_size * keys
    assert model_flops(setup) == pytest.approx(linear + attention, rel=2 / batch.tokens)
    assert model_flops(setup) > linear
