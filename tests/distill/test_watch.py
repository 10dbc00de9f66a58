"""The reports of a training about its attention loss: warnings, pictures for trackers, exact accuracy."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from molsaki.batches.batch import Batch
from molsaki.config import EvaluateConfig
from molsaki.evaluation.evaluate import evaluate
from molsaki.method import losses
from molsaki.text.examples import Example
from molsaki.training import watch
from molsaki.training.trainer import DistillTrainer
from tests.helpers import processes, tiny
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import TOKENIZER, config, examples, trainer

PLAIN = {"save_strategy": "no"}


def messages(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "molsaki.training.watch"]


def test_a_router_that_has_collapsed(tmp_path, caplog):
    """The default pooling sums over the text: with a large rate one layer wins at once. There is one warning."""
    t = trainer(tmp_path / "a", max_steps=6, router_learning_rate=1.0, **PLAIN)
    t.train()
    (message,) = messages(caplog)
    assert message.startswith("mixture: at step ") and "% of the weight" in message and "--pooling mean" in message
    caplog.clear()
    trainer(tmp_path / "b", max_steps=6, pooling="mean", router_learning_rate=1e-4, **PLAIN).train()
    trainer(tmp_path / "c", max_steps=2, mixture="last", **PLAIN).train()  # one layer has all by choice
    assert messages(caplog) == []


def test_a_share_of_the_gradient_that_is_too_small(tmp_path, caplog):
    options = {"mixture": "last", "share_steps": 1, "max_steps": 3} | PLAIN
    trainer(tmp_path / "a", beta=1e-6, **options).train()
    (message,) = messages(caplog)
    assert message.startswith("beta: at step ") and "--attention_share 0.1 holds it" in message
    caplog.clear()
    trainer(tmp_path / "b", attention_share=0.2, **options).train()
    trainer(tmp_path / "c", beta=1e-6, beta_until=0.0, **options).train()
    assert messages(caplog) == []


def test_the_layer_weights_in_tensorboard(tmp_path):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    t = trainer(tmp_path, max_steps=4, save_steps=2, report_to="tensorboard")
    t.train()
    assert (tmp_path / watch.PICTURE).is_file()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = event_file.EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("layer_weights")] == [2, 4, 4]
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss_att", "train/map_overlap", "train/entropy_student"} <= scalars
    lines = [json.loads(line) for line in (tmp_path / "layer_weights.jsonl").read_text().splitlines()]
    assert len(lines) == 4


def test_the_layer_weights_in_other_trackers(tmp_path):
    """Each with a stand-in of its library, called as its library is called."""
    pytest.importorskip("matplotlib")
    seen = []

    class Experiment:
        def log_image(self, path, name, step):
            seen.append(("comet", Path(path).name, name, step))

    class WandbCallback(TrainerCallback):
        _wandb = SimpleNamespace(log=lambda values: seen.append(("wandb", values)), Image=lambda path: Path(path).name)

    class MLflowCallback(TrainerCallback):
        _ml_flow = SimpleNamespace(log_artifact=lambda path: seen.append(("mlflow", Path(path).name)))

    class CometCallback(TrainerCallback):
        _experiment = Experiment()

    t = trainer(tmp_path, max_steps=2, **PLAIN)
    for callback in (WandbCallback, MLflowCallback, CometCallback):
        t.add_callback(callback)
    t.train()
    name = watch.PICTURE
    assert ("comet", name, "layer_weights", 2) in seen and ("mlflow", name) in seen
    assert ("wandb", {"layer_weights": name, "train/global_step": 2}) in seen
    quiet = trainer(tmp_path / "quiet", max_steps=1, **PLAIN)
    quiet.train()
    assert not (tmp_path / "quiet" / name).exists()  # nobody asked


@pytest.mark.parametrize("mode", ["answer", "rationale"])
def test_accuracy_is_that_of_evaluate(tmp_path, mode):
    """Of a student that has learnt some problems by heart, on the folder that the training exports."""
    data = tiny.write_jsonl(tmp_path / "eval.jsonl", tiny.problems(8))
    t = trainer(
        tmp_path / "run", objective="dss", max_steps=60, per_device_train_batch_size=8, eval_accuracy=6,
        logging_steps=20, eval_accuracy_mode=mode, eval_file=str(data), per_device_eval_batch_size=4, **PLAIN,
    )  # fmt: skip
    t.train()
    found, state = t.evaluate()["eval_accuracy"], torch.get_rng_state()
    assert t._accuracy(t.eval_dataset) == found and torch.equal(torch.get_rng_state(), state)
    t.save_model()
    options = EvaluateConfig(
        model=str(tmp_path / "run"), data_file=str(data), output_dir=str(tmp_path / "out"), mode=mode, limit=6,
        device="cpu", dtype="float32",
    )  # fmt: skip
    assert found == evaluate(options)["accuracy"] > 0
    assert t.model.student.training == t.model.training


def test_the_best_checkpoint_by_accuracy(tmp_path):
    """The metric is there when the trainer looks for it, also for several evaluation sets, and larger is better."""
    options = {
        "objective": "dss", "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "eval_accuracy": 3,
        "per_device_eval_batch_size": 2,
    }  # fmt: skip
    t = DistillTrainer(
        tiny.model(2),
        args=config(tmp_path, **options),
        train_dataset=examples(),
        eval_dataset=examples(4),
        processing_class=TOKENIZER,
    )
    t.train()
    rows = [row["eval_accuracy"] for row in t.state.log_history if "eval_accuracy" in row]
    assert len(rows) == 2 and t.state.best_metric == max(rows) and t.args.greater_is_better
    with pytest.raises(ValueError, match="eval_accuracy: expected at least 0, got -1"):
        config(tmp_path, eval_accuracy=-1)
    with pytest.raises(ValueError, match="eval_accuracy_mode: expected one of answer, rationale"):
        config(tmp_path, eval_accuracy_mode="both")


def test_accuracy_of_what_cannot_be_asked(tmp_path, caplog):
    """Answers that no reply can match are left out; if nothing is left, it is an error and not 0."""
    data = [*examples(3), dataclasses.replace(examples(1)[0], id="odd", answer="---")]
    options = {"objective": "dss", "eval_accuracy": 4, "max_steps": 1, **PLAIN}
    t = trainer(tmp_path / "a", **options)
    assert 0 <= t.evaluate(data)["eval_accuracy"] <= 1
    assert "eval_accuracy: computed on 3 of 4 examples; the others could not be asked" in caplog.text
    assert "eval_accuracy: not computed, since there is no evaluation data" in caplog.text
    short = trainer(tmp_path / "b", student=tiny.model(2, max_position_embeddings=250), **options,
                    eval_accuracy_mode="rationale")  # fmt: skip
    with pytest.raises(ValueError, match="eval_accuracy: none of 3 examples could be asked"):
        short.evaluate(examples(3))


def test_no_overlap_without_words(tmp_path):
    wordless = [dataclasses.replace(e, question="Who has nuts?", rationale="Ann has nuts.") for e in examples(2)]
    t = trainer(tmp_path, data=[*wordless, *examples(1)], max_steps=2, per_device_train_batch_size=2,
                train_sampling_strategy="sequential", **PLAIN)  # fmt: skip
    t.train()
    rows = [row for row in t.state.log_history if "loss" in row]
    assert "map_overlap" not in rows[0] and rows[1]["map_overlap"] > 0


@pytest.mark.slow
def test_accuracy_in_two_processes(tmp_path):
    """Both decode a part of the examples; the result is that of all, of a student that has learnt some by heart."""
    data = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.problems(8))
    options = {"objective": "dss", "max_steps": 60, "per_device_train_batch_size": 8, "eval_accuracy": 5}
    t = trainer(tmp_path / "student", **options, **PLAIN)
    t.train()
    t.save_model()
    expected = t.evaluate(examples(5))["eval_accuracy"]
    tiny.save(tmp_path / "teacher", 3)
    flags = {
        "student": tmp_path / "student", "teacher": tmp_path / "teacher", "train_file": data, "eval_file": data,
        "max_steps": 1, "learning_rate": 0, "eval_strategy": "steps", "eval_steps": 1, "eval_accuracy": 5,
        "save_strategy": "no", "disable_tqdm": True, "output_dir": tmp_path / "run", "logging_steps": 1,
    }  # fmt: skip
    argv = [f"--{name}={value}" for name, value in flags.items()] + ["--use_cpu"]
    done = processes.ranks("distill", tmp_path / "report", *argv)
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"'eval_accuracy': '?([\d.]+)", done.stdout)
    assert float(found) == pytest.approx(expected, abs=1e-3) and expected > 0


def batch_of(steps: int, words: int, mass: float, seed: int = 0) -> Batch:
    """Two examples whose steps have this mass, half of it on one word."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(2, 1, steps, words, generator=generator)
    maps *= mass / 2 / maps.sum(-1, keepdim=True)
    chosen = torch.randint(words, (2, steps), generator=generator)
    maps[torch.arange(2)[:, None], 0, torch.arange(steps), chosen] += mass / 2
    weights = torch.full((2, 1, 3), 1 / 3)
    return Batch(["a", "b"], tiny.plan_of(*[(steps, words)] * 2), [], teacher_map=maps, teacher_weights=weights)


@pytest.mark.parametrize(
    ("words", "mass", "options", "warns"),
    [
        (3000, 2.0, {}, True),
        (1000, 2.0, {}, True),
        (30, 2.0, {}, False),
        (3000, 12.0, {}, False),  # long steps have large masses
        (3000, 2.0, {"normalise": "sum"}, False),
        (3000, 2.0, {"beta": 1000.0}, False),
        (3000, 2.0, {"beta": 0.0}, False),
        (3000, 2.0, {"attention_share": 0.1}, False),
        (3000, 0.01, {"attention_share": 0.1}, True),  # the loss is rounding
        (3000, 2.0, {"objective": "dss"}, False),
    ],
)
def test_a_softmax_over_many_words(tmp_path, caplog, words, mass, options, warns):
    options = config(tmp_path, **{"objective": "molsaki"} | options)
    idle = watch.IdleLoss(learns_router=False)
    idle.add_maps(batch_of(20, words, mass), options)
    for step in (1, 2):  # said once
        idle.look(step, {}, None, options.beta)
        idle.add_maps(batch_of(20, words, mass), options)
    found = messages(caplog)
    assert len(found) == warns
    if warns:
        assert found[0].startswith("normalise: with softmax the attention loss hardly distinguishes maps")
        assert f"(up to {words})" in found[0] and "the first 2 examples" in found[0]


def flat_batch(words: int) -> Batch:
    """Two examples whose maps give every word the same mass."""
    batch = batch_of(20, words, 2.0)
    return dataclasses.replace(batch, teacher_map=torch.full_like(batch.teacher_map, 2 / words))


@pytest.mark.parametrize("normalise", ["softmax", "sum"])
@pytest.mark.parametrize(
    ("batch", "beginning"),
    [
        (batch_of(20, 1, 2.0), "key: in 2 of the first 2 examples no step has two key words to compare"),
        (flat_batch(5), "teacher: its maps hardly distinguish the key words"),
        (flat_batch(3000), "teacher: its maps hardly distinguish the key words"),
    ],
)
def test_where_the_other_normalisation_does_not_help(tmp_path, caplog, batch, beginning, normalise):
    """The attention loss is 0 because of the words or the teacher, so the warning does not advise --normalise sum."""
    options = config(tmp_path, objective="molsaki", normalise=normalise)
    idle = watch.IdleLoss(learns_router=False)
    idle.add_maps(batch, options)
    idle.look(1, {}, None, options.beta)
    (message,) = messages(caplog)
    assert message.startswith(beginning) and "with --normalise sum" not in message


def test_steps_that_compare_no_two_words(tmp_path, caplog):
    """Two words, of which only one counts in every step."""
    batch = batch_of(20, 2, 2.0)
    batch = dataclasses.replace(batch, teacher_entries=torch.eye(2, dtype=torch.bool).repeat(2, 10, 1))
    options = config(tmp_path, objective="molsaki")
    idle = watch.IdleLoss(learns_router=False)
    idle.add_maps(batch, options)
    idle.look(1, {}, None, options.beta)
    (message,) = messages(caplog)
    assert message.startswith("key: in 2 of the first 2 examples")


def test_the_warning_states_the_losses_of_a_flat_map(tmp_path, caplog):
    batch, options = batch_of(20, 2000, 2.0), config(tmp_path, objective="molsaki")
    idle = watch.IdleLoss(learns_router=False)
    idle.add_maps(batch, options)
    idle.look(1, {}, None, options.beta)
    (message,) = messages(caplog)
    flat = torch.ones_like(batch.teacher_map)
    for normalise in ("softmax", "sum"):
        expected = losses.attention(flat, batch.teacher_map, batch.plan, normalise).median().item()
        assert f"{expected:.2g} nats" in message


def test_no_map_differs_by_more_than_the_bound():
    """m (e^m - 1) / (e^m + W - 1), reached by all mass on one word on either side, each on another."""
    generator = torch.Generator().manual_seed(0)
    for words, mass in ((2, 1.0), (30, 2.0), (300, 2.0), (300, 8.0)):
        bound = mass * (math.exp(mass) - 1) / (math.exp(mass) + words - 1)
        plan = tiny.plan_of((500, words))
        sharpness = torch.rand(2, 1, 1, 500, 1, generator=generator) * 40
        scores = torch.randn(2, 1, 1, 500, words, generator=generator)
        teacher, student = mass * (sharpness * scores).softmax(-1)
        teacher[..., 0, :] = mass * torch.eye(words)[0]
        student[..., 0, :] = mass * torch.eye(words)[1]
        found = losses._softmax_divergence(student, teacher, torch.ones(1, 1, 500, words, dtype=torch.bool))[0, 0]
        assert len(plan) == 1 and found.max() <= bound * 1.0001
        torch.testing.assert_close(found[0].item(), bound, rtol=1e-4, atol=0)


def test_a_training_on_texts_of_many_key_words(tmp_path, caplog):
    """Teacher's maps of a live model; short texts of the same kind are not warned of."""
    tokens = tiny.tokenizer()
    model = {"max_position_embeddings": 1 << 14}
    for sentences, warns in ((200, 1), (1, 0)):
        rationale = " ".join(f"There are {n} + {n % 7} = {n + n % 7} nuts." for n in range(10, 10 + sentences))
        data = [Example(str(n), f"Ann has {n + 3} bags. How many?", rationale, "5") for n in range(2)]
        caplog.clear()
        t = DistillTrainer(
            args=config(tmp_path / str(sentences), max_steps=2, mixture="last", **PLAIN),
            model=tiny.model(1, **model), processing_class=tokens,
            teacher_model=tiny.model(1, seed=1, **model), teacher_processing_class=tokens, train_dataset=data,
        )  # fmt: skip
        t.train()
        assert len(messages(caplog)) == warns, messages(caplog)
