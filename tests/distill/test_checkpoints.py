"""Checkpoints: resumed runs are bitwise the same, damaged checkpoints are passed over, old ones can be read."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from molsaki.run_files import ROUTER, checkpoints
from molsaki.training.checkpoints import last_checkpoint, seal
from molsaki.training.trainer import DistillTrainer
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import LOSSES, OTHER, TOKENIZER, StopAt, config, examples, logged, trainer

WRITTEN = Path(__file__).parent / "checkpoint_0_1_0"  # by version 0.1.0 before its first release


def same_files(a: Path, b: Path) -> bool:
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("fault", [None, "interrupted", "flipped byte", "truncated"])
def test_resume_is_bitwise(straight, tmp_path, fault):
    first = trainer(tmp_path, save_steps=1 if fault else 3, max_steps=6)
    first.add_callback(StopAt(3))
    first.train()
    file = tmp_path / "checkpoint-3/model.safetensors"
    if fault == "interrupted":
        (tmp_path / "checkpoint-3/sealed.json").unlink()
    elif fault == "flipped byte":
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    assert last_checkpoint(tmp_path) == str(tmp_path / ("checkpoint-2" if fault else "checkpoint-3"))
    resumed = trainer(tmp_path, resume=True)
    resumed.train()
    assert len(logged(straight, *LOSSES)) == 6
    assert logged(resumed, *LOSSES) == logged(straight, *LOSSES)
    whole = Path(straight.args.output_dir)
    assert same_files(whole / "checkpoint-6/model.safetensors", tmp_path / "checkpoint-6/model.safetensors")
    assert same_files(whole / "checkpoint-6" / ROUTER, tmp_path / "checkpoint-6" / ROUTER)
    a, b = (torch.load(folder / "checkpoint-6/optimizer.pt")["state"] for folder in (whole, tmp_path))
    assert all(torch.equal(value, b[k][name]) for k, state in a.items() for name, value in state.items())
    assert (whole / "layer_weights.jsonl").read_text() == (tmp_path / "layer_weights.jsonl").read_text()


@pytest.mark.parametrize(
    "options",
    [{"packing": False}, {"bf16": True, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2}],
    ids=["padded", "packed, bf16, accumulation, workers"],
)
def test_resume_is_bitwise_however_batches_are_made(tmp_path, options, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    runs = {}
    for name, stop in (("whole", None), ("resumed", 3)):
        t = trainer(tmp_path / name, **options)
        if stop:
            t.add_callback(StopAt(stop))
            t.train()
            t = trainer(tmp_path / name, resume=True, **options)
        t.train()
        runs[name] = t
    assert len(logged(runs["whole"], *LOSSES)) == 6
    assert logged(runs["whole"], *LOSSES) == logged(runs["resumed"], *LOSSES)
    for file in ("model.safetensors", ROUTER):
        assert same_files(tmp_path / "whole/checkpoint-6" / file, tmp_path / "resumed/checkpoint-6" / file)


def test_a_full_disk_leaves_the_checkpoint_before(straight, tmp_path):
    """A write fails in the middle of a checkpoint; resumed, the run ends as one without interruption."""
    t = trainer(tmp_path, save_steps=2)

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # from now on no file gets longer than this
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk: an error, not a signal
    t.add_callback(Fill())
    try:
        with pytest.raises(Exception, match="(?i)file too large|write|failed"):
            t.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path, resume=True)
    resumed.train()
    assert logged(resumed, *LOSSES) == logged(straight, *LOSSES)
    assert same_files(
        Path(straight.args.output_dir, "checkpoint-6/model.safetensors"), tmp_path / "checkpoint-6/model.safetensors"
    )


def test_best_checkpoint_is_loaded_with_its_router(tmp_path):
    t = DistillTrainer(
        args=config(
            tmp_path,
            max_steps=4,
            learning_rate=0.3,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
        ),
        model=tiny.model(2),
        processing_class=TOKENIZER,
        teacher_model=tiny.model(3, len(OTHER), seed=1),
        teacher_processing_class=OTHER,
        train_dataset=examples(),
        eval_dataset=examples(2),
    )
    t.train()
    best = Path(t.state.best_model_checkpoint)
    losses = {e["step"]: e["eval_loss"] for e in t.state.log_history if "eval_loss" in e}
    assert best.name == f"checkpoint-{min(losses, key=losses.get)}"
    assert len(checkpoints(tmp_path)) <= 2
    router = load_file(best / ROUTER)
    assert all(torch.equal(value, t.model.mixture.state_dict()[name]) for name, value in router.items())
    embedding = load_file(best / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, t.model.student.get_input_embeddings().weight)


def test_a_folder_with_checkpoints_is_not_overwritten(straight):
    with pytest.raises(ValueError, match="holds the checkpoints of another run; continue it with --resume"):
        trainer(Path(straight.args.output_dir)).train()


def test_resume_with_nothing_to_resume_starts(tmp_path):
    t = trainer(tmp_path, resume=True, max_steps=1, save_strategy="no")
    t.train()
    assert t.state.global_step == 1


def test_a_checkpoint_of_another_student_is_refused(straight, tmp_path):
    other = trainer(tmp_path, student=tiny.model(3))
    shutil.copytree(Path(straight.args.output_dir, "checkpoint-3"), tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="^resume_from_checkpoint: the checkpoint belongs to another student"):
        other.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_version_0_1_0_is_resumed(tmp_path):
    """Steps 3 and 4 have the losses that version 0.1.0 computed after resuming from its own checkpoint of step 2."""
    shutil.copytree(WRITTEN, tmp_path / "run")
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run/checkpoint-2")
    options = dict(max_steps=4, save_steps=2, freeze=["embed_tokens", "mlp", r"layers\.0\."])
    t = trainer(tmp_path / "run", resume=True, **options)
    t.train()
    expected = json.loads((WRITTEN / "expected.json").read_text())
    assert [entry["step"] for entry in expected] == [1, 2, 3, 4]
    for row, entry in zip(logged(t, *LOSSES), expected, strict=True):
        assert row == pytest.approx(tuple(entry.values()), rel=1e-4)  # rounding differs between machines


def test_a_part_of_a_seal_is_not_sealed(tmp_path):
    """A process was killed while it wrote the seal; the same step is reached and sealed again."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/weights").write_text("1")
    (tmp_path / "checkpoint-1/.sealed.json.part").write_text("{")
    seal(tmp_path / "checkpoint-1")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("kind", ["absolute", "./relative", "relative/", "link", "~"])
def test_the_best_checkpoint_stays(tmp_path, monkeypatch, kind):
    """However output_dir is written; and a run that was moved resumes with its best checkpoint."""
    real = tmp_path / "relative"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = {"absolute": str(real), "link": str(tmp_path / "link"), "~": "~/relative"}.get(kind, kind)
    options = dict(learning_rate=1.0, eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=1,
                   load_best_model_at_end=True)  # fmt: skip

    def made(output_dir: str, **more) -> DistillTrainer:
        return DistillTrainer(
            args=config(output_dir, **(options | more)),
            model=tiny.model(2),
            processing_class=TOKENIZER,
            teacher_model=tiny.model(3, len(OTHER), seed=1),
            teacher_processing_class=OTHER,
            train_dataset=examples(),
            eval_dataset=examples(2),
        )

    class Worse(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step > 1:
                next(t.model.student.parameters()).data.mul_(1.5)

    t = made(folder, max_steps=3)
    t.add_callback(Worse())
    t.add_callback(StopAt(3))
    t.train()
    assert Path(t.state.best_model_checkpoint).samefile(real / "checkpoint-1")
    assert "checkpoint-1" in {path.name for path in checkpoints(real)}
    if kind == "absolute":
        saved = load_file(real / "checkpoint-1/model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(saved, t.model.student.get_input_embeddings().weight)
        shutil.copytree(real / "checkpoint-1", tmp_path / "moved/checkpoint-1")
        shutil.rmtree(real)
        t = made(str(tmp_path / "moved"), max_steps=3, resume=True)
        t.add_callback(Worse())
        t.train()
        assert t.state.best_model_checkpoint == str(tmp_path / "moved/checkpoint-1")
        assert torch.equal(saved, t.model.student.get_input_embeddings().weight)


def test_a_checkpoint_without_optimizer_is_not_resumed(tmp_path):
    trainer(tmp_path, max_steps=1, save_steps=1, save_only_model=True).train()
    with pytest.raises(ValueError, match="checkpoint-1 was saved with save_only_model: it has no optimizer"):
        trainer(tmp_path, resume=True).train()
