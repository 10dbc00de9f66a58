"""A .safetensors file that holds its own checksum and the digest of the store it belongs to.

So damage and files of another store are detected at any time, even in an unfinished store.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from molsaki.io import atomic_write

HEAD = "molsaki"  # the only entry of a file's metadata: safetensors writes several entries in no fixed order
UNSUMMED = "0" * 64  # placeholder for the checksum while it is computed
DTYPES = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1"}


def write(path: Path, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
    """Write tensors and a head, with a SHA-256 checksum of the whole file except the checksum's own place."""
    data = save(tensors, {HEAD: json.dumps({"sha256": UNSUMMED} | head)})
    at, view = data.index(UNSUMMED.encode()), memoryview(data)  # a copy may be gigabytes
    with atomic_write(path, binary=True) as file:
        file.write(view[:at])
        file.write(hashlib.sha256(data).hexdigest().encode())
        file.write(view[at + len(UNSUMMED) :])


def read(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """A file's tensors, mapped into memory, and its head.

    Not by ``safe_open``: safetensors 0.8 leaks 64 bytes per tensor or slice that it returns to torch.
    """
    described, head, start = _header(path)
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    arrays = {}
    for name, tensor in described.items():
        a, b = tensor["data_offsets"]
        arrays[name] = data[start + a : start + b].view(DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return arrays, head


def fault(path: Path, store: str) -> str | None:
    """The fault of a file that `write` wrote for the store with this digest, or None."""
    try:
        _, head, start = _header(path)
        sha256, of = head["sha256"], head["store"]
    except FileNotFoundError:
        return "missing"
    except (ValueError, LookupError, TypeError, AttributeError):
        return "damaged: its head cannot be read"
    found = hashlib.sha256()
    with path.open("rb") as file:
        found.update(file.read(start).replace(sha256.encode(), UNSUMMED.encode(), 1))
        while block := file.read(1 << 20):
            found.update(block)
    if found.hexdigest() != sha256:
        return f"damaged: its checksum is {found.hexdigest()[:16]}, expected {sha256[:16]}"
    if of != store:
        return f"belongs to another store: it was written with a store.json of fingerprint {of}, expected {store}"
    return None


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The header of a .safetensors file: the description of each tensor, our head, and the first tensor's offset."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path}: damaged: its head is longer than the file")
        described = json.loads(file.read(size))
    head = json.loads(described.pop("__metadata__")[HEAD])
    return described, head, 8 + size
