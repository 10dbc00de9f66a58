"""Models with the attention implementation "molsaki" under torch.compile and torch.jit.trace."""

from __future__ import annotations

import pytest
import torch

import molsaki
from molsaki_kernels import StepPlan
from tests.helpers.architectures import batch, make, relative


@pytest.mark.slow
@pytest.mark.parametrize(("name", "with_mask"), [("Llama", True), ("Gemma2", False)])
def test_compiled_models_have_the_same_graphs_for_all_batches(name, with_mask):
    """No graph break, no graph per layer, per number of sequences or per length; with and without padding masks."""
    layers = dict(layer_types=["sliding_attention", "full_attention"]) if name == "Gemma2" else {}
    model = make(name, torch.float32, num_hidden_layers=2, **layers)
    model.set_attn_implementation("molsaki")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for B, M in ((2, 14), (3, 17), (4, 25), (2, 30), (5, 21), (7, 15)):
        ids = torch.randint(3, 61, (B, M))
        mask = torch.ones_like(ids)
        mask[-1, M - 3 :] = 0
        words = [[1], [3, 4], [7]][: 2 + B % 2]
        plan = StepPlan.from_spans([[(0, 5), (5, M - 3)]] * B, [words] * B)
        inputs = dict(input_ids=ids, use_cache=False) | ({"attention_mask": mask} if with_mask else {})
        with molsaki.capture(compiled, plan, values=True) as record:
            logits = compiled(**inputs).logits
        with molsaki.capture(model, plan, values=True) as expected:
            torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(record.maps, expected.maps, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(record.values, expected.values, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2  # one with the first batch's sizes as constants, one for all others


@pytest.mark.slow
def test_compiled_refusals():
    model = make("Llama", torch.float32)
    model.set_attn_implementation("molsaki")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs, plan = batch()
    left = inputs | {"attention_mask": inputs["attention_mask"].flip(1), "use_cache": False}
    with molsaki.capture(compiled, plan), pytest.raises(RuntimeError, match="right-padded"):
        compiled(**left)
    real = left["attention_mask"].bool()
    found = compiled(**left).logits[real]
    model.set_attn_implementation("eager")
    assert relative(found, model(**left).logits[real]) < 1e-5
    longer = StepPlan.from_spans([[(0, 5)], [(0, 5)]], [[[2]], [[33]]])  # in the second sequence's padding
    with molsaki.capture(compiled, longer), pytest.raises(RuntimeError, match="into the padding"):
        compiled(**inputs, use_cache=False)


@pytest.mark.slow
def test_compiled_packed_texts_are_checked():
    model = make("Llama", torch.float32, num_hidden_layers=1)
    model.set_attn_implementation("molsaki")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(7))
    position = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = dict(position_ids=position, cu_seq_lens_q=torch.tensor([0, 5, 12]).int(), use_cache=False)
    expected = model(ids, **packed).logits
    ones = torch.ones_like(ids)
    for attend in (None, ones):
        torch.testing.assert_close(compiled(ids, attention_mask=attend, **packed).logits, expected)
    with pytest.raises(RuntimeError, match="packed texts with their bounds"):
        compiled(ids, attention_mask=None, **packed | {"cu_seq_lens_q": torch.tensor([0, 7, 12]).int()})
    ones[0, 9:] = 0
    with pytest.raises(RuntimeError, match="no padding with packed texts|packed texts with their bounds"):
        compiled(ids, attention_mask=ones, **packed)


def test_traced_by_jit_for_another_padding():
    model = make("Llama", torch.float32, num_hidden_layers=1)
    model.set_attn_implementation("molsaki")
    ids = batch()[0]["input_ids"][:, :12]

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits

    traced = torch.jit.trace(Logits(), (ids, torch.ones_like(ids)), check_trace=False)
    left = torch.ones_like(ids)
    left[1, :4] = 0
    assert relative(traced(ids, left)[left.bool()], Logits()(ids, left)[left.bool()]) < 1e-5
