"""The teacher's maps on disk: one small matrix an example, in shards, with fingerprints of what they were made from.

    store/
      store.json              what it is of: fingerprints, mixture, how many examples and shards; written first
      shard-00000.safetensors the maps of examples 0 to shard_size - 1, and so on
      index.json              the shards' sizes and checksums; written last, when all of them are there
      index.safetensors       where each example is

Every file is written under another name, flushed to the disk and renamed, so a half-written one is never seen. A shard
covers a fixed range of examples: several processes can write theirs at once, and a killed run goes on where it was.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from molsaki.segment import Spans

VERSION = 1
DESCRIPTION, INDEX, WHERE = "store.json", "index.json", "index.safetensors"
OPEN_SHARDS = 16  # kept open for random access
NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}


class Entry(NamedTuple):
    """One example of a store.

    Attributes:
        id: the example's name, unique in the store.
        text: `fingerprint_spans` of what its map is of.
        maps: ``(K, S, W)``, float32, or with all layers ``(Lt, S, W)``, float16; None if it was left out.
        weights: ``(K, Lt)`` float32; None with all layers.
        reason: why it was left out.
    """

    id: str
    text: int
    maps: Tensor | None = None
    weights: Tensor | None = None
    reason: str = ""


class StoreWriter:
    """Writes a store shard by shard; an unfinished one of the same description is continued.

    Args:
        folder: made if it is not there.
        description: what the store is of: ``num_layers``, ``all_layers``, fingerprints, options; JSON.
        examples: how many there will be, those left out included.
        shard_size: examples a shard.

    Raises:
        ValueError: the folder holds a store of something else; the message has both values.
    """

    def __init__(self, folder: str | Path, description: dict, examples: int, shard_size: int = 1024):
        if shard_size < 1:
            raise ValueError(f"shard_size: expected at least 1, got {shard_size}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        size = {"version": VERSION, "examples": examples, "shard_size": shard_size}
        self.description = json.loads(json.dumps(size | description))
        path = self.folder / DESCRIPTION
        if path.exists():
            _compare(self.folder, _read_json(path), self.description)
        elif any(self.folder.glob("*.safetensors")) and not path.exists():  # unless another process just made it
            raise ValueError(f"{self.folder}: holds files but no {DESCRIPTION}; choose an empty folder for the store")
        else:
            _write_json(path, self.description)
        self.shards = -(-examples // shard_size)

    def examples_of(self, shard: int) -> range:
        """The numbers of the examples that a shard holds."""
        start = shard * self.description["shard_size"]
        return range(start, min(start + self.description["shard_size"], self.description["examples"]))

    def missing(self) -> list[int]:
        """The shards that are not there yet, or not whole."""
        return [shard for shard in range(self.shards) if not _is_whole(self.folder / _shard_name(shard))]

    def write(self, shard: int, entries: Sequence[Entry]) -> None:
        """Write one shard: an entry for each of `examples_of`, in order.

        Raises:
            ValueError: their number is another, or an entry has neither a map nor a reason.
        """
        if len(entries) != len(self.examples_of(shard)):
            raise ValueError(f"entries: expected {len(self.examples_of(shard))} in shard {shard}, got {len(entries)}")
        dtype = torch.float16 if self.description["all_layers"] else torch.float32
        shapes, values, weights = [], [], []
        for entry in entries:
            if entry.maps is None:
                if not entry.reason:
                    raise ValueError(f"entries: {entry.id!r} has neither a map nor a reason why not")
                shapes.append((0, -1, -1))
                continue
            if (entry.weights is None) != self.description["all_layers"]:
                raise ValueError(f"entries: {entry.id!r}: expected weights unless all layers are stored")
            shapes.append(tuple(entry.maps.shape))
            values.append(entry.maps.detach().cpu().to(dtype).flatten())
            if not values[-1].isfinite().all():
                raise ValueError(f"entries: the map of {entry.id!r} is not finite in {dtype}")
            if entry.weights is not None:
                weights.append(entry.weights.detach().cpu().float())
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
        reasons = json.dumps({entry.id: entry.reason for entry in entries if entry.maps is None})
        with _new_file(self.folder / _shard_name(shard)) as path:
            save_file(tensors, path, {"left_out": reasons})

    def finish(self) -> bool:
        """Write the index if every shard is there; False if not. Any process may call it, more than one too."""
        if self.missing():
            return False
        if (self.folder / INDEX).exists():
            return True
        shards, keys, where = [], [], []
        left_out: collections.Counter[str] = collections.Counter()
        seen = set()
        for shard in range(self.shards):
            path = self.folder / _shard_name(shard)
            shards.append({"file": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)})
            with safe_open(path, "pt") as file:
                left_out.update(json.loads(file.metadata()["left_out"]).values())
                for row, name in enumerate(_names(file)):
                    key = _key(name)
                    if key in seen:
                        raise ValueError(f"{self.folder}: example id {name!r} is there twice")
                    seen.add(key)
                    keys.append(key)
                    where.append((shard, row))
        order = sorted(range(len(keys)), key=keys.__getitem__)
        with _new_file(self.folder / WHERE) as path:
            save_file(
                {
                    "keys": torch.tensor([keys[i] for i in order], dtype=torch.int64),
                    "where": torch.tensor([where[i] for i in order], dtype=torch.int32).reshape(-1, 2),
                },
                path,
            )
        index = {"shards": shards, "left_out": dict(left_out), "where_sha256": _sha256(self.folder / WHERE)}
        _write_json(self.folder / INDEX, index)
        return True


class Store:
    """A finished store, read at random; holds 16 bytes an example in memory, whatever the maps' size. Picklable.

    Raises:
        FileNotFoundError: the folder is none or its extraction is not finished.
        ValueError: a shard is missing or truncated, or (when it is read) its checksum is another.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / DESCRIPTION).is_file():
            raise FileNotFoundError(f"{self.folder}: no store there (no {DESCRIPTION})")
        self.description = _read_json(self.folder / DESCRIPTION)
        if self.description.get("version") != VERSION:
            raise ValueError(f"{self.folder}: version {self.description.get('version')}, this program reads {VERSION}")
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"{self.folder}: the store is not finished; run molsaki extract again to continue")
        self.index = _read_json(self.folder / INDEX)
        for shard in self.index["shards"]:
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes, expected {shard['bytes']}"
                raise ValueError(f"{path}: {state}; delete it and {INDEX}, and run molsaki extract again")
        if not (self.folder / WHERE).is_file() or _sha256(self.folder / WHERE) != self.index["where_sha256"]:
            raise ValueError(f"{self.folder / WHERE}: damaged; delete it and {INDEX}, and run molsaki extract again")
        with safe_open(self.folder / WHERE, "pt") as file:
            self._keys, self._where = file.get_tensor("keys"), file.get_tensor("where")
        self._open: collections.OrderedDict[int, dict] = collections.OrderedDict()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": collections.OrderedDict()}

    def __len__(self) -> int:
        """Examples, those left out included."""
        return self.description["examples"]

    @property
    def num_layers(self) -> int:
        """Lt, the teacher's layers."""
        return self.description["num_layers"]

    @property
    def all_layers(self) -> bool:
        """Whether entries hold the map of every layer, to be mixed by whoever reads them."""
        return self.description["all_layers"]

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

    def __iter__(self) -> Iterator[Entry]:
        """All entries, in the order of the data."""
        for shard in range(len(self.index["shards"])):
            for row in range(len(self._shard(shard)["texts"])):
                yield self._entry(shard, row)

    def check(self, expected: dict) -> None:
        """Refuse the store if its description differs from ``expected`` in any of these keys.

        Raises:
            ValueError: with the key and both values.
        """
        _compare(self.folder, {name: self.description.get(name) for name in expected}, expected)

    def verify(self) -> list[str]:
        """Everything that is wrong with the files, read as a whole; empty if nothing is."""
        faults = []
        for shard in self.index["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file():
                faults.append(f"{path.name}: missing")
            elif _sha256(path) != shard["sha256"]:
                faults.append(f"{path.name}: its checksum is another than when it was written")
        if not faults and sum(1 for entry in self if entry.id in self) != len(self):
            faults.append(f"{INDEX}: it does not list every example")
        return faults

    def _find(self, id: str) -> tuple[int, int] | None:
        key = _key(id)
        at = int(torch.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return None
        shard, row = self._where[at].tolist()
        return shard, row

    def _entry(self, shard: int, row: int) -> Entry:
        tensors = self._shard(shard)
        name, text = tensors["ids"][row], int(tensors["texts"][row])
        shape = tensors["shapes"][row].tolist()
        if shape[1] < 0:
            return Entry(name, text, reason=tensors["left_out"][name])
        start, stop = tensors["offsets"][row : row + 2].tolist()
        maps = tensors["values"][start:stop].reshape(shape)
        weights = None if self.all_layers else tensors["weights"][int(tensors["weight_row"][row])]
        return Entry(name, text, maps, weights)

    def _shard(self, number: int) -> dict:
        """A shard's small tensors, and its values as a slice that is read from the disk when it is asked for."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        listed = self.index["shards"][number]
        path = self.folder / listed["file"]
        if _sha256(path) != listed["sha256"]:
            raise ValueError(
                f"{path}: its checksum is another than when it was written; delete it and {INDEX}, and run molsaki "
                "extract again"
            )
        try:
            file = safe_open(path, "pt").__enter__()
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        tensors = {name: file.get_tensor(name) for name in ("shapes", "offsets", "texts")}
        tensors["values"], tensors["weights"] = file.get_slice("values"), file.get_slice("weights")
        tensors["weight_row"] = (tensors["shapes"][:, 1] >= 0).cumsum(0) - 1
        tensors["ids"], tensors["left_out"] = _names(file), json.loads(file.metadata()["left_out"])
        self._open[number] = tensors
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return tensors


def fingerprint_model(model: nn.Module) -> str:
    """A short name of a model: its config, and each parameter's name, shape and a sample of up to 4,096 values."""
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in NOT_THE_MODEL}
    digest = hashlib.blake2b(_digest(config).encode(), digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().reshape(-1)
        sample = values[:: max(values.numel() // 4096, 1)][:4096]
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short name of what a fast tokenizer does to a text, its chat template included."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None  # what the last call happened to ask for
    return _digest([state, tokenizer.chat_template])


def fingerprint_spans(spans: Spans) -> int:
    """A number for a text, its steps and its key words."""
    digest = hashlib.blake2b(json.dumps([spans.text, spans.steps, spans.words]).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True)


def _digest(value) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _compare(folder: Path, found: dict, expected: dict) -> None:
    for name, value in json.loads(json.dumps(expected)).items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder}: this store is of another {name.replace('_', ' ')}: it has {found.get(name)!r}, "
                f"expected {value!r}"
            )


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _names(file) -> list[str]:
    text = bytes(file.get_tensor("names").numpy())
    offsets = file.get_tensor("name_offsets").tolist()
    return [text[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def _key(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big", signed=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_whole(shard: Path) -> bool:
    """A shard's length is in its head: one that was cut short does not open."""
    try:
        with safe_open(shard, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}; delete it and run molsaki extract again") from None


def _write_json(path: Path, value: dict) -> None:
    with _new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A file to write that takes ``path``'s place when it is whole and on the disk."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
