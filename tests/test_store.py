"""The teacher's maps on disk: exact round trips, interruption, damage, foreign stores."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from molsaki import store as store_module
from molsaki.segment import segment
from molsaki.store import Entry, Store, StoreWriter, fingerprint_model, fingerprint_spans, fingerprint_tokenizer
from tests import tiny

DESCRIPTION = {"num_layers": 6, "all_layers": False, "teacher": "aa", "options": {"tau_t": 0.1}}


def entries(count: int, layers: int = 6, all_layers: bool = False, seed: int = 0) -> list[Entry]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        S, W = (int(x) for x in torch.randint(0, 8, (2,), generator=g))
        if n % 7 == 3:
            made.append(Entry(f"example é {n}", n - 5, reason="too long" if n % 2 else "no rationale"))
        elif all_layers:
            made.append(Entry(f"example é {n}", n - 5, torch.rand(layers, S, W, generator=g)))
        else:
            weights = torch.rand(1, layers, generator=g)
            made.append(Entry(f"example é {n}", n - 5, torch.rand(1, S, W, generator=g), weights))
    return made


def fill(folder: Path, made: list[Entry], shard_size: int = 4, description: dict = DESCRIPTION) -> StoreWriter:
    writer = StoreWriter(folder, description, len(made), shard_size)
    for shard in writer.missing():
        writer.write(shard, [made[n] for n in writer.examples_of(shard)])
    assert writer.finish()
    return writer


def same(a: Entry, b: Entry) -> bool:
    def equal(x, y):
        return (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))

    fields = a.id == b.id and a.text == b.text and a.reason == b.reason
    return fields and equal(a.maps, b.maps) and equal(a.weights, b.weights)


def test_round_trip_is_exact(tmp_path):
    made = entries(23)
    fill(tmp_path, made)
    store = Store(tmp_path)
    assert len(store) == 23 and store.num_layers == 6 and store.index["left_out"] == {"too long": 2, "no rationale": 1}
    assert all(same(store[entry.id], entry) for entry in reversed(made))
    assert all(same(a, b) for a, b in zip(store, made, strict=True))
    assert "example é 0" in store and "another" not in store and store.verify() == []
    with pytest.raises(KeyError, match="no example 'another'"):
        store["another"]
    again = pickle.loads(pickle.dumps(store))
    assert same(again[made[5].id], made[5])
    store.check({"teacher": "aa", "options": {"tau_t": 0.1}})


def test_all_layers_are_half_precision(tmp_path):
    made = entries(9, all_layers=True)
    fill(tmp_path, made, description=DESCRIPTION | {"all_layers": True})
    store = Store(tmp_path)
    assert store.all_layers
    for entry in made:
        if entry.maps is not None:
            assert torch.equal(store[entry.id].maps, entry.maps.half()) and store[entry.id].weights is None


def test_empty_store(tmp_path):
    fill(tmp_path, [])
    assert len(Store(tmp_path)) == 0 and Store(tmp_path).verify() == [] and "x" not in Store(tmp_path)


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 2)
    made = entries(23)
    fill(tmp_path, made)
    store = Store(tmp_path)
    assert all(same(store[entry.id], entry) for entry in made * 2)
    assert len(store._open) == 2


def test_below_a_kilobyte_an_example(tmp_path):
    """At SVAMP's lengths, about 5 steps by 10 words, and a teacher of 32 layers."""
    made = [Entry(f"svamp-{n}", n, torch.rand(1, 5, 10), torch.rand(1, 32)) for n in range(1000)]
    fill(tmp_path, made, shard_size=1024, description=DESCRIPTION | {"num_layers": 32})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1024 * 1000 / 2


def test_continues_where_it_was(tmp_path):
    made = entries(10)
    writer = StoreWriter(tmp_path, DESCRIPTION, 10, 4)
    writer.write(1, made[4:8])
    (tmp_path / ".shard-00000.safetensors.x1").write_bytes(b"half")  # a killed process's
    assert not writer.finish()
    with pytest.raises(FileNotFoundError, match="not finished; run molsaki extract again"):
        Store(tmp_path)
    before = (tmp_path / "shard-00001.safetensors").stat().st_mtime_ns
    writer = StoreWriter(tmp_path, DESCRIPTION, 10, 4)
    assert writer.missing() == [0, 2]
    fill(tmp_path, made)
    assert (tmp_path / "shard-00001.safetensors").stat().st_mtime_ns == before
    assert all(same(a, b) for a, b in zip(Store(tmp_path), made, strict=True))
    assert StoreWriter(tmp_path, DESCRIPTION, 10, 4).missing() == []


def _write_some(folder, rank):
    made = entries(40)
    writer = StoreWriter(folder, DESCRIPTION, 40, 4)
    for shard in range(rank, writer.shards, 2):
        writer.write(shard, [made[n] for n in writer.examples_of(shard)])
    writer.finish()


def test_two_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_some, args=(tmp_path, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    StoreWriter(tmp_path, DESCRIPTION, 40, 4).finish()
    assert all(same(a, b) for a, b in zip(Store(tmp_path), entries(40), strict=True))


def _write_until_killed(folder):
    made = entries(4000)
    writer = StoreWriter(folder, DESCRIPTION, 4000, 4)
    for shard in writer.missing():
        writer.write(shard, [made[n] for n in writer.examples_of(shard)])
        if shard == 20:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_and_continued(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    writer = StoreWriter(tmp_path, DESCRIPTION, 4000, 4)
    assert writer.missing() == list(range(21, 1000))
    made = entries(4000)
    for shard in range(21):
        assert len(load_file(tmp_path / f"shard-{shard:05d}.safetensors")["texts"]) == 4
    fill(tmp_path, made)
    assert Store(tmp_path).verify() == []


@pytest.mark.parametrize(
    "name, value", [("teacher", "bb"), ("options", {"tau_t": 0.2}), ("num_layers", 7), ("examples", 11)]
)
def test_another_description_is_refused_with_both_values(tmp_path, name, value):
    fill(tmp_path, entries(10))
    changed = DESCRIPTION | {name: value}
    with pytest.raises(ValueError, match=f"another {name.replace('_', ' ')}: it has .*, expected") as error:
        StoreWriter(tmp_path, changed, value if name == "examples" else 10, 4)
    assert repr(value) in str(error.value)
    if name != "examples":
        with pytest.raises(ValueError, match=f"another {name.replace('_', ' ')}"):
            Store(tmp_path).check({name: value})


def test_truncated_missing_and_flipped(tmp_path):
    made = entries(10)
    fill(tmp_path, made)
    shard = tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="shard-00001.safetensors: has .* bytes, expected .*extract again"):
        Store(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00001.safetensors: is missing"):
        Store(tmp_path)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    shard.write_bytes(flipped)
    store = Store(tmp_path)
    assert store.verify() == ["shard-00001.safetensors: its checksum is another than when it was written"]
    assert same(store[made[0].id], made[0])
    with pytest.raises(ValueError, match="its checksum is another"):
        store[made[4].id]
    shard.unlink()
    (tmp_path / "index.json").unlink()
    fill(tmp_path, made)  # what the message says mends it
    assert Store(tmp_path).verify() == []


def test_damage_to_the_small_files(tmp_path):
    made = entries(10)
    fill(tmp_path, made)
    for name in ("index.json", "store.json"):
        whole = (tmp_path / name).read_text()
        (tmp_path / name).write_text(whole[:-9])
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            Store(tmp_path)
        (tmp_path / name).write_text(whole)
    where = bytearray((tmp_path / "index.safetensors").read_bytes())
    where[-3] ^= 4
    (tmp_path / "index.safetensors").write_bytes(where)
    with pytest.raises(ValueError, match="index.safetensors: damaged"):
        Store(tmp_path)


def test_a_shard_cut_short_before_the_index_is_made_again(tmp_path):
    made = entries(10)
    writer = StoreWriter(tmp_path, DESCRIPTION, 10, 4)
    writer.write(0, made[:4])
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert writer.missing() == [0, 1, 2]
    fill(tmp_path, made)
    assert Store(tmp_path).verify() == []


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


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    writer = StoreWriter(tmp_path, DESCRIPTION, 4, 4)
    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        writer.write(0, entries(4))
    assert writer.missing() == [0] and [path.name for path in tmp_path.iterdir()] == ["store.json"]


def test_fingerprints():
    model = tiny.model()
    first = fingerprint_model(model)
    assert fingerprint_model(tiny.model()) == first
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert fingerprint_model(model) != first
    again = tiny.model()
    again.config.rms_norm_eps *= 2  # the same weights, another model
    assert fingerprint_model(again) != first
    tokenizer = tiny.tokenizer()
    name = fingerprint_tokenizer(tokenizer)
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=1)
    assert fingerprint_tokenizer(tokenizer) == name
    tokenizer.chat_template = "{{ messages }}"
    assert fingerprint_tokenizer(tokenizer) != name
    spans = segment("Ann has 3 apples.", "3 + 4 = 7.")
    assert fingerprint_spans(spans) == fingerprint_spans(segment("Ann has 3 apples.", "3 + 4 = 7."))
    assert fingerprint_spans(spans) != fingerprint_spans(segment("Ann has 3 apples.", "3 + 4 = 8."))
    assert fingerprint_spans(spans) != fingerprint_spans(segment("Ann has 3 apples.", "3 + 4 = 7.", key=["apples"]))
