"""Times each Triton kernel alone with other tile sizes than the configured ones, on a GPU.

    python -m benchmarks.tile_sweep [--csv FILE] [--limit SECONDS] [--kernels map_dq ...] [--shapes 1x4096 ...]

Processes compile the candidates first, all at once, into Triton's cache. Then one process runs the launcher of a kernel
once per candidate, with the function of ``configs`` replaced, keeps the arguments of the launch, compares the result
with the configured one, and launches the kernel again and again, all candidates of a kernel and shape in turns, each
after a read of more memory than the L2 holds. A time is the median of torch.profiler's kernel times. The most
informative kernels and shapes come first; nothing is started after ``--limit``.

Under the stand-in nothing is timed and no processes are started: every candidate is compiled, which takes minutes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from molsaki_kernels import aot
from molsaki_kernels._triton import attention_backward, attention_forward, configs, map_backward, map_forward
from molsaki_kernels._triton.launch import Kernel
from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    MapInputs,
    OutputGradients,
    PlanTensors,
)

from . import layer
from .shapes import Shape

SHAPES = [
    Shape(1, 4096, 256, 32, 32, 32, 128, "bfloat16"),
    Shape(16, 256, 20, 5, 9, 3, 64, "bfloat16"),
    Shape(2, 2048, 64, 16, 32, 32, 128, "bfloat16"),
    Shape(1, 16384, 1024, 128, 32, 32, 128, "bfloat16"),
    Shape(1, 4096, 256, 32, 32, 8, 128, "bfloat16"),
]
MAP = ("map_dq", "map_dk", "map_dlse", "map_partials")
FLASH = ("flash_forward", "flash_dq", "flash_dkv")
CONFIG = {"map_partials": "map_forward"}  # the function of configs, where its name is another
HELPERS = ("plan_tables", "map_reduce", "map_dk_add")  # whose compile-time arguments depend on the candidate's tile
LIMIT = 1e-2
FLUSH = 128 << 20  # bytes, more than the L2 of any card
ROUNDS = 12
WARM_UP = 0.6  # of the limit, at most
FIELDS = ("rows", "columns", "key_columns", "warps", "stages", "resident", "heads", "splits")
COLUMNS = (
    *("kernel", "shape", *FIELDS, "configured", "us", "fastest_us", "ratio", "difference", "registers", "spills"),
    *("shared", "straight", "loops", "blocks", "limit", "programs", "error"),
)
Candidate = tuple[tuple[str, int], ...]  # what differs from the configured tile


def candidates(kernel: str, shape: Shape) -> list[Candidate]:
    """Return the candidates, the configured tile first."""
    tile = _usual(kernel, shape)
    key = kernel in FLASH

    def tiles(sizes: Sequence[tuple[int, ...]], **more: int) -> Iterator[dict[str, int]]:
        for size in sizes:
            names = ("rows", "columns", *(("key_columns",) if key else ()), "warps", "stages")
            yield dict(zip(names, size, strict=True)) | more

    few, large = shape.words <= 32, shape.head_dim > 64
    found: list[dict[str, int]] = [{}]
    # map_dq, map_dlse and map_dk load in two levels (key_table or step, then keys and gradient). Compiled: with 2
    # stages the first level is not prefetched, and the second is waited for right after its start; with 3 the first is
    # prefetched; only from 5 on is a whole block of the second in flight during the products.
    if kernel == "map_dq":
        found += tiles([(64, 32, 4, 2), (64, 32, 8, 3), (64, 32, 8, 5), (64, 32, 4, 3), (64, 32, 4, 5), (64, 32, 8, 2)])
        if few:
            found += tiles([(64, 32, 4, 1), (128, 32, 8, 1), (128, 32, 4, 1), (64, 16, 4, 2), (64, 16, 4, 5),
                           (32, 32, 4, 1), (32, 32, 4, 2), (32, 32, 2, 1)])  # fmt: skip
        else:
            found += tiles([(64, 32, 4, 1), (128, 64, 8, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 5),
                           (64, 64, 8, 3), (64, 64, 8, 5), (128, 32, 8, 3), (128, 32, 8, 5), (128, 64, 8, 5),
                           (32, 32, 4, 5)])  # fmt: skip
    elif kernel == "map_dlse":
        found += tiles([(64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 5)])
        if few:
            found += [{"heads": heads} for heads in (1, 2, 3, 5, 9)]
            found += tiles([(32, 32, 4, 2), (64, 32, 4, 1), (64, 32, 8, 2), (128, 32, 8, 1)], heads=1)
            found += tiles([(32, 32, 4, 2), (64, 32, 4, 3)], heads=3)
        else:
            found += tiles([(64, 64, 4, 1), (128, 64, 8, 1), (64, 64, 4, 3), (64, 64, 4, 5), (64, 64, 8, 3),
                           (64, 64, 8, 5), (128, 64, 8, 3), (128, 64, 8, 5), (128, 32, 8, 3), (128, 32, 8, 5),
                           (32, 64, 4, 5)])  # fmt: skip
    elif kernel == "map_partials":
        found += tiles([(64, 64, 4, 2), (64, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 4)], resident=2)
        if few:
            found += [{"heads": heads} for heads in (1, 2, 3, 5, 9)]
            found += tiles([(64, 64, 4, 1), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2)], heads=1)
            found += tiles([(32, 64, 4, 2)], heads=3)
        else:
            found += [{"heads": heads} for heads in (1, 4, 8, 16)] + [{"resident": 2}, {"stages": 3}, {"stages": 1}]
            found += tiles([(32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2), (64, 64, 8, 3)], resident=1)
            found += tiles([(64, 64, 4, 2)], heads=4) if shape.words > 64 else tiles([(64, 128, 8, 2)], resident=2)
    elif kernel == "map_dk":
        found += [{"resident": n} for n in (1, 3, 4, 6, 8, 12)]
        found += tiles([(32, 64, 4, 3), (32, 64, 4, 5)], resident=2)
        found += tiles([(32, 64, 4, 1), (16, 64, 4, 1), (32, 128, 8, 1)], resident=3)
        found += tiles([(32, 64, 4, 3), (32, 64, 4, 5), (64, 64, 4, 2), (64, 64, 8, 3), (64, 64, 8, 5), (32, 64, 8, 5),
                       (16, 64, 4, 3), (16, 64, 4, 5)], resident=4)  # fmt: skip
        found += tiles([(32, 64, 4, 5)], resident=8)
        if not few:
            found += tiles([(64, 128, 8, 3), (32, 128, 8, 5), (32, 32, 4, 5)], resident=4)
    elif kernel == "flash_forward":
        found += [{"stages": n} for n in (2, 3, 4)] + [{"key_columns": 32}]
        found += tiles([(128, 128, 128, 8, 2), (64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (128, 32, 32, 8, 4)])
        found += tiles([(64, 32, 32, 4, 3)]) if large else tiles([(128, 64, 64, 4, 2), (128, 64, 128, 8, 3)])
        found += tiles([(128, 128, 128, 8, 3)])
    elif kernel == "flash_dq":
        found += [{"stages": n} for n in (1, 2, 3, 4)] + [{"key_columns": n} for n in (16, 64)]
        found += tiles([(128, 32, 32, 8, 3), (64, 64, 32, 4, 2), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3)])
        found += tiles([(128, 128, 32, 8, 2), (64, 64, 32, 8, 2)])
    elif kernel == "flash_dkv":
        found += [{"stages": n} for n in (2, 3, 4)]
        found += tiles([(128, 64, 16, 8, 2), (128, 64, 16, 8, 3), (128, 32, 16, 8, 2), (64, 64, 16, 4, 2)])
        found += tiles([(64, 32, 16, 4, 2), (64, 32, 16, 4, 3), (64, 64, 16, 8, 2), (64, 64, 16, 8, 3)])
    unique: dict[Candidate, None] = {}
    for fields in found:
        differing = {name: n for name, n in fields.items() if getattr(tile, name, None) != n}
        if kernel == "map_dq":
            differing.pop("resident", None)
        unique[tuple(differing.items())] = None
    return list(unique)


class Launch(NamedTuple):
    kernel: Kernel
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    compiled: Any

    def again(self) -> None:
        self.kernel[self.grid](*self.args, **self.keywords)


class Case:
    """The inputs of a shape and the calls of the launchers."""

    def __init__(self, shape: Shape, values: bool = True):
        device = torch.device("cuda")
        x = shape.inputs(device)
        self.shape = shape
        self.q, self.k, self.v, self.dout = (t.detach() for t in (x.q, x.k, x.v, x.dout))
        self.dmaps = x.dmaps
        self.options = AttentionOptions(causal=True, scale=shape.head_dim**-0.5)
        plan = x.plan
        self.plan = PlanTensors(plan.steps, plan.tokens, plan.word_of_token, plan.num_words)
        self.out, self.lse = torch.zeros_like(self.q), torch.zeros(self.q.shape[:3], device=device)
        if values:
            group = shape.q_heads // shape.kv_heads
            k, v = (t.repeat_interleave(group, 1) for t in (self.k, self.v))
            found = torch.ops.aten._scaled_dot_product_flash_attention(self.q, k, v, 0.0, True)
            self.out.copy_(found[0])
            self.lse.copy_(found[1][..., : shape.tokens])

    def run(self, kernel: str) -> tuple[Tensor, ...]:
        """Call the launcher of a kernel; return the results that depend on the kernel."""
        inputs = MapInputs(self.q, self.k, self.lse)
        if kernel == "map_partials":
            return (map_forward.map_forward(inputs, self.options, self.plan),)
        if kernel == "map_dlse":
            return (map_backward.map_dlse(self.dmaps, inputs, self.options, self.plan)[0],)
        if kernel in ("map_dq", "map_dk"):
            dq, dk = torch.zeros_like(self.q), torch.zeros_like(self.k)
            map_backward.add_map_gradients(self.dmaps, inputs, self.options, self.plan, dq, dk)
            return (dq,) if kernel == "map_dq" else (dk,)
        attention = AttentionInputs(self.q, self.k, self.v)
        if kernel == "flash_forward":
            found = attention_forward.attention_forward(attention, self.options, self.plan)
            return found.out, found.maps
        gradients = OutputGradients(self.dout, None, self.dmaps)
        outputs = AttentionOutputs(self.out, self.lse)
        found = attention_backward.attention_backward(gradients, attention, outputs, self.options, self.plan)
        return (found.dq,) if kernel == "flash_dq" else (found.dk, found.dv)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tile_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="append the rows to this file, each kernel and shape when it is done")
    parser.add_argument("--limit", type=float, default=80.0, help="seconds, with those of the compilation")
    parser.add_argument("--kernels", nargs="+", choices=(*MAP, *FLASH), default=[*MAP, *FLASH])
    parser.add_argument("--shapes", nargs="+", default=[""], metavar="TEXT", help="only shapes with one in their name")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile; 0: compile as needed")
    parser.add_argument("--list", action="store_true", help="print the number of candidates; run nothing")
    arguments = parser.parse_args(argv)
    begin = time.monotonic()

    def left() -> float:
        return arguments.limit - (time.monotonic() - begin)

    shapes = [s for s in SHAPES if any(text in s.name for text in arguments.shapes)]
    todo = order(shapes, arguments.kernels)
    if arguments.list:
        for kernel, shape in todo:
            print(f"{kernel:14s} {shape.name:36s} {len(candidates(kernel, shape))}")
        print(f"{sum(len(candidates(*each)) for each in todo)} in all, {len(compilations(todo))} to compile")
        return 0
    machine = layer.describe(torch.device("cuda"))
    real = "stand-in" not in machine["device"]
    late: set[tuple] = set()
    cases: dict[str, Case] = {}
    flush = torch.ones(FLUSH // 4, device="cuda")
    if real and arguments.workers:
        late = warm_up(compilations(todo), arguments.workers, arguments.limit * WARM_UP)
        print(f"compiled in {arguments.limit - left():.0f} s, {len(late)} not in time", flush=True)
    results: dict[tuple[str, str], list[dict]] = {}
    for i, (kernel, shape) in enumerate(todo):
        if left() < 1.5:
            print(f"--limit {arguments.limit:.0f} s: {len(todo) - i} kernels and shapes left out")
            break
        if shape.name not in cases:
            if len(cases) >= 3:  # memory
                cases.pop(next(iter(cases)))
            cases[shape.name] = Case(shape)
        try:
            rows = sweep(kernel, cases[shape.name], flush, late, machine, real, left)
        except Exception as reason:  # the other kernels are still measured
            print(f"{kernel} {shape.name}: {_first_line(reason)}", flush=True)
            continue
        results[kernel, shape.name] = rows
        append(arguments.csv, rows)
        timed = sum(row["us"] is not None for row in rows)
        print(f"{kernel} {shape.name}: {timed} of {len(rows)} timed, at {arguments.limit - left():.1f} s", flush=True)
    print(*table(results), sep="\n")
    return 0


def order(shapes: list[Shape], kernels: list[str]) -> list[tuple[str, Shape]]:
    """Return kernels and shapes, the most informative first."""
    first, rest = [s for s in shapes if s in SHAPES[:2]], [s for s in shapes if s not in SHAPES[:2]]
    return [
        (kernel, shape)
        for some in (first, rest)
        for names in (MAP, FLASH)
        for shape in some
        for kernel in names
        if kernel in kernels
    ]


def sweep(
    kernel: str, case: Case, flush: Tensor, late: set[tuple], machine: dict, real: bool, left: Callable[[], float]
) -> list[dict]:
    """Return a row per candidate of a kernel and shape."""
    rows, launches, expected = [], [], None
    for candidate in candidates(kernel, case.shape):
        row = dict.fromkeys(COLUMNS) | {"kernel": kernel, "shape": case.shape.name, "configured": int(not candidate)}
        row |= machine | describe(kernel, case.shape, candidate)
        rows.append(row)
        launches.append(None)
        if candidate and compile_key(kernel, case.shape, candidate) in late:
            row["error"] = "not compiled in time"
            continue
        if candidate and left() < 1.0:
            row["error"] = "no time left"
            continue
        try:
            launch, results = prepared(kernel, case, candidate)
            row |= usage(launch.compiled, row["warps"], real) | {"programs": _product(launch.grid)}
            if kernel == "map_dk":
                row["splits"] = launch.grid[2]
            if kernel in ("map_dlse", "map_partials"):
                row["heads"] = -(-case.shape.q_heads // launch.grid[1])
            if expected is None:
                expected = results
            else:
                row["difference"] = difference(results, expected)
                if not row["difference"] <= LIMIT:
                    row["error"] = "differs"
            launches[-1] = launch
        except Exception as reason:  # out of resources, or the compiler's
            row["error"] = _first_line(reason)
            if real:
                torch.cuda.synchronize()  # raises where the context is lost
        if not candidate and expected is None:
            raise RuntimeError(f"as configured: {row['error']}")
        if not real:
            print("{kernel} {shape} {rows}x{columns} w{warps} s{stages} regs {registers} spills {spills} shared "
                  "{shared} blocks {blocks} ({limit}) {error}".format(**row), flush=True)  # fmt: skip
    if not real:
        return rows
    timed = [i for i, launch in enumerate(launches) if launch is not None]
    times = kernel_times([launches[i] for i in timed], kernel, flush)
    for i, each in zip(timed, times, strict=True):
        rows[i]["us"], rows[i]["fastest_us"] = round(statistics.median(each), 2), round(min(each), 2)
    for row in rows:
        if row["us"] is not None and rows[0]["us"]:
            row["ratio"] = round(row["us"] / rows[0]["us"], 4)
    return rows


def kernel_times(launches: list[Launch], kernel: str, flush: Tensor) -> list[list[float]]:
    """Return the microseconds of the launches of each candidate, which are made in turns."""
    for launch in launches:
        launch.again()
    torch.cuda.synchronize()
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda]) as profile:
        for _ in range(ROUNDS):
            for launch in launches:
                flush.sum()
                launch.again()
        torch.cuda.synchronize()
    found = [seconds * 1e6 for name, seconds in layer.kernels_of(profile.events()) if name == f"{kernel}_kernel"]
    if len(found) == ROUNDS * len(launches):
        return [found[i :: len(launches)][1:] for i in range(len(launches))]
    print(f"{kernel}: the profiler saw {len(found)} launches of {ROUNDS * len(launches)}; events instead", flush=True)
    events = []
    for _ in range(ROUNDS):
        for launch in launches:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum()
            start.record()
            launch.again()
            stop.record()
            events.append((start, stop))
    torch.cuda.synchronize()
    found = [start.elapsed_time(stop) * 1e3 for start, stop in events]
    return [found[i :: len(launches)][1:] for i in range(len(launches))]


def prepared(kernel: str, case: Case, candidate: Candidate) -> tuple[Launch, tuple[Tensor, ...]]:
    """Call the launcher with a candidate's tile; return the kernel's launch and the results."""
    found: list[Launch] = []
    original = Kernel.launch

    def launch(self: Kernel, grid: tuple[int, ...], *args: Any, **keywords: Any) -> Any:
        compiled = original(self, grid, *args, **keywords)
        if self.__name__ == f"{kernel}_kernel":
            found.append(Launch(self, grid, args, keywords, compiled))
        return compiled

    with configured(kernel, candidate), mock.patch.object(Kernel, "launch", launch):
        results = case.run(kernel)
    return found[0], results


@contextlib.contextmanager
def configured(kernel: str, candidate: Candidate) -> Iterator[None]:
    """Have ``configs`` return the candidate's tile."""
    fields = dict(candidate)
    heads, splits = fields.pop("heads", None), fields.pop("splits", None)
    name = CONFIG.get(kernel, kernel)
    usual = getattr(configs, name)
    with contextlib.ExitStack() as stack:
        if fields:
            stack.enter_context(
                mock.patch.object(configs, name, lambda *args: dataclasses.replace(usual(*args), **fields))
            )
        if heads is not None:
            stack.enter_context(mock.patch.object(configs, "heads_per_program", lambda *_: heads))
        if splits is not None:
            stack.enter_context(
                mock.patch.object(
                    configs, "row_splits", lambda _arch, _blocks, _n, items, *_: max(1, min(items, splits))
                )
            )
        yield


def _usual(kernel: str, shape: Shape) -> configs.MapTile | configs.FlashTile:
    arch, dtype = "sm90", torch.bfloat16
    more = {"flash_forward": (False,), "flash_dq": (), "flash_dkv": ()}.get(kernel, (shape.words,))
    return getattr(configs, CONFIG.get(kernel, kernel))(arch, dtype, shape.head_dim, *more)


def describe(kernel: str, shape: Shape, candidate: Candidate) -> dict[str, int]:
    """Return all fields of a candidate's tile."""
    return {n: x for n, x in (dataclasses.asdict(_usual(kernel, shape)) | dict(candidate)).items() if n in FIELDS}


def usage(compiled: Any, warps: int, real: bool) -> dict[str, Any]:
    """Return what a compiled kernel needs, and how many of its programs fit a multiprocessor."""
    shared = compiled.metadata.shared
    try:
        registers, spills = (compiled.n_regs, compiled.n_spills) if real else aot._nvidia_usage(compiled)
    except Exception as reason:
        return {"shared": shared, "limit": _first_line(reason)[:40]}
    blocks, limit = aot.occupancy(aot.TARGETS["cuda:90"], warps, registers, shared)
    found = {"registers": registers, "spills": spills, "shared": shared, "blocks": blocks, "limit": limit}
    if not real:  # it takes a fifth of a second; the same compiler gives the same code without a GPU
        straight, loops = aot.count_instructions(aot._cuobjdump(compiled, "-sass"))
        found |= {"straight": straight, "loops": " ".join(map(str, loops))}
    return found


def difference(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest relative difference; NaN if there is one."""
    found = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(results, expected, strict=True)]
    return float("nan") if any(x != x for x in found) else float(f"{max(found):.2e}")


def compile_key(kernel: str, shape: Shape, candidate: Candidate) -> tuple:
    """Return the properties that determine what has to be compiled; a key may be finer than that."""
    tile = {n: x for n, x in describe(kernel, shape, candidate).items() if n not in ("resident", "heads", "splits")}
    alone = dict(candidate).get("splits") == 1 if kernel == "map_dk" else False
    fused = shape.words > 512 if kernel == "flash_forward" else False
    return kernel, *tile.items(), shape.head_dim, shape.q_heads, shape.kv_heads, shape.words <= 32, alone, fused


def compilations(todo: list[tuple[str, Shape]]) -> dict[tuple, tuple[str, Shape, Candidate]]:
    found: dict[tuple, tuple[str, Shape, Candidate]] = {}
    for kernel, shape in todo:
        for candidate in candidates(kernel, shape):
            found.setdefault(compile_key(kernel, shape, candidate), (kernel, shape, candidate))
    return found


def warm_up(tasks: dict[tuple, tuple[str, Shape, Candidate]], workers: int, seconds: float) -> set[tuple]:
    """Compile into Triton's cache in new processes; return the keys of what was not compiled in time."""
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    futures = {pool.submit(compile_candidate, *task): key for key, task in tasks.items()}
    done, waiting = concurrent.futures.wait(futures, timeout=seconds)
    for future in done:
        if future.exception() is not None:
            print(f"not compiled: {futures[future]}: {_first_line(future.exception())}", flush=True)
    seconds_each = [future.result() for future in done if future.exception() is None]
    if seconds_each:
        print(f"{len(done)} compiled, {statistics.mean(seconds_each):.1f} s each", flush=True)
    processes = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes if waiting else []:
        process.terminate()
    for process in processes:
        process.join(5)
    return {futures[future] for future in waiting}


_cases: dict[str, Case] = {}


def compile_candidate(kernel: str, shape: Shape, candidate: Candidate) -> float:
    """Compile a candidate and what its launcher launches beside it; launch nothing. Return the seconds."""
    begin = time.monotonic()
    if shape.name not in _cases:
        _cases.clear()
        _cases[shape.name] = Case(shape, values=False)

    def launch(self: Kernel, grid: tuple[int, ...], *args: Any, **keywords: Any) -> Any:
        name = self.__name__.removesuffix("_kernel")
        if name == kernel or name in HELPERS:
            compiled = self.run(*args, grid=grid, warmup=True, **keywords)
            with contextlib.suppress(Exception):  # out of resources, which is found again when it is timed
                compiled._init_handles()  # builds the launcher
        return None

    with configured(kernel, candidate), mock.patch.object(Kernel, "launch", launch):
        _cases[shape.name].run(kernel)
    return time.monotonic() - begin


def append(path: Path | None, rows: list[dict]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def table(results: dict[tuple[str, str], list[dict]]) -> list[str]:
    """Return the three fastest of each kernel and shape under the configured one."""
    lines = []
    for (kernel, shape), rows in results.items():
        good = sorted((r for r in rows if r["us"] and r["error"] is None), key=lambda r: r["us"])
        for row in [rows[0], *(row for row in good[:3] if row is not rows[0])]:
            tile = " ".join(f"{name}={row[name]}" for name in FIELDS if row.get(name) is not None)
            mark = ("now," if row is rows[0] else "    ") + (" best" if good and row is good[0] else "     ")
            if row["us"] is not None:
                lines.append(
                    f"{kernel:14s}{shape:36s}{mark} {row['us']:9.2f} us x{row['ratio']:.3f}"
                    f" diff {row['difference'] or 0:.0e} registers {row['registers']} spills {row['spills']}"
                    f" blocks {row['blocks']}  {tile}"
                )
    return lines


def _product(grid: tuple[int, ...]) -> int:
    total = 1
    for n in grid:
        total *= n
    return total


def _first_line(reason: BaseException | None) -> str:
    return f"{type(reason).__name__}: {(str(reason).splitlines() or ['?'])[0][:120]}"


if __name__ == "__main__":
    sys.exit(main())
