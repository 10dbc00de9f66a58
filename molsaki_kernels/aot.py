"""Compile every kernel variant ahead of time, without a GPU, and report the resources that it needs.

    python -m molsaki_kernels.aot --target cuda:90 [cuda:80 ...] [--csv FILE] [--json] [--filter NAME] [--jobs N]

The columns and their sources:

    registers   per thread: from the cubin (cuobjdump), or from the AMD code object's notes (.vgpr_count)
    spills      registers spilled to memory: bytes of ptxas' spill stores / 4, or .vgpr_spill_count
    shared      bytes of shared memory per program, including the buffers of the software pipeline
    matrix      matrix instructions in the code: wgmma (Hopper), tcgen05 (Blackwell), mma, mfma (AMD) or none
    products    how many of them; a loop's body counts once
    copies      cp.async instructions, by which the pipeline loads tiles ahead of their use
    straight    instructions outside of all loops (NVIDIA); a warp executes them once
    loops       instructions in one trip of each loop, without those of a loop inside it, in order of address
    warps       per program, as configured; so are the stages of the pipeline
    blocks      programs that fit on a multiprocessor (a compute unit) at once, see :func:`occupancy`
    resident    their warps, in percent of the most that a multiprocessor holds
    limit       what limits the blocks: registers, shared, warps or blocks

A variant fails if it

- does not compile,
- needs more shared memory than the chip has,
- spills, with head dimension 64 or 128 and none of window, softcap, sinks, packing and one map per head,
- should use wgmma on Hopper and does not,
- has wgmma with a descriptor that ptxas computed wrongly, so that the product reads other memory: see
  :mod:`molsaki_kernels._triton.descriptors`.

Each failure is printed, and the exit status is then 1. Triton caches compiled kernels, so a second run takes seconds. A
launch on such a GPU, with the same Triton and Python sources, finds the variants of its dtype, head dimension and
features in that cache, if pointers and strides are multiples of 16 and the numbers of heads are like the variant's.
"""

from __future__ import annotations

import argparse
import concurrent.futures.process
import csv
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molsaki_kernels._triton.variants import Variant

MODULES = (
    "map_forward",
    "map_backward",
    "fa4_preprocess",
    "attention_forward",
    "attention_backward",
    "value_pooling",
    "lse_gradient",
    "widened_map",
)
SPILL_FREE_HEAD_DIMS = (64, 128)
FEATURES = ("HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINKS", "PACKED", "PER_HEAD")  # a default variant has none of them


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip; the limits are those of one multiprocessor (NVIDIA) or compute unit (AMD).

    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; CDNA 3 ISA reference guide
    and LLVM's AMDGPU subtargets.
    """

    arch: str  # the name in configs
    backend: str
    chip: int | str  # Triton's name
    warp_size: int
    shared_limit: int  # bytes per program
    shared: int  # bytes
    shared_reserved: int  # bytes that each program takes in addition
    warps: int
    blocks: int
    lane_registers: int  # of one of the four schedulers: 32-bit registers of each lane, for all of its warps together


KB = 1024
TARGETS = {
    "cuda:80": Target("sm80", "cuda", 80, 32, 163 * KB, 164 * KB, KB, warps=64, blocks=32, lane_registers=512),
    "cuda:89": Target("sm86", "cuda", 89, 32, 99 * KB, 100 * KB, KB, warps=48, blocks=24, lane_registers=512),
    "cuda:90": Target("sm90", "cuda", 90, 32, 227 * KB, 228 * KB, KB, warps=64, blocks=32, lane_registers=512),
    "cuda:100": Target("sm100", "cuda", 100, 32, 227 * KB, 228 * KB, KB, warps=64, blocks=32, lane_registers=512),
    "cuda:120": Target("sm86", "cuda", 120, 32, 99 * KB, 100 * KB, KB, warps=48, blocks=24, lane_registers=512),
    "hip:gfx942": Target("gfx942", "hip", "gfx942", 64, 64 * KB, 64 * KB, 0, warps=32, blocks=16, lane_registers=512),
}
SCHEDULERS = 4  # per multiprocessor; each holds a quarter of the warps and of the registers


def occupancy(target: Target, warps: int, registers: int, shared: int) -> tuple[int, str]:
    """The programs that fit on a multiprocessor at once, and what limits them.

    Args:
        warps: per program. registers: per thread. shared: bytes per program.
    """
    per_scheduler = target.lane_registers // (-(-max(registers, 1) // 8) * 8)  # warps; allocated in units of 8
    limits = {
        "registers": SCHEDULERS * per_scheduler // warps,
        "shared": target.shared // max(shared + target.shared_reserved, 1),
        "warps": target.warps // warps,
        "blocks": target.blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


@dataclasses.dataclass(frozen=True)
class Report:
    """The result for one variant; the numbers are None if it did not compile."""

    name: str
    kernel: str
    target: str
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    wgmma: bool | None = None
    matrix: str | None = None  # matrix instructions: wgmma, tcgen05, mma, mfma or none
    products: int | None = None
    copies: int | None = None
    straight: int | None = None
    loops: str | None = None
    warps: int | None = None
    stages: int | None = None
    blocks: int | None = None
    resident: int | None = None  # percent
    limit: str | None = None
    seconds: float = 0.0
    failures: tuple[str, ...] = ()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m molsaki_kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", required=True, nargs="+", choices=TARGETS, help="one or several")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table to this file too")
    parser.add_argument(
        "--filter",
        default="",
        metavar="NAME",
        help="only the variants whose name matches (a regular expression, anywhere in it)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="number of compiler processes")
    args = parser.parse_args(argv)
    # For the compiler processes, which import Triton again; Triton reads this variable at import.
    os.environ.pop("TRITON_INTERPRET", None)

    begin = time.perf_counter()
    reports: list[Report] = []
    for report in compile_all(args.target, args.filter, max(args.jobs, 1)):
        if not args.json:
            print(_line(report) if reports else f"{_line()}\n{_line(report)}", flush=True)
        for failure in report.failures:
            print(f"FAILED {report.name}: {failure}", file=sys.stderr, flush=True)
        reports.append(report)
    if not reports:
        print(f"no variant's name matches {args.filter!r}", file=sys.stderr)
        return 1
    if args.csv:
        write_csv(args.csv, reports)
    failed = sum(bool(r.failures) for r in reports)
    if args.json:
        print(json.dumps([dataclasses.asdict(r) for r in reports], indent=1))
    else:
        counts = ", ".join(f"{sum(r.target == t for r in reports)} variants for {t}" for t in args.target)
        print(f"{counts}, {failed} failed, {time.perf_counter() - begin:.0f} s")
    return int(failed > 0)


def compile_all(targets: Sequence[str], name: str = "", jobs: int = 1) -> Iterator[Report]:
    """Compile the variants whose name matches ``name``, for all targets, in ``jobs`` new processes."""
    with _pool(jobs) as pool:
        variants = [(target, pool.submit(variant_names, target)) for target in targets]
        chosen = [(target, n) for target, names in variants for n in names.result() if re.search(name, n)]
        pending = [(target, n, pool.submit(compile_variant, target, n)) for target, n in chosen]
        for target, n, future in pending:
            try:
                yield future.result()
            except concurrent.futures.process.BrokenProcessPool:
                # A crash of the compiler ends its process and breaks the whole pool.
                yield _compile_alone(target, n)


def write_csv(path: Path, reports: Sequence[Report]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(r, c) for c in COLUMNS] for r in reports)


def _compile_alone(target: str, name: str) -> Report:
    with _pool(1) as pool:
        try:
            return pool.submit(compile_variant, target, name).result()
        except concurrent.futures.process.BrokenProcessPool:
            return Report(name, "", target, failures=("the compiler crashed",))


def _pool(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


@functools.cache
def _variants(arch: str) -> dict[str, Variant]:
    modules = [importlib.import_module(f"molsaki_kernels._triton.{name}") for name in MODULES]
    return {variant.name: variant for module in modules for variant in module.variants(arch)}


def variant_names(target: str) -> list[str]:
    return list(_variants(TARGETS[target].arch))


def compile_variant(target: str, name: str) -> Report:
    """Compile one variant and inspect the result."""
    from triton.backends.compiler import GPUTarget

    from molsaki_kernels._triton.descriptors import wrong_descriptors

    chip = TARGETS[target]
    variant = _variants(chip.arch)[name]
    report = Report(name, variant.kernel.__name__, target, warps=variant.num_warps, stages=variant.num_stages)
    begin = time.perf_counter()
    try:
        compiled = variant.compile(GPUTarget(chip.backend, chip.chip, chip.warp_size))
    except Exception as error:  # Any error of the compiler is a result for this variant; the run goes on.
        lines = str(error).strip().splitlines() or [""]
        return dataclasses.replace(report, failures=(f"does not compile: {type(error).__name__}: {lines[-1]}",))
    registers, spills = _amd_usage(compiled) if chip.backend == "hip" else _nvidia_usage(compiled)
    shared = compiled.metadata.shared
    matrix, products = _matrix_instructions(compiled)
    blocks, limit = occupancy(chip, variant.num_warps, registers, shared)
    sass = "" if chip.backend == "hip" else _cuobjdump(compiled, "-sass")
    straight, loops = count_instructions(sass) if sass else (None, None)
    report = dataclasses.replace(
        report,
        registers=registers,
        spills=spills,
        shared=shared,
        wgmma=matrix == "wgmma",
        matrix=matrix,
        products=products,
        copies=len(re.findall(r"\bcp\.async\.c[ag]\.", compiled.asm.get("ptx", ""))),
        straight=straight,
        loops=None if loops is None else " ".join(map(str, loops)),
        blocks=blocks,
        resident=round(100 * blocks * variant.num_warps / chip.warps),
        limit=limit,
        seconds=round(time.perf_counter() - begin, 2),
    )
    failures = _failures(report, variant, chip)
    if matrix == "wgmma" and (wrong := wrong_descriptors(compiled.asm["ptx"], sass)):
        failures.append(f"{len(wrong)} wgmma descriptors are wrong, ptxas miscompiled it: {wrong[0]}")
    return dataclasses.replace(report, failures=tuple(failures))


def _failures(report: Report, variant: Variant, chip: Target) -> list[str]:
    failures = []
    if (report.shared or 0) > chip.shared_limit:
        failures.append(f"needs {report.shared} bytes of shared memory, {report.target} has {chip.shared_limit}")
    default = not any(variant.constexprs.get(feature) for feature in FEATURES)
    if report.spills and default and variant.constexprs.get("D") in SPILL_FREE_HEAD_DIMS:
        failures.append(f"spills {report.spills} registers")
    if variant.wants_wgmma and chip.arch == "sm90" and not report.wgmma:
        failures.append("does not use wgmma")
    return failures


def _nvidia_usage(compiled: Any) -> tuple[int, int]:
    """Registers and spilled registers per thread."""
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", _cuobjdump(compiled, "-res-usage"))
    return int(registers), _spilled_bytes(compiled) // 4 if int(stack) else 0


def _cuobjdump(compiled: Any, option: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _spilled_bytes(compiled: Any) -> int:
    """Bytes of spill stores by ptxas; the rest of the stack is the frame of calls, for example of slow divisions."""
    from triton.backends.nvidia.compiler import get_ptxas

    (chip,) = re.findall(r"\.target (sm_\w+)", compiled.asm["ptx"])
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        ptxas = get_ptxas(compiled.metadata.target.arch).path
        command = [ptxas, "-v", f"--gpu-name={chip}", file.name, "-o", os.devnull]
        messages = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", messages)))


def _amd_usage(compiled: Any) -> tuple[int, int]:
    """Registers and spilled registers per thread."""
    notes = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", compiled.asm["amdgcn"]))
    return int(notes["vgpr_count"]), int(notes["vgpr_spill_count"])


def _matrix_instructions(compiled: Any) -> tuple[str, int]:
    """The kind of matrix instructions in the code, or "none", and their number."""
    for form, mnemonic in (("ptx", "wgmma.mma"), ("ptx", "tcgen05.mma"), ("ptx", "mma.sync"), ("amdgcn", "v_mfma")):
        if count := compiled.asm.get(form, "").count(mnemonic):
            return re.sub(r"v_|\..*", "", mnemonic), count
    return "none", 0


def count_instructions(sass: str) -> tuple[int, list[int]]:
    """The instructions outside of all loops, and those of one trip of each loop, in order of address.

    An instruction in several loops counts in the innermost. A loop is what lies between a branch backwards and its
    target; the padding at the end of a kernel is not counted.

    Args:
        sass: as ``cuobjdump -sass`` prints it.
    """
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", sass)]
    ends: dict[int, int] = {}
    for address, text in code:
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if target and (start := int(target[1], 16)) < address:
            ends[start] = address
    counts = dict.fromkeys([-1, *sorted(ends)], 0)
    for address, text in code:
        if not text.startswith("NOP"):
            counts[max((start for start, end in ends.items() if start <= address <= end), default=-1)] += 1
    straight, *loops = counts.values()
    return straight, loops


COLUMNS = (
    *("target", "name", "registers", "spills", "shared", "matrix", "products", "copies", "straight", "loops", "warps"),
    *("stages", "blocks", "resident", "limit"),
)


def _line(report: Report | None = None) -> str:
    """A report as a line of the table, or the table's header."""
    columns = (*COLUMNS, "seconds")
    cells = columns if report is None else ["-" if (x := getattr(report, c)) is None else str(x) for c in columns]
    return f"{cells[0]:<12}{cells[1]:<36}" + "".join(f" {cell:>9}" for cell in cells[2:])


if __name__ == "__main__":
    sys.exit(main())
