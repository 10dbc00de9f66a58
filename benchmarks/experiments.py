"""Small measurements on a GPU that decide what to change next; gpu_second.sh runs them.

    python -m benchmarks.experiments flash4                compare engine flash_attn with sdpa on small cases
    python -m benchmarks.experiments all [--csv FILE]      the experiments below

tables: the map and its gradient alone, with the plan's steps and key tokens unchanged, with one step that holds every
    row, and with the key tokens in runs of 32. The savings of the last two are bounds on what precomputed step ranges
    and a faster gather can save.
tiles: the map and its gradient alone, with twice or half as many warps in a kernel. More warps hide more latency but
    execute more instructions; which effect dominates is only predicted.
plans: what cuDNN takes for the first call of a shape beyond that of the second, in which it builds its plan
    (``sdpa.CUDNN_PAYS``): forward, then forward and backward.
host: the host's time to submit one forward and backward of the paper's regime, per contender. The GPU is faster than
    the host there.

Which plain attention is fastest, and how the implementations compare in a CUDA graph, is in the rows of
``benchmarks.layer``; the time of each kernel beside its prediction is in those of ``--kernels``.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import molsaki_kernels as mk
from molsaki_kernels import StepPlan
from molsaki_kernels._triton import configs

from .contenders import SLOW_TO_BUILD, contenders, step, with_lse
from .layer import describe, read_records, write_csv
from .measure import cuda_clock
from .shapes import Shape

LONG = Shape(1, 4096, 256, 32, 32, 32, 128, "bfloat16")
PAPER = Shape(16, 256, 20, 5, 9, 3, 64, "bfloat16")
# Both engines compute in bfloat16 and round differently. Results of a wrong mask or layout differ by about 1.
LIMIT = 0.03


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["flash4", "all"])
    parser.add_argument("--csv", type=Path, help="append the records to this file")
    arguments = parser.parse_args(argv)
    if arguments.what == "flash4":
        return int(not flash4_agrees())
    device, failed = torch.device("cuda"), 0
    for experiment in (tables, tiles, host, plans):
        try:
            found = experiment(device)
        except RuntimeError as reason:  # the other experiments still run
            print(f"{experiment.__name__} failed: {reason}", flush=True)
            failed = 1
            continue
        for what, seconds in found.items():
            record = {
                "experiment": experiment.__name__,
                "what": what,
                "us": round(seconds * 1e6, 2),
                **describe(device),
            }
            print("{experiment:8s} {what:40s} {us:10.1f} us".format(**record), flush=True)
            if arguments.csv:
                write_csv(arguments.csv, read_records(arguments.csv) + [record])
    return failed


def flash4_agrees() -> bool:
    """Print the relative differences between engines flash_attn and sdpa; return whether all are small."""
    agrees = True
    for q_heads, kv_heads, head_dim, lengths in (
        (4, 4, 128, None), (8, 2, 128, None), (9, 3, 64, None), (9, 3, 64, (130, 0, 1, 253)),
    ):  # fmt: skip
        found = {name: small_case(name, q_heads, kv_heads, head_dim, lengths) for name in ("flash_attn", "sdpa")}
        differences = {
            name: float((a.float() - b.float()).norm() / b.float().norm())
            for name, a, b in zip(("out", "maps", "dq", "dk", "dv"), found["flash_attn"], found["sdpa"], strict=True)
        }
        kind = "packed" if lengths else "batch"
        text = "  ".join(f"{name} {value:.1e}" for name, value in differences.items())
        print(f"{q_heads}/{kv_heads} heads of {head_dim}, {kind}: {text}", flush=True)
        agrees &= all(value < LIMIT for value in differences.values())  # not if one is NaN
    return agrees


def small_case(
    engine: str, q_heads: int, kv_heads: int, head_dim: int, lengths: tuple[int, ...] | None
) -> tuple[Tensor, ...]:
    """Return out, the map, and the gradients of q, k and v, of the same random inputs for every engine."""
    generator = torch.Generator().manual_seed(0)
    batch, tokens = (1, sum(lengths)) if lengths else (2, 384)

    def rows(heads: int) -> Tensor:
        return (
            torch.randn(batch, tokens, heads, head_dim, generator=generator).to("cuda", torch.bfloat16).transpose(1, 2)
        )

    q, k, v = (rows(heads).requires_grad_() for heads in (q_heads, kv_heads, kv_heads))
    bounds = None
    if lengths:
        bounds = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    each = lengths or (tokens,) * batch
    steps = [[(0, n // 2), (n // 2, n)] if n > 1 else [] for n in each]
    words = [[[0], [n // 3, n // 2]] if n > 1 else [] for n in each]
    plan = StepPlan.from_spans(steps, words, device="cuda")
    out, maps = mk.stepwise_attention(q, k, v, plan, cu_seqlens=bounds, engine=engine)
    upstream = rows(q_heads), torch.randn(maps.shape, generator=generator).to("cuda")
    return out, maps, *torch.autograd.grad((out, maps), (q, k, v), upstream)


def plans(device: torch.device) -> dict[str, float]:
    """Return medians over new lengths, in this order, so that the first pays for loading cuDNN."""
    if torch.cuda.get_device_name(device).startswith("stand-in"):
        print("plans: skipped, the stand-in has no cuDNN", flush=True)
        return {}
    found: dict[str, list[float]] = {}
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for rows in (512, 520, 528, 536, 544):
            q, k, v, dout = (torch.randn(2, 8, rows, 64, device=device, dtype=torch.bfloat16) for _ in range(4))
            for name, backward in (("cuDNN's plan, forward", False), ("cuDNN's plans, forward and backward", True)):
                leaves = [x.detach().requires_grad_(backward) for x in (q, k, v)]
                seconds = []
                for _ in range(2):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
                    if backward:
                        torch.autograd.grad(out, leaves, dout)
                    torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - begin)
                found.setdefault(name, []).append(seconds[0] - seconds[1])
    return {name: statistics.median(values) for name, values in found.items()}


def tables(device: torch.device) -> dict[str, float]:
    inputs = with_lse(LONG.inputs(device))
    tokens, rows = inputs.plan.num_words, LONG.tokens
    random = sorted(torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:tokens].tolist())
    runs = [start + i for start in range(16, rows, rows // (tokens // 32)) for i in range(32)][:tokens]
    cuts = [rows * i // LONG.steps for i in range(LONG.steps + 1)]
    steps = list(zip(cuts, cuts[1:], strict=False))
    plans = {
        "32 steps, key tokens anywhere": (steps, random),
        "1 step, key tokens anywhere": ([(0, rows)], random),
        "32 steps, key tokens in runs of 32": (steps, runs),
    }
    found = {}
    for name, (spans, words) in plans.items():
        plan = StepPlan.from_spans([spans], [[[token] for token in words]], device=device)
        dmaps = torch.ones((1, len(spans), len(words)), device=device)

        def call(plan: StepPlan = plan, dmaps: Tensor = dmaps) -> None:
            maps = mk.stepwise_map(inputs.q, inputs.k, inputs.lse, plan)
            torch.autograd.grad(maps, (inputs.q, inputs.k, inputs.lse), dmaps)

        found[name] = median(call)
    return found


def tiles(device: torch.device) -> dict[str, float]:
    inputs = with_lse(LONG.inputs(device))

    def call() -> None:
        maps = mk.stepwise_map(inputs.q, inputs.k, inputs.lse, inputs.plan)
        torch.autograd.grad(maps, (inputs.q, inputs.k, inputs.lse), inputs.dmaps)

    found = {"as configured": median(call)}
    for kernel in ("map_dk", "map_dq"):
        usual = getattr(configs, kernel)
        warps = {4: 8, 8: 4}[usual(configs.arch_of(inputs.q), inputs.q.dtype, LONG.head_dim, LONG.words).warps]

        def other(*arguments: object, usual: Callable = usual, warps: int = warps) -> configs.MapTile:
            return dataclasses.replace(usual(*arguments), warps=warps)

        with mock.patch.object(configs, kernel, other):
            found[f"{kernel} with {warps} warps"] = median(call)
    return found


def host(device: torch.device) -> dict[str, float]:
    inputs, found = with_lse(PAPER.inputs(device)), {}
    for contender in contenders(device, PAPER):
        if contender.kind not in ("plain", "map") or any(word in contender.name for word in SLOW_TO_BUILD):
            continue
        try:
            step(contender, inputs, True)
        except Exception as reason:  # the others are still measured
            print(f"host: {contender.name} cannot: {(str(reason).splitlines() or ['?'])[0]}")
            continue
        found[contender.name] = submitted(lambda c=contender: step(c, inputs, True))
    return found


def median(call: Callable[[], object], calls: int = 30) -> float:
    """Return the median seconds of a call on the GPU, after three warm-up calls."""
    for _ in range(3):
        call()
    return statistics.median(cuda_clock(call) for _ in range(calls))


def submitted(call: Callable[[], object], calls: int = 20, rounds: int = 7) -> float:
    """Return the host's seconds for one call, without waiting for the GPU: the fastest of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - begin) / calls)
    return best


if __name__ == "__main__":
    sys.exit(main())
