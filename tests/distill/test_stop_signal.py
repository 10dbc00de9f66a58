"""SIGINT and SIGTERM stop a training at the end of its step, and the resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molsaki.cli import main
from molsaki.run_files import checkpoints
from molsaki.training import distill as distill_module
from molsaki.training import stop_signal as signal_module
from molsaki.training.stop_signal import StopOnSignal, TrainingStopped
from molsaki.training.trainer import DistillTrainer
from tests.helpers import processes, tiny
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.helpers.training import LOSSES, OTHER, TOKENIZER, config, examples, logged, trainer

ROOT = Path(__file__).parents[2]


class Send(TrainerCallback):
    """Sends signals to this process in the middle of a step, after the forward and before the optimizer's step."""

    def __init__(self, step: int, *signals: int):
        self.step, self.signals = step, signals

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for number in self.signals:
                os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    tiny.save(folder / "student", 2)
    tiny.write_jsonl(folder / "train.jsonl", tiny.problems(16))
    return folder


def argv_of(work: Path, output: Path, *more: str) -> list[str]:
    options = {
        "student": work / "student", "train_file": work / "train.jsonl", "output_dir": output, "max_steps": 4,
        "per_device_train_batch_size": 4, "learning_rate": "3.0e-3", "logging_steps": 1, "use_cpu": "true",
        "disable_tqdm": "true",
    }  # fmt: skip
    return ["distill", *(str(word) for name, value in options.items() for word in (f"--{name}", value)), *more]


@pytest.fixture
def sigint():
    """SIGINT as usual. A shell without job control starts what it puts into the background with SIGINT ignored: pytest
    may have been."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(monkeypatch, capsys, sigint):
    """The command in this process, which gets signals in a step: exit code, standard output and standard error."""

    def run(argv: list[str], step: int = 0, *signals: int, ignored: bool = False) -> tuple[int, str, str]:
        class Trainer(DistillTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.add_callback(Send(step, *signals))

        monkeypatch.setattr(distill_module, "DistillTrainer", Trainer)
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        capsys.readouterr()
        code = main(argv)
        return code, *capsys.readouterr()

    return run


def history(folder: Path) -> list[list[float]]:
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [[e["step"], e["loss"], e["loss_exp"], e["grad_norm"]] for e in entries if "loss" in e]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_resumed_run_is_bitwise_the_same(work, run, number, code):
    whole, folder = work / f"whole-{code}", work / f"stopped-{code}"
    assert run(argv_of(work, whole))[0] == 0
    found, out, err = run(argv_of(work, folder), 2, number)
    assert found == code, err
    assert out == ""  # no result
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert not (folder / "model.safetensors").exists()
    last = err.strip().splitlines()[-1]
    assert f"saved {folder}/checkpoint-2. To continue: molsaki distill --student" in last
    again = shlex.split(last.partition("To continue: molsaki ")[2])
    assert again == [*argv_of(work, folder), "--resume"]
    assert run(again)[0] == 0
    assert history(folder) == history(whole) and len(history(folder)) == 4
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_second_signal_stops_at_once(work, run):
    found, out, err = run(argv_of(work, work / "twice"), 2, signal.SIGINT, signal.SIGINT)
    assert (found, out) == (130, "")
    assert checkpoints(work / "twice") == []
    assert "To continue from the last checkpoint, if there is one: molsaki distill" in err


def test_a_signal_in_the_last_step_changes_nothing(work, run, caplog):
    assert run(argv_of(work, work / "last"), 4, signal.SIGINT)[0] == 0
    assert "this is the last step" in caplog.text and "at the end of this step" not in caplog.text
    assert (work / "last/model.safetensors").exists()


@pytest.mark.parametrize(("number", "steps"), [(signal.SIGINT, 4), (signal.SIGTERM, 4), (signal.SIGTERM, 2)])
def test_a_signal_while_the_student_is_exported_changes_nothing(work, run, monkeypatch, caplog, number, steps):
    """Also if a callback has ended the training early."""

    class Early(Send):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_training_stop or state.global_step == steps

    monkeypatch.setattr(f"{__name__}.Send", Early)
    original, folder = DistillTrainer.save_model, work / f"exported-{number}-{steps}"

    def save_model(self, *args, **kwargs):
        os.kill(os.getpid(), number)
        original(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "save_model", save_model)
    found, out, err = run(argv_of(work, folder, "--save_strategy", "no"))
    assert found == 0 and str(folder) in out, err
    assert "this is the last step or later" in caplog.text and "at the end of this step" not in caplog.text
    assert (folder / "model.safetensors").exists() and len(history(folder)) == steps


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="workers are kept where the system has sigwaitinfo")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_processes_of_a_data_loader(work, run, monkeypatch, number, code):
    """As torchrun, scancel and a terminal send it."""

    class ToAll(Send):
        def __init__(self, step, *signals):
            super().__init__(step)

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == self.step - 1:
                everyone = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
                assert len(everyone) == 3
                subprocess.run(["kill", f"-{int(number)}", *map(str, everyone)], check=True)

    monkeypatch.setattr(f"{__name__}.Send", ToAll)
    folder = work / f"workers-{code}"
    found, _, err = run(argv_of(work, folder, "--dataloader_num_workers", "2"), 2)
    assert found == code, err
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert multiprocessing.active_children() == []


class TwoProcesses:
    """What `StopOnSignal` uses of a trainer, in the first of two processes; ``other`` is what the second received."""

    def __init__(self, other: int):
        self.accelerator, self.callback_handler = self, self
        self.num_processes, self.device, self.callbacks = 2, "cpu", []
        self.remove_callback = self.callbacks.remove
        self.state, self.control = TrainerState(global_step=1, max_steps=9), TrainerControl()
        self.other, self.during_gather, self.waited = other, lambda: None, 0

    def wait_for_everyone(self):
        self.waited += 1

    def gather(self, tensor):
        found = torch.cat([tensor, torch.tensor([self.other])])
        self.during_gather()
        return found

    def step(self, stop) -> bool:
        control = TrainerControl()
        stop.on_step_end(None, self.state, control)
        assert control.should_save == stop.is_stopping
        return stop.is_stopping


def test_no_process_goes_on_before_all_have_saved():
    both, args = TwoProcesses(signal.SIGTERM), TrainingArguments("out")
    with StopOnSignal(both) as stop:
        assert both.step(stop)
        with pytest.raises(TrainingStopped, match="saved out/checkpoint-1"):
            stop.on_save(args, both.state, TrainerControl())
    assert both.waited == 1


def test_a_signal_while_processes_agree_stops_the_next_step():
    both = TwoProcesses(0)
    both.during_gather = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with StopOnSignal(both) as stop:
        assert not both.step(stop)
        both.during_gather = lambda: None
        assert both.step(stop)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_reached_another_process_first(sigint, monkeypatch, number):
    """The first one that reaches this process raises nothing; later ones do, but for torchrun's SIGTERM."""
    both = TwoProcesses(number)
    monkeypatch.setattr(signal_module, "SAME_SIGNAL", -1.0)
    with StopOnSignal(both) as stop:
        assert both.step(stop)
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored(work, run):
    """A background process of a shell script ignores SIGINT, as it should."""
    assert run(argv_of(work, work / "ignored"), 2, signal.SIGINT, ignored=True)[0] == 0


def test_a_checkpoint_without_optimizer_cannot_be_continued(work, run):
    found, _, err = run(argv_of(work, work / "only", "--save_only_model"), 2, signal.SIGINT)
    assert found == 130 and "checkpoint-2, which cannot be continued, because save_only_model is set" in err


@pytest.mark.slow
@pytest.mark.parametrize("slow", ["seal", "on_train_end", "end_training", "interrupted"])
def test_both_processes_stop_after_the_same_step(work, slow):
    """The signal reaches one of two processes, and the other takes longer to stop."""
    folder = work / slow
    words = argv_of(work, folder, "--per_device_train_batch_size", "2")
    stopped = processes.ranks("distill_but", f"signal:{slow}", 1, 1, *words[1:])
    assert stopped.returncode == 143
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"], stopped.stderr
    assert (folder / "checkpoint-2/sealed.json").exists()
    if slow in ("seal", "on_train_end"):
        assert "ended after it" in stopped.stderr
    assert "To continue: torchrun --nproc_per_node 2 -m molsaki.cli distill" in stopped.stderr
    assert not (folder / "model.safetensors").exists()
    if slow != "seal":
        return
    resumed = processes.ranks("command", *words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [entry[0] for entry in history(folder)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_torchrun_passes_a_signal_on(work):
    """SIGTERM to torchrun, and so to all of its processes: a checkpoint, and an end well before torchrun kills."""
    folder = work / "passed-on"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "molsaki.cli"]
    more = ["--max_steps", "100000", "--save_strategy", "no", "--dataloader_num_workers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    process = subprocess.Popen(
        [*words, *argv_of(work, folder, *more)], cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 3 of"):
            break
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    process.wait()
    assert len(checkpoints(folder)) == 1, rest
    assert time.monotonic() - started < 25  # it kills after 30 seconds


@pytest.mark.parametrize("strategy", ["no", "epoch", "best"])
def test_every_save_strategy(straight, tmp_path, strategy):
    """In Python, as a context: the checkpoint is saved whatever the strategy is, also at a step of an evaluation."""
    options = {} if strategy != "best" else dict(eval_strategy="steps", eval_steps=1, metric_for_best_model="loss",
                                                 greater_is_better=True)  # fmt: skip
    first = DistillTrainer(
        args=config(tmp_path, save_strategy=strategy, max_steps=6, **options),
        model=tiny.model(2),
        processing_class=TOKENIZER,
        teacher_model=tiny.model(3, len(OTHER), seed=1),
        teacher_processing_class=OTHER,
        train_dataset=examples(),
        eval_dataset=examples(2) if options else None,
    )
    first.add_callback(Send(3, signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped) as caught:
        with StopOnSignal(first):
            first.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not any(isinstance(one, StopOnSignal) for one in first.callback_handler.callbacks)
    assert caught.value.checkpoint == str(tmp_path / "checkpoint-3") and caught.value.can_resume
    assert (tmp_path / "checkpoint-3").is_dir() and not (tmp_path / "checkpoint-2").is_dir()
    resumed = trainer(tmp_path, resume=True, max_steps=6, save_strategy="no")
    resumed.train()
    assert logged(resumed, *LOSSES) == logged(straight, *LOSSES)
