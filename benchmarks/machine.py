"""Describes the machine of a measurement: processor, GPU, versions, commit, and how busy it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .candidates import free_bytes
from .layer import describe

ROOT = Path(__file__).parents[1]
# Flags of /proc/cpuinfo and the names under which a record has them.
ISA = {
    "avx2": "avx2", "avx512f": "avx512", "avx512_bf16": "avx512-bf16", "avx512_fp16": "avx512-fp16",
    "amx_tile": "amx", "asimd": "neon", "sve": "sve", "sve2": "sve2",
}  # fmt: skip
PACKAGES = ("triton", "flash-attn", "flash-attn-4", "flash-attn-3", "transformers", "matplotlib")


def machine_of(device: torch.device) -> dict[str, str]:
    """Return the columns of every record: those of ``benchmarks.layer``, and the instruction sets.

    A commit with uncommitted changes ends in "-dirty".
    """
    found = describe(device)
    commit = os.environ.get("COMMIT", "") or commit_of(ROOT) or found["commit"]
    return {**found, "commit": commit, "isa": "+".join(isa()) if device.type == "cpu" else ""}


def details(device: torch.device) -> dict[str, Any]:
    """Return further facts, which are printed and go into the JSON file."""
    free = free_bytes(device)
    found: dict[str, Any] = {
        "system": platform.platform(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "free_gib": None if free is None else round(free / 2**30, 1),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "packages": versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["multiprocessors"] = properties.multi_processor_count
        found["runtime"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return found


def header(machine: dict[str, str], more: dict[str, Any]) -> list[str]:
    """Return the lines that introduce a run."""
    on_gpu = "runtime" in more
    free = f", {more['free_gib']} GiB free" if more["free_gib"] is not None else ""
    if on_gpu:
        first = f"{machine['device']}, compute capability {more['capability']}, {more['memory_gib']} GiB{free}"
        second = f"{more['runtime']}, driver {machine['driver'] or 'unknown'}, cuDNN {machine['cudnn'] or 'none'}"
    else:
        first = f"{machine['device']} on {more['cores']} cores{free}"
        second = f"instruction sets {machine['isa'] or 'unknown'}; torch uses {more['torch_uses']}"
    packages = ", ".join(f"{name} {version}" for name, version in more["packages"].items())
    lines = [
        first,
        second,
        f"torch {machine['torch']}, Python {machine['python']}, {packages}",
        f"commit {machine['commit']}, {machine['date']}",
    ]
    if not on_gpu and more["load"] is not None and more["load"] > 0.5 * more["cores"]:
        lines.append(f"The machine is busy (load {more['load']} on {more['cores']} cores): times will spread.")
    if machine["commit"].endswith("-dirty"):
        lines.append("There are uncommitted changes: commit before you measure what is to be kept.")
    return lines


def folder_of(machine: dict[str, str]) -> str:
    """Return a file name for the machine: the same for the same device, threads and instruction sets."""
    name = re.sub(r"\((r|tm)\)", "", machine["device"].lower())
    best = [known for known in ("amx", "avx512", "avx2", "sve", "neon") if known in machine["isa"].split("+")]
    return re.sub(r"[^a-z0-9]+", "-", " ".join([name, *best[:1]])).strip("-")


def commit_of(folder: Path) -> str:
    """Return the short commit of a checkout, with "-dirty" if tracked files differ from it; "" without git."""
    if shutil.which("git") is None:
        return ""
    commit = _git(folder, "rev-parse", "--short", "HEAD")
    changed = commit and _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def isa() -> list[str]:
    """Return the instruction sets that matter for attention; empty where the system does not list them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ["neon"] if platform.machine() in ("arm64", "aarch64") else []
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(line.group(1).split()) if line else set()
    return [name for flag, name in ISA.items() if flag in flags]


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
