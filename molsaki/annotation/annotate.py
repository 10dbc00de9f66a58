"""The command ``molsaki annotate``: a teacher writes rationales; those that end in the right answer are kept.

The teacher sees demonstrations and a question (phase 1). If its answer is wrong, it is asked again with the gold answer
as a hint (phase 2), as in STaR (arXiv 2203.14465). On request it is then asked for the key words of each kept text.

    train.jsonl            the kept rationales, as ``molsaki extract`` and ``distill`` read them; written last
    train.work.jsonl       every reply, see `ReplyJournal`
    train.wrong.jsonl      refused replies with their reasons, if asked for
    train.summary.json     the counts

The teacher is loaded here (`LocalTeacher`) or called through an endpoint (`EndpointTeacher`). With ``rationales=keep``
it is asked only for key words, for the rationales in the data.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.annotation import keywords
from molsaki.annotation.demonstrations import demonstrations_by_task, task_of
from molsaki.annotation.journal import ReplyJournal
from molsaki.annotation.judge import Verdict, judge
from molsaki.annotation.prompts import FIRST, KEYWORDS, SECOND, PromptFormat, question_turns
from molsaki.annotation.teacher import Decoding, Prompt, Teacher
from molsaki.batches.tokenized import all_left_out
from molsaki.config import AnnotateConfig, require
from molsaki.evaluation.generate import Reply
from molsaki.io import digest, write_json, write_json_lines
from molsaki.text.examples import Example, Examples, read_examples
from molsaki.text.formats import EARLIER
from molsaki.text.tables import check_json_lines_name


def annotate(
    config: AnnotateConfig, teacher: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Write a teacher's right rationales to ``config.output_file``. Continues an interrupted run.

    Args:
        config: the options of the command.
        teacher, tokenizer: used instead of loading ``config.teacher``; both or neither.

    Returns:
        The summary, as in ``.summary.json``: the number of ``examples``, of which ``phase_1`` and ``phase_2`` have a
        rationale and the others are in ``dropped``, by reason; ``left_out``, those that could not be read;
        ``rationales`` written; ``keywords`` if requested. For a local teacher also the tokens and seconds of this
        process; for an endpoint the tokens and cost of all replies in the journal, see `EndpointTeacher.summary`.

    Raises:
        ValueError, TypeError, OSError: a flag, file or field is not as described, the journal belongs to another run,
            no rationale was right, or the endpoint gave no reply.
    """
    data_file, output = require(config, "data_file"), Path(require(config, "output_file"))
    check_json_lines_name("--output_file", output)
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"WORLD_SIZE: annotate runs in one process, got {processes}; start it without torchrun (--device_map auto "
            "spreads a large teacher over several GPUs)"
        )
    work_file = output.with_suffix(".work.jsonl")
    if output.exists() and not work_file.exists():
        raise ValueError(
            f"--output_file: {output} exists without its {work_file.name}, so it cannot be continued; choose another "
            "name"
        )
    keep = config.rationales == "keep"
    examples = read_examples(data_file, rationale=keep, data_format=config.data_format)[: config.limit]
    form = PromptFormat.of(config.template)
    shown = demonstrations_by_task(config, examples, form)
    asked = teacher_of(config, form, teacher, tokenizer)

    output.parent.mkdir(parents=True, exist_ok=True)
    run = _Run(config, form, shown, asked, ReplyJournal(work_file, describe(config, examples, shown, asked)))
    start = time.perf_counter()
    summary: dict[str, Any] = {"teacher": asked.name, "data_file": config.data_file, "output_file": config.output_file}
    summary |= {"examples": len(examples), "left_out": len(examples.left_out)}
    records, counts, refused = _with_keywords(run, examples) if keep else _with_rationales(run, examples)
    summary |= counts | asked.summary(run.journal, time.perf_counter() - start)
    if config.keep_wrong:
        write_json_lines(output.with_suffix(".wrong.jsonl"), refused)
    write_json(output.with_suffix(".summary.json"), summary, indent=2)
    if not records:
        raise ValueError(f"{data_file}: {all_left_out(collections.Counter(counts['dropped']))}")
    write_json_lines(output, records)
    return summary


def teacher_of(
    config: AnnotateConfig, form: PromptFormat, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> Teacher:
    if config.endpoint is None:
        from molsaki.annotation.local_teacher import LocalTeacher

        return LocalTeacher(config, form, model, tokenizer)
    from molsaki.annotation.endpoint_teacher import EndpointTeacher

    if model is not None or tokenizer is not None:
        raise ValueError("teacher, tokenizer: expected neither with an endpoint, whose model config.teacher names")
    return EndpointTeacher(config, form)


Written = tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]  # records, counts, refused replies


def _with_rationales(run: _Run, examples: Examples) -> Written:
    """Records with the teacher's right rationales."""
    kept, dropped, refused = run.rationales(examples)
    texts, ids = [], {example.id for example in examples}
    for example in examples:
        for number, verdict in enumerate(kept.get(example.id, []), 1):
            id = example.id if number == 1 else f"{example.id}/{number}"
            while number > 1 and id in ids:
                id += "/"
            texts.append((dataclasses.replace(example, id=id, rationale=verdict.rationale), verdict))
    words = run.keywords([text for text, _ in texts]) if run.config.keywords == "teacher" else None
    records = []
    for text, verdict in texts:
        record: dict[str, Any] = {"id": text.id, "task": task_of(text), "question": text.question}
        if text.context:
            record[EARLIER] = [{"role": role, "content": content} for role, content in text.context]
        if text.choices:
            record["choices"] = text.choices
        record |= {"rationale": text.rationale, "answer": verdict.answer, "gold": text.answer}
        if words is not None:
            record["keywords"] = words[text.id]
        records.append(record | {"rationale_source": run.teacher.name, "phase": verdict.phase})
    phases = collections.Counter(verdicts[0].phase for verdicts in kept.values())
    counts: dict[str, Any] = {"phase_1": phases[FIRST], "phase_2": phases[SECOND]}
    counts |= {"dropped": dict(dropped), "rationales": len(records)}
    return records, counts | ({} if words is None else {"keywords": run.count(words)}), refused


def _with_keywords(run: _Run, examples: Examples) -> Written:
    """The records of the data, with the teacher's key words added to those that have a rationale but no key words."""
    texts = [example for example in examples if example.rationale.strip() and example.keywords is None]
    words = run.keywords(texts)
    records = []
    for number, example in enumerate(examples):
        record = examples.record(number)
        if not str(record.get("id", "")).strip() or record["id"] is None:  # the id is a line number otherwise
            record = {"id": example.id} | {name: value for name, value in record.items() if name != "id"}
        records.append(record | ({"keywords": words[example.id]} if example.id in words else {}))
    counts = {
        "rationales": len(texts),
        "had_keywords": sum(example.keywords is not None for example in examples),
        "without_rationale": sum(not example.rationale.strip() for example in examples),
        "keywords": run.count(words),
    }
    return records, counts, []


def describe(
    config: AnnotateConfig, examples: Sequence[Example], shown: dict[str, list[Example]], teacher: Teacher
) -> dict[str, Any]:
    """Everything that the replies depend on: they are reused only if all of it is the same.

    A local model's replies depend on the other texts of their batch. An endpoint's replies do not, and each is in the
    journal with the digest of its request; so its description leaves out the data and the number of examples.
    """
    options = ["template", "instruction", "hint", "keywords", "max_new_tokens", "batch_size", "samples", "temperature"]
    if config.endpoint is not None:
        for name in ("keywords", "batch_size", "samples"):
            options.remove(name)
        same = {name: getattr(config, name) for name in (*options, "seed")}
        return same | {"teacher": teacher.name} | teacher.describe()
    others = ("key_spans", "context")  # the first is not shown, and few have the second
    names = [field.name for field in dataclasses.fields(Example) if field.name not in others]
    demonstrations = {
        task: [[*(getattr(e, name) for name in names), *([e.context] if e.context else [])] for e in found]
        for task, found in shown.items()
    }
    described = {name: getattr(config, name) for name in (*options, "seed")} | {
        "number_of_examples": len(examples),
        "data": digest(
            [[e.id, e.question, e.answer, e.choices, task_of(e), *([e.context] if e.context else [])] for e in examples]
        ),
        "demonstrations": digest(demonstrations, sort_keys=False),
        "teacher": teacher.name,
    }
    if config.rationales == "keep":
        described["rationales"] = digest([[e.rationale, e.keywords] for e in examples])
    return described | teacher.describe()


@dataclasses.dataclass
class _Run:
    """The phases of one run. Counts the key words that occur in no text and the prompts without a reply."""

    config: AnnotateConfig
    form: PromptFormat
    shown: dict[str, list[Example]]
    teacher: Teacher
    journal: ReplyJournal
    not_in_the_text: int = 0
    without_list: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def rationales(
        self, examples: Sequence[Example]
    ) -> tuple[dict[str, list[Verdict]], collections.Counter[str], list[dict[str, Any]]]:
        """The right rationales by id; counts of the reasons why examples have none; every refused reply."""
        kept: dict[str, list[Verdict]] = {}
        reasons: dict[str, str] = {}  # of the examples that are not kept
        right: collections.Counter[int] = collections.Counter()  # examples by the phase in which they were kept
        refused = []
        for phase, hint in ((FIRST, None), (SECOND, self.config.hint)):
            prompts = []
            for example in examples:
                if example.id in kept:
                    continue
                turns = question_turns(self.form, self.shown[task_of(example)], example, hint)
                content, reason = self.teacher.prompt(turns, self.config.instruction, self.config.max_new_tokens)
                if reason:
                    reasons[example.id] = reason
                    refused.append(_refusal(example, phase, reason))
                else:
                    prompts += [Prompt(example, sample, content) for sample in range(1, self.config.samples + 1)]
            with tqdm(total=len(prompts), unit="reply", desc=f"annotate, phase {phase}") as bar:
                for prompt, reply in self._replies(phase, prompts, bar):
                    example = prompt.example
                    if isinstance(reply, str):
                        if example.id not in kept:
                            reasons[example.id] = reply
                        refused.append(_refusal(example, phase, reply, prompt.sample))
                        continue
                    verdict = judge(example, reply, self.form, self.config.hint, phase, self.config.thinking == "keep")
                    if verdict.reason:
                        if example.id not in kept:
                            reasons[example.id] = verdict.reason
                        refused.append(_refusal(example, phase, verdict.reason, prompt.sample, reply, verdict.answer))
                    elif all(verdict.rationale != other.rationale for other in kept.get(example.id, [])):
                        if example.id not in kept:
                            reasons.pop(example.id, None)
                            right[phase] += 1
                        kept.setdefault(example.id, []).append(verdict)
                    counts = f"right {right[FIRST]} + {right[SECOND]}, not {len(reasons)}"
                    bar.set_postfix_str(counts + self.teacher.status(), refresh=False)
        order = {example.id: number for number, example in enumerate(examples)}
        refused.sort(key=lambda record: (order[record["id"]], record["phase"], record["sample"] or 0))
        return kept, collections.Counter(reasons[e.id] for e in examples if e.id in reasons), refused

    def keywords(self, texts: Sequence[Example]) -> dict[str, list[str]]:
        """The key words of each text by its id: those named by the teacher that occur in the text."""
        prompts = []
        for text in texts:
            turns = keywords.keyword_turns(self.shown[task_of(text)], text)
            content, reason = self.teacher.prompt(turns, keywords.INSTRUCTION, keywords.NEW_TOKENS)
            if reason:
                self.without_list[reason] += 1
            else:
                prompts.append(Prompt(text, 1, content))
        found: dict[str, list[str]] = {text.id: [] for text in texts}
        with tqdm(total=len(prompts), unit="text", desc="annotate, keywords") as bar:
            for prompt, reply in self._replies(KEYWORDS, prompts, bar):
                if not isinstance(reply, str) and keywords.is_cut_off(reply):
                    reply = "cut off before the list"
                if isinstance(reply, str):
                    self.without_list[reply] += 1
                    continue
                named = keywords.split_keywords(reply.text)
                found[prompt.example.id] = [word for word in named if keywords.occurs(word, prompt.example)]
                self.not_in_the_text += len(named) - len(found[prompt.example.id])
                bar.set_postfix_str(self.teacher.status().lstrip(", "), refresh=False)
        return found

    def count(self, words: dict[str, list[str]]) -> dict[str, Any]:
        """The counts of key words for the summary."""
        counts = {
            "kept": sum(map(len, words.values())),
            "not_in_the_text": self.not_in_the_text,
            "rationales_without": sum(not found for found in words.values()),
        }
        return counts | ({"without_list": dict(self.without_list)} if self.without_list else {})

    def _replies(self, phase: int, prompts: list[Prompt], bar: tqdm[Any]) -> Iterator[tuple[Prompt, Reply | str]]:
        """The teacher's replies; key words are decoded greedily."""
        decoding = Decoding(self.config.max_new_tokens, self.form.stop, self.config.temperature)
        if phase == KEYWORDS:
            decoding = Decoding(keywords.NEW_TOKENS, None if self.form.chat else "\n", 0.0)
        return self.teacher.replies(self.journal, phase, prompts, decoding, bar)


def _refusal(
    example: Example,
    phase: int,
    reason: str,
    sample: int | None = None,
    reply: Reply | None = None,
    answer: str | None = None,
) -> dict[str, Any]:
    record = {"id": example.id, "question": example.question, "gold": example.answer, "phase": phase}
    return record | {
        "sample": sample,
        "reply": None if reply is None else reply.text,
        "answer": answer,
        "reason": reason,
    }
