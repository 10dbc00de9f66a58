"""``--dry_run``: what a command would do, and about how much time and memory it would take, without doing it.

The models are loaded, all texts are tokenized and counted, and one or two batches run as in the command, the longest
first. Nothing is written into the output folders. Figures hold for this machine and for the numbers of processes and
threads with which the dry run was started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from molsaki.measuring import bytes_of, peak_of_process, resident, synchronize

if TYPE_CHECKING:
    from molsaki.config import AnnotateConfig, EvaluateConfig, ExtractConfig, KeysConfig
    from molsaki.training.config import DistillConfig
    from molsaki.training.probe import Plan

logger = logging.getLogger(__name__)

Found = dict[str, Any]
TYPICAL = 2  # batches that are timed after the longest; as in molsaki.training.probe
STREAMED = 256  # examples of a stream that are looked at
BY_PROCESS = "the most that this process had, the longest batch included"
BY_DEVICE = "the most that PyTorch had allocated on the GPU, the longest batch included"


def extract(config: ExtractConfig) -> Found:
    """What ``molsaki extract`` would do."""
    from molsaki.teacher.extract import _run, batches_of, entries_of, prepare_extraction
    from molsaki.teacher.map_store import DESCRIPTION, Store, compare, shard_name
    from molsaki.teacher.map_store_writer import StoreWriter

    start = time.perf_counter()
    job = prepare_extraction(config)
    job.check_templates()
    loading = time.perf_counter() - start
    folder = Path(job.folder)
    with contextlib.suppress(FileNotFoundError):
        existing = json.loads((folder / DESCRIPTION).read_bytes())
        size = {name: existing[name] for name in ("version", "examples", "shard_size") if name in existing}
        compare(folder, existing, json.loads(json.dumps(size | {"examples": len(job.examples)} | job.description)))
    shards = [
        range(first, min(first + job.shard_size, len(job.examples)))
        for first in range(0, len(job.examples), job.shard_size)
    ]
    finished = [number for number in range(len(shards)) if (folder / shard_name(number)).is_file()]
    counts, texts_per_batch, start = _Counts(), [], time.perf_counter()
    missing_tokens = 0
    for number, shard in enumerate(shards):
        for pending, _ in batches_of(job.examples, shard, config, job.specs, job.packing):
            for item in pending:
                if item.text is None:
                    counts.leave_out(item.entry.reason)
                else:
                    counts.add(item.steps, item.words, item.tokens)
            tokens = sum(item.tokens for item in pending)
            if tokens:
                texts_per_batch.append(([item.number for item in pending], tokens))
            if number not in finished:
                missing_tokens += tokens
    counts.need_some()
    tokenizing = time.perf_counter() - start

    def run(numbers: Sequence[int]) -> Found:
        for _, texts in batches_of(job.examples, numbers, config, job.specs, job.packing):
            if texts is not None:
                _run(job.teacher, job.mixture, texts, config.map_heads)
        return {}

    probe = _timed(run, texts_per_batch, job.teacher.device)
    some = list(dict.fromkeys(n for numbers, _ in _chosen(texts_per_batch)[1:] for n in numbers))[:64]
    with tempfile.TemporaryDirectory() as part:
        writer = StoreWriter(part, job.description, len(some), len(some))
        entries: Found = {}
        for found, _ in entries_of(job.examples, some, config, job.specs, job.teacher, job.mixture, job.packing):
            entries |= cast(Any, found)
        writer.write(0, [entries[cast(Any, number)] for number in some])
        writer.finish()
        shapes = [one.maps.shape for one in entries.values() if one.maps is not None]
        maps = sum(shape[-2] * shape[-1] for shape in shapes) * job.entry_bytes
        overhead = max(Store(part).num_bytes - maps, 0) / len(some)
    size = counts.entries * job.entry_bytes + len(job.examples) * overhead
    seconds = missing_tokens / probe.rate + tokenizing
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "examples": _examples(job.examples, counts),
        "per_example": counts.summary(),
        "work": {
            "shards": len(shards),
            "shards_finished": len(finished),
            "forward_passes": len(texts_per_batch),
            "tokens": missing_tokens,
        },
        "store": {"folder": job.folder, "bytes": round(size), "bytes_per_example": round(size / len(job.examples))},
        "memory": _memory(job.teacher.device, {"teacher": bytes_of(job.teacher)}),
        "time": {
            "seconds": loading + seconds / world,
            "of_which_loading": loading,
            "of_which_tokenizing": tokenizing / world,
            "measured": probe.how("forward passes") + (f"; divided by {world} processes" if world > 1 else ""),
        },
    }


def distill(config: DistillConfig) -> Found:
    """What ``molsaki distill`` would do."""
    from molsaki.batches.streamed import StreamedDataset
    from molsaki.config import require
    from molsaki.training import checkpoints
    from molsaki.training.probe import Plan, Probe

    require(config, "train_file")
    folder = str(config.output_dir)
    existing = checkpoints.checkpoints(Path(folder)) if Path(folder).is_dir() else []
    last = checkpoints.last_checkpoint(folder) if config.resume and existing else None
    if existing and not (config.resume or config.resume_from_checkpoint):
        raise ValueError(
            f"output_dir: {folder} holds the checkpoints of another run; continue it with --resume, or choose another "
            "folder"
        )
    before, start = resident(), time.perf_counter()
    with tempfile.TemporaryDirectory() as part:
        trainer = Probe(config, part)
        loading = time.perf_counter() - start
        data = cast(Any, trainer.train_dataset)
        is_streamed = isinstance(data, StreamedDataset)
        counts, total = _count_training(data)
        plan = Plan.of(config, None if is_streamed else len(data), total)
        evaluations = _evaluations(config, plan)
        trainer.choose_batches(statistics.fmean(counts.tokens))
        trainer.train()
        evaluating, eval_examples = trainer.time_evaluation() if evaluations else (0.0, 0)
    rate = trainer.rate()
    done = checkpoints.step_of(last) if last else 0
    left = max(plan.steps - done, 0)
    seconds = left * (plan.tokens_per_step / rate + trainer.optimizer_seconds) + evaluations * evaluating
    examples: Found = {"used": counts.used, "left_out": dict(counts.left_out)}
    if is_streamed:
        examples["note"] = f"of the first {counts.used} of a stream, which is not counted"
    else:
        examples["not_usable"] = len(getattr(data.examples, "left_out", ()))
        examples["without_key_words"] = data.without_words
    return {
        "examples": examples,
        "per_example": counts.summary(),
        "work": {
            "objective": trainer.args.objective,
            "optimizer_steps": plan.steps,
            "steps_done": done,
            "epochs": round(plan.epochs, 3) if plan.epochs is not None else None,
            "examples_per_step": plan.per_step,
            "tokens_per_step": round(plan.tokens_per_step),
            "evaluations": evaluations,
            "examples_per_evaluation": eval_examples,
        },
        "memory": _memory(config.device, trainer.parts(before)),
        "time": {
            "seconds": loading + seconds,
            "of_which_loading": loading,
            "seconds_per_step": plan.tokens_per_step / rate + trainer.optimizer_seconds,
            "measured": f"{TYPICAL} training steps of one batch after one with the longest texts, scaled by their "
            "tokens; without checkpoints and eval_accuracy",
        },
    }


def keys(config: KeysConfig) -> Found:
    """What ``molsaki keys`` would do."""
    from molsaki.batches.tokenized import LeftOut
    from molsaki.modeling.loading import context_length
    from molsaki.teacher.keys import PART, candidates, prepare_keys, scored_text
    from molsaki.teacher.keys import _batches as batches
    from molsaki.teacher.word_scores import WORD_SCORES

    start = time.perf_counter()
    examples, teacher, tokenizer = prepare_keys(config)
    limit = context_length(teacher.config)
    loading, start = time.perf_counter() - start, time.perf_counter()
    counts, groups = _Counts(), []
    for first in range(0, len(examples), PART):
        texts = []
        for number in range(first, min(first + PART, len(examples))):
            example = examples[number]
            try:
                spans = candidates(example, config)
                text = scored_text(example, spans, config, tokenizer, limit)
            except LeftOut as reason:
                counts.leave_out(str(reason))
                continue
            counts.add(len(spans.steps), len(spans.words), len(text.tokens.input_ids))
            texts.append((number, spans, text))
        for batch in batches(texts, config.batch_tokens):
            groups.append(([number for number, *_ in batch], sum(len(t.tokens.input_ids) for *_, t in batch)))
    counts.need_some()
    tokenizing = time.perf_counter() - start

    def run(numbers: Sequence[int]) -> None:
        texts = [scored_text(examples[n], candidates(examples[n], config), config, tokenizer, limit) for n in numbers]
        WORD_SCORES[config.by](teacher, texts, int(tokenizer.pad_token_id), config.layers)

    probe = _timed(run, groups, teacher.device)
    work = Path(str(config.output_file)).with_suffix(".work.jsonl")
    lines = max(sum(1 for _ in work.open(encoding="utf-8")) - 1, 0) if work.is_file() else 0
    return {
        "examples": _examples(examples, counts),
        "per_example": counts.summary(words="candidates"),
        "work": {
            "batches": len(groups),
            "tokens": sum(counts.tokens),
            "examples_done": min(lines * PART, len(examples)),
        },
        "memory": _memory(teacher.device, {"teacher": bytes_of(teacher)}),
        "time": {
            "seconds": loading
            + (sum(counts.tokens) / probe.rate + tokenizing) * (1 - min(lines * PART, len(examples)) / len(examples)),
            "of_which_loading": loading,
            "measured": probe.how("batches"),
        },
    }


def evaluate(config: EvaluateConfig) -> Found:
    """What ``molsaki evaluate`` would do."""
    import torch

    from molsaki.config import require
    from molsaki.evaluation.compare import read_predictions
    from molsaki.evaluation.evaluate import prompts_of
    from molsaki.evaluation.generate import batches, decode
    from molsaki.modeling.loading import load_for_command
    from molsaki.text.examples import read_examples

    if config.predictions:
        raise ValueError("dry_run: expected no --predictions, which runs no model and takes seconds")
    start = time.perf_counter()
    data_file, _ = require(config, "data_file"), require(config, "output_dir")
    examples = read_examples(data_file, rationale=False, data_format=config.data_format)[: config.limit]
    if config.compare:
        read_predictions("--compare", config.compare[0], examples)
    model, tokenizer = load_for_command(config, "model", None, None)
    model.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    loading = time.perf_counter() - start
    prompts, left_out, new_tokens = prompts_of(model, tokenizer, examples, config)
    counts = _Counts()
    for reason in left_out.values():
        counts.leave_out(str(reason))
    for ids in prompts.values():
        counts.add(None, None, len(ids))
    counts.need_some()
    numbers = list(prompts)
    groups = batches(list(prompts.values()), config.batch_size)
    decoded, seconds = _time_decoding(
        lambda batch, most: decode(model, tokenizer, [prompts[numbers[i]] for i in batch], most)[1], groups, new_tokens
    )
    return {
        "examples": _examples(examples, counts),
        "per_example": counts.summary(),
        "work": {"questions": counts.used, "batches": len(groups), "longest_reply": new_tokens},
        "memory": _memory(model.device, {"model": bytes_of(model)}),
        "time": {
            "seconds": loading + seconds * len(groups),
            "of_which_loading": loading,
            "measured": _how_decoded(decoded, new_tokens),
        },
    }


def annotate(config: AnnotateConfig) -> Found:
    """What ``molsaki annotate`` would do; no request is sent to an endpoint."""
    from molsaki.annotation.annotate import _teacher as teacher_of
    from molsaki.annotation.demonstrations import demonstrations_by_task, task_of
    from molsaki.annotation.prompts import FIRST, SECOND, PromptFormat, question_turns
    from molsaki.annotation.teacher import Decoding, Prompt
    from molsaki.config import require
    from molsaki.evaluation.generate import batches, decode
    from molsaki.text.examples import read_examples

    start = time.perf_counter()
    data_file, output = require(config, "data_file"), Path(require(config, "output_file"))
    keep = config.rationales == "keep"
    examples = read_examples(data_file, rationale=keep, data_format=config.data_format)[: config.limit]
    form = PromptFormat.of(config.template)
    shown = demonstrations_by_task(config, examples, form)
    teacher: Any = teacher_of(config, form, None, None)
    loading = time.perf_counter() - start
    counts, prompts, most = _Counts(), [], {FIRST: 0.0, SECOND: 0.0}
    decoding = Decoding(config.max_new_tokens, form.stop, config.temperature)
    for example in examples:
        if keep and (not example.rationale.strip() or example.keywords is not None):
            counts.leave_out("nothing to ask: no rationale, or it has keywords")
            continue
        turns = question_turns(form, shown[task_of(example)], example, None)
        content, reason = teacher.prompt(turns, config.instruction, config.max_new_tokens)
        if reason:
            counts.leave_out(reason)
            continue
        prompts.append(content)
        counts.add(None, None, len(content) if config.endpoint is None else 0)
        if config.price_in is not None and not keep:
            hinted = question_turns(form, shown[task_of(example)], example, config.hint)
            again, _ = teacher.prompt(hinted, config.instruction, config.max_new_tokens)
            for phase, one in ((FIRST, content), (SECOND, again)):
                body = teacher._body(phase, Prompt(example, 1, one), decoding)
                most[phase] += teacher._spending.most(body) * config.samples
    counts.need_some()
    first = 0 if keep else len(prompts) * config.samples
    asked = {"phase_1": first, "phase_2_at_most": first}
    words = len(prompts) if keep else (first if config.keywords == "teacher" else 0)
    work = output.with_suffix(".work.jsonl")
    kept = max(sum(1 for _ in work.open(encoding="utf-8")) - 1, 0) if work.is_file() else 0
    result: Found = {
        "examples": _examples(examples, counts),
        "work": {
            "requests" if config.endpoint else "replies": asked
            | {"key_words_at_most": words, "at_most": 2 * first + words},
            "lines_in_the_journal": kept,
        },
    }
    if config.endpoint is not None:
        if config.price_in is not None and not keep:
            result["cost"] = {
                "phase_1_at_most": round(most[FIRST], 4),
                "both_phases_at_most": round(most[FIRST] + most[SECOND], 4),
                "computed": "a token per byte of the prompt and the longest reply; most runs cost a fraction of it",
            } | ({} if config.max_cost is None else {"max_cost": config.max_cost})
        result["time"] = {"note": f"unknown: no request was sent; {config.concurrency} requests are asked at a time"}
        return result
    groups = batches(prompts, config.batch_size)
    model, tokenizer = teacher._model, teacher._tokenizer

    def run(batch: Sequence[int], most: int) -> int:
        return decode(model, tokenizer, [prompts[i] for i in batch], most, stop=form.stop,
                      temperature=config.temperature)[1]  # fmt: skip

    decoded, seconds = _time_decoding(run, groups, config.max_new_tokens)
    phases = 1 if keep else 2 * config.samples
    batches_of_words = -(-words // config.batch_size)
    result["per_example"] = counts.summary()
    result["memory"] = _memory(model.device, {"teacher": bytes_of(model)})
    result["time"] = {
        "seconds_at_most": loading + seconds * (phases * len(groups) + (0 if keep else batches_of_words)),
        "of_which_loading": loading,
        "seconds_of_phase_1": seconds * len(groups) * config.samples,
        "measured": _how_decoded(decoded, config.max_new_tokens),
    }
    return result


def study_runs(path: str, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> Found:
    """What ``molsaki study`` would run."""
    from molsaki.study.config import read_study
    from molsaki.study.run import FAILED, RESULT, check_finished

    found = read_study(path)
    check_finished(found)
    runs = [run for run in found.runs if (not arms or run.arm in arms) and (not seeds or run.seed in seeds)]
    if not runs:
        raise ValueError(f"--arms, --seeds: no run of {path} has one of these arms and one of these seeds")
    seconds: dict[str, list[float]] = {}
    for run in runs:
        with contextlib.suppress(FileNotFoundError):
            result = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
            seconds.setdefault(f"{run.data}/{run.arm}", []).append(
                result["step_ms"] / 1000 * result["steps"] + result["evaluate_seconds"]
            )
    missing = [run for run in runs if not (run.folder / RESULT).is_file()]
    known = [run for run in missing if f"{run.data}/{run.arm}" in seconds]
    configs = {f"{run.data}/{run.arm}": found.distill_config(run) for run in runs}
    time_left = sum(statistics.fmean(seconds[f"{run.data}/{run.arm}"]) for run in known)
    stores = {(run.data, str(run.options.get("teacher"))) for run in missing if run.extract is not None}
    return {
        "work": {
            "runs": len(runs),
            "finished": len(runs) - len(missing),
            "failed_before": sum((run.folder / FAILED).is_file() for run in missing),
            "left": len(missing),
            "stores_of_maps": len(stores),
        },
        "runs_left": {
            name: sum(f"{run.data}/{run.arm}" == name for run in missing)
            for name in configs
            if any(f"{run.data}/{run.arm}" == name for run in missing)
        },
        "max_steps": {
            name: one.max_steps if one.max_steps > 0 else f"{one.num_train_epochs:g} epochs"
            for name, one in configs.items()
        },
        "time": {
            "seconds": time_left if len(known) == len(missing) else None,
            "seconds_of_known": time_left,
            "measured": "the mean of finished runs of the same arm and data, in one process; "
            f"{len(missing) - len(known)} runs have none yet: `molsaki distill --dry_run` measures one",
        },
    }


DRY_RUNS: dict[str, Callable[[Any], Found]] = {
    "extract": extract, "distill": distill, "keys": keys, "annotate": annotate, "evaluate": evaluate,
}  # fmt: skip


class _Counts:
    """Steps, words and tokens of the examples that are used, and how many others are left out for which reason."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.words: list[int] = []
        self.tokens: list[int] = []
        self.left_out: dict[str, int] = {}
        self.entries = 0

    def add(self, steps: int | None, words: int | None, tokens: int) -> None:
        if steps is not None and words is not None:
            self.steps.append(steps)
            self.words.append(words)
            self.entries += steps * words
        self.tokens.append(tokens)

    def leave_out(self, reason: str, count: int = 1) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + count

    @property
    def used(self) -> int:
        return len(self.tokens)

    def need_some(self) -> None:
        if not self.tokens:
            import collections

            from molsaki.batches.tokenized import all_left_out

            raise ValueError(all_left_out(collections.Counter(self.left_out)))

    def summary(self, words: str = "key_words") -> Found:
        found: Found = {}
        for name, values in (("steps", self.steps), (words, self.words)):
            if values:
                found[name] = {"mean": round(statistics.fmean(values), 1), "max": max(values)}
        if any(self.tokens):
            found["tokens"] = {
                "median": round(statistics.median(self.tokens)),
                "longest": max(self.tokens),
                "total": sum(self.tokens),
            }
        return found


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Tokens per second in the batches that were timed."""

    rate: float
    batches: int
    tokens: int
    seconds: float

    def how(self, what: str) -> str:
        return (
            f"{self.batches} {what} with {self.tokens} tokens in {self.seconds:.3g} s, after one with the longest texts"
        )


def _examples(examples: Any, counts: _Counts) -> Found:
    found: Found = {"used": counts.used, "left_out": counts.left_out}
    return found | {"not_usable": len(getattr(examples, "left_out", ()))}


def _chosen(groups: Sequence[tuple[list[int], int]]) -> list[tuple[list[int], int]]:
    """The largest batch, and typical ones: those with the median number of tokens."""
    ordered = sorted(groups, key=lambda group: group[1])
    middle = len(ordered) // 2
    typical = ordered[max(middle - TYPICAL // 2, 0) :][:TYPICAL]
    return [ordered[-1], *(typical if len(typical) == TYPICAL else [ordered[-1]] * TYPICAL)]


def _timed(run: Callable[[Sequence[int]], Any], groups: Sequence[tuple[list[int], int]], device: Any) -> _Probe:
    """Run the longest batch, then typical ones with a clock."""
    longest, *typical = _chosen(groups)
    run(longest[0])
    synchronize(device)
    start = time.perf_counter()
    for numbers, _ in typical:
        run(numbers)
    synchronize(device)
    seconds, tokens = time.perf_counter() - start, sum(count for _, count in typical)
    return _Probe(tokens / seconds, len(typical), tokens, seconds)


def _time_decoding(
    run: Callable[[Sequence[int], int], int], groups: Sequence[Sequence[int]], new_tokens: int
) -> tuple[int, float]:
    """Decode one token of the longest prompts, for the memory, then one typical batch as long as its replies are.

    Returns:
        The tokens that each reply of that batch took, the longest included, and the seconds.
    """
    run(groups[0], 1)
    batch = groups[len(groups) // 2]
    start = time.perf_counter()
    tokens = run(batch, new_tokens)
    return tokens // len(batch), time.perf_counter() - start


def _how_decoded(decoded: int, new_tokens: int) -> str:
    return (
        f"one batch of questions of median length, whose longest reply had {decoded} of at most {new_tokens} tokens, "
        "times the number of batches"
    )


def _memory(device: Any, parts: Found) -> Found:
    """The parts and the peak, as PyTorch's allocator or the system counted it."""
    import torch

    if getattr(device, "type", "cpu") == "cuda":
        peak = max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
        return {**parts, "peak": peak, "measured": BY_DEVICE}
    return {**parts, "peak": peak_of_process(), "measured": BY_PROCESS}


def _evaluations(config: DistillConfig, plan: Plan) -> int:
    strategy = getattr(config.eval_strategy, "value", config.eval_strategy)
    if strategy == "epoch":
        return 0 if plan.epochs is None else -int(-plan.epochs // 1)
    if strategy == "steps":
        every = config.eval_steps or config.logging_steps
        return int(plan.steps // (every if every >= 1 else max(every * plan.steps, 1)))
    return 0


def _count_training(data: Any) -> tuple[_Counts, float]:
    """Counts of the training data, and the student's tokens of both texts: of all, or the mean of one if streamed."""
    import itertools

    from molsaki.batches.streamed import StreamedDataset

    counts = _Counts()
    if isinstance(data, StreamedDataset):
        for tokenized, _ in itertools.islice(data, STREAMED):
            _add(counts, tokenized)
        for reason, count in data.left_out.items():
            counts.leave_out(reason, count)
        counts.need_some()
        return counts, statistics.fmean(counts.tokens)
    for number in range(len(data)):
        _add(counts, data[number][0])
    for reason, ids in data.left_out.items():
        counts.leave_out(reason, len(ids))
    return counts, float(data.lengths.sum())


def _add(counts: _Counts, tokenized: Any) -> None:
    tokens = len(tokenized.explain.input_ids) + len(tokenized.predict.input_ids)
    counts.add(len(tokenized.explain.steps), len(tokenized.explain.words), tokens)


def render(found: Found) -> str:
    """The result as indented lines, sizes and times in units that fit."""
    lines = ["dry run: nothing was written"]
    for section, entries in found.items():
        lines.append(section.replace("_", " "))
        flat = dict(_flat(entries))
        width = max(map(len, flat), default=0)
        lines += [f"  {name:{width}}  {_shown(section, name, value)}" for name, value in flat.items()]
    return "\n".join(lines)


def _flat(entries: Found) -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if value and isinstance(value, dict) and set(value) <= {"mean", "max", "median", "longest", "total"}:
            yield name.replace("_", " "), ", ".join(f"{key} {one:,}" for key, one in value.items())
        elif isinstance(value, dict):
            if not value:
                yield name.replace("_", " "), "none"
            for key, one in value.items():
                yield f"{name}: {key}".replace("_", " "), one
        else:
            yield name.replace("_", " "), value


def _shown(section: str, name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if section == "memory" or name.startswith("bytes"):
            return _size(value)
        if section == "time":
            return _duration(value)
        return f"{value:,}"
    return str(value)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.3g} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
