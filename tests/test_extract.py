from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401

from molsaki import extract as extract_module
from molsaki.config import DistillConfig, ExtractConfig
from molsaki.data import read_examples
from molsaki.extract import extract, probe, teacher_maps
from molsaki.store import Store
from molsaki.tokens import encode
from molsaki.trainer import DistillTrainer
from molsaki_kernels import StepPlan

TOKENIZER, OTHER = tiny.tokenizer(), tiny.tokenizer(60)
TEACHER = tiny.model(3, len(OTHER), seed=1)
WORDLESS = {"id": "w", "question": "Who has nuts?", "rationale": "Ann has nuts. They are small.", "answer": "Ann"}


def config(folder: Path, rows: list[dict] | None = None, **options) -> ExtractConfig:
    data = tiny.write_jsonl(folder / "train.jsonl", tiny.problems(10) + [WORDLESS] if rows is None else rows)
    options = dict(store=str(folder / "store"), shard_size=4, batch_tokens=200) | options
    return ExtractConfig(data_files=[str(data)], **options)


def distill(folder: Path, store: Store | None, **options) -> DistillTrainer:
    options = dict(
        max_steps=3, adam_epsilon=1e-3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, seed=3,
        save_strategy="no",
        use_cpu=True, disable_tqdm=True, train_file=str(folder / "train.jsonl"), output_dir=str(folder / "out"),
    ) | options  # fmt: skip
    teacher = (TEACHER, OTHER) if store is None else (None, None)
    return DistillTrainer(DistillConfig(**options), tiny.model(2), TOKENIZER, *teacher, store=store)


def test_maps_are_those_of_eager_attention(tmp_path):
    """One layer's map against the model's own attention weights, summed by hand; the store's against all layers."""
    extract(config(tmp_path, all_layers=True), TEACHER, OTHER)
    store = Store(tmp_path / "store")
    eager = tiny.model(3, len(OTHER), seed=1)
    eager.set_attn_implementation("eager")
    for example in read_examples(tmp_path / "train.jsonl")[:3]:
        encoded = encode(extract_module.spans_of(example, ExtractConfig()), OTHER)
        with torch.no_grad():
            weights = eager(torch.tensor([encoded.input_ids]), output_attentions=True).attentions
        rows = [[layer[0].mean(0)[a:b].sum(0) for a, b in encoded.steps] for layer in weights]
        by_hand = torch.stack(
            [torch.stack([torch.stack([r[w].sum() for w in encoded.words]) for r in s]) for s in rows]
        )
        torch.testing.assert_close(store[example.id].maps.float(), by_hand, rtol=2e-3, atol=2e-4)  # stored as fp16


def test_no_logits_are_computed(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the teacher's head ran")

    monkeypatch.setattr(TEACHER.lm_head, "forward", fail)
    plan = StepPlan.from_spans([[(0, 3)]], [[[0], [1]]])
    assert teacher_maps(TEACHER, torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3), plan).shape == (1, 3, 1, 2)


@pytest.mark.parametrize("all_layers", [False, True])
@pytest.mark.parametrize("mixture", ["mixture", "uniform"])
def test_the_store_gives_the_live_loss(tmp_path, mixture, all_layers):
    options = dict(mixture=mixture)
    student = tiny.save(tmp_path / "student", 2)
    extract(config(tmp_path, all_layers=all_layers, student=str(student), **options), TEACHER, OTHER)
    live = distill(tmp_path, None, **options)
    stored = distill(tmp_path, Store(tmp_path / "store"), **options)
    for t in (live, stored):
        t.train()
    names = (
        "loss",
        "loss_pre",
        "loss_exp",
        "loss_att",
        "loss_att_uniform",
        "entropy_teacher",
        "grad_norm",
        "without_words",
    )
    tolerance = 2e-3 if all_layers else 2e-6  # fp16 against float32
    for a, b in zip(
        *([[e[n] for n in names] for e in t.state.log_history if "loss" in e] for t in (live, stored)), strict=True
    ):
        assert b == pytest.approx(a, rel=tolerance)
    for a, b in zip(live.model.parameters(), stored.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)


def test_batching_and_padding_change_nothing(tmp_path):
    stores = []
    for tokens in (1, 100_000):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        extract(config(folder, batch_tokens=tokens, shard_size=11), TEACHER, OTHER)
        stores.append(Store(folder / "store"))
    for a, b in zip(*stores, strict=True):
        assert (a.id, a.text) == (b.id, b.text)
        torch.testing.assert_close(a.maps, b.maps, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.weights, b.weights, rtol=1e-5, atol=1e-6)
    assert stores[0]["w"].maps.shape == (1, 3, 0)


def test_interrupted_and_continued(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    whole.mkdir()
    extract(config(whole), TEACHER, OTHER)
    run, shards = extract_module._run, []

    def interrupt(*args):
        shards.append(1)
        if len(shards) == 3:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(extract_module, "_run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(config(tmp_path), TEACHER, OTHER)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("shard-*")}
    assert 0 < len(kept) < 3
    with pytest.raises(FileNotFoundError, match="not finished"):
        Store(tmp_path / "store")
    monkeypatch.setattr(extract_module, "_run", run)
    result = extract(config(tmp_path), TEACHER, OTHER)
    assert result["shards_written"] == 3 - len(kept)
    assert all((tmp_path / "store" / name).stat().st_mtime_ns == time for name, time in kept.items())
    for name in ("shard-00000", "shard-00001", "shard-00002", "index"):
        file = f"{name}.safetensors"
        assert (tmp_path / "store" / file).read_bytes() == (whole / "store" / file).read_bytes()
    assert extract(config(tmp_path), TEACHER, OTHER)["shards_written"] == 0


def test_left_out_is_counted_and_stays_left_out(tmp_path):
    rows = tiny.problems(4) + [{**tiny.problems(1)[0], "id": "none", "rationale": ""}]
    rows.append({**rows[0], "id": "long", "rationale": rows[0]["rationale"] * 3})
    result = extract(config(tmp_path, rows, teacher_max_length=80), TEACHER, OTHER)
    assert result["left_out"] == {"no rationale": 1, "text longer than max_length": 1}
    t = distill(tmp_path, Store(tmp_path / "store"))
    assert t.train_dataset.skipped == {"no rationale": 1, "text longer than max_length (in the store)": 1}
    rows = [{**tiny.problems(1)[0], "rationale": ""}]
    with pytest.raises(ValueError, match="all 1 examples were left out: 1 no rationale"):
        extract(config(tmp_path, rows, store=str(tmp_path / "other")), TEACHER, OTHER)


def test_a_store_of_something_else_is_refused(tmp_path):
    extract(config(tmp_path), TEACHER, OTHER)
    store = Store(tmp_path / "store")
    for options, message in (
        (dict(tau_t=0.2), r"another tau t: it has 0.1, expected 0.2"),
        (dict(mixture="last"), r"another mixture: it has 'mixture', expected 'last'"),
        (dict(key="keywords"), r"another key: it has 'numbers', expected 'keywords'"),
        (dict(splitter="periods"), r"another splitter"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(tmp_path, store, **options)
    other = tiny.save(tmp_path / "other", 3, OTHER, seed=2)
    with pytest.raises(ValueError, match="another teacher: it has '[0-9a-f]{32}', expected '[0-9a-f]{32}'"):
        distill(tmp_path, store, teacher=str(other))
    same = tiny.save(tmp_path / "same", 3, OTHER, seed=1)
    assert distill(tmp_path, store, teacher=str(same)).teacher is None
    with pytest.raises(ValueError, match="objective: logits needs a live teacher"):
        distill(tmp_path, store, objective="logits")

    rows = tiny.problems(10)
    rows[3]["rationale"] += " Done."
    tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match="example 'p3' has another text, other steps or other key words there"):
        distill(tmp_path, store)
    with pytest.raises(ValueError, match="holds no example 'new'"):
        tiny.write_jsonl(tmp_path / "train.jsonl", [{**rows[0], "id": "new"}])
        distill(tmp_path, store)


def test_another_run_into_the_same_folder_is_refused(tmp_path):
    extract(config(tmp_path), TEACHER, OTHER)
    with pytest.raises(ValueError, match="another tau t"):
        extract(config(tmp_path, tau_t=0.3), TEACHER, OTHER)
    with pytest.raises(ValueError, match="another data"):
        extract(
            config(tmp_path, [{**r, "answer": "1", "rationale": "No 1."} for r in tiny.problems(11)]), TEACHER, OTHER
        )


def test_store_works_in_dataloader_workers(tmp_path):
    extract(config(tmp_path), TEACHER, OTHER)
    store = Store(tmp_path / "store")
    runs = [distill(tmp_path, store, dataloader_num_workers=n) for n in (0, 2)]
    for t in runs:
        t.train()
    a, b = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in runs)
    assert a == b


def test_probe():
    assert probe(TEACHER) == (3, 16)
    assert probe(TEACHER, "mean") == (3, 8)
    assert TEACHER.training is False


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="--store: required"):
        extract(config(tmp_path, store=None), TEACHER, OTHER)
    with pytest.raises(ValueError, match="--teacher: required"):
        extract(config(tmp_path))
    with pytest.raises(ValueError, match="--student: required: mixture=uniform depends on how deep the student is"):
        extract(config(tmp_path, mixture="uniform"), TEACHER, OTHER)
    twice = config(tmp_path)
    twice.data_files *= 2
    with pytest.raises(ValueError, match=r"train.jsonl:1: id 'p0' is line 1 of .*train.jsonl's already"):
        extract(twice, TEACHER, OTHER)
    assert json.loads(json.dumps(extract(config(tmp_path), TEACHER, OTHER)))["examples"] == 11
