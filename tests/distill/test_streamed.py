"""Training data as a stream: the same steps as from a list in its order, each row once, broken rows counted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from molsaki.batches.dataset import tokenization_of
from molsaki.batches.streamed import StreamedDataset, StreamedFiles
from molsaki.batches.tokenized import TokenizerSpec
from molsaki.cli import main
from molsaki.config import TextOptions
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tiny
from tests.helpers.training import LOSSES, TOKENIZER, StopAt, config, logged, trainer

TOKENIZATION = tokenization_of(TextOptions(), TokenizerSpec(TOKENIZER, "plain", None))


class Rows:
    """Rows without a length."""

    def __init__(self, rows):
        self.rows, self.epochs = rows, []

    def __iter__(self):
        return iter(self.rows)

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class OfTorch(torch.utils.data.IterableDataset):
    """Rows that divide themselves among workers, as a datasets.IterableDataset does."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        yield from tiny.problems(6)[worker.id :: worker.num_workers]


def streamed(rows, **options) -> StreamedDataset:
    return StreamedDataset(rows, "train_dataset", TOKENIZATION, **options)


def test_the_same_steps_as_from_a_list_in_its_order(tmp_path):
    rows = tiny.problems(8)
    given = Rows(rows)
    streamed = trainer(tmp_path / "stream", given, max_steps=6)
    streamed.train()
    listed = trainer(tmp_path / "list", rows, max_steps=6, train_sampling_strategy="sequential")
    listed.train()
    assert logged(streamed, *LOSSES) == logged(listed, *LOSSES)
    assert given.epochs[-1] == 1  # the second epoch


def test_a_resumed_stream_goes_on_where_it_was(tmp_path):
    whole = trainer(tmp_path / "whole", Rows(tiny.problems(8)))
    whole.train()
    first = trainer(tmp_path / "parts", Rows(tiny.problems(8)))
    first.add_callback(StopAt(3))
    first.train()
    second = trainer(tmp_path / "parts", Rows(tiny.problems(8)), resume=True)
    second.train()
    assert logged(second, *LOSSES) == logged(whole, *LOSSES)


@pytest.mark.parametrize("rows", [Rows(tiny.problems(6)), OfTorch()], ids=["rows", "torch"])
def test_workers_read_each_row_once(rows):
    loader = torch.utils.data.DataLoader(streamed(rows), num_workers=2, batch_size=None)
    assert sorted(tokenized.id for tokenized, _ in loader) == [f"p{n}" for n in range(6)]


def test_rows_that_cannot_be_used_are_counted(caplog):
    rows = tiny.problems(3)
    rows.insert(1, {"question": "q"})
    rows += [ValueError("not a JSON object", "d.jsonl:4: not valid JSON")]
    rows += [rows[0] | {"rationale": " "}, rows[0] | {"rationale": "<think>"}, {"question": "q"}]
    data = streamed(Rows(rows))
    assert [tokenized.id for tokenized, _ in data] == ["p0", "p1", "p2"]
    assert sorted(data.left_out.values()) == [1, 1, 1, 2]
    assert data.left_out["no rationale"] == data.left_out["thinking trace without its end </think>"] == 1
    assert caplog.text.count("left out, the first for this reason") == len(data.left_out)
    assert "row 4 left out, the first for this reason: not a JSON object (d.jsonl:4: not valid JSON)" in caplog.text
    assert data.summary().startswith("3 examples, 0 without key words; ")
    assert [tokenized.id for tokenized, _ in streamed(Rows(rows), limit=3)] == ["p0", "p1"]
    with pytest.raises(ValueError, match="train_dataset: all 1024 examples were left out"):
        next(iter(streamed(Rows([{"question": "q"}] * 2000))))
    caplog.clear()
    assert len(list(data)) == 3 and not caplog.text  # named once
    assert data.peek().used == 3 and data.used == 0
    with pytest.raises(ValueError, match="train_dataset: holds no examples"):
        streamed(Rows([])).peek()


def test_what_cannot_be_streamed_is_refused(tmp_path):
    with pytest.raises(TypeError, match="train_dataset: a generator can be read only once"):
        streamed(row for row in tiny.problems(2))
    shared = SimpleNamespace(once=iter(tiny.problems(2)))
    with pytest.raises(TypeError, match="train_dataset: a Shared can be read only once"):
        streamed(type("Shared", (), {"__iter__": lambda self: shared.once})())
    loader = torch.utils.data.DataLoader(streamed(OfTorch(), limit=3), num_workers=2, batch_size=None)
    with pytest.raises(ValueError, match="limit: expected None with 2 workers"):
        list(loader)
    with pytest.raises(ValueError, match="max_steps: expected the number of steps to train on streamed data"):
        trainer(tmp_path, Rows(tiny.problems(4)), max_steps=-1)
    with pytest.raises(ValueError, match="train_sampling_strategy: expected no group_by_length"):
        trainer(tmp_path, Rows(tiny.problems(4)), train_sampling_strategy="group_by_length")
    wordless = Rows([{"question": "Who?", "rationale": "Ann does.", "answer": "Ann"}])
    with pytest.raises(ValueError, match="finds no key word in any of the first 1 examples of train_dataset"):
        trainer(tmp_path, wordless)
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such file"):
        StreamedFiles([tmp_path / "none.jsonl"])


def test_a_stream_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(tiny.problems(8)).to_iterable_dataset(num_shards=2)
    args = config(tmp_path, objective="dss", max_steps=2, dataloader_num_workers=2)
    t = DistillTrainer(tiny.model(2), args=args, train_dataset=rows, processing_class=TOKENIZER)
    t.train()
    assert len(logged(t, "loss")) == 2


def test_files_line_by_line(tmp_path):
    row = {"question": "q", "rationale": "r 1.", "answer": "1"}
    one = tiny.write_jsonl(tmp_path / "a.jsonl", [row, row | {"id": " "}])
    one.write_text(one.read_text() + "{broken\n")
    found = list(StreamedFiles([one]))
    assert [record["id"] for record in found[:2]] == ["1", "2"] and "a.jsonl:3: not valid JSON" in found[2].args[1]
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="b.jsonl: holds no examples"):
        list(StreamedFiles([one, tmp_path / "b.jsonl"]))


def test_files_from_the_command_line(tmp_path, caplog):
    """Two files whose rows have no ids, of two formats, in order and streamed; a store made from the same files."""
    teacher, student = tiny.save(tmp_path / "t", 3, seed=1), tiny.save(tmp_path / "s", 2)
    rows = [{name: row[name] for name in ("question", "rationale", "answer")} for row in tiny.problems(8)]
    dss = [{"input": r["question"], "rationale": r["rationale"], "label": r["answer"]} for r in rows[4:]]
    files = [tiny.write_jsonl(tmp_path / name, part) for name, part in (("a.jsonl", rows[:4]), ("b.jsonl", dss))]
    store = ["--store", tmp_path / "store"]
    assert main([str(word) for word in ["extract", "--teacher", teacher, "--data_files", *files, *store]]) == 0
    said = caplog.text
    assert f"{files[0]}: 4 of format molsaki" in said and f"{files[1]}: 4 of format dss" in said
    losses = []
    for name, options in (("list", ["--train_sampling_strategy", "sequential"]), ("stream", ["--streaming", "true"])):
        run = tmp_path / name
        words = ["distill", "--student", student, *store, "--train_file", *files, "--output_dir", run, "--use_cpu",
                 "--max_steps", 4, "--per_device_train_batch_size", 2, "--logging_steps", 1, *options]  # fmt: skip
        assert main([str(word) for word in words]) == 0
        state = json.loads((run / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
        said = caplog.text
        caplog.clear()
        assert "labels of example a.jsonl:1: explain: " in said
        assert ("read in the last epoch: 8 examples, 0 without" in said) == (name == "stream")
    assert losses[0] == losses[1] and len(losses[0]) == 4
