"""Tests without a GPU that a layer can be captured in a CUDA graph.

It must neither wait for the device nor copy from the host. The tensors are PyTorch's fake tensors on "cuda": operators
compute shapes and devices only, and reading a value raises. Triton's kernels are launched through the driver that
launches nothing. ``tests/gpu/test_graphs_hardware.py`` captures graphs.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

triton = pytest.importorskip("triton")

from benchmarks.null_driver import null_driver  # noqa: E402
from molsaki_kernels.ops import attention as attention_ops  # noqa: E402
from molsaki_kernels.ops import value_pooling as pooling_ops  # noqa: E402
from molsaki_kernels.spec import (  # noqa: E402
    AttentionInputs,
    AttentionOptions,
    OutputGradients,
    PlanTensors,
    PoolingOptions,
)

B, M, HQ, HKV, D, S, W, C = 2, 40, 4, 2, 64, 3, 4, 5

INTERPRETED = triton.knobs.runtime.interpret
compiled = pytest.mark.skipif(INTERPRETED, reason="runs in a process of its own, without Triton's interpreter")


class OnDeviceOnly(TorchDispatchMode):
    """Raises where an operator makes a tensor on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                assert x.device.type == "cuda", f"{function} makes a tensor on the host"
        return result


@contextlib.contextmanager
def device(chip: int):
    """Fake tensors on a device of compute capability ``chip``."""
    capability = divmod(chip, 10)
    with (
        null_driver(chip, compile_kernels=False) as record,
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
        mock.patch.object(torch.cuda, "device", lambda *_: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0)),
        FakeTensorMode(),
        OnDeviceOnly(),
    ):
        yield record


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def run_layer(engine: str, dtype: torch.dtype, packed: bool, sinks: bool, options: AttentionOptions) -> None:
    b, m = (1, B * M) if packed else (B, M)
    q, dout = (empty(b, m, HQ, D, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (empty(b, m, HKV, D, dtype=dtype).transpose(1, 2) for _ in range(2))
    cu_seqlens = empty(B + 1, dtype=torch.int32) if packed else None
    inputs = AttentionInputs(q, k, v, empty(HQ, dtype=dtype) if sinks else None, cu_seqlens)
    indices = torch.int64
    plan = PlanTensors(empty(B, S, 2, dtype=indices), empty(B, C, dtype=indices), empty(B, C, dtype=indices), W)
    outputs = attention_ops._attention(inputs, options, plan, engine, "triton")
    assert outputs.maps is not None
    for gradients in (
        OutputGradients(dout, None, torch.empty_like(outputs.maps)),
        OutputGradients(None, None, torch.empty_like(outputs.maps)),
        OutputGradients(dout, torch.empty_like(outputs.lse), None),
    ):
        found = attention_ops._attention_gradients(gradients, inputs, outputs, options, plan, engine, "triton")
        assert found.dq.shape == q.shape and (found.dsinks is not None) == sinks


@pytest.mark.skipif(not INTERPRETED, reason="the other tests run in this process")
def test_in_a_process_without_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


FEATURES = {
    "default": {},
    "packed": dict(packed=True),
    "window": dict(options=AttentionOptions(True, 0.125, 7)),
    "heads": dict(options=AttentionOptions(True, 0.125, per_head=True)),
    "sinks": dict(sinks=True),
    "float16": dict(dtype=torch.float16),
    "everything": dict(packed=True, sinks=True, options=AttentionOptions(True, 0.125, 7, per_head=True)),
}


@compiled
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("engine", ["triton", "sdpa"])
def test_layers(engine, chip, feature):
    if engine == "sdpa" and not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch cannot index fake CUDA tensors")
    usual = dict(dtype=torch.bfloat16, packed=False, sinks=False, options=AttentionOptions(True, 0.125))
    with device(chip) as record:
        run_layer(engine, **{**usual, **FEATURES[feature]})
    assert record.launches >= 5


@compiled
@pytest.mark.parametrize("packed", [False, True])
def test_pooling(packed):
    options = PoolingOptions(1e-6, False, False)
    with device(90) as record:
        v = empty(1 if packed else B, HKV, B * M if packed else M, D, dtype=torch.bfloat16)
        cu_seqlens = empty(B + 1, dtype=torch.int32) if packed else None
        lengths = empty(B, dtype=torch.int64)
        pooled = pooling_ops._pool(v, lengths, cu_seqlens, options, "triton")
        dv = pooling_ops._pool_gradient(pooled, v, lengths, cu_seqlens, options, "triton")
    assert dv.shape == v.shape and record.launches == 3


@compiled
def test_what_is_detected():
    """Reading a value, a constant made on the host, and memory for copies."""
    with device(90):
        x = empty(3)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with pytest.raises(DataDependentOutputException):
            x.tolist()
        with pytest.raises(DataDependentOutputException):
            bool((x > 0).all())
        with pytest.raises(AssertionError, match="on the host"):
            torch.tensor([1.0, 2.0]).to("cuda")
        with pytest.raises(AssertionError, match="on the host"):
            x.cpu()
