"""Reads a store: the teacher's maps on disk, one small matrix per example, with fingerprints of their sources.

    store/
      store.json              the description: fingerprints, mixture, how many examples and shards; written first
      shard-00000.safetensors the maps of examples 0 to shard_size - 1, and so on
      index.safetensors       the shard and position of each example; written last, when all shards are there

`molsaki.store.map_store_writer` writes it; `molsaki.store.checked_file` is the format of the .safetensors files.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from molsaki.io import digest, hash64
from molsaki.store import checked_file
from molsaki.store.fingerprints import fingerprint_spans
from molsaki.text.spans import Spans

VERSION = 2
DESCRIPTION, INDEX = "store.json", "index.safetensors"
NEEDED = {"version", "examples", "shard_size", "num_layers", "all_layers"}  # keys of every description
# The values of keys that older descriptions lack.
ABSENT = {"map_heads": "mean", "key_of": "all", "key_occurrence": "all", "max_key_words": 0}
NAMES = {
    "examples": "number of examples",
    "data": "data set",
    "teacher_layers": "list of teacher layers",
}  # of keys, in messages
OPEN_SHARDS = 128  # kept open for random access; each holds a file descriptor
REMEDY = "run molsaki extract again with the same options to repair it"

Arrays = dict[str, np.ndarray[Any, Any]]


class Entry(NamedTuple):
    """One example of a store.

    Attributes:
        id: the example's name, unique in the store.
        text: `fingerprint_spans` of the text of its map.
        maps: ``(K, S, W)``, float32, or with all layers ``(Lt, S, W)``, float16; None if it was left out.
        weights: ``(K, Lt)`` float32; None with all layers.
        reason: why it was left out.
    """

    id: str
    text: int
    maps: Tensor | None = None
    weights: Tensor | None = None
    reason: str = ""


class Store:
    """A finished store with random access to the disk; memory use does not grow with its size. Picklable.

    Attributes:
        description: the content of ``store.json``.
        left_out: the number of examples without a map, by reason.

    Raises:
        FileNotFoundError: there is no store in the folder, or its extraction is not finished.
        ValueError: a file is missing, cut short or (shards: when they are read) otherwise damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        self._digest = digest(self.description)
        index = self.folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"{self.folder}: the store is not finished; run molsaki extract again to continue")
        _refuse(index, self._digest)
        where, head = checked_file.read(index)
        self._keys, self._where = where["keys"], where["where"]
        self.left_out: dict[str, int] = head["left_out"]
        self._bytes: list[int] = head["bytes"]
        for shard, expected in enumerate(self._bytes):
            path = self.folder / shard_name(shard)
            size = path.stat().st_size if path.is_file() else None
            if size != expected:
                state = "missing" if size is None else f"it has {size} bytes, expected {expected}"
                raise ValueError(f"{path}: {state}; {REMEDY}")
        read = functools.partial(_read_shard, self.folder, self._digest, {})
        self._shard = functools.lru_cache(OPEN_SHARDS)(read)

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.folder,)

    def __len__(self) -> int:
        """Examples, those left out included."""
        return int(self.description["examples"])

    @property
    def num_layers(self) -> int:
        """Lt, the number of the teacher's layers, or with ``map_heads="each"`` of all their heads."""
        return int(self.description["num_layers"])

    @property
    def all_layers(self) -> bool:
        """Whether entries hold the map of every layer, to be mixed by the reader."""
        return bool(self.description["all_layers"])

    @property
    def num_shards(self) -> int:
        return len(self._bytes)

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(self._bytes) + sum((self.folder / name).stat().st_size for name in (DESCRIPTION, INDEX))

    def __contains__(self, id: str) -> bool:
        return self._find(id) is not None

    def __getitem__(self, id: str) -> Entry:
        """The entry of an example; its ``maps`` are None if it was left out.

        Raises:
            KeyError: there is no such example.
        """
        found = self._find(id)
        if found is None:
            raise KeyError(f"{self.folder}: holds no example {id!r}")
        return self._entry(*found)

    def batch(self, ids: Sequence[str], spans: Sequence[Spans]) -> Tensor | tuple[Tensor, Tensor]:
        """The maps of N examples as one tensor, for your own training loop (`molsaki.StepwiseAttentionLoss`).

        Args:
            ids: their names in the store.
            spans: their texts, as `molsaki.segment` returns them; they must match the texts of the maps.

        Returns:
            ``(N, Lt, S, W)`` of every layer, or mixed maps ``(N, K, S, W)`` and their weights ``(N, K, Lt)``; S and W
            are those of the longest, and the rest is 0.

        Raises:
            KeyError, ValueError: an example is not in the store, was left out there, or has another text.
        """
        if len(ids) != len(spans) or not len(ids):
            raise ValueError(
                f"ids, spans: expected the same number of both, at least one, got {len(ids)} and {len(spans)}"
            )
        for id in ids:
            if not isinstance(id, str):
                raise TypeError(f"ids: expected names, got {id!r}")
        entries = [self[id] for id in ids]
        for entry, text in zip(entries, spans, strict=True):
            check_text(self.folder, entry, text)
            if entry.maps is None:
                raise ValueError(f"{self.folder}: example {entry.id!r} has no map: {entry.reason}")
        maps = pad_maps([entry.maps for entry in entries if entry.maps is not None])
        weights = [entry.weights for entry in entries if entry.weights is not None]
        return (maps, torch.stack(weights)) if weights else maps

    def __iter__(self) -> Iterator[Entry]:
        """All entries, in the order of the data."""
        for shard in range(self.num_shards):
            for position in range(len(self._shard(shard)[0]["texts"])):
                yield self._entry(shard, position)

    def check(self, expected: dict[str, Any]) -> None:
        """Refuse the store if its description differs from ``expected`` in any of these keys.

        Raises:
            ValueError: with the key and both values.
        """
        compare(self.folder, self.description, expected)

    def _find(self, id: str) -> tuple[int, int] | None:
        key = hash64(id)
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return None
        shard, position = self._where[at].tolist()
        return shard, position

    def _entry(self, shard: int, position: int) -> Entry:
        arrays, left_out = self._shard(shard)
        name, text = id_at(arrays, position), int(arrays["texts"][position])
        shape = arrays["shapes"][position].tolist()
        if shape[1] < 0:
            return Entry(name, text, reason=left_out[str(position)])
        start, stop = arrays["offsets"][position : position + 2].tolist()
        maps = torch.from_numpy(arrays["values"][start:stop].reshape(shape).copy())
        if self.all_layers:
            return Entry(name, text, maps)
        weights = arrays["weights"][np.count_nonzero(arrays["shapes"][:position, 1] >= 0)]
        return Entry(name, text, maps, torch.from_numpy(weights.copy()))


def check_text(folder: Path, entry: Entry, spans: Spans) -> None:
    """Refuse an entry with another text, or with other steps or key words."""
    expected = fingerprint_spans(spans)
    if entry.text != expected:
        raise ValueError(
            f"{folder}: example {entry.id!r} has another text, other steps or other key words there: fingerprint "
            f"{entry.text}, expected {expected}; extract into a new folder, or use the same data, options and functions"
        )


def pad_maps(maps: Sequence[Tensor]) -> Tensor:
    """``(K, S_n, W_n)`` each to ``(N, K, S, W)``."""
    steps, words = max(m.shape[1] for m in maps), max(m.shape[2] for m in maps)
    return torch.stack([pad(m, (0, words - m.shape[2], 0, steps - m.shape[1])) for m in maps])


def _read_shard(
    folder: Path, store: str, checked: dict[int, tuple[int, int]], number: int
) -> tuple[Arrays, dict[str, str]]:
    """A shard's arrays, which are memory-mapped, and the reasons why examples were left out.

    Args:
        checked: size and modification time of the shards whose checksums were correct; this shard is added.
    """
    path = folder / shard_name(number)
    if not path.is_file():
        raise ValueError(f"{path}: missing; {REMEDY}")
    state = path.stat().st_size, path.stat().st_mtime_ns
    if checked.get(number) != state:
        _refuse(path, store)
        checked[number] = state
    arrays, head = checked_file.read(path)
    return arrays, head["left_out"]


def read_description(folder: str | Path) -> dict[str, Any]:
    """The description of a store, finished or not.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of another version.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no store there (no {DESCRIPTION}); molsaki extract --store {folder} writes one"
        )
    try:
        description: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError:
        description = {}
    if not description.keys() >= NEEDED or description["shard_size"] < 1:
        raise ValueError(f"{path}: damaged; {REMEDY}")
    if description["version"] != VERSION:
        raise ValueError(
            f"{folder}: expected a store of version {VERSION}, got version {description['version']}; extract into a "
            "new folder with this version of molsaki"
        )
    return description


def verify(folder: str | Path) -> list[str]:
    """Every fault of a store's files, each of which is read completely; empty if there is none."""
    folder, description = Path(folder), read_description(folder)
    names = [shard_name(shard) for shard in range(-(-description["examples"] // description["shard_size"]))]
    found = {name: checked_file.fault(folder / name, digest(description)) for name in [*names, INDEX]}
    faults = [f"{name}: {fault}" for name, fault in found.items() if fault is not None]
    if len(faults) == len(found) and all("belongs to another store" in fault for fault in faults):
        return [f"{DESCRIPTION}: damaged: it is not the one that the other files were written with"]
    if not faults:
        store = Store(folder)
        if sum(1 for entry in store if entry.id in store) != len(store):
            faults.append(f"{INDEX}: it does not list every example")
    return faults


def compare(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise a ValueError with both values for the first key of ``expected`` whose value differs in ``found``."""
    for name, value in json.loads(json.dumps(expected)).items():
        stored = found.get(name, ABSENT.get(name))
        if stored != value:
            what = NAMES.get(name, name.replace("_", " "))
            raise ValueError(
                f"{folder}: this store was written with another {what}: it has {stored!r}, expected {value!r}; use the "
                "options, models and data of the extraction, or extract into a new folder"
            )


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def id_at(arrays: Arrays, position: int) -> str:
    """The name of the example at this position of a shard."""
    start, stop = arrays["name_offsets"][position : position + 2].tolist()
    return arrays["names"][start:stop].tobytes().decode()


def _refuse(path: Path, store: str) -> None:
    if (fault := checked_file.fault(path, store)) is not None:
        raise ValueError(f"{path}: {fault}; {REMEDY}")
