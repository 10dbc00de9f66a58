"""The command ``molsaki study``: trains and evaluates every student of a study, in any number of processes.

Each process claims the next free run by a lock. A run is finished when its ``result.json`` is there, and is then never
repeated; one that fails leaves ``failed.json``, and the next command tries it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import molsaki
from molsaki import logs
from molsaki.batches.dataset import DistillDataset
from molsaki.config import TextOptions
from molsaki.evaluation.evaluate import evaluate
from molsaki.io import digest, write_json
from molsaki.locks import claim
from molsaki.machine import processor
from molsaki.method.objectives import objective_of
from molsaki.modeling.loading import context_length, load_both, load_tokenizer
from molsaki.run_files import CONFIG, WEIGHTS_LOG, step_of
from molsaki.store.fingerprints import fingerprint_model, fingerprint_tokenizer
from molsaki.study.config import Run, Study, extract_config, read_study
from molsaki.teacher.extract import extract
from molsaki.text.examples import read_examples
from molsaki.training.accuracy import count_right
from molsaki.training.checkpoints import last_checkpoint
from molsaki.training.config import DistillConfig
from molsaki.training.trainer import DistillTrainer

logger = logging.getLogger(__name__)

RESULT, FAILED, OPTIONS, LOG = "result.json", "failed.json", "options.json", "log.json"
KEPT = 16  # data sets that a process keeps tokenized
LOCKS = ".locks"  # folder of empty files in the output folder


def study(
    path: str | Path,
    processes: int = 1,
    threads: int | None = None,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> list[str]:
    """Run all unfinished runs of a study.

    Args:
        path: the YAML file.
        processes: how many to start; 1 runs in this one.
        threads: of PyTorch on a CPU, per process. Default: the processors divided by ``processes``.
        arms, seeds: only these; all if empty.

    Returns:
        A line per run that failed or is missing.

    Raises:
        ValueError, TypeError, OSError: the YAML file or an argument is not as described, or an option has changed since
            a run was finished; nothing runs in this case.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("WORLD_SIZE: expected 1: start the command itself, several times or with --processes")
    for name, value in (("processes", processes), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    with _environment():
        found = read_study(path)
    for flag, asked, known in (("arms", arms, found.arms), ("seeds", seeds, found.seeds)):
        for one in asked:
            if one not in known:
                raise ValueError(f"--{flag}: expected some of {', '.join(map(str, known))}, got {one}")
    check_finished(found)
    runs = [run for run in found.runs if (not arms or run.arm in arms) and (not seeds or run.seed in seeds)]
    if not runs:
        raise ValueError(f"--arms, --seeds: no run of {found.path} has one of these arms and one of these seeds")
    earlier = {str(run): _read(run.folder / FAILED) for run in runs}
    (found.output_dir / LOCKS).mkdir(parents=True, exist_ok=True)
    done = sum((run.folder / RESULT).is_file() for run in runs)
    logger.info("%d runs, %d of them finished; %d process%s", len(runs), done, processes, "es" * (processes > 1))
    if processes == 1:
        work(found, runs, earlier, threads)
    else:
        context = multiprocessing.get_context("spawn")
        count = threads or max((os.cpu_count() or 1) // processes, 1)
        workers = [context.Process(target=_worker, args=(found, runs, earlier, count)) for _ in range(processes)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except BaseException:
            for worker in workers:
                if worker.pid is not None:
                    worker.terminate()  # SIGTERM may have reached this process alone, and Python's end waits for them
            raise
        for worker in workers:
            if worker.exitcode:
                logger.warning(
                    "a process of the study ended with exit code %s; another one, or the next command, repeats its run",
                    worker.exitcode,
                )
    unfinished = []
    for run in runs:
        if not (run.folder / RESULT).is_file():
            failed = _read(run.folder / FAILED)
            unfinished.append(f"{run}: {'missing' if failed is None else 'failed: ' + json.loads(failed)['error']}")
    return unfinished


def check_finished(study: Study) -> None:
    """Refuse a study whose options differ from those that a finished run had.

    Raises:
        ValueError: with the folder, the option and both values.
    """
    for run in study.runs:
        text = _read(run.folder / RESULT)
        if text is None:
            continue
        found, expected = json.loads(text)["options"], study.identity(run)
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"{run.folder}: was run with {name} = {found.get(name)!r}, and {study.path} has "
                    f"{expected.get(name)!r} (None: not set); take the old value, name a new arm, or delete the folder"
                )


def work(study: Study, runs: Sequence[Run], earlier: dict[str, str | None], threads: int | None) -> None:
    """Do all runs, in this process, that no other process does.

    Args:
        earlier: the content of each run's ``failed.json`` when the command started; a run that has failed since then is
            not tried again.
    """
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)

    def is_missing(run: Run) -> bool:
        failed = _read(run.folder / FAILED)
        return not (run.folder / RESULT).is_file() and (failed is None or failed == earlier[str(run)])

    def lock_of(run: Run) -> Path:
        return study.output_dir / LOCKS / f"{run.data}@{run.arm}@{run.seed}.lock"

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    stores: set[Path] = set()
    datasets: dict[str, DistillDataset] = {}
    for run in claim(runs, lock_of, is_missing):
        start = time.perf_counter()
        try:
            with _environment():
                tests = execute(study, run, stores, datasets)
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            run.folder.mkdir(parents=True, exist_ok=True)
            failure = {"error": message, "traceback": traceback.format_exc(), "date": _now()}
            write_json(run.folder / FAILED, failure, indent=1)
            logger.warning("%s: failed: %s", run, message)
        else:
            (run.folder / FAILED).unlink(missing_ok=True)
            done = sum((one.folder / RESULT).is_file() for one in runs)
            accuracies = ", ".join(f"{name} {100 * test['accuracy']:.1f} %" for name, test in tests.items())
            seconds = time.perf_counter() - start
            values = {name: test["accuracy"] for name, test in tests.items()}
            logger.info(
                "%s: %s; took %.0f s; %d of %d runs finished", run, accuracies, seconds, done, len(runs),
                extra={"values": {"run": str(run), "accuracy": values, "seconds": seconds}},
            )  # fmt: skip
        gc.collect()


def execute(study: Study, run: Run, stores: set[Path], datasets: dict[str, DistillDataset]) -> dict[str, Any]:
    """Train, evaluate and record one student; the summary of each test.

    Args:
        stores: of maps that this process has checked; the run's is added.
        datasets: tokenized training data of this process's last runs, by what they depend on; the run's is added.
    """
    identity = study.identity(run)
    commits = {"commit": _commit(Path(molsaki.__file__).parent), "study_commit": _commit(study.path.parent)}
    text = _read(run.folder / OPTIONS)
    if text is None or json.loads(text) != identity:  # else the run continues from its checkpoints, if any
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        write_json(run.folder / OPTIONS, identity, indent=1)
    config = study.distill_config(run)
    if run.extract is not None:
        config = _with_store(study, run, config, stores)
    key = _key_of_data(study, run, config)
    trainer = DistillTrainer(args=config, train_dataset=datasets.get(key))
    datasets[key] = cast(DistillDataset, trainer.train_dataset)
    if len(datasets) > KEPT:
        datasets.pop(next(iter(datasets)))
    trainer.remove_callback(PrinterCallback)
    curve = None if run.curve is None else _Curve(trainer, study, run)
    if curve is not None:
        trainer.add_callback(curve)
    models = _fingerprints(run, trainer)
    _check_models(study, models)
    checkpoint = last_checkpoint(str(config.output_dir))
    resumed = step_of(checkpoint) if checkpoint else 0
    metrics = trainer.train().metrics
    trainer.save_model()
    steps, history = trainer.state.global_step, trainer.state.log_history
    data: Any = trainer.train_dataset
    counts = {"examples": len(data), "without_words": data.without_words, "left_out": dict(data.skipped)}
    seconds = metrics["train_runtime"] - (0.0 if curve is None else curve.seconds)
    del trainer, curve, data

    folder, start = run.folder / "student", time.perf_counter()
    model, tokenizer = load_both(None, None, str(folder), "student", study.evaluate_config(run).dtype)
    model.eval()  # type: ignore[no-untyped-call]
    tests = {}
    for name, file in run.tests.items():
        where = {"model": str(folder), "data_file": study.file(file), "output_dir": str(run.folder / "tests" / name)}
        summary = evaluate(study.evaluate_config(run, **where), model, tokenizer)
        numbers = {key: summary[key] for key in ("accuracy", "right", "examples", "without_answer", "seconds")}
        tests[name] = numbers | {"left_out": sum(map(len, summary["left_out"].values()))}
    evaluate_seconds = time.perf_counter() - start
    if not study.keep_students:
        for name in (WEIGHTS_LOG, CONFIG):
            if (folder / name).is_file():
                shutil.move(folder / name, run.folder / name)
        shutil.rmtree(folder)
    write_json(run.folder / LOG, history)
    logged = next((entry for entry in reversed(history) if "loss" in entry), {})
    result = {
        "options": identity,
        "tests": tests,
        "losses": {name: value for name, value in logged.items() if name.startswith("loss")},
        "steps": steps,
        "resumed_at_step": resumed,
        "train_seconds": seconds,  # since that step
        "step_ms": 1000 * seconds / max(steps - resumed, 1),
        "evaluate_seconds": evaluate_seconds,
        "data": counts,
        "models": models,
        "versions": _versions(),
        **commits,  # of the start
        "machine": {"processor": processor(), "gpu": _gpu(), "threads": torch.get_num_threads()},
        "date": _now(),
    }
    write_json(run.folder / RESULT, result, indent=1)
    return tests


def _with_store(study: Study, run: Run, config: DistillConfig, stores: set[Path]) -> DistillConfig:
    """The options with a store of the teacher's maps; an unfinished store is extracted or continued here.

    All processes that need the store share the work. A finished one is checked once per process: its teacher, texts and
    options.
    """
    options = extract_config(study, run, config)
    content = study.identity(run)[f"content of {run.options['train_file']}"]
    folder = study.output_dir / "stores" / f"{run.data}-{digest([dataclasses.asdict(options), content])[:12]}"
    if folder not in stores:
        extract(dataclasses.replace(options, store=str(folder)))
        stores.add(folder)
    teacher = config.teacher if config.too_long == "cut" else None  # cutting needs the teacher's tokenizer
    return study.distill_config(run, store=str(folder), teacher=teacher)


def _key_of_data(study: Study, run: Run, config: DistillConfig) -> str:
    """A digest of everything that the tokenized training data depend on."""
    texts = {field.name: getattr(config, field.name) for field in dataclasses.fields(TextOptions)}
    tokenizers = [
        fingerprint_tokenizer(load_tokenizer(name, flag))
        for name, flag in ((config.student, "--student"), (config.teacher, "--teacher"))
        if name is not None
    ]
    more = [config.predict_template, config.cot_template, config.limit, config.store, config.data_format]
    context = context_length(AutoConfig.from_pretrained(str(config.student)))
    content = study.identity(run)[f"content of {run.options['train_file']}"]
    objective = objective_of(str(config.objective))
    return digest([texts, tokenizers, more, context, content, objective.rationale_first, objective.has_teacher])


def _fingerprints(run: Run, trainer: DistillTrainer) -> dict[str, str]:
    """Fingerprints of the models that a run uses, by name and floating-point type. Students with adapters have none."""
    config, found = trainer.args, {}
    if not config.lora_rank:
        found[f"{run.options['student']} in {config.student_dtype}"] = fingerprint_model(trainer.model.student)
    if trainer.teacher is not None:
        found[f"{run.options['teacher']} in {config.teacher_dtype}"] = fingerprint_model(trainer.teacher)
    return found


def _check_models(study: Study, models: dict[str, str]) -> None:
    """Refuse models that have changed since another run of the study; `extract` refuses a changed teacher."""
    for run in study.runs:
        text = _read(run.folder / RESULT)
        found = {} if text is None else json.loads(text)["models"]
        for name in models.keys() & found.keys():
            if models[name] != found[name]:
                raise ValueError(
                    f"{name}: the model has changed since {run} was run; use another name, or delete that run"
                )


class _Curve(TrainerCallback):
    """Evaluates the student every n steps and at the end, and logs its accuracy.

    Attributes:
        seconds: spent on it.
    """

    def __init__(self, trainer: DistillTrainer, study: Study, run: Run):
        assert run.curve is not None
        self.trainer, self.every, self.seconds = trainer, run.curve["every"], 0.0
        args, data = trainer.args, trainer.train_dataset
        self.examples = read_examples(study.file(run.curve["data_file"]), rationale=False)[: run.curve.get("limit")]
        options = study.evaluate_config(run)
        self.options = dataclasses.replace(  # as recorded in the exported student's folder after the training
            options,
            template=options.template or args.student_template,
            predict_template=options.predict_template or args.predict_template,
            thinking=2 * data.thinking > len(data) if options.thinking is None else options.thinking,  # type: ignore
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        start = time.perf_counter()
        trainer = self.trainer
        right, asked = count_right(trainer.model.student, trainer.processing_class, self.examples, self.options)
        should_log = control.should_log
        trainer.log({"accuracy": right / max(asked, 1)})
        control.should_log = should_log  # the losses of this step have not been logged yet
        self.seconds += time.perf_counter() - start


def _worker(study: Study, runs: Sequence[Run], earlier: dict[str, str | None], threads: int) -> None:
    """The target of a process: `work`, until the process that started it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow(join: Callable[[], None] = parent.join) -> None:
        join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    logs.show()
    logs.take_over_libraries()
    with contextlib.suppress(KeyboardInterrupt):
        work(study, runs, earlier, threads)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Undo changes to the environment variables: transformers passes some options on to accelerate in them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _versions() -> dict[str, str]:
    import platform

    found = {"molsaki": molsaki.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return found | {"python": platform.python_version()}


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _commit(folder: Path) -> str | None:
    """The commit of a folder in git, with ``-dirty`` if tracked files have changed; None outside of git."""
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat()
