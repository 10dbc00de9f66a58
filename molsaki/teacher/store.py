"""The teacher's maps on disk: one small matrix an example, in shards, with fingerprints of what they were made from.

    store/
      store.json              what it is of: fingerprints, mixture, how many examples and shards; written first
      shard-00000.safetensors the maps of examples 0 to shard_size - 1, and so on
      index.safetensors       where each example is; written last, when all shards are there

Every file is written under another name, flushed to the disk and renamed, so a half-written one is never seen. Each
.safetensors holds its own checksum and a fingerprint of ``store.json``, so damage and foreign files are found at any
time, also in a store that is not finished. A shard covers a fixed range of examples, and is locked by the process that
makes it: several can work at once, the others take over what a lost one left, and a killed run goes on where it was.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import align_module_device
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.text.segment import Spans

VERSION = 2
DESCRIPTION, INDEX, LOCK = "store.json", "index.safetensors", ".lock"
NEEDED = {"version", "examples", "shard_size", "num_layers", "all_layers"}  # in every description
HEAD = "molsaki"  # the one entry of a file's metadata: safetensors writes several in no fixed order
UNSUMMED = "0" * 64  # stands in the checksum's place while the checksum is made
DTYPES = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1"}
OPEN_SHARDS = 128  # kept open for random access; each holds a file descriptor
NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
MEND = "run molsaki extract again with the same options to mend it"


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
    """Writes a store shard by shard; an unfinished or damaged one of the same description is continued.

    Args:
        folder: made if it is not there.
        description: what the store is of: ``num_layers``, ``all_layers``, fingerprints, options; JSON.
        examples: how many there will be, those left out included.
        shard_size: examples a shard.

    Raises:
        ValueError: the folder holds a store of something else; the message has both values.
        OSError: the folder's file system has no file locks.
    """

    def __init__(self, folder: str | Path, description: dict, examples: int, shard_size: int = 1024):
        if shard_size < 1:
            raise ValueError(f"shard_size: expected at least 1, got {shard_size}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        size = {"version": VERSION, "examples": examples, "shard_size": shard_size}
        self.description = json.loads(json.dumps(size | description))
        self.shards = -(-examples // shard_size)
        self._store = _digest(self.description)
        self._lock = (self.folder / LOCK).open("ab")  # closed, and so unlocked, with the writer
        with self._locked(self.shards):
            found = _read_json(self.folder / DESCRIPTION)
            if found is not None:
                _compare(self.folder, found, self.description)
            else:
                for path in self.folder.glob("*.safetensors"):
                    if (fault := _fault(path, self._store)) is not None:
                        raise ValueError(
                            f"{self.folder}: holds no readable {DESCRIPTION}, and a file that is not of this store "
                            f"({path.name}: {fault}); choose an empty folder for the store"
                        )
                with _new_file(self.folder / DESCRIPTION) as temporary:
                    temporary.write_text(json.dumps(self.description, indent=1) + "\n")

    def examples_of(self, shard: int) -> range:
        """The numbers of the examples that a shard holds."""
        start = shard * self.description["shard_size"]
        return range(start, min(start + self.description["shard_size"], self.description["examples"]))

    def missing(self) -> list[int]:
        """The shards that are not there yet, or not as they were written."""
        return [shard for shard in range(self.shards) if _fault(self.folder / _shard_name(shard), self._store)]

    def claim(self, shards: Sequence[int]) -> Iterator[int]:
        """Those of the ``shards`` that this process is to make: nobody else does while it does.

        When none is free, waits for those that other processes are making; if one of these is lost, its shard comes
        here.
        """
        made = set()
        for wait in (False, True):
            for shard in shards:
                if shard in made:
                    continue
                with self._locked(shard, wait) as is_mine:
                    if is_mine and _fault(self.folder / _shard_name(shard), self._store):
                        yield shard
                        made.add(shard)

    def write(self, shard: int, entries: Sequence[Entry]) -> None:
        """Write one shard: an entry for each of `examples_of`, in order.

        Raises:
            ValueError: their number is another, or an entry has neither a map nor a reason.
            OSError: the disk is full, or the like; nothing is left behind.
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
        reasons = {row: entry.reason for row, entry in enumerate(entries) if entry.maps is None}
        _write(self.folder / _shard_name(shard), tensors, {"store": self._store, "left_out": reasons})

    def finish(self) -> bool:
        """Write the index if every shard is there; False if not. Any process may call it, more than one too."""
        with self._locked(self.shards):
            paths = [self.folder / _shard_name(shard) for shard in range(self.shards)]
            if any(not path.is_file() for path in paths):
                return False
            if _fault(self.folder / INDEX, self._store) is None:
                return True
            keys, where = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int32)]
            left_out: collections.Counter[str] = collections.Counter()
            for shard, path in enumerate(paths):
                arrays, head = _read(path)
                rows = range(len(arrays["texts"]))
                keys.append(np.array([id_key(_name(arrays, row)) for row in rows]))
                where.append(np.array([(shard, row) for row in rows], np.int32))
                left_out.update(head["left_out"].values())
            order = np.concatenate(keys).argsort(kind="stable")
            sorted_keys, places = np.concatenate(keys)[order], np.concatenate(where)[order]
            for shard, row in places[:-1][np.diff(sorted_keys) == 0][:1]:
                name = _name(_read(paths[shard])[0], row)
                raise ValueError(f"{self.folder}: example id {name!r} is there twice")
            sizes = [path.stat().st_size for path in paths]
            head = {"store": self._store, "left_out": dict(left_out), "bytes": sizes}
            tensors = {"keys": torch.from_numpy(sorted_keys), "where": torch.from_numpy(places)}
            _write(self.folder / INDEX, tensors, head)
            return True

    @contextlib.contextmanager
    def _locked(self, number: int, wait: bool = True) -> Iterator[bool]:
        """Hold a lock, of a shard or (one past them) of the small files; it ends with the process however that ends."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError as error:
            raise OSError(
                f"{self.folder}: its file system has no file locks ({error.strerror}), which keep two processes from "
                "one file; choose another folder"
            ) from None
        try:
            yield True
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, number)


class Store:
    """A finished store, read at random from the disk; memory does not grow with it. Picklable.

    Attributes:
        description: what it is of, as it was written.
        left_out: how many examples have no map, by reason.

    Raises:
        FileNotFoundError: the folder is none or its extraction is not finished.
        ValueError: a file is missing, cut short or (shards: when they are read) otherwise damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        self._store = _digest(self.description)
        index = self.folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"{self.folder}: the store is not finished; run molsaki extract again to continue")
        _refuse(index, self._store)
        where, head = _read(index)
        self._keys, self._where = where["keys"], where["where"]
        self.left_out: dict[str, int] = head["left_out"]
        self._bytes: list[int] = head["bytes"]
        for shard, expected in enumerate(self._bytes):
            path = self.folder / _shard_name(shard)
            size = path.stat().st_size if path.is_file() else None
            if size != expected:
                state = "missing" if size is None else f"it has {size} bytes, expected {expected}"
                raise ValueError(f"{path}: {state}; {MEND}")
        self._open: collections.OrderedDict[int, tuple[dict, dict]] = collections.OrderedDict()
        self._seen: dict[int, tuple[int, int]] = {}  # size and time of the shards whose checksums were right

    def __reduce__(self):
        return Store, (self.folder,)

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

    def __iter__(self) -> Iterator[Entry]:
        """All entries, in the order of the data."""
        for shard in range(self.num_shards):
            for row in range(len(self._shard(shard)[0]["texts"])):
                yield self._entry(shard, row)

    def check(self, expected: dict) -> None:
        """Refuse the store if its description differs from ``expected`` in any of these keys.

        Raises:
            ValueError: with the key and both values.
        """
        _compare(self.folder, {name: self.description.get(name) for name in expected}, expected)

    def _find(self, id: str) -> tuple[int, int] | None:
        key = id_key(id)
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return None
        shard, row = self._where[at].tolist()
        return shard, row

    def _entry(self, shard: int, row: int) -> Entry:
        arrays, left_out = self._shard(shard)
        name, text = _name(arrays, row), int(arrays["texts"][row])
        shape = arrays["shapes"][row].tolist()
        if shape[1] < 0:
            return Entry(name, text, reason=left_out[str(row)])
        start, stop = arrays["offsets"][row : row + 2].tolist()
        maps = torch.from_numpy(arrays["values"][start:stop].reshape(shape).copy())
        if self.all_layers:
            return Entry(name, text, maps)
        weights = arrays["weights"][np.count_nonzero(arrays["shapes"][:row, 1] >= 0)]
        return Entry(name, text, maps, torch.from_numpy(weights.copy()))

    def _shard(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """A shard's arrays, pages of which are read when they are looked at, and why rows are left out."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.folder / _shard_name(number)
        if not path.is_file():
            raise ValueError(f"{path}: missing; {MEND}")
        state = path.stat().st_size, path.stat().st_mtime_ns
        if self._seen.get(number) != state:
            _refuse(path, self._store)
            self._seen[number] = state
        arrays, head = _read(path)
        self._open[number] = arrays, head["left_out"]
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]


def read_description(folder: str | Path) -> dict:
    """What a store is of, finished or not.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged or of another version.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no store there (no {DESCRIPTION})")
    description = _read_json(path)
    if description is None or not description.keys() >= NEEDED or description["shard_size"] < 1:
        raise ValueError(f"{path}: damaged; {MEND}")
    if description["version"] != VERSION:
        raise ValueError(f"{folder}: version {description['version']}, this program reads {VERSION}")
    return description


def verify(folder: str | Path) -> list[str]:
    """Everything that is wrong with a store's files, each read as a whole; empty if nothing is.

    Raises:
        FileNotFoundError, ValueError: as `read_description`.
    """
    folder, description = Path(folder), read_description(folder)
    names = [_shard_name(shard) for shard in range(-(-description["examples"] // description["shard_size"]))]
    found = {name: _fault(folder / name, _digest(description)) for name in [*names, INDEX]}
    faults = [f"{name}: {fault}" for name, fault in found.items() if fault is not None]
    if len(faults) == len(found) and all("of another store" in fault for fault in faults):
        return [f"{DESCRIPTION}: damaged: it is not the one that the other files were written with"]
    if not faults:
        store = Store(folder)
        if sum(1 for entry in store if entry.id in store) != len(store):
            faults.append(f"{INDEX}: it does not list every example")
    return faults


def fingerprint_model(model: PreTrainedModel) -> str:
    """A short name of what a model's maps depend on: its config and every weight of its decoder, not those of its head.

    Weights that a ``device_map`` put elsewhere are read from there. The name of quantised weights says so.
    """
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in NOT_THE_MODEL}
    weights = {}
    for prefix, module in model.base_model.named_modules():
        with align_module_device(module):
            for name, parameter in module.named_parameters(recurse=False):
                values = parameter.detach().reshape(-1)
                sample = values[:: max(values.numel() // 4096, 1)][:4096].to("cpu", torch.float32)
                chunks = (chunk.float().view(torch.int32) for chunk in values.split(1 << 24))
                total = sum(int(bits.sum(dtype=torch.int64)) for bits in chunks)  # exact in any order
                weights[f"{prefix}.{name}"] = [list(parameter.shape), total, sample.numpy().tobytes().hex()]
    return ("quantised-" if "quantization_config" in config else "") + _digest([config, weights])


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


def _name(arrays: dict[str, np.ndarray], row: int) -> str:
    start, stop = arrays["name_offsets"][row : row + 2].tolist()
    return arrays["names"][start:stop].tobytes().decode()


def id_key(id: str) -> int:
    """64 bits that stand for an example's name."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big", signed=True)


def _read_json(path: Path) -> dict | None:
    """None if there is no such file or it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _write(path: Path, tensors: dict[str, Tensor], head: dict) -> None:
    """A .safetensors file with a head, in which is the checksum of the whole file but for the checksum's own place."""
    data = bytearray(save(tensors, {HEAD: json.dumps({"sha256": UNSUMMED} | head)}))
    at = data.index(UNSUMMED.encode())
    data[at : at + len(UNSUMMED)] = hashlib.sha256(data).hexdigest().encode()
    with _new_file(path) as temporary:
        temporary.write_bytes(data)


def _header(path: Path) -> tuple[dict, int]:
    """The JSON that a .safetensors file begins with, and where it ends."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path}: damaged: its head is longer than the file")
        return json.loads(file.read(size)), 8 + size


def _head(path: Path) -> dict:
    return json.loads(_header(path)[0]["__metadata__"][HEAD])


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """A file's tensors, mapped into memory, and its head.

    By hand, since safetensors 0.8 loses 64 bytes with every tensor or slice that it hands to torch.
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


def _fault(path: Path, store: str) -> str | None:
    """What is wrong with a file that `_write` wrote into this store, if anything is."""
    try:
        sha256, of = (_head(path)[name] for name in ("sha256", "store"))
    except FileNotFoundError:
        return "missing"
    except (ValueError, LookupError, TypeError):
        return "damaged: its head cannot be read"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(int.from_bytes(head, "little"))
        digest.update(head.replace(sha256.encode(), UNSUMMED.encode(), 1))
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        return f"damaged: its checksum is {digest.hexdigest()[:16]}, expected {sha256[:16]}"
    if of != store:
        return f"of another store: it was written with a {DESCRIPTION} of fingerprint {of}, expected {store}"
    return None


def _refuse(path: Path, store: str) -> None:
    if (fault := _fault(path, store)) is not None:
        raise ValueError(f"{path}: {fault}; {MEND}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A file to write that takes ``path``'s place when it is whole and on the disk; whoever writes holds a lock."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
