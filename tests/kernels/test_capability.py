"""GPUs that are too old for flash attention and Triton kernels are refused with a reason, and "auto" serves them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from molsaki_kernels import engine_selection
from molsaki_kernels._triton import support
from molsaki_kernels.attention import flash_attn, flex, sdpa, triton
from molsaki_kernels.spec import AttentionInputs, AttentionOptions, AttentionRequest
from tests.helpers import flash_attn_stand_ins as stand_ins

CUDA, OPTIONS = torch.device("cuda", 0), AttentionOptions(True, 0.1)
TOO_OLD = {"V100": (7, 0), "T4": (7, 5)}
NEW_ENOUGH = {"A100": (8, 0), "4090": (8, 9), "H100": (9, 0), "B200": (10, 0), "5090": (12, 0)}


@pytest.fixture
def gpu(monkeypatch):
    """A function that simulates a GPU of some compute capability, with both flash-attn packages installed."""

    def simulate(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        stand_ins.install(monkeypatch, 2, 4)
        flash_attn._interface.cache_clear()

    yield simulate
    flash_attn._interface.cache_clear()


def request(dtype=torch.float16):
    return AttentionRequest(
        device=CUDA, dtype=dtype, batch=1, q_heads=4, kv_heads=2, length=100, head_dim=64, options=OPTIONS, sinks=False,
        packed=False, backward=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", TOO_OLD)
def test_too_old(gpu, name):
    gpu(TOO_OLD[name])
    found = "needs a GPU of compute capability 8.0 (Ampere) or later, not {}.{}".format(*TOO_OLD[name])
    assert support.why_no_triton(CUDA, torch.float16) == found
    assert [engine.why_not(request()) for engine in (sdpa, flex, triton)] == [found] * 3
    assert "sm80 or later, not sm7x" in flash_attn.why_not(request())


@pytest.mark.parametrize("name", NEW_ENOUGH)
def test_new_enough(gpu, name):
    gpu(NEW_ENOUGH[name])
    assert [engine.why_not(request()) for engine in (sdpa, flex, triton, flash_attn)] == [None] * 4


def test_other_devices_have_no_capability(gpu, monkeypatch):
    gpu((7, 5))
    assert "not for cpu tensors" in flex.why_not(AttentionRequest(**vars(request()) | {"device": torch.device("cpu")}))
    assert sdpa.why_not(AttentionRequest(**vars(request()) | {"device": torch.device("cpu")})) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert sdpa.why_not(request()) is None and triton.why_not(request()) is None
    monkeypatch.undo()
    if not torch.cuda.is_available():  # fake tensors
        assert sdpa.why_not(request()) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_auto_on_a_gpu_that_is_too_old(gpu, dtype):
    with FakeTensorMode():
        q = torch.empty(1, 4, 100, 64, dtype=dtype, device=CUDA)
    gpu((7, 5))
    call = AttentionInputs(q, q, q).request(OPTIONS)
    assert engine_selection.choose_engine("auto", call) == "eager"
    assert engine_selection.choose_map_engine("auto", q, OPTIONS) == "torch"
    if dtype == torch.float16:
        with pytest.raises(ValueError, match="'sdpa' cannot serve this call .*8.0 .Ampere. or later, not 7.5"):
            engine_selection.choose_engine("sdpa", call)


def test_selection_compiles():
    """The capability is a constant of the compiled code."""

    def query():
        return torch.zeros(1), sdpa.why_not(request()), support.why_no_triton(CUDA, torch.float16)

    assert torch.compile(query, fullgraph=True, backend="eager")()[1:] == query()[1:]
