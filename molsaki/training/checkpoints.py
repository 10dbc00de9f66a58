"""Sealed checkpoints: ``sealed.json`` is written last and holds a checksum of every other file of a checkpoint.

A checkpoint is a Hugging Face folder of the student (or of its LoRA adapter), ``router.safetensors`` and the trainer's
state. One without a valid seal is not resumed from. The exported student has neither router nor seal.
"""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path

from molsaki.io import atomic_write, write_json
from molsaki.run_files import checkpoints

logger = logging.getLogger(__name__)

SEAL = "sealed.json"


def last_checkpoint(folder: str | Path) -> str | None:
    """The last complete checkpoint of a run, or None. A warning names every later checkpoint and its fault."""
    for path in checkpoints(folder):
        fault = _fault(path)
        if fault is None:
            return str(path)
        logger.warning("%s is not complete (%s): going back to the one before", path, fault)
    return None


def seal(folder: Path) -> None:
    """Write ``sealed.json``, which marks a checkpoint as complete."""
    unsealed = (SEAL, f".{SEAL}.part")  # a process that was killed here leaves the second
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in unsealed)
    write_json(folder / SEAL, {path.relative_to(folder).as_posix(): _checksum(path) for path in files}, indent=1)


def cut_weights_log(path: Path, step: int) -> None:
    """Drop the lines after ``step``; a resumed run writes them again."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        with atomic_write(path) as file:
            file.writelines(line for line in lines if json.loads(line)["step"] <= step)


def _fault(folder: Path) -> str | None:
    try:
        sums = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {SEAL}, so its writing was interrupted"
    except ValueError:
        return f"{SEAL} cannot be read"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _checksum(folder / name) != expected:
            return f"{name} has changed since it was written"
    return None


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
