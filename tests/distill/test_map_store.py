"""The teacher's maps on disk: exact round trips, interruption, damage, foreign stores."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molsaki.store import map_store
from molsaki.store.map_store import Entry, Store, verify
from molsaki.store.map_store_writer import StoreWriter

DATA = Path(__file__).with_name("data")
DESCRIPTION = {"num_layers": 6, "all_layers": False, "teacher": "aa", "options": {"tau_t": 0.1}}


def entries(count: int, layers: int = 6, all_layers: bool = False, seed: int = 0) -> list[Entry]:
    g = torch.Generator().manual_seed(seed)
    expected = []
    for n in range(count):
        S, W = (int(x) for x in torch.randint(0, 8, (2,), generator=g))
        if n % 7 == 3:
            expected.append(Entry(f"example é {n}", n - 5, reason="too long" if n % 2 else "no rationale"))
        elif all_layers:
            expected.append(Entry(f"example é {n}", n - 5, torch.rand(layers, S, W, generator=g)))
        else:
            weights = torch.rand(1, layers, generator=g)
            expected.append(Entry(f"example é {n}", n - 5, torch.rand(1, S, W, generator=g), weights))
    return expected


def fill(folder: Path, expected: list[Entry], shard_size: int = 4, description: dict = DESCRIPTION) -> StoreWriter:
    writer = StoreWriter(folder, description, len(expected), shard_size)
    for shard in writer.missing():
        writer.write(shard, [expected[n] for n in writer.examples_of(shard)])
    assert writer.finish()
    return writer


WHOLE = {".locks", "store.json", "index.safetensors", *(f"shard-0000{n}.safetensors" for n in range(3))}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same(a: Entry, b: Entry) -> bool:
    def equal(x, y):
        return (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))

    fields = a.id == b.id and a.text == b.text and a.reason == b.reason
    return fields and equal(a.maps, b.maps) and equal(a.weights, b.weights)


def test_round_trip_is_exact(tmp_path):
    expected = entries(23)
    fill(tmp_path, expected)
    store = Store(tmp_path)
    assert len(store) == 23 and store.num_layers == 6 and store.left_out == {"too long": 2, "no rationale": 1}
    assert all(same(store[entry.id], entry) for entry in reversed(expected))
    assert all(same(a, b) for a, b in zip(store, expected, strict=True))
    assert "example é 0" in store and "another" not in store and verify(tmp_path) == []
    with pytest.raises(KeyError, match="no example 'another'"):
        store["another"]
    again = pickle.loads(pickle.dumps(store))
    assert same(again[expected[5].id], expected[5])
    store.check({"teacher": "aa", "options": {"tau_t": 0.1}})


def test_all_layers_are_half_precision(tmp_path):
    expected = entries(9, all_layers=True)
    fill(tmp_path, expected, description=DESCRIPTION | {"all_layers": True})
    store = Store(tmp_path)
    assert store.all_layers
    for entry in expected:
        if entry.maps is not None:
            assert torch.equal(store[entry.id].maps, entry.maps.half()) and store[entry.id].weights is None


@pytest.mark.parametrize("name", ["store", "store_all_layers"])
def test_a_store_of_version_0_1(name):
    """Stores that were written before the layout of the package changed: every value, id, reason and checksum."""
    store, layers = Store(DATA / name), name == "store_all_layers"
    expected = json.loads((DATA / "store_values.json").read_text())
    assert verify(DATA / name) == [] and store.num_shards == 3 and store.left_out == {"no rationale": 1}
    assert [entry.id for entry in store] == list(expected) and store.all_layers == layers
    for entry in store:
        wanted = expected[entry.id]
        assert (entry.text, entry.reason) == (wanted["text"], wanted["reason"])
        assert (entry.maps is None) == (wanted["maps"] is None)
        if entry.maps is not None and not layers:
            assert entry.maps.tolist() == wanted["maps"] and entry.weights.tolist() == wanted["weights"]
        elif entry.maps is not None:
            steps, words = torch.tensor(wanted["maps"]).shape[1:]
            assert entry.maps.dtype == torch.float16 and entry.maps.shape == (3, steps, words)


def test_empty_store(tmp_path):
    fill(tmp_path, [])
    assert len(Store(tmp_path)) == 0 and verify(tmp_path) == [] and "x" not in Store(tmp_path)


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(map_store, "OPEN_SHARDS", 2)
    expected = entries(23)
    fill(tmp_path, expected)
    store = Store(tmp_path)
    assert all(same(store[entry.id], entry) for entry in expected * 2)
    assert store._shard.cache_info().currsize == 2


def test_memory_does_not_grow_with_the_store(tmp_path, monkeypatch):
    """Reading all of it leaves a few bytes per shard in memory. A list of the names would take 60 per example."""
    monkeypatch.setattr(map_store, "OPEN_SHARDS", 16)
    kept = []
    for count in (2048, 8192):
        folder = tmp_path / str(count)
        expected = [Entry(f"example {n}", n, torch.rand(1, 2, 2), torch.rand(1, 6)) for n in range(count)]
        fill(folder, expected, shard_size=128)
        tracemalloc.start()
        store = Store(folder)
        for n, entry in enumerate(store):
            assert entry.id == expected[n].id
        for n in range(0, count, 97):
            assert same(store[expected[-n].id], expected[-n])
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert store._shard.cache_info().currsize <= map_store.OPEN_SHARDS
    assert kept[1] - kept[0] < 8 * (8192 - 2048)


def test_continues_where_it_was(tmp_path):
    expected = entries(10)
    writer = StoreWriter(tmp_path, DESCRIPTION, 10, 4)
    writer.write(1, expected[4:8])
    (tmp_path / ".shard-00000.safetensors.part").write_bytes(b"half")  # a killed process's
    assert not writer.finish()
    with pytest.raises(FileNotFoundError, match="not finished; run molsaki extract again"):
        Store(tmp_path)
    before = (tmp_path / "shard-00001.safetensors").stat().st_mtime_ns
    writer = StoreWriter(tmp_path, DESCRIPTION, 10, 4)
    assert writer.missing() == [0, 2]
    fill(tmp_path, expected)
    assert (tmp_path / "shard-00001.safetensors").stat().st_mtime_ns == before
    assert all(same(a, b) for a, b in zip(Store(tmp_path), expected, strict=True))
    assert StoreWriter(tmp_path, DESCRIPTION, 10, 4).missing() == [] and names(tmp_path) == WHOLE


def _write_some(folder, written, start, lose):
    all_of_them = entries(40)
    writer = StoreWriter(folder, DESCRIPTION, 40, 4)
    start.wait(60)
    for shard in writer.claim(writer.missing()):
        if lose is not None:
            lose.set()
            while written.value < 9:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        writer.write(shard, [all_of_them[n] for n in writer.examples_of(shard)])
        with written.get_lock():
            written.value += 1
    assert writer.finish()


@pytest.mark.parametrize("is_lost", [False, True])
def test_processes_share_the_shards(tmp_path, is_lost):
    """Each shard is written once. The shard of a lost process is written by another process, which waited for it."""
    context = multiprocessing.get_context("fork")
    written, start = context.Value("i", 0), context.Event()
    more = (tmp_path, written, start, None)
    processes = [context.Process(target=_write_some, args=more) for _ in range(2)]
    if is_lost:
        now = context.Event()
        now.set()
        processes.append(context.Process(target=_write_some, args=(tmp_path, written, now, start)))
    else:
        start.set()
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, *[-signal.SIGKILL] * is_lost]
    assert written.value == 10 and verify(tmp_path) == []
    assert all(same(a, b) for a, b in zip(Store(tmp_path), entries(40), strict=True))


def _wait_for(folder, is_waiting):
    writer = StoreWriter(folder, DESCRIPTION, 10, 4)
    is_waiting.set()
    for shard in writer.claim([1]):
        writer.write(shard, entries(10)[4:8])


def test_waits_for_a_shard_that_another_process_writes(tmp_path):
    """The process that holds it writes it; if that fails, the one that waits does."""
    for is_written in (True, False):
        folder, context = tmp_path / str(is_written), multiprocessing.get_context("fork")
        is_waiting = context.Event()
        process = context.Process(target=_wait_for, args=(folder, is_waiting))
        writer = StoreWriter(folder, DESCRIPTION, 10, 4)
        claims = writer.claim([1])
        assert next(claims) == 1
        process.start()
        assert is_waiting.wait(60)
        process.join(0.3)
        assert process.is_alive()
        if is_written:
            writer.write(1, entries(10)[4:8])
            before = (folder / "shard-00001.safetensors").stat().st_mtime_ns
        claims.close()
        process.join(60)
        assert process.exitcode == 0 and writer.missing() == [0, 2]
        if is_written:
            assert (folder / "shard-00001.safetensors").stat().st_mtime_ns == before


def _write_until_killed(folder):
    expected = entries(400)
    writer = StoreWriter(folder, DESCRIPTION, 400, 4)
    for shard in writer.missing():
        writer.write(shard, [expected[n] for n in writer.examples_of(shard)])
        if shard == 20:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_and_continued(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    writer = StoreWriter(tmp_path, DESCRIPTION, 400, 4)
    assert writer.missing() == list(range(21, 100))
    expected = entries(400)
    for shard in range(21):
        assert len(load_file(tmp_path / f"shard-{shard:05d}.safetensors")["texts"]) == 4
    fill(tmp_path, expected)
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    "name, value", [("teacher", "bb"), ("options", {"tau_t": 0.2}), ("num_layers", 7), ("examples", 11)]
)
def test_another_description_is_refused_with_both_values(tmp_path, name, value):
    fill(tmp_path, entries(10))
    changed = DESCRIPTION | {name: value}
    with pytest.raises(ValueError, match=f"another .*{name.replace('_', ' ')}: it has .*, expected") as error:
        StoreWriter(tmp_path, changed, value if name == "examples" else 10, 4)
    assert repr(value) in str(error.value)
    if name != "examples":
        with pytest.raises(ValueError, match=f"another {name.replace('_', ' ')}"):
            Store(tmp_path).check({name: value})


def test_missing_and_truncated(tmp_path):
    expected = entries(10)
    fill(tmp_path, expected)
    for name in ("shard-00001.safetensors", "index.safetensors"):
        path = tmp_path / name
        whole = path.read_bytes()
        for size in (len(whole) - 3, 100, 8, 3, 0):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=f"{name}: .*; run molsaki extract again with the same options"):
                Store(tmp_path)
            assert [fault.split(":")[0] for fault in verify(tmp_path)] == [name]
        fill(tmp_path, expected)  # as the message says
        assert path.read_bytes() == whole
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors: missing; run molsaki extract again"):
        Store(tmp_path)
    assert verify(tmp_path) == ["shard-00001.safetensors: missing"]
    fill(tmp_path, expected)
    assert verify(tmp_path) == [] and names(tmp_path) == WHOLE


def test_a_shard_lost_or_damaged_while_it_is_read(tmp_path):
    expected = entries(10)
    fill(tmp_path, expected)
    store = Store(tmp_path)
    assert same(store[expected[0].id], expected[0])
    shard = tmp_path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 8
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="shard-00001.safetensors: damaged: its checksum is [0-9a-f]{16}, expected "):
        store[expected[4].id]
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001.safetensors: missing"):
        store[expected[4].id]


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    """In any file, at 50 places each: by verify, by reading all entries, and by a writer that continues the store."""
    expected = entries(10)
    writer = fill(tmp_path, expected)
    for name in sorted(WHOLE - {".locks"}):
        path = tmp_path / name
        whole = path.read_bytes()
        for at in range(0, len(whole), max(len(whole) // 50, 1)):
            data = bytearray(whole)
            data[at] ^= 1 << at % 8
            path.write_bytes(data)
            try:
                assert verify(tmp_path) != [], (name, at)
            except ValueError as error:
                assert name == "store.json" and ("damaged" in str(error) or "version" in str(error))
            with pytest.raises(ValueError):
                list(Store(tmp_path))
            assert [f"shard-0000{n}.safetensors" for n in writer.missing()] == [name] * name.startswith("shard")
        path.write_bytes(whole)
    assert verify(tmp_path) == []


def test_a_lost_description_is_written_again(tmp_path):
    expected = entries(10)
    fill(tmp_path, expected)
    path = tmp_path / "store.json"
    whole = path.read_bytes()
    for left in (None, whole[:40], b""):
        path.unlink() if left is None else path.write_bytes(left)
        with pytest.raises(ValueError, match="no readable store.json, and a file that is not of this store"):
            StoreWriter(tmp_path, DESCRIPTION | {"teacher": "bb"}, 10, 4)
        if left is not None:
            with pytest.raises(ValueError, match="store.json: damaged; run molsaki extract again"):
                Store(tmp_path)
        assert StoreWriter(tmp_path, DESCRIPTION, 10, 4).missing() == []
        assert path.read_bytes() == whole and verify(tmp_path) == []
    path.write_bytes(whole.replace(b'"aa"', b'"ab"'))
    assert verify(tmp_path) == ["store.json: damaged: it is not the one that the other files were written with"]


def test_a_shard_of_another_store_is_refused(tmp_path):
    expected = entries(10)
    for folder, teacher in (("a", "aa"), ("b", "bb")):
        fill(tmp_path / folder, expected, description=DESCRIPTION | {"teacher": teacher})
    name = "shard-00001.safetensors"
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    message = f"{name}: belongs to another store: it was written with a store.json of fingerprint [0-9a-f]+, expected"
    with pytest.raises(ValueError, match=message):
        list(Store(tmp_path / "a"))
    fill(tmp_path / "a", expected, description=DESCRIPTION | {"teacher": "aa"})
    assert verify(tmp_path / "a") == []


def test_a_shard_cut_short_before_the_index_is_written_again(tmp_path):
    expected = entries(10)
    writer = StoreWriter(tmp_path, DESCRIPTION, 10, 4)
    writer.write(0, expected[:4])
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert writer.missing() == [0, 1, 2]
    fill(tmp_path, expected)
    assert verify(tmp_path) == []


def test_what_is_not_finite_is_refused(tmp_path):
    writer = StoreWriter(tmp_path, DESCRIPTION, 1, 4)
    with pytest.raises(ValueError, match="the map of 'a' is not finite"):
        writer.write(0, [Entry("a", 0, torch.full((1, 2, 2), float("nan")), torch.rand(1, 6))])
    with pytest.raises(ValueError, match="'a': expected weights"):
        writer.write(0, [Entry("a", 0, torch.rand(1, 2, 2))])
    layers = StoreWriter(tmp_path / "layers", DESCRIPTION | {"all_layers": True}, 1, 4)
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        layers.write(0, [Entry("a", 0, torch.full((6, 2, 2), 1e5))])


def test_bad_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="no store there"):
        Store(tmp_path / "nothing")
    with pytest.raises(ValueError, match="shard_size"):
        StoreWriter(tmp_path / "a", DESCRIPTION, 4, 0)
    writer = StoreWriter(tmp_path / "a", DESCRIPTION, 4, 4)
    with pytest.raises(ValueError, match="entries: expected 4 in shard 0, got 1"):
        writer.write(0, entries(1))
    with pytest.raises(ValueError, match="neither a map nor a reason"):
        writer.write(0, [Entry("a", 0)] * 4)
    assert writer.missing() == [0]
    twice = StoreWriter(tmp_path / "b", DESCRIPTION, 2, 4)
    twice.write(0, [Entry("a", 0, reason="x")] * 2)
    with pytest.raises(ValueError, match="'a' is there twice"):
        twice.finish()


def test_a_file_that_cannot_grow_leaves_nothing_behind(tmp_path):
    writer = StoreWriter(tmp_path, DESCRIPTION, 4, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.write(0, entries(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.missing() == [0] and names(tmp_path) == {".locks", "store.json"}
    fill(tmp_path, entries(4))
    assert verify(tmp_path) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        writer = StoreWriter(tmp_path, DESCRIPTION, 40, 40)
        with (tmp_path / "other").open("wb", buffering=0) as other, contextlib.suppress(OSError):
            while True:
                other.write(bytes(4096))
        with pytest.raises(OSError, match="No space left on device"):
            writer.write(0, entries(40))
        assert writer.missing() == [0] and names(tmp_path) == {".locks", "store.json", "other"}
        (tmp_path / "other").unlink()
        fill(tmp_path, entries(40), 40)
        assert verify(tmp_path) == []
        del writer
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_without_file_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(
        OSError, match=r"its file system has no file locks \(.*\), which keep two processes .*another folder"
    ):
        StoreWriter(tmp_path, DESCRIPTION, 4, 4)


def test_a_lock_that_cannot_be_opened(tmp_path):
    (tmp_path / ".locks" / "store.json.lock").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="store.json.lock"):
        StoreWriter(tmp_path, DESCRIPTION, 4, 4)
