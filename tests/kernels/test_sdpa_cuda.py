"""The CUDA path of engine sdpa on a CPU: PyTorch's operators are replaced by stand-ins, or get meta tensors."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

import molsaki_kernels as mk
from molsaki_kernels.attention import sdpa
from molsaki_kernels.spec import AttentionInputs, AttentionOptions, AttentionOutputs
from tests.helpers.aten_stand_ins import Operators
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.kernels.test_attention import FEATURES, compare, inputs, serves

CAUSAL = AttentionOptions(True, 0.25)
SERVED = [name for name in FEATURES if serves("sdpa", FEATURES[name]) and name != "window, not causal"]


@pytest.fixture
def hopper(monkeypatch):
    """Simulates a Hopper GPU with CPU tensors, and returns the stand-ins of PyTorch's operators."""
    operators = Operators()
    monkeypatch.setattr(sdpa, "aten", operators.namespace())
    monkeypatch.setattr(sdpa, "_cpu_forward", sdpa._cuda_forward)
    monkeypatch.setattr(sdpa, "_cpu_backward", sdpa._cuda_backward)
    monkeypatch.setattr(sdpa, "_cpu_operands", lambda *tensors: list(tensors))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(sdpa, "_work", {})
    monkeypatch.setattr(sdpa, "_plans", threading.local())
    monkeypatch.setattr(sdpa, "ROUNDED_LENGTHS", False)
    return operators


def choose(M=64, backward=False, options=CAUSAL, layout="bhmd", **changes):
    """Whether cuDNN serves the next call of such tensors."""
    shape = dict(B=2, H=4, D=16) | changes
    B, H, D = shape["B"], shape["H"], shape["D"]
    q = torch.zeros(B, H, M, D) if layout == "bhmd" else torch.zeros(B, M, H, D).transpose(1, 2)
    return sdpa._use_cudnn(AttentionInputs(q, q, q), options, backward)


@pytest.mark.parametrize("pays", [0, 1, 1e30], ids=["cudnn", "both", "aten"])
@pytest.mark.parametrize("feature", SERVED)
def test_features(hopper, monkeypatch, feature, pays):
    """aten's operators, cuDNN's, and one after the other give the oracle's results."""
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", pays)
    for _ in range(2):
        compare("sdpa", "ragged", FEATURES[feature], torch.bfloat16)
    compare("sdpa", "ragged", FEATURES[feature], torch.float32, layout="bmhd")
    compare("sdpa", "ragged", FEATURES[feature], torch.float32, source="maps", layout="bmhd")
    compare("sdpa", "ragged", FEATURES[feature], torch.bfloat16, layout="bhdm")
    allowed = not {"packed", "window"} & FEATURES[feature].keys()
    assert any("cudnn" in name for name in hopper.calls) == (allowed and pays < 1e30)
    assert any("flash" in name for name in hopper.calls) == (not allowed or pays > 0)


@pytest.mark.parametrize("calls", [("flash forward", "cudnn backward"), ("cudnn forward", "flash backward")])
def test_the_other_backward(hopper, monkeypatch, calls):
    """Forward and backward are decided separately; one's results are valid inputs of the other."""
    wanted = "cudnn forward" in calls
    monkeypatch.setattr(sdpa, "_use_cudnn", lambda inputs, options, backward: backward is not wanted)
    for source in ("both", "maps", "out"):
        compare("sdpa", "ragged", dict(sinks=True), torch.bfloat16, source)
    assert tuple(hopper.calls[-2:]) == calls


def test_cudnn_serves_what_pays_for_its_plan(hopper, monkeypatch):
    flops = 2 * 2 * 4 * 64 * 64 * (16 + 16) / 2
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", 2.5 * flops)
    assert [choose() for _ in range(5)] == [False, False, False, True, True]
    full = dataclasses.replace(CAUSAL, causal=False)  # twice the work
    assert [choose(options=full) for _ in range(3)] == [False, False, True]
    assert [choose(backward=True) for _ in range(4)] == [False, False, False, True]
    for other in (dict(M=65), dict(layout="bmhd"), dict(B=1), dict(D=24), dict(H=1)):
        assert not choose(**other)
    assert choose()  # the others did not replace it
    assert not any(choose(M=M) for M in range(66, 200))


def test_lengths_that_change_never_build_a_plan(hopper, monkeypatch):
    """A padded training run: a new length in every step, thirty layers each."""
    monkeypatch.setattr(sdpa, "KEPT", 20)
    for M in range(1000, 1100):
        assert not any(choose(M, backward=backward) for _ in range(30) for backward in (False, True))
    assert len(sdpa._work) == 20 and max(sdpa._work.values()) < sdpa.CUDNN_PAYS


def test_a_length_that_returns_is_remembered(hopper, monkeypatch):
    monkeypatch.setattr(sdpa, "KEPT", 20)
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", 1)
    chosen = []
    for M in range(100, 200):
        choose(M)
        chosen.append(choose(64))
    assert chosen == [False] + [True] * 99


@pytest.mark.parametrize(
    "change",
    [
        dict(M=63),
        dict(D=136),
        dict(options=dataclasses.replace(CAUSAL, window=9)),
    ],
)
def test_calls_that_cudnn_never_serves(hopper, monkeypatch, change):
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", 0)
    assert not choose(**change) and not sdpa._work
    assert choose()


def test_switches_that_exclude_cudnn(hopper, monkeypatch):
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", 0)
    assert choose()  # a plan exists from here on
    torch.use_deterministic_algorithms(True)
    try:
        assert not choose()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        assert not choose()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    for name, value in (("ROUNDED_LENGTHS", True), ("CUDNN_ROWS", 65)):
        with monkeypatch.context() as patch:
            patch.setattr(sdpa, name, value)
            assert not choose()
    for capability, chosen in (((8, 9), False), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert choose() is chosen
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not choose()


def test_no_plan_is_built_during_a_capture(hopper, monkeypatch):
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", 0)
    monkeypatch.setattr(sdpa, "_capturing", lambda: True)
    assert not choose() and not sdpa._work
    monkeypatch.setattr(sdpa, "_capturing", lambda: False)
    assert choose()
    monkeypatch.setattr(sdpa, "_capturing", lambda: True)
    assert choose() and not choose(backward=True)


def test_plans_belong_to_a_thread(hopper, monkeypatch):
    """PyTorch keeps cuDNN's plans per thread: during a capture, another thread's plan is of no use."""
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", 0)
    assert choose()
    monkeypatch.setattr(sdpa, "_capturing", lambda: True)
    found = []
    thread = threading.Thread(target=lambda: found.append(choose()))
    thread.start()
    thread.join()
    assert found == [False] and choose()


@pytest.mark.parametrize("feature", ["plain", "sinks"])
def test_dout_gets_the_strides_of_out(hopper, monkeypatch, feature):
    """The stand-in refuses a plan with other strides, where cuDNN would read dO with the old ones."""
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", 0)
    tensors, plan, _ = inputs("ragged", torch.bfloat16, layout="bmhd", sinks="sinks" in FEATURES[feature])
    for with_maps in (False, True):  # dlse is folded or there is none
        for dout in ("contiguous", "transposed", "expanded", "none"):
            leaves = [t.detach().requires_grad_() for t in tensors]
            sinks = leaves[3] if len(leaves) > 3 else None
            out, maps = mk.stepwise_attention(*leaves[:3], plan, sinks=sinks, engine="sdpa")
            given = {
                "contiguous": lambda out: torch.ones(out.shape, dtype=out.dtype),
                "transposed": lambda out: torch.ones_like(out),
                "expanded": lambda out: torch.ones((), dtype=out.dtype).expand(out.shape),
                "none": lambda out: None,
            }[dout](out)
            results = [(out, given)] if given is not None else []
            results += [(maps, torch.ones_like(maps))] if with_maps or not results else []
            outs, gradients = zip(*results, strict=True)
            grads = torch.autograd.grad(outs, leaves[:3], gradients, allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in grads)
    assert hopper.calls.count("cudnn backward") == 8


@pytest.mark.parametrize("cudnn", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cuda_operators_accept_these_arguments(monkeypatch, cudnn, packed):
    """The signatures and shapes of the real operators, on meta tensors."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0) if cudnn else (8, 0))
    monkeypatch.setattr(sdpa, "CUDNN_PAYS", 0)
    monkeypatch.setattr(sdpa, "_work", {})
    monkeypatch.setattr(sdpa, "_plans", threading.local())
    B = 1 if packed else 2
    q, k = (torch.zeros(B, heads, 64, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    cu = torch.zeros(3, dtype=torch.int32, device="meta") if packed else None
    inputs = AttentionInputs(q, k, k, None, cu)
    for options in (CAUSAL, dataclasses.replace(CAUSAL, window=9)):
        expected = cudnn and not packed and options.window is None
        assert sdpa._use_cudnn(inputs, options, backward=False) is expected
        out, lse = sdpa._cuda_forward(inputs, options)
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        grads = sdpa._cuda_backward(out, inputs, AttentionOutputs(out, lse), options)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
