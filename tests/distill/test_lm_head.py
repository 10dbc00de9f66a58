"""The heads of real architectures and their cross-entropy in chunks."""

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

from molsaki.batches.batch import TextBatch
from molsaki.batches.collator import Collator
from molsaki.batches.dataset import prepare
from molsaki.batches.tokenized import TokenizerSpec
from molsaki.config import TextOptions
from molsaki.modeling import lm_head
from molsaki.modeling.lm_head import Head, _CrossEntropy, label_logits
from molsaki.text.examples import Example
from tests.helpers import tiny
from tests.helpers.architectures import HEADS, make_headed
from tests.helpers.budget import assert_within_budget
from tests.helpers.tiny import one_thread  # noqa: F401


def tasks(packing: bool) -> list[TextBatch]:
    tokenizer = tiny.tokenizer()
    examples = [Example(r["id"], r["question"], r["rationale"], r["answer"]) for r in tiny.problems(3)]
    data = prepare(examples, TextOptions(), TokenizerSpec(tokenizer, "plain", None))
    return Collator(0, packing=packing)([data[n] for n in range(3)]).student


def hidden_of(model, task: TextBatch) -> torch.Tensor:
    model.set_attn_implementation("molsaki")
    return model.base_model(**task.model_inputs())[0].flatten(0, 1)[task.index]


@pytest.mark.parametrize("name", HEADS)
def test_chunks_give_the_loss_and_gradients_of_all_logits(name, monkeypatch):
    """Against the model's own logits in float64; the weight of the head may be the embedding's too."""
    upstream = torch.rand(10**4, dtype=torch.float64)
    results = []
    for dtype, own in ((torch.float64, True), (torch.float32, True), (torch.float32, False)):
        model, (task,) = make_headed(name, dtype), tasks(True)
        labels = task.targets
        if own:
            model.set_attn_implementation("molsaki")
            loss = F.cross_entropy(label_logits(model, task), labels, reduction="none")
        else:
            head = Head.of(model)
            assert head is not None
            monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", 258 * 50)
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
        model = make_headed(kind, dtype)
        return model, Head.of(model)
    model = make_headed("Qwen2", dtype, tie_word_embeddings=False)
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
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", 258 * -(-40 // chunks))
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
    model = make_headed("Qwen2")
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
    model, hidden = make_headed("Llama"), torch.randn(0, 32, requires_grad=True)
    loss = Head().cross_entropy(model, hidden, torch.zeros(0, dtype=torch.long))
    loss.sum().backward()
    assert loss.shape == (0,) and hidden.grad.shape == (0, 32)
    assert not model.lm_head.weight.grad.any()


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_second_backward_is_refused(chunks, hooks, monkeypatch):
    """Also if hooks return the saved tensors, so that autograd does not detect that they changed."""
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", 258 * (8 // chunks))
    model, hidden = make_headed("Llama"), torch.randn(8, 32, requires_grad=True)
    same = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with same if hooks else contextlib.nullcontext():
        loss = Head().cross_entropy(model, hidden, torch.arange(8)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through the same graph; .* run the forward again"):
        loss.backward()


def test_a_gradient_of_the_gradient_is_refused():
    model, hidden = make_headed("Llama"), torch.randn(8, 32, requires_grad=True)
    loss = Head().cross_entropy(model, hidden, torch.arange(8)).sum()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_compiled(kind, monkeypatch):
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", 258 * 4)
    (model, head), labels, results = headed(kind, torch.float32), torch.arange(8), []
    for function in (head.cross_entropy, torch.compile(head.cross_entropy, backend="aot_eager")):
        hidden = torch.linspace(-1, 1, 8 * 32).view(8, 32).requires_grad_()
        loss = function(model, hidden, labels)
        loss.backward(torch.arange(8.0))
        results.append((loss.detach(), hidden.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("chunks", [1, 3])
def test_memory_is_that_of_one_chunk(chunks, monkeypatch, tmp_path):
    """By the CPU allocator's record: without the weight's gradients no other buffer has the size of the logits."""
    model, hidden = make_headed("Llama", vocab_size=1 << 13), torch.randn(384, 32, requires_grad=True)
    labels = torch.randint(1 << 13, (384,))
    chunk = 4 * (1 << 13) * 384 // chunks
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", chunk // 4)
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
    model, (task,) = make_headed(name, torch.float64), tasks(True)
    grads = []
    for fused in (False, True):
        model.zero_grad()
        loss = Head.of(model).cross_entropy(model, hidden_of(model, task), task.targets, fused)
        (loss * torch.linspace(0, 1, len(loss))).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_only_labels_are_projected_and_few_at_a_time(packing, monkeypatch):
    model = make_headed("Llama")
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", 258 * 50)
    for task in tasks(packing):
        count, head = sum(task.counts), Head.of(model)
        seen.clear()
        loss = head.cross_entropy(model, hidden_of(model, task), task.targets)
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

    model = Halved(make_headed("Llama").config).eval()
    assert Head.of(model) is None
    for packing in (False, True):
        for task in tasks(packing):
            model.set_attn_implementation("molsaki" if packing else "sdpa")
            whole = model(**task.model_inputs()).logits.flatten(0, 1)[task.index]
            torch.testing.assert_close(label_logits(model, task), whole)


def test_fused_cross_entropy_says_why_not():
    assert not lm_head.use_fused("torch", torch.device("cuda"))
    assert not lm_head.use_fused("auto", torch.device("cpu"))
    wanted = "CUDA device" if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
    with pytest.raises(ValueError, match=f"fused_cross_entropy: liger cannot be used: .*{wanted}"):
        lm_head.use_fused("liger", torch.device("cpu"))


def test_the_head_inside_a_wrapper():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    assert Head.of(peft.get_peft_model(make_headed("Llama"), config)) == Head()
