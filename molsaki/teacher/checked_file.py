"""A .safetensors file that holds its own checksum and the digest of the store it belongs to.

Damage and files of another store are found at any time, also while the store is not finished.
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

HEAD = "molsaki"  # the one entry of a file's metadata: safetensors writes several in no fixed order
UNSUMMED = "0" * 64  # stands in the checksum's place while the checksum is computed
DTYPES = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1"}


def write(path: Path, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
    """Write tensors and a head, with a SHA-256 checksum of the whole file except the checksum's own place."""
    data = bytearray(save(tensors, {HEAD: json.dumps({"sha256": UNSUMMED} | head)}))
    at = data.index(UNSUMMED.encode())
    data[at : at + len(UNSUMMED)] = hashlib.sha256(data).hexdigest().encode()
    with atomic_write(path, binary=True) as file:
        file.write(data)


def read(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """A file's tensors, mapped into memory, and its head.

    Not by ``safe_open``: safetensors 0.8 leaks 64 bytes per tensor or slice that it returns to torch.
    """
    header, start = _header(path)
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    arrays = {}
    for name, described in header.items():
        if name != "__metadata__":
            a, b = described["data_offsets"]
            values = data[start + a : start + b].view(DTYPES[described["dtype"]])
            arrays[name] = values.reshape(described["shape"])
    return arrays, json.loads(header["__metadata__"][HEAD])


def fault(path: Path, store: str) -> str | None:
    """The fault of a file that `write` wrote into the store with this digest, or None."""
    try:
        head = json.loads(_header(path)[0]["__metadata__"][HEAD])
        sha256, of = head["sha256"], head["store"]
    except FileNotFoundError:
        return "missing"
    except (ValueError, LookupError, TypeError):
        return "damaged: its head cannot be read"
    found = hashlib.sha256()
    with path.open("rb") as file:
        start = file.read(8)
        start += file.read(int.from_bytes(start, "little"))
        found.update(start.replace(sha256.encode(), UNSUMMED.encode(), 1))
        while block := file.read(1 << 20):
            found.update(block)
    if found.hexdigest() != sha256:
        return f"damaged: its checksum is {found.hexdigest()[:16]}, expected {sha256[:16]}"
    if of != store:
        return f"of another store: it was written with a store.json of fingerprint {of}, expected {store}"
    return None


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON at the start of a .safetensors file, and the offset where it ends."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path}: damaged: its head is longer than the file")
        return json.loads(file.read(size)), 8 + size
