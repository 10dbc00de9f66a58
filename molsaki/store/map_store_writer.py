"""Writes a store of the teacher's maps, in one process or in several that share the work.

A shard covers a fixed range of examples and is locked by the process that computes it. Several processes can work at
the same time. If a process is lost, another one computes its shard, and a killed run continues where it stopped.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from molsaki.io import digest, hash64, write_json
from molsaki.locks import claim, locked
from molsaki.store import checked_file
from molsaki.store.map_store import DESCRIPTION, INDEX, VERSION, Entry, compare, id_at, shard_name

LOCKS = ".locks"  # folder of empty files, one per file that was locked


class StoreWriter:
    """Writes a store shard by shard; continues an unfinished or damaged store with the same description.

    Args:
        folder: created if it does not exist.
        description: the store's identity: ``num_layers``, ``all_layers``, fingerprints, options; JSON.
        examples: the number of examples, including those left out.
        shard_size: examples per shard.

    Raises:
        ValueError: the folder holds a store with another description; the message has both values.
        OSError: the folder's file system has no file locks.
    """

    def __init__(self, folder: str | Path, description: dict[str, Any], examples: int, shard_size: int = 1024):
        if shard_size < 1:
            raise ValueError(f"shard_size: expected at least 1, got {shard_size}")
        self.folder = Path(folder)
        (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
        size = {"version": VERSION, "examples": examples, "shard_size": shard_size}
        self.description = json.loads(json.dumps(size | description))
        self.shards = -(-examples // shard_size)
        self._digest = digest(self.description)
        with locked(self._lock(DESCRIPTION)):
            try:
                found = json.loads((self.folder / DESCRIPTION).read_bytes())
            except (FileNotFoundError, ValueError):
                found = None
            if found is not None:
                compare(self.folder, found, self.description)
                self.description, self._digest = found, digest(found)
            else:
                for path in self.folder.glob("*.safetensors"):
                    if (fault := checked_file.fault(path, self._digest)) is not None:
                        raise ValueError(
                            f"{self.folder}: holds no readable {DESCRIPTION}, and a file that is not of this store "
                            f"({path.name}: {fault}); choose an empty folder for the store"
                        )
                write_json(self.folder / DESCRIPTION, self.description, indent=1)

    def examples_of(self, shard: int) -> range:
        """The numbers of the examples in a shard."""
        start = shard * self.description["shard_size"]
        return range(start, min(start + self.description["shard_size"], self.description["examples"]))

    def missing(self) -> list[int]:
        """The shards that are absent or damaged."""
        return [shard for shard in range(self.shards) if self._is_missing(shard)]

    def claim(self, shards: Sequence[int]) -> Iterator[int]:
        """The ``shards`` that this process has to compute; each is locked until the next one is requested.

        If no shard is free, waits for those that other processes compute; if such a process is lost, its shard is
        yielded here.
        """
        return claim(shards, lambda shard: self._lock(shard_name(shard)), self._is_missing)

    def write(self, shard: int, entries: Sequence[Entry]) -> None:
        """Write one shard: one entry per index in `examples_of`, in order.

        Raises:
            ValueError: the number of entries is wrong, or an entry has neither a map nor a reason.
            OSError: for example, the disk is full; nothing is left behind.
        """
        if len(entries) != len(self.examples_of(shard)):
            raise ValueError(f"entries: expected {len(self.examples_of(shard))} in shard {shard}, got {len(entries)}")
        dtype = torch.float16 if self.description["all_layers"] else torch.float32
        for entry in entries:
            if entry.maps is None and not entry.reason:
                raise ValueError(f"entries: {entry.id!r} has neither a map nor a reason for leaving it out")
            if entry.maps is not None and (entry.weights is None) != self.description["all_layers"]:
                raise ValueError(f"entries: {entry.id!r}: expected weights unless all layers are stored")
            if entry.maps is not None and not entry.maps.to(dtype).isfinite().all():
                raise ValueError(f"entries: the map of {entry.id!r} is not finite in {dtype}")
        shapes = [(0, -1, -1) if entry.maps is None else tuple(entry.maps.shape) for entry in entries]
        values = [entry.maps.detach().cpu().to(dtype).flatten() for entry in entries if entry.maps is not None]
        weights = [
            entry.weights.detach().cpu().float()
            for entry in entries
            if entry.maps is not None and entry.weights is not None
        ]
        sizes = [pairs * steps * words for pairs, steps, words in shapes]
        names = [entry.id.encode() for entry in entries]
        tensors = {
            "shapes": torch.tensor(shapes, dtype=torch.int32).reshape(-1, 3),
            "offsets": torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0),
            "values": torch.cat(values) if values else torch.zeros(0, dtype=dtype),
            "weights": torch.stack(weights) if weights else torch.zeros(0),
            "texts": torch.tensor([entry.text for entry in entries], dtype=torch.int64),
            "names": torch.frombuffer(bytearray(b"".join(names) or b"\0"), dtype=torch.uint8),
            "name_offsets": torch.tensor([0, *map(len, names)], dtype=torch.int64).cumsum(0),
        }
        reasons = {position: entry.reason for position, entry in enumerate(entries) if entry.maps is None}
        checked_file.write(self.folder / shard_name(shard), tensors, {"store": self._digest, "left_out": reasons})

    def finish(self) -> bool:
        """Write the index if every shard exists, else return False. Any number of processes may call it."""
        with locked(self._lock(DESCRIPTION)):
            paths = [self.folder / shard_name(shard) for shard in range(self.shards)]
            if any(not path.is_file() for path in paths):
                return False
            if checked_file.fault(self.folder / INDEX, self._digest) is None:
                return True
            keys, where = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int32)]
            left_out: collections.Counter[str] = collections.Counter()
            for shard, path in enumerate(paths):
                arrays, head = checked_file.read(path)
                positions = range(len(arrays["texts"]))
                keys.append(np.array([hash64(id_at(arrays, position)) for position in positions]))
                where.append(np.array([(shard, position) for position in positions], np.int32))
                left_out.update(head["left_out"].values())
            order = np.concatenate(keys).argsort(kind="stable")
            sorted_keys, places = np.concatenate(keys)[order], np.concatenate(where)[order]
            for shard, position in places[:-1][np.diff(sorted_keys) == 0][:1]:
                name = id_at(checked_file.read(paths[shard])[0], position)
                raise ValueError(f"{self.folder}: example id {name!r} is there twice")
            head = {"store": self._digest, "left_out": dict(left_out), "bytes": [path.stat().st_size for path in paths]}
            tensors = {"keys": torch.from_numpy(sorted_keys), "where": torch.from_numpy(places)}
            checked_file.write(self.folder / INDEX, tensors, head)
            return True

    def _is_missing(self, shard: int) -> bool:
        return checked_file.fault(self.folder / shard_name(shard), self._digest) is not None

    def _lock(self, name: str) -> Path:
        return self.folder / LOCKS / f"{name}.lock"
