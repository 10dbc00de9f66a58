"""The command ``molsaki annotate``: a teacher writes rationales, and those that end in the right answer are kept.

The teacher sees demonstrations and a question (phase 1). If its answer is wrong, it is asked again with the gold answer
as a hint (phase 2), as in STaR (arXiv 2203.14465). On request it is then asked for the key words of each kept text.

    train.jsonl            the kept rationales, as ``molsaki extract`` and ``distill`` read them; written last
    train.work.jsonl       every reply, see `ReplyJournal`
    train.wrong.jsonl      refused replies with their reasons, if asked for
    train.summary.json     the counts

Batches are formed independently of progress, so a resumed run decodes exactly what an uninterrupted one would.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.annotation import keywords
from molsaki.annotation.demonstrations import demonstrations_by_task, task_of
from molsaki.annotation.journal import ReplyJournal
from molsaki.annotation.judge import Verdict, judge
from molsaki.annotation.prompts import FIRST, KEYWORDS, SECOND, PromptFormat, prompt_ids, question_turns
from molsaki.batches.tokenized import all_left_out
from molsaki.config import AnnotateConfig, require
from molsaki.evaluation.generate import Reply, batches, decode
from molsaki.io import digest, write_json, write_json_lines
from molsaki.modeling.loading import context_length, load_for_command
from molsaki.teacher.fingerprints import fingerprint_model, fingerprint_tokenizer
from molsaki.text.examples import Example, read_examples
from molsaki.text.templates import TextChanged

TOO_LONG = "prompt and reply longer than the context"
REFUSED = "refused by the chat template"


def annotate(
    config: AnnotateConfig, teacher: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Write a teacher's right rationales to ``config.output_file``; continues an interrupted run.

    Args:
        config: the options of the command.
        teacher, tokenizer: used in place of loading ``config.teacher``; both or neither.

    Returns:
        The summary, as in ``.summary.json``: the number of ``examples``, of which ``phase_1`` and ``phase_2`` have a
        rationale and the others are in ``dropped``, by reason; ``left_out``, those that could not be read;
        ``rationales`` written; ``keywords`` where asked for; tokens and seconds of this process.

    Raises:
        ValueError, TypeError, OSError: a flag, file or field is not as described, the journal is of something else,
            or no rationale was right.
    """
    data_file, output = require(config, "data_file"), Path(require(config, "output_file"))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("annotate runs in one process, started without torchrun; device_map spreads a large teacher")
    work_file = output.with_suffix(".work.jsonl")
    if output.exists() and not work_file.exists():
        raise ValueError(f"--output_file: {output} exists without its {work_file.name}; choose another name")
    examples = read_examples(data_file, rationale=False)[: config.limit]
    form = PromptFormat.of(config.template)
    shown = demonstrations_by_task(config, examples, form)
    teacher, tokenizer = load_for_command(config, "teacher", teacher, tokenizer, device_map=config.device_map)
    if config.device_map is None:
        teacher.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]

    output.parent.mkdir(parents=True, exist_ok=True)
    source = _teacher_name(config, teacher)
    journal = ReplyJournal(work_file, describe(config, examples, shown, teacher, tokenizer, source))
    run = _Run(config, form, shown, teacher, tokenizer, journal)
    start = time.perf_counter()
    kept, dropped, refused = run.rationales(examples)
    texts, ids = [], {example.id for example in examples}
    for example in examples:
        for number, verdict in enumerate(kept.get(example.id, []), 1):
            id = example.id if number == 1 else f"{example.id}/{number}"
            while number > 1 and id in ids:
                id += "/"
            texts.append((dataclasses.replace(example, id=id, rationale=verdict.rationale), verdict))
    words = run.keywords([text for text, _ in texts]) if config.keywords == "teacher" else None
    seconds = time.perf_counter() - start

    records = []
    for text, verdict in texts:
        record: dict[str, Any] = {"id": text.id, "task": task_of(text), "question": text.question}
        if text.choices:
            record["choices"] = text.choices
        record |= {"rationale": text.rationale, "answer": verdict.answer, "gold": text.answer}
        if words is not None:
            record["keywords"] = words[text.id]
        records.append(record | {"rationale_source": source, "phase": verdict.phase})
    phases = collections.Counter(verdicts[0].phase for verdicts in kept.values())
    summary: dict[str, Any] = {"teacher": source, "data_file": config.data_file, "output_file": config.output_file}
    summary |= {
        "examples": len(examples),
        "left_out": len(examples.left_out),
        "phase_1": phases[FIRST],
        "phase_2": phases[SECOND],
    }
    summary |= {"dropped": dict(dropped), "rationales": len(records)}
    if words is not None:
        summary["keywords"] = {
            "kept": sum(map(len, words.values())),
            "not_in_the_text": run.not_in_the_text,
            "rationales_without": sum(not found for found in words.values()),
        }
    summary |= {"tokens": run.tokens, "seconds": seconds, "tokens_per_second": run.tokens / seconds}
    if config.keep_wrong:
        write_json_lines(output.with_suffix(".wrong.jsonl"), refused)
    write_json(output.with_suffix(".summary.json"), summary, indent=2)
    if not records:
        raise ValueError(all_left_out(dropped))
    write_json_lines(output, records)
    return summary


def describe(
    config: AnnotateConfig,
    examples: Sequence[Example],
    shown: dict[str, list[Example]],
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
) -> dict[str, Any]:
    """Everything that the replies depend on: they are used again only if all of it is the same."""
    options = ("template", "instruction", "hint", "keywords", "max_new_tokens", "batch_size", "samples", "temperature")
    names = [field.name for field in dataclasses.fields(Example) if field.name != "key_spans"]  # not shown
    demonstrations = {task: [[getattr(e, name) for name in names] for e in found] for task, found in shown.items()}
    return {name: getattr(config, name) for name in (*options, "seed")} | {
        "number_of_examples": len(examples),
        "data": digest([[e.id, e.question, e.answer, e.choices, task_of(e)] for e in examples]),
        "demonstrations": digest(demonstrations, sort_keys=False),
        "teacher": source,
        "teacher_dtype": str(teacher.dtype),
        "teacher_weights": fingerprint_model(teacher),
        "teacher_tokenizer": fingerprint_tokenizer(tokenizer),
    }


@dataclasses.dataclass(frozen=True)
class _Prompt:
    example: Example
    sample: int
    ids: list[int]


@dataclasses.dataclass
class _Run:
    """The phases of one run, with counts of tokens decoded by this process and of key words that are in no text."""

    config: AnnotateConfig
    form: PromptFormat
    shown: dict[str, list[Example]]
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    journal: ReplyJournal
    tokens: int = 0
    not_in_the_text: int = 0

    def rationales(
        self, examples: Sequence[Example]
    ) -> tuple[dict[str, list[Verdict]], collections.Counter[str], list[dict[str, Any]]]:
        """Right rationales by id; the reasons of the examples without one, counted; every refused reply."""
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
                ids, reason = self._prompt(turns, self.config.instruction, self.config.max_new_tokens)
                if reason:
                    reasons[example.id] = reason
                    refused.append(_refusal(example, phase, reason))
                else:
                    prompts += [_Prompt(example, sample, ids) for sample in range(1, self.config.samples + 1)]
            with tqdm(total=len(prompts), unit="reply", desc=f"annotate, phase {phase}") as bar:
                for prompt, reply in self._replies(phase, prompts, self.config.max_new_tokens, bar):
                    example = prompt.example
                    verdict = judge(example, reply, self.form, self.config.hint, phase)
                    if verdict.reason:
                        if example.id not in kept:
                            reasons[example.id] = verdict.reason
                        refused.append(_refusal(example, phase, verdict.reason, prompt.sample, reply, verdict.answer))
                    elif all(verdict.rationale != other.rationale for other in kept.get(example.id, [])):
                        if example.id not in kept:
                            reasons.pop(example.id, None)
                            right[phase] += 1
                        kept.setdefault(example.id, []).append(verdict)
                    bar.set_postfix_str(f"right {right[FIRST]} + {right[SECOND]}, not {len(reasons)}", refresh=False)
        order = {example.id: number for number, example in enumerate(examples)}
        refused.sort(key=lambda record: (order[record["id"]], record["phase"], record["sample"] or 0))
        return kept, collections.Counter(reasons[e.id] for e in examples if e.id in reasons), refused

    def keywords(self, texts: Sequence[Example]) -> dict[str, list[str]]:
        """The key words of each kept text, by its id: those of the teacher's that occur in it."""
        prompts = []
        for text in texts:
            turns = keywords.keyword_turns(self.shown[task_of(text)], text)
            ids, reason = self._prompt(turns, keywords.INSTRUCTION, keywords.NEW_TOKENS)
            if not reason:
                prompts.append(_Prompt(text, 1, ids))
        found: dict[str, list[str]] = {text.id: [] for text in texts}
        with tqdm(total=len(prompts), unit="text", desc="annotate, keywords") as bar:
            for prompt, reply in self._replies(KEYWORDS, prompts, keywords.NEW_TOKENS, bar):
                named = keywords.split_keywords(reply.text)
                found[prompt.example.id] = [word for word in named if keywords.occurs(word, prompt.example)]
                self.not_in_the_text += len(named) - len(found[prompt.example.id])
        return found

    def _replies(
        self, phase: int, prompts: list[_Prompt], new_tokens: int, bar: tqdm[Any]
    ) -> Iterator[tuple[_Prompt, Reply]]:
        """The reply to each prompt, from the journal or decoded batch by batch; key words are decoded greedily."""
        stop, temperature = self.form.stop, self.config.temperature
        if phase == KEYWORDS:
            stop, temperature = None if self.form.chat else "\n", 0.0
        for number, indices in enumerate(batches([prompt.ids for prompt in prompts], self.config.batch_size)):
            batch = [prompts[i] for i in indices]
            asked = [(prompt.example.id, prompt.sample) for prompt in batch]
            replies = self.journal.get(phase, number, asked)
            if replies is None:
                seed = int(digest([self.config.seed, phase, number])[:15], 16)
                ids = [prompt.ids for prompt in batch]
                replies, tokens = decode(
                    self.teacher, self.tokenizer, ids, new_tokens, stop=stop, temperature=temperature, seed=seed
                )
                self.tokens += tokens
                self.journal.put(phase, number, asked, replies)
            yield from zip(batch, replies, strict=True)
            bar.update(len(batch))

    def _prompt(self, turns: list[str], instruction: str, new_tokens: int) -> tuple[list[int], str]:
        """The token ids of a prompt, and why it cannot be used, empty if it can."""
        try:
            ids = prompt_ids(turns, instruction, self.form, self.tokenizer)
        except TextChanged:
            return [], REFUSED
        limit = context_length(self.teacher.config)
        return ids, "" if limit is None or len(ids) + new_tokens <= limit else TOO_LONG


def _teacher_name(config: AnnotateConfig, teacher: PreTrainedModel) -> str:
    name: str = config.teacher or getattr(teacher.config, "name_or_path", "") or type(teacher).__name__
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


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
