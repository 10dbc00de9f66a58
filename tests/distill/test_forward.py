"""The heads of real architectures, their cross-entropy in chunks, and which models can pack."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers

from molsaki.batches.data import Collator, Example, Side, prepare
from molsaki.config import TextOptions
from molsaki.modeling import forward
from molsaki.modeling.forward import Head, _CrossEntropy, can_branch, can_pack, causal_model, label_logits, model_inputs
from tests.helpers import tiny
from tests.helpers.budget import assert_within_budget
from tests.helpers.tiny import one_thread  # noqa: F401

SMALL = dict(
    vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip
HEADS = {
    "Llama": dict(tie_word_embeddings=True),
    "Qwen2": dict(tie_word_embeddings=False),
    "Gemma2": dict(final_logit_softcapping=3.0),
    "Cohere2": dict(logit_scale=0.25),
    "Granite": dict(logits_scaling=4.0),
    "Phi": dict(),  # a head with a bias
}


def make(name: str, dtype: torch.dtype = torch.float32, **more) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**SMALL | HEADS.get(name, {}) | more)
    model = getattr(transformers, name + "ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(10)  # logits large enough for a softcap to bend them
    if model.get_output_embeddings().bias is not None:
        model.get_output_embeddings().bias.data.normal_()
    return model.to(dtype).eval()


def tasks(packing: bool) -> list[dict]:
    tokenizer = tiny.tokenizer()
    examples = [Example(r["id"], r["question"], r["rationale"], r["answer"]) for r in tiny.problems(3)]
    data = prepare(examples, TextOptions(), Side(tokenizer, "plain", None))
    return Collator(0, packing=packing)([data[n] for n in range(3)])["tasks"]


def hidden_of(model, task: dict) -> torch.Tensor:
    model.set_attn_implementation("molsaki")
    return model.base_model(**model_inputs(task))[0].flatten(0, 1)[task["index"]]


@pytest.mark.parametrize("name", HEADS)
def test_chunks_give_the_loss_and_gradients_of_all_logits(name, monkeypatch):
    """Against the model's own logits in float64; the weight of the head may be the embedding's too."""
    upstream = torch.rand(10**4, dtype=torch.float64)
    results = []
    for dtype, own in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
        model, (task,) = make(name, dtype), tasks(True)
        labels = task["targets"]
        if own:
            model.set_attn_implementation("molsaki")
            loss = F.cross_entropy(label_logits(model, task), labels, reduction="none")
        else:
            head = Head.of(model)
            assert head is not None
            monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 258 * 50)
            loss = head.cross_entropy(model, hidden_of(model, task), labels)
        (loss * upstream[: len(loss)].to(dtype)).sum().backward()
        results.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()})
    oracle, eager, got = results
    for key, value in got.items():
        assert_within_budget(key, value, oracle[key], eager[key])


class Squashed(torch.nn.Linear):
    """A head whose last operation saves its result for its backward."""

    def forward(self, x):
        return super().forward(x).tanh()


def headed(kind: str, dtype: torch.dtype):
    """A model and its head: one of `HEADS`, or a head whose logits others may have."""
    if kind in HEADS:
        model = make(kind, dtype)
        return model, Head.of(model)
    model = make("Qwen2", dtype, tie_word_embeddings=False)
    if kind == "squashed":
        model.set_output_embeddings(Squashed(32, 258, dtype=dtype))
    if kind == "lora":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
    return model, Head()


def pytorchs(head: Head, model, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = head.logits(model, hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kind", [*HEADS, "squashed", "lora"])
def test_cross_entropy_in_the_memory_of_the_logits(kind, chunks, monkeypatch):
    """Losses, and gradients of labels that weigh differently, in float64 and in bfloat16 autocast."""
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 258 * -(-40 // chunks))
    rows, upstream = torch.randn(40, 32, dtype=torch.float64), torch.rand(40)
    labels = torch.randint(258, (40,))
    results = []
    for dtype, own in ((torch.float64, False), (torch.float64, True), (torch.float32, False), (torch.float32, True)):
        model, head = headed(kind, dtype)
        hidden = rows.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = head.cross_entropy(model, hidden, labels) if own else pytorchs(head, model, hidden, labels)
        assert loss.dtype == dtype
        (loss * upstream).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), "hidden": hidden.grad} | grads)
    oracle, exact, eager, got = results
    assert got.keys() == oracle.keys() and len(got) > 2
    for key in oracle:
        torch.testing.assert_close(exact[key], oracle[key], rtol=1e-12, atol=1e-13)
        assert_within_budget(key, got[key], oracle[key], eager[key])


def test_logits_that_a_hook_keeps_stay_theirs():
    model = make("Qwen2")
    kept = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: kept.append(out))
    hidden = torch.randn(5, 32)
    Head().cross_entropy(model, hidden, torch.arange(5)).sum().backward()
    assert torch.equal(kept[0], F.linear(hidden, model.lm_head.weight))


def test_logits_of_minus_infinity():
    logits = torch.randn(4, 9, dtype=torch.float64)
    logits[:, 2], logits[1, 3:] = -torch.inf, -torch.inf
    logits[2, :8] = -torch.inf
    labels, results = torch.tensor([0, 1, 8, 2]), []  # the last one cannot be
    for function in (lambda x: F.cross_entropy(x, labels, reduction="none"), lambda x: _CrossEntropy.apply(x, labels)):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf * 1)
        loss.backward(torch.arange(1.0, 5.0, dtype=torch.float64))
        results.append((loss.detach(), leaf.grad))
    assert results[0][0][3] == torch.inf
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-15)


def test_no_labels():
    model, hidden = make("Llama"), torch.randn(0, 32, requires_grad=True)
    loss = Head().cross_entropy(model, hidden, torch.zeros(0, dtype=torch.long))
    loss.sum().backward()
    assert loss.shape == (0,) and hidden.grad.shape == (0, 32)
    assert not model.lm_head.weight.grad.any()


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_second_backward_is_refused(chunks, hooks, monkeypatch):
    """Also where hooks hand out the saved tensors, so that autograd does not see that they changed."""
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 258 * (8 // chunks))
    model, hidden = make("Llama"), torch.randn(8, 32, requires_grad=True)
    same = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with same if hooks else contextlib.nullcontext():
        loss = Head().cross_entropy(model, hidden, torch.arange(8)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through the same graph; .* run the forward again"):
        loss.backward()


def test_a_gradient_of_the_gradient_is_refused():
    model, hidden = make("Llama"), torch.randn(8, 32, requires_grad=True)
    loss = Head().cross_entropy(model, hidden, torch.arange(8)).sum()
    with pytest.raises(RuntimeError, match="create_graph=True is refused"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_compiled(kind, monkeypatch):
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 258 * 4)
    (model, head), labels, results = headed(kind, torch.float32), torch.arange(8), []
    for function in (head.cross_entropy, torch.compile(head.cross_entropy, backend="aot_eager")):
        hidden = torch.linspace(-1, 1, 8 * 32).view(8, 32).requires_grad_()
        loss = function(model, hidden, labels)
        loss.backward(torch.arange(8.0))
        results.append((loss.detach(), hidden.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("chunks", [1, 3])
def test_memory_is_that_of_one_chunk(chunks, monkeypatch, tmp_path):
    """What the allocator of a CPU says: without the weight's gradients no other buffer is of the logits' size."""
    model, hidden = make("Llama", vocab_size=1 << 13), torch.randn(384, 32, requires_grad=True)
    labels = torch.randint(1 << 13, (384,))
    chunk = 4 * (1 << 13) * 384 // chunks
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", chunk // 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        Head().cross_entropy(model.requires_grad_(False), hidden, labels).sum().backward()
    profile.export_chrome_trace(str(tmp_path / "trace"))
    events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
    held = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    assert chunk <= max(held) - min(held) < 1.2 * chunk


@pytest.mark.parametrize("name", HEADS)
def test_what_the_fused_kernel_is_given(name, monkeypatch):
    """Its own arithmetic is liger-kernel's; here PyTorch's stands in, with the arguments of liger-kernel 0.8.5."""

    def stand_in(input, weight, target, bias=None, *, reduction, softcap):
        logits = F.linear(input, weight, bias)
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return F.cross_entropy(logits, target, reduction=reduction)

    functional = types.SimpleNamespace(liger_fused_linear_cross_entropy=stand_in)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    model, (task,) = make(name, torch.float64), tasks(True)
    grads = []
    for fused in (False, True):
        model.zero_grad()
        loss = Head.of(model).cross_entropy(model, hidden_of(model, task), task["targets"], fused)
        (loss * torch.linspace(0, 1, len(loss))).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_only_labels_are_projected_and_few_at_a_time(packing, monkeypatch):
    model = make("Llama")
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 258 * 50)
    for task in tasks(packing):
        count, head = sum(task["counts"]), Head.of(model)
        seen.clear()
        loss = head.cross_entropy(model, hidden_of(model, task), task["targets"])
        assert sum(seen) == count * 258 and max(seen) <= 258 * 50
        assert len(seen) == -(-count // 50)
        kept = seen[-1]  # the last chunk is not computed again
        loss.sum().backward()
        assert sum(seen) == 2 * count * 258 - kept


def test_a_head_of_another_kind_is_left_to_the_model():
    class Halved(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits / 2
            return out

    model = Halved(make("Llama").config).eval()
    assert Head.of(model) is None
    for packing in (False, True):
        for task in tasks(packing):
            model.set_attn_implementation("molsaki" if packing else "sdpa")
            whole = model(**model_inputs(task)).logits.flatten(0, 1)[task["index"]]
            torch.testing.assert_close(label_logits(model, task), whole)


@pytest.mark.parametrize("name", HEADS)
def test_decoders_can_pack(name):
    model = make(name).train()
    assert can_pack(model)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())


def test_a_model_that_mixes_the_texts_of_a_row_cannot():
    model = make("Llama")

    class Mixing(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):  # a convolution over two tokens
            return self.inner(x) + 0.1 * F.pad(x, (0, 0, 1, 0))[:, :-1]

    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    assert not can_pack(model)
    assert not can_branch(model)


def test_fused_cross_entropy_says_why_not():
    assert not forward.use_fused("torch", torch.device("cuda"))
    assert not forward.use_fused("auto", torch.device("cpu"))
    wanted = "CUDA device" if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
    with pytest.raises(ValueError, match=f"fused_cross_entropy: liger cannot be used: .*{wanted}"):
        forward.use_fused("liger", torch.device("cpu"))


def test_the_model_inside_a_wrapper():
    peft = pytest.importorskip("peft")
    model = make("Llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    assert causal_model(wrapped) is model
    assert Head.of(wrapped) == Head()
    assert can_pack(wrapped)
    assert can_branch(wrapped)
