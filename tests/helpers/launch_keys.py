"""Print which variants of :mod:`molsaki_kernels.aot` have the cache key of a launch, as a JSON list of names.

    python -m tests.helpers.launch_keys

The launches are those of engine triton and of the gradient of lse, with SmolLM2's heads (9 and 3 of 64) in bfloat16.
Nothing is compiled and nothing is launched.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from typing import Any

import torch
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_key

from benchmarks.null_driver import null_driver
from molsaki_kernels import StepPlan, aot
from molsaki_kernels._triton.attention_backward import attention_backward
from molsaki_kernels._triton.attention_forward import attention_forward
from molsaki_kernels._triton.lse_gradient import fold_dlse_into_out
from molsaki_kernels.spec import AttentionInputs, AttentionOptions, OutputGradients, PlanTensors

TARGET = GPUTarget("cuda", 90, 32)


def key_of_variant(variant: Any) -> str:
    backend = make_backend(TARGET)
    options = backend.parse_options(variant.options)
    key = get_cache_key(variant.source(TARGET), backend, options, get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def keys_of_launches() -> set[str]:
    B, M, D = 2, 256, 64
    q, k, v, dout = (torch.zeros(B, M, heads, D, dtype=torch.bfloat16).transpose(1, 2) for heads in (9, 3, 3, 9))
    plan = StepPlan.from_spans([[(0, 100), (100, 256)]] * B, [[[t] for t in range(0, 200, 10)]] * B)
    tensors = PlanTensors(plan.steps, plan.tokens, plan.word_of_token, plan.num_words)
    inputs, options = AttentionInputs(q, k, v, None, None), AttentionOptions(True, 0.125, None, None, False)
    with null_driver(TARGET.arch, compile_kernels=False) as record:
        outputs = attention_forward(inputs, options, tensors)
        attention_backward(OutputGradients(dout, None, outputs.maps), inputs, outputs, options, tensors)
        fold_dlse_into_out(outputs.out, dout, outputs.lse)
    return record.keys


def main() -> None:
    modules = [importlib.import_module(f"molsaki_kernels._triton.{name}") for name in aot.MODULES]
    launched = keys_of_launches()
    variants = [variant for module in modules for variant in module.variants("sm90")]
    print(json.dumps([variant.name for variant in variants if key_of_variant(variant) in launched]))


if __name__ == "__main__":
    main()
