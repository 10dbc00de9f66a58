"""Measures the host time of a layer, everything except the work of the GPU, with a driver that launches nothing.

    python -m benchmarks.host [--rounds N] [--calls N] [--profile]

Prints microseconds of processor time of one thread for one layer, forward and backward, at a shape so small that the
arithmetic of PyTorch's own operators does not count:

    no-op            an autograd function that saves q, k and v and does nothing, for scale
    attention        PyTorch's attention on the CPU, arithmetic included, for scale
    triton           engine "triton"
    sdpa             engine "sdpa", whose attention costs nothing here, with the Triton kernels of the map
    ... launches     the launches of that layer alone, with the same arguments, and their number

Each number is the best of the rounds, in which all take turns. It includes neither the driver's work (reading pointers,
putting the launch in the stream) nor that of PyTorch's CUDA allocator. ``--profile`` lists the functions that take the
most time.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import pstats
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from molsaki_kernels import StepPlan, stepwise_attention
from molsaki_kernels.attention import ENGINES
from molsaki_kernels.spec import AttentionOutputs, InputGradients

from .null_driver import null_driver

MODULES = ("map_forward", "map_backward", "attention_forward", "attention_backward", "lse_gradient")
B, M, HQ, HKV, D = 1, 16, 9, 3, 64
Launch = tuple[Any, Any, tuple[Any, ...], dict[str, Any]]  # kernel, grid, arguments, keywords


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=50, help="calls per round")
    parser.add_argument("--chip", type=int, default=90, help="compute capability")
    parser.add_argument("--profile", action="store_true", help="list the functions of the layers by their time")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with null_driver(args.chip, compile_kernels=False), free_attention():
        functions, launches = subjects()
        best = measure(functions, args.rounds, args.calls)
        print(f"{'us':>8} {'launches':>9} {'us each':>8}")
        for name, seconds in best.items():
            n = launches.get(name)
            counts = f"{n:9d} {1e6 * seconds / n:8.1f}" if n else " " * 18
            print(f"{1e6 * seconds:8.1f} {counts}  {name}")
        if args.profile:
            for name in ("triton", "sdpa"):
                profile(name, functions[name])
    return 0


def subjects() -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """The measured functions by name, and the number of launches of those that consist of launches only."""
    q, k, v = (torch.randn(B, M, h, D, dtype=torch.bfloat16).transpose(1, 2) for h in (HQ, HKV, HKV))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    plan = StepPlan.from_spans([[(0, 8), (8, 16)]] * B, [[[1], [5]]] * B)
    dout, dmaps = torch.randn(B, M, HQ, D, dtype=torch.bfloat16).transpose(1, 2), torch.randn(B, 2, 2)

    def layer(engine: str) -> None:
        outputs = stepwise_attention(q, k, v, plan, engine=engine)
        torch.autograd.grad(outputs, (q, k, v), (dout, dmaps))

    def attention() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), dout)

    functions: dict[str, Callable[[], object]] = {
        "no-op": lambda: torch.autograd.grad(_Nothing.apply(q, k, v), (q, k, v), dout),
        "attention": attention,
    }
    counts = {}
    for engine in ("triton", "sdpa"):
        functions[engine] = lambda engine=engine: layer(engine)
        with recorded_launches() as launches:
            functions[engine]()
        functions[f"{engine}: its launches"] = lambda launches=launches: replay(launches)
        counts[f"{engine}: its launches"] = len(launches)
    return functions, counts


def measure(functions: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, float]:
    """Seconds of processor time per call, the best of the rounds."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.process_time()
            for _ in range(calls):
                function()
            best[name] = min(best[name], (time.process_time() - begin) / calls)
    return best


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect the launches of the package's kernels."""
    launches: list[Launch] = []
    modules = [importlib.import_module(f"molsaki_kernels._triton.{name}") for name in MODULES]
    patches = [
        mock.patch.object(module, name, _Recording(kernel, launches))
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    ]
    for patch in patches:
        patch.start()
    try:
        yield launches
    finally:
        for patch in patches:
            patch.stop()


class _Recording:
    """A kernel whose launches are collected."""

    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **keywords: Any) -> Any:
            self.launches.append((self.kernel, grid, arguments, keywords))
            return self.kernel[grid](*arguments, **keywords)

        return launch


def replay(launches: list[Launch]) -> None:
    for kernel, grid, arguments, keywords in launches:
        kernel[grid](*arguments, **keywords)


class _Nothing(torch.autograd.Function):
    """An attention that costs nothing: the least that any differentiable function written in Python costs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def free_attention() -> Iterator[None]:
    """Have engine "sdpa" compute nothing; the gradient of lse is still folded into O, as on CUDA."""
    sdpa = ENGINES["sdpa"]

    def forward(inputs: Any, options: Any, plan: Any) -> AttentionOutputs:
        q = inputs.q
        return AttentionOutputs(torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))

    def backward(gradients: Any, inputs: Any, outputs: Any, options: Any, plan: Any) -> InputGradients:
        if gradients.dlse is not None:
            sdpa.fold_dlse_into_out(outputs.out, gradients.dout, gradients.dlse)
        return InputGradients(*(torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v)))

    free = types.SimpleNamespace(**{name: value for name, value in vars(sdpa).items() if not name.startswith("__")})
    free.forward, free.backward = forward, backward
    with mock.patch.dict(ENGINES, sdpa=free):
        yield


def profile(name: str, function: Callable[[], object], calls: int = 200, lines: int = 60) -> None:
    """Print the functions of a layer in which most time is spent, callees included (a profiler slows them down)."""
    profiler = cProfile.Profile(time.thread_time)
    profiler.enable()
    for _ in range(calls):
        function()
    profiler.disable()
    print(f"\n{name}: us per layer with callees, us in the function itself, calls")
    stats: Any = pstats.Stats(profiler)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][3])
    for (file, line, function_name), (_, count, own, cumulative, _) in rows[:lines]:
        place = f"{'/'.join(file.split('/')[-2:])}:{line} {function_name}"
        print(f"{1e6 * cumulative / calls:9.1f} {1e6 * own / calls:8.1f} {count / calls:6.1f}  {place}")


if __name__ == "__main__":
    raise SystemExit(main())
