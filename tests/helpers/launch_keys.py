"""Print which variants of :mod:`molsaki_kernels.aot` have the cache key of a launch, as a JSON list of names.

    python -m tests.helpers.launch_keys

The launches are those of engine triton and of the gradient of lse, with SmolLM2's heads (9 and 3 of 64) in bfloat16.
CPU tensors stand for CUDA ones; nothing is compiled and nothing is launched.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from typing import Any

import torch
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_key
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from molsaki_kernels import StepPlan, aot
from molsaki_kernels._triton import configs
from molsaki_kernels._triton.attention_backward import attention_backward
from molsaki_kernels._triton.attention_forward import attention_forward
from molsaki_kernels._triton.lse_gradient import fold_dlse_into_out
from molsaki_kernels.spec import AttentionInputs, AttentionOptions, AttentionOutputs, OutputGradients, PlanTensors

ARCH, TARGET = "sm90", GPUTarget("cuda", 90, 32)


class NoDriver(DriverBase):
    """The driver of a GPU of :data:`TARGET` that is not there."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def cache_key(source: Any, options: Any) -> str:
    key = get_cache_key(source, make_backend(TARGET), options, get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def keys_of_launches() -> set[str]:
    keys = set()

    def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
        keys.add(cache_key(self.ASTSource(self, signature, constexprs, attrs), options))
        self.device_caches[device][0][key] = kernel = object()
        return kernel

    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)
    JITFunction._do_compile = compile_nothing
    driver.set_active(NoDriver())
    configs.arch_of = lambda tensor: ARCH

    B, M, D = 2, 256, 64
    q, k, v, dout = (torch.zeros(B, M, heads, D, dtype=torch.bfloat16).transpose(1, 2) for heads in (9, 3, 3, 9))
    plan = StepPlan.from_spans([[(0, 100), (100, 256)]] * B, [[[t] for t in range(0, 200, 10)]] * B)
    tensors = PlanTensors(plan.steps, plan.tokens, plan.word_of_token, plan.num_words)
    inputs, options = AttentionInputs(q, k, v, None, None), AttentionOptions(True, 0.125, None, None, False)
    outputs: AttentionOutputs = attention_forward(inputs, options, tensors)
    attention_backward(OutputGradients(dout, None, outputs.maps), inputs, outputs, options, tensors)
    fold_dlse_into_out(outputs.out, dout, outputs.lse)
    return keys


def main() -> None:
    modules = [importlib.import_module(f"molsaki_kernels._triton.{name}") for name in aot.MODULES]
    variants = [variant for module in modules for variant in module.variants(ARCH)]
    keys = {v.name: cache_key(v.source(TARGET), make_backend(TARGET).parse_options(v.options)) for v in variants}
    launched = keys_of_launches()
    print(json.dumps([name for name, key in keys.items() if key in launched]))


if __name__ == "__main__":
    main()
