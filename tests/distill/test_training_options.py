"""Every option that DistillConfig inherits works or is refused; docs/training-options.md lists them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from molsaki.batches.dataset import prepare
from molsaki.batches.tokenized import TokenizerSpec
from molsaki.config import TextOptions
from molsaki.training.config import REFUSED, DistillConfig
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import LOSSES, OTHER, TOKENIZER, StopAt, config, examples, gradients, logged, trainer

ROOT = Path(__file__).parents[2]
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split("|")]
    for line in (ROOT / "docs/training-options.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]
STATUS = {name: status for names, status, *_ in ROWS for name in re.findall(r"`(\w+)`", names)}


def test_the_table_has_every_option():
    """An option of a new version of transformers has to be classified first."""
    named = [name for names, *_ in ROWS for name in re.findall(r"`(\w+)`", names)]
    assert sorted(named) == sorted(set(named))
    assert set(FIELDS) - set(named) == set()
    assert set(STATUS.values()) == {"works", "Trainer", "partly", "refused"}
    assert {name for name, status in STATUS.items() if status == "refused"} == set(REFUSED)


def test_the_table_names_tests():
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for names, status, *rest in ROWS:
        tests = re.findall(r"`(test_\w+)`", rest[0] if rest else "")
        assert tests or status != "works", names
        assert all(f"def {name}(" in sources for name in tests), names


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(FIELDS)))
def test_refused_options(name):
    bad = not FIELDS[name].default if isinstance(FIELDS[name].default, bool) else "other"
    bad = True if name == "remove_unused_columns" else bad  # our default is another
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got .*{re.escape(REFUSED[name])}"):
        DistillConfig(use_cpu=True, **{name: bad})


def grouped() -> dict:
    five = "train_sampling_strategy" in FIELDS
    return {"train_sampling_strategy": "group_by_length"} if five else {"group_by_length": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neftune_noise_alpha": 5.0, "packing": True}, "neftune_noise_alpha: expected packing=False"),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "gradient_checkpointing_kwargs: expected use_reent",
        ),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: expected dispatch_batches False"),
        ({"optim": "lomo"}, "optim: lomo changes weights within the backward"),
        ({"optim": "galore_adamw_layerwise"}, "optim: galore_adamw_layerwise changes weights within the backward"),
        ({"do_eval": True}, "do_eval: got True with eval_strategy no"),
        ({"fp16": True}, "fp16: expected a GPU"),
        ({"save_only_model": True, "resume": True}, "resume: checkpoints of save_only_model hold no optimizer"),
    ],
)
def test_refused_values(options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(use_cpu=True, **options)


@pytest.mark.skipif("train_sampling_strategy" not in FIELDS, reason="transformers 5")
def test_refused_sampling():
    with pytest.raises(ValueError, match="train_sampling_strategy: expected random, sequential or group_by_length"):
        DistillConfig(use_cpu=True, train_sampling_strategy="batch_rebalance")


def test_a_config_can_be_copied():
    made = DistillConfig(use_cpu=True, gradient_checkpointing_kwargs={}, neftune_noise_alpha=1.0)
    assert dataclasses.replace(made, beta=2.0).gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert made.packing is False


@pytest.mark.parametrize(
    "name", ["model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"]
)
def test_functions_that_would_never_be_called(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: expected None"):
        DistillTrainer(
            args=config(tmp_path),
            model=tiny.model(2),
            processing_class=TOKENIZER,
            train_dataset=examples(),
            **{name: print},
        )


def one_step(folder: Path, **options) -> DistillTrainer:
    return trainer(folder, **(dict(max_steps=1, save_strategy="no", max_grad_norm=1e9) | options))


def test_neftune(tmp_path):
    """Noise of alpha / sqrt(length * width) at most on the student's embeddings in training, and none afterwards."""
    t = one_step(tmp_path, neftune_noise_alpha=5.0, max_steps=2)
    seen = []
    embedding = t.model.student.get_input_embeddings()

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            embedding.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out.detach())))

    t.add_callback(Look())
    t.train()
    for ids, out in seen:
        noise = (out - nn.functional.embedding(ids, embedding.weight)).abs().max()
        assert noise > 0
    ids, out = seen[-1]  # the weights of the last forward, but for one step
    assert len(seen) == 4 and ids.shape[0] == 2
    before = len(seen)
    t.model.eval()
    embedding(ids)
    assert torch.equal(seen[before][1], nn.functional.embedding(ids, embedding.weight))
    embedding.train()(ids)
    assert torch.equal(seen[before + 1][1], nn.functional.embedding(ids, embedding.weight))


def test_tokens_are_counted(tmp_path):
    counts = {}
    for kind in ("all", "non_padding"):
        for packing in (False, True):
            options = dict(packing=packing, share_question=False, per_device_train_batch_size=8)
            t = one_step(tmp_path / f"{kind}{packing}", include_num_input_tokens_seen=kind, **options)
            t.train()
            counts[kind, packing] = t.state.num_input_tokens_seen
    data = t.train_dataset
    pairs = [(len(row.explain.input_ids), len(row.predict.input_ids)) for row, _ in (data[n] for n in range(8))]
    assert counts["non_padding", False] == counts["all", True] == counts["non_padding", True] == sum(map(sum, pairs))
    assert counts["all", False] == sum(8 * max(lengths) for lengths in zip(*pairs, strict=True))


def test_batches_of_similar_length(tmp_path):
    """Also after resuming in the second epoch."""
    long = [dataclasses.replace(e, rationale=e.rationale * (1 + n % 2)) for n, e in enumerate(examples(32))]
    t = trainer(tmp_path / "a", data=long, **grouped())
    assert t.train_dataset.lengths.tolist() == [
        len(row.explain.input_ids) + len(row.predict.input_ids) for row, _ in (t.train_dataset[n] for n in range(32))
    ]
    orders = []
    for epoch in (0, 1, 0):
        loader = t.get_train_dataloader()
        loader.set_epoch(epoch)
        batches = [batch.ids for batch in loader]
        assert sorted(sum(batches, [])) == sorted(e.id for e in long)
        mixed = sum(len({int(id[1:]) % 2 for id in ids}) == 2 for ids in batches)
        assert mixed <= 4  # of 16: one per group of 8 that is sorted
        orders.append(batches)
    assert orders[0] == orders[2] != orders[1]
    options = dict(per_device_train_batch_size=8, save_steps=5) | grouped()
    whole, first = (trainer(tmp_path / name, data=long, **options) for name in ("b", "c"))
    first.add_callback(StopAt(5))
    for one in (whole, first):
        one.train()
    resumed = trainer(tmp_path / "c", data=long, resume=True, **options)
    resumed.train()
    assert resumed.state.epoch == 1.5
    assert logged(resumed, *LOSSES) == logged(whole, *LOSSES)


def with_evaluation(folder: Path, eval_dataset, **options) -> DistillTrainer:
    return DistillTrainer(
        args=config(folder, **(dict(max_steps=1, save_strategy="no") | options)),
        model=tiny.model(2),
        processing_class=TOKENIZER,
        teacher_model=tiny.model(3, len(OTHER), seed=1),
        teacher_processing_class=OTHER,
        train_dataset=examples(),
        eval_dataset=eval_dataset,
    )


def test_evaluation_sets(tmp_path):
    """Several by name, as examples or rows, also where persistent workers keep a loader; none of them mixes."""
    rows = tiny.problems(5)
    t = with_evaluation(tmp_path, {"a": rows[:2], "b": examples(5)}, eval_strategy="steps", eval_steps=1,
                        eval_on_start=True, dataloader_num_workers=1, dataloader_persistent_workers=True)  # fmt: skip
    t.train()
    evaluated = [entry for entry in t.state.log_history if "eval_a_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 1]
    alone = {name: with_evaluation(tmp_path / name, examples(n)).evaluate() for name, n in (("a", 2), ("b", 5))}
    again = t.evaluate(rows[:2])
    for name in ("a", "b"):
        metrics = next(entry for entry in t.state.log_history if f"eval_{name}_loss" in entry)
        assert metrics[f"eval_{name}_loss_att"] == pytest.approx(alone[name]["eval_loss_att"], rel=1e-4)
    assert again["eval_loss"] == pytest.approx(evaluated[-1]["eval_a_loss"], rel=1e-4)
    assert t.evaluate(examples(5))["eval_loss"] != pytest.approx(again["eval_loss"], rel=1e-4)


def test_drop_last(tmp_path):
    options = dict(dataloader_drop_last=True, per_device_eval_batch_size=1000)
    t = with_evaluation(tmp_path / "a", examples(3), **options)
    kept = with_evaluation(tmp_path / "b", examples(3)).evaluate()
    assert t.evaluate()["eval_loss"] == pytest.approx(kept["eval_loss"], rel=1e-5)
    assert t.args.dataloader_drop_last
    with pytest.raises(
        ValueError, match="dataloader_drop_last: expected at least one whole batch, got 8 examples and 9"
    ):
        one_step(tmp_path / "c", dataloader_drop_last=True, per_device_train_batch_size=9).train()


class Table:
    """Rows as a `datasets.Dataset` gives them: dicts by number, a dict of columns for a slice."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return {name: [row[name] for row in self.rows[index]] for name in self.rows[0]}
        return self.rows[index]


def test_rows(tmp_path, caplog):
    """Dicts train as the lines of a file do; one that is no example is left out and named, and no row is refused."""
    expected = gradients(one_step(tmp_path / "a", limit=4))
    for number, data in enumerate((tiny.problems(8), Table(tiny.problems(8)))):
        found = gradients(one_step(tmp_path / f"b{number}", data=data, limit=4))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    bad = {"rationale": "a 1", "answer": "1"}
    caplog.clear()
    found = gradients(one_step(tmp_path / "c", data=[bad, *tiny.problems(8)], limit=4))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "1 of 9 examples left out, the first: train_dataset: row 0: question: missing" in caplog.text
    with pytest.raises(ValueError, match="train_dataset: row 0: question: missing"):
        one_step(tmp_path, data=[bad, bad])
    with pytest.raises(TypeError, match="train_dataset: a list_iterator can be read only once; expected rows that can"):
        one_step(tmp_path, data=iter([]))
    for bad, kind in (({"question": ["a"]}, "dict"), ("train.jsonl", "str")):
        with pytest.raises(TypeError, match=f"train_dataset: expected a sequence of examples or of dicts, got {kind}"):
            one_step(tmp_path, data=bad)
    with pytest.raises(TypeError, match="train_dataset: row 0: expected an Example or a dict, got int"):
        one_step(tmp_path, data=[1])


def test_compiled_training_is_the_same(tmp_path):
    plain = gradients(one_step(tmp_path / "a"))
    compiled = gradients(one_step(tmp_path / "b", torch_compile=True, torch_compile_backend="eager"))
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6)


def test_a_batch_size_that_does_not_fit(tmp_path, monkeypatch):
    """The steps of the attempt that failed are in no metric, nor in layer_weights.jsonl."""
    options = dict(auto_find_batch_size=True, per_device_train_batch_size=8, logging_steps=2, max_steps=2)
    t = one_step(tmp_path, data=examples(14), **options)
    forward, sizes = t.model.forward, []

    def limited(batch):
        sizes.append(len(batch))
        out = forward(batch)
        if len(sizes) == 2:
            raise RuntimeError("CUDA out of memory.")
        return out

    monkeypatch.setattr(t.model, "forward", limited)
    t.train()
    assert sizes == [8, 6, 7, 7]
    (row,) = logged(t, "loss", "loss_pre", "loss_exp", "loss_att")
    assert row[0] == pytest.approx((row[1] + row[2]) / 2 + row[3], rel=1e-4)


def test_prepared_data_without_a_key_word_is_refused(tmp_path):
    """An objective with maps has no loss of them then; also where the data set was prepared before."""
    message = "key: keywords finds no key word in any of the 8 examples of train_dataset, so objective molsaki has no"
    with pytest.raises(ValueError, match=message):
        one_step(tmp_path, key="keywords")
    sides = TokenizerSpec(TOKENIZER, "plain", None), TokenizerSpec(OTHER, "plain", None)
    with pytest.raises(ValueError, match=message):
        one_step(tmp_path, key="keywords", data=prepare(examples(), TextOptions(key="keywords"), *sides))
    one_step(tmp_path, key="keywords", objective="dss").train()
