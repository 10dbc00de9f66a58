"""Tensor parallelism in two gloo processes: maps, values and gradients equal those of one process."""

from __future__ import annotations

import pytest
import torch

import molsaki
from tests.helpers import processes, tensor_parallel
from tests.helpers.architectures import TRANSFORMERS, batch, make, relative

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TRANSFORMERS < 5, reason='transformers 4 has tp_plan="auto" on accelerators only'),
]


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_two_processes_equal_one(tmp_path, name):
    model = make(name, vocab_size=62)  # divisible by two processes
    model.save_pretrained(tmp_path / "model")
    run = processes.ranks("tensor_parallel", tmp_path / "model", tmp_path / "found")
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(2):
        found = torch.load(f"{tmp_path / 'found'}.{rank}")
        assert found["query_rows"] == model.model.layers[0].self_attn.q_proj.weight.shape[0] // 2
        for heads in (("concat", "mean"), ("mean", "each")):
            expected, got = tensor_parallel.results(model, *heads), found[heads]
            for what in ("maps", "values", "logits"):
                assert relative(got[what], expected[what]) < 1e-6, (
                    what,
                    relative(got[what], expected[what]),
                )  # norms and rotations are float32
            assert got["gradients"].keys() == expected["gradients"].keys()
            for parameter, gradient in expected["gradients"].items():
                assert relative(got["gradients"][parameter], gradient) < 1e-5, (
                    parameter,
                    relative(got["gradients"][parameter], gradient),
                )


def test_heads_that_are_not_divided_equally_are_refused(monkeypatch):
    model = make("Llama")
    inputs, plan = batch()
    model._tp_size, model._device_mesh = 3, _Mesh()
    with molsaki.capture(model, plan), pytest.raises(ValueError, match="LlamaAttention has 4 heads in this process"):
        model.config.num_attention_heads = 5
        model(**inputs)


class _Mesh:
    ndim = 1

    def get_group(self):
        return None
