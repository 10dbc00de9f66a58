"""Compile the C sources of ``csrc/``, with the standard library only: setup.py runs this file without torch."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted(_FOLDER.glob("*.c"))
HEADERS = sorted(_FOLDER.glob("*.h"))
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
_V3 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A library in the wheel: its compiler flags, and the flags of /proc/cpuinfo that it needs."""

    flags: tuple[str, ...]
    needs: frozenset[str]


# Best first. The code for AMX is called only where the processor has it.
VARIANTS = {
    "x86-64-v4-bf16": Variant(("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"), _V4 | {"avx512_bf16"}),
    "x86-64-v4": Variant(("-march=x86-64-v4",), _V4),
    "x86-64-v3": Variant(("-march=x86-64-v3",), _V3),
}


def compiler() -> str | None:
    """The path of the C compiler (``$CC``, cc, gcc or clang), or None."""
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    found = next((found for name in candidates if name and (found := shutil.which(name))), None)
    return found and os.path.abspath(found)


def version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout


def compile_library(command: str, flags: Sequence[str], path: Path) -> None:
    """Write the shared library for the processors that ``flags`` select to ``path``, completely or not at all.

    The library is not linked with an OpenMP runtime: PyTorch loads one for the whole process, and a second one would
    compete with it for the cores. Code compiled by clang needs clang's own runtime, so with clang the library is linked
    with it.

    Raises:
        subprocess.CalledProcessError: the compiler failed; ``stderr`` has its message.
    """
    openmp = ["-fopenmp"] if "clang" in version(command) else []
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [f"{source.stem}.o" for source in SOURCES]
        compile_ = [command, *flags, *FLAGS, "-c", *map(str, SOURCES)]
        for call in (compile_, [command, "-shared", *openmp, *objects, "-lm", "-o", path.name]):
            subprocess.run(call, cwd=folder, capture_output=True, text=True, check=True)
        os.replace(Path(folder) / path.name, path)
