"""Compile every kernel variant for a GPU that need not be there, and report what the compilers made of it.

    python -m molsaki_kernels.aot --target cuda:90 [--json] [--filter NAME] [--jobs N]

What each column says and where it comes from:

    registers   a thread's: of the cubin (cuobjdump), of the AMD code object's notes (.vgpr_count)
    spills      registers kept in memory for want of room: bytes of ptxas' spill stores / 4, or .vgpr_spill_count
    shared      bytes of shared memory a program takes, the pipeline's buffers counted
    wgmma       Hopper's warp-group matrix instructions are in the PTX (tcgen05 is Blackwell's, mfma AMD's)

The exit status is 1, with a line for each, if a variant does not compile, takes more shared memory than the chip has,
is a default one of head dimension 64 or 128 (no window, softcap, sinks or packing) and spills, or should use wgmma on
Hopper and does not.

Triton keeps what it compiled in its cache, so a second run takes seconds.
"""

from __future__ import annotations

import argparse
import concurrent.futures.process
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

KERNELS = ("map_forward", "map_backward", "flash_forward", "flash_backward", "values", "fold")
SPILL_FREE_HEAD_DIMS = (64, 128)
FEATURES = ("HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINKS", "PACKED", "PER_HEAD")  # a default variant has none of them


@dataclasses.dataclass(frozen=True)
class Target:
    arch: str  # as configs names it
    backend: str
    chip: int | str  # as Triton names it
    warp_size: int
    shared_limit: int  # bytes a program may take


TARGETS = {
    "cuda:80": Target("sm80", "cuda", 80, 32, 163 * 1024),
    "cuda:90": Target("sm90", "cuda", 90, 32, 227 * 1024),
    "cuda:100": Target("sm100", "cuda", 100, 32, 227 * 1024),
    "hip:gfx942": Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of one variant; the numbers are None where it did not compile."""

    name: str
    kernel: str
    target: str
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    wgmma: bool | None = None
    matrix: str | None = None  # the matrix instructions in use: wgmma, tcgen05, mma, mfma or none
    warps: int | None = None
    stages: int | None = None
    seconds: float = 0.0
    failures: tuple[str, ...] = ()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m molsaki_kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument("--filter", default="", metavar="NAME", help="only the variants whose name contains NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="compilers at a time")
    args = parser.parse_args(argv)
    # For the compiler processes, which import Triton afresh: it decides at import whether to interpret.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default, without the warning for every process

    begin = time.perf_counter()
    reports: list[Report] = []
    for report in compile_all(args.target, args.filter, max(args.jobs, 1)):
        if not args.json:
            print(_line(report) if reports else f"{_line()}\n{_line(report)}", flush=True)
        for failure in report.failures:
            print(f"FAILED {report.name}: {failure}", file=sys.stderr, flush=True)
        reports.append(report)
    if not reports:
        print(f"no variant's name contains {args.filter!r}", file=sys.stderr)
        return 1
    failed = sum(bool(r.failures) for r in reports)
    if args.json:
        print(json.dumps([dataclasses.asdict(r) for r in reports], indent=1))
    else:
        print(f"{len(reports)} variants for {args.target}, {failed} failed, {time.perf_counter() - begin:.0f} s")
    return int(failed > 0)


def compile_all(target: str, name: str = "", jobs: int = 1) -> Iterator[Report]:
    """Compile the variants whose name contains ``name`` in ``jobs`` processes of their own."""
    with _pool(jobs) as pool:
        names = [n for n in pool.submit(variant_names, target).result() if name in n]
        pending = [(n, pool.submit(compile_variant, target, n)) for n in names]
        for n, future in pending:
            try:
                yield future.result()
            except concurrent.futures.process.BrokenProcessPool:
                # A compiler that crashes takes its process with it, and the whole pool.
                yield _compile_alone(target, n)


def _compile_alone(target: str, name: str) -> Report:
    with _pool(1) as pool:
        try:
            return pool.submit(compile_variant, target, name).result()
        except concurrent.futures.process.BrokenProcessPool:
            return Report(name, "", target, failures=("the compiler crashed",))


def _pool(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


@functools.cache
def _variants(arch: str) -> dict:
    modules = [importlib.import_module(f".triton.{kernel}", __package__) for kernel in KERNELS]
    return {variant.name: variant for module in modules for variant in module.variants(arch)}


def variant_names(target: str) -> list[str]:
    return list(_variants(TARGETS[target].arch))


def compile_variant(target: str, name: str) -> Report:
    """Compile one variant and look at what came out."""
    from triton.backends.compiler import GPUTarget

    chip = TARGETS[target]
    variant = _variants(chip.arch)[name]
    report = Report(name, variant.kernel.__name__, target, warps=variant.num_warps, stages=variant.num_stages)
    begin = time.perf_counter()
    try:
        compiled = variant.compile(GPUTarget(chip.backend, chip.chip, chip.warp_size))
    except Exception as error:  # Whatever the compiler raises is a finding about this variant, not the end of the run.
        lines = str(error).strip().splitlines() or [""]
        return dataclasses.replace(report, failures=(f"does not compile: {type(error).__name__}: {lines[-1]}",))
    registers, spills = _amd_usage(compiled) if chip.backend == "hip" else _nvidia_usage(compiled)
    matrix = _matrix_instructions(compiled)
    report = dataclasses.replace(
        report,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        wgmma=matrix == "wgmma",
        matrix=matrix,
        seconds=round(time.perf_counter() - begin, 2),
    )
    return dataclasses.replace(report, failures=tuple(_failures(report, variant, chip)))


def _failures(report: Report, variant, chip: Target) -> list[str]:
    failures = []
    if (report.shared or 0) > chip.shared_limit:
        failures.append(f"takes {report.shared} bytes of shared memory, {report.target} has {chip.shared_limit}")
    default = not any(variant.constexprs.get(feature) for feature in FEATURES)
    if report.spills and default and variant.constexprs.get("D") in SPILL_FREE_HEAD_DIMS:
        failures.append(f"spills {report.spills} registers")
    if variant.wants_wgmma and chip.arch == "sm90" and not report.wgmma:
        failures.append("does not use wgmma")
    return failures


def _nvidia_usage(compiled) -> tuple[int, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return int(registers), _spilt_bytes(compiled) // 4 if int(stack) else 0


def _spilt_bytes(compiled) -> int:
    """What ptxas says it stored for want of registers; the rest of a stack is the frame of a slow division's call."""
    from triton.backends.nvidia.compiler import get_ptxas

    chip = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        ptxas = get_ptxas(compiled.metadata.target.arch).path
        command = [ptxas, "-v", f"--gpu-name={chip}", file.name, "-o", os.devnull]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", told)))


def _amd_usage(compiled) -> tuple[int, int]:
    notes = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", compiled.asm["amdgcn"]))
    return int(notes["vgpr_count"]), int(notes["vgpr_spill_count"])


def _matrix_instructions(compiled) -> str:
    for form, mnemonic in (("ptx", "wgmma.mma"), ("ptx", "tcgen05.mma"), ("ptx", "mma.sync"), ("amdgcn", "v_mfma")):
        if mnemonic in compiled.asm.get(form, ""):
            return re.sub(r"v_|\..*", "", mnemonic)
    return "none"


def _line(report: Report | None = None) -> str:
    """A report as a line of the table; without one, the table's head."""
    columns = ("name", "registers", "spills", "shared", "matrix", "warps", "stages", "seconds")
    cells = columns if report is None else ["-" if (x := getattr(report, c)) is None else str(x) for c in columns]
    return f"{cells[0]:<42}" + "".join(f"{cell:>10}" for cell in cells[1:])


if __name__ == "__main__":
    sys.exit(main())
