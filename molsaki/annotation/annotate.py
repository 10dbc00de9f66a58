"""Has a teacher write rationales, and keeps those that end in the right answer.

The teacher sees demonstrations and a question (phase 1). Where it is wrong it is asked again with the gold answer shown
as a hint (phase 2), as in STaR (arXiv 2203.14465). Where key words are wanted it is asked for those of each kept text.

    train.jsonl            what is kept, as ``molsaki extract`` and ``distill`` read it; written last
    train.work.jsonl       every reply: a line for what it is of, then one for each batch; only ever appended to
    train.wrong.jsonl      what was refused and why, if asked for
    train.summary.json     the counts

Batches do not depend on what is done already, so a killed run that is continued decodes what it would have decoded.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.annotation.demonstrations import DEMONSTRATIONS
from molsaki.batches.tokenized import all_left_out
from molsaki.config import AnnotateConfig, require
from molsaki.evaluation.evaluate import score
from molsaki.evaluation.generate import Reply, batches, decode, write_whole
from molsaki.modeling.loading import check_tokenizer, context_length, load_model, load_tokenizer
from molsaki.teacher.store import fingerprint_model, fingerprint_tokenizer
from molsaki.text.answers import parse_number
from molsaki.text.examples import Example, read_examples
from molsaki.text.segment import segment
from molsaki.text.tokens import prompt

PLAIN = "Question: {question}\nRationale: {rationale}\nAnswer: {answer}"
KEYWORD_PROMPT = "Question: {question}\nRationale: {rationale}\nKeywords:"
KEYWORD_INSTRUCTION = (
    "List the key words of each question and its rationale: the few words that decide the answer, as they are written "
    "there, separated by commas."
)
KEYWORD_TOKENS = 64
FIRST, SECOND, KEYWORDS = 1, 2, 3  # the phases, as the work file names them
TOO_LONG = "prompt and reply longer than the context"
# A rationale with fewer than two words besides these, the hint's and the answer's only states the answer.
FILLER = {
    "a", "an", "and", "are", "be", "choice", "correct", "final", "hence", "is", "it", "must", "of", "only", "right",
    "so", "that", "the", "therefore", "this", "thus",
}  # fmt: skip


def annotate(config: AnnotateConfig, teacher=None, tokenizer=None) -> dict:
    """Write a teacher's right rationales to ``config.output_file``; continues what an interrupted run has decoded.

    Args:
        config: what to annotate and how.
        teacher, tokenizer: used in place of loading ``config.teacher``.

    Returns:
        The summary, as in ``.summary.json``: ``examples``, of which ``phase_1`` and ``phase_2`` got a rationale and the
        others are in ``dropped``, by reason; ``rationales`` written; ``keywords`` where asked for; tokens and seconds
        of this process.

    Raises:
        ValueError, TypeError, OSError: a flag, file or field is not as described, the work file is of something else,
            or no rationale was right.
    """
    require(config, "data_file", "output_file")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("annotate runs in one process, started without torchrun; device_map spreads a large teacher")
    output = Path(config.output_file)
    work_file = output.with_suffix(".work.jsonl")
    if output.exists() and not work_file.exists():
        raise ValueError(f"--output_file: {output} is there without its {work_file.name}; choose another name")
    examples = read_examples(config.data_file, rationale=False)[: config.limit]
    _check_examples(config, examples)
    form = Form.of(config.template)
    shown = demonstrations(config, examples, form)
    if teacher is None:
        require(config, "teacher")
        teacher = load_model(config.teacher, "--teacher", config.dtype, config.device_map)
        tokenizer = load_tokenizer(config.teacher, "--teacher")
    check_tokenizer(tokenizer, "--teacher")
    if config.device_map is None:
        teacher = teacher.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    teacher.eval()

    output.parent.mkdir(parents=True, exist_ok=True)
    source = _teacher_name(config, teacher)
    work = Work(work_file, describe(config, examples, shown, teacher, tokenizer, source))
    run = _Run(config, form, shown, teacher, tokenizer, work)
    start = time.perf_counter()
    kept, dropped, refused = run.rationales(examples)
    keywords = run.keywords(examples, kept) if config.keywords == "teacher" else None
    seconds = time.perf_counter() - start

    rows, phases = [], collections.Counter()
    for example in examples:
        found = kept.get(example.id, [])
        phases.update(verdict.phase for verdict in found[:1])
        for number, verdict in enumerate(found, 1):
            row: dict = {"id": _sample_id(example.id, number), "task": _task(example), "question": example.question}
            if example.choices:
                row["choices"] = example.choices
            row |= {"rationale": verdict.rationale, "answer": verdict.answer, "gold": example.answer}
            if keywords is not None:
                row["keywords"] = keywords.found[row["id"]]
            rows.append(row | {"rationale_source": source, "phase": verdict.phase})
    summary = {
        "teacher": source, "data_file": config.data_file, "output_file": config.output_file, "examples": len(examples),
        "phase_1": phases[FIRST], "phase_2": phases[SECOND], "dropped": dict(dropped), "rationales": len(rows),
    }  # fmt: skip
    if keywords is not None:
        summary["keywords"] = {
            "kept": sum(map(len, keywords.found.values())), "not_in_the_text": keywords.strange,
            "rationales_without": sum(not found for found in keywords.found.values()),
        }  # fmt: skip
    summary |= {"tokens": run.tokens, "seconds": seconds, "tokens_per_second": run.tokens / seconds}
    if config.keep_wrong:
        write_whole(output.with_suffix(".wrong.jsonl"), _lines(refused))
    write_whole(output.with_suffix(".summary.json"), json.dumps(summary, indent=2) + "\n")
    if not rows:
        raise ValueError(all_left_out(dropped))
    write_whole(output, _lines(rows))
    return summary


@dataclasses.dataclass(frozen=True)
class Form:
    """How a question, its rationale and its answer are put into one text, or into turns of a chat.

    Attributes:
        before, between, label, after: what stands before the question, the rationale, the answer, and at the end.
        chat: whether question and reply are turns of the tokenizer's chat template.
    """

    before: str
    between: str
    label: str
    after: str
    chat: bool = False

    @classmethod
    def of(cls, template: str) -> Form:
        """The form of ``config.template``.

        Raises:
            ValueError: it is neither plain nor chat nor a format with the three fields in order, once each.
        """
        if template == "chat":
            return cls("", "", "\nAnswer: ", "", chat=True)
        parts = re.split(r"\{(question|rationale|answer)\}", PLAIN if template == "plain" else template)
        if parts[1::2] != ["question", "rationale", "answer"] or not all(part.strip() for part in parts[:-1:2]):
            raise ValueError(
                "template: expected plain, chat, or a format with {question}, {rationale} and {answer} in this order, "
                f"once each and each after a text of its own, got {template!r}"
            )
        return cls(*parts[::2])

    @property
    def stop(self) -> str | None:
        """What shows that the model has gone on to a question of its own; a chat ends by its end token."""
        return None if self.chat else "\n" + self.before.strip()

    def ask(self, question: str) -> str:
        return self.before + question + self.between

    def reply(self, example: Example) -> str:
        return example.rationale.strip() + self.label + example.answer + self.after


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a reply holds; right if there is no ``reason`` against it."""

    phase: int
    rationale: str
    answer: str | None
    reason: str


def judge(example: Example, reply: Reply, form: Form, hint: str, phase: int) -> Verdict:
    """Take a reply apart and say what is wrong with it, if anything.

    The answer is the first number (or choice) after the label, or that after an equals sign there. A reply without a
    label is a rationale whose last number (or choice) is the answer. Right is a rationale of some words that ends in
    the right answer: in its last number (or choice), as ``evaluate --mode rationale`` reads a student's.

    Args:
        hint: the template of the second phase's question; a rationale that only repeats it is refused.
    """
    text = reply.text.rpartition("</think>")[2].strip()
    head, label, tail = _at_label(text, form.label.strip())
    rationale = re.sub(r"[\s*#_]+$", "", head)
    line, newline, _ = tail.strip().partition("\n")
    written = line.rpartition("=")[2]
    answer = score(example, written, "answer") if label else score(example, rationale, "rationale")
    reason = ""
    if not reply.ended and not newline:
        reason = "cut off at max_new_tokens"
    elif not rationale:
        reason = "no rationale"
    elif answer["prediction"] is None:
        reason = "no answer"
    elif not answer["right"]:
        reason = "wrong answer"
    elif _has_ending(example) and not score(example, rationale, "rationale")["right"]:
        reason = "rationale ends in another answer"
    elif sum(word not in _words(f"{hint} {example.answer}") | FILLER for word in _word_list(rationale)) < 2:
        reason = "rationale only states the answer"
    elif phase == SECOND and "hint" in _words(rationale) - _words(example.question):
        reason = "rationale speaks of the hint"
    return Verdict(phase, rationale, answer["prediction"], reason)


def _at_label(text: str, label: str) -> tuple[str, str, str]:
    match = re.search(rf"(?<!\w)(?:the\s+)?(?:final\s+)?{re.escape(label)}", text, re.I)
    return (text[: match.start()], match[0], text[match.end() :].lstrip(" *")) if match else (text, "", "")


def _has_ending(example: Example) -> bool:
    return bool(example.choices) or parse_number(example.answer) is not None


def _word_list(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _words(text: str) -> set[str]:
    return set(_word_list(text))


def demonstrations(config: AnnotateConfig, examples: Sequence[Example], form: Form) -> dict[str, list[Example]]:
    """What is shown before the examples of each task: those of ``config.examples`` of the same task or of none.

    Raises:
        ValueError, TypeError, OSError: the file is not as described, or a task has no demonstrations.
    """
    found = DEMONSTRATIONS if config.examples is None else read_examples(config.examples)
    for one in found:
        reason = judge(one, Reply(form.reply(one), True), form, config.hint, FIRST).reason
        if reason:
            raise ValueError(f"--examples: {config.examples}: example {one.id}: {reason}: {one.rationale!r}")
    shown: dict[str, list[Example]] = {}
    for example in examples:
        task = _task(example)
        if task in shown:
            continue
        shown[task] = [one for one in found if one.task in (None, task)][: config.shots]
        by_keywords = config.keywords == "teacher"
        if config.shots != 0 and not any(one.keywords or not by_keywords for one in shown[task]):
            wanted = "demonstration with keywords" if by_keywords else "demonstration"
            there = ", ".join(sorted({str(one.task) for one in found}))
            raise ValueError(
                f"--examples: no {wanted} of task {task!r}, which example {example.id} is of; there are those of "
                f"{there}; give a file that has some, or --shots 0"
            )
    return shown


def describe(
    config: AnnotateConfig,
    examples: Sequence[Example],
    shown: dict[str, list[Example]],
    teacher,
    tokenizer,
    source: str,
) -> dict:
    """What replies depend on: they are only used again if all of it is the same."""
    options = (
        "template", "instruction", "hint", "keywords", "max_new_tokens", "batch_size", "samples", "temperature", "seed",
    )  # fmt: skip
    return {name: getattr(config, name) for name in options} | {
        "number_of_examples": len(examples),
        "data": _digest([[e.id, e.question, e.answer, e.choices, _task(e)] for e in examples]),
        "demonstrations": _digest({task: [dataclasses.astuple(e) for e in found] for task, found in shown.items()}),
        "teacher": source,
        "teacher_dtype": str(teacher.dtype),
        "teacher_weights": fingerprint_model(teacher),
        "teacher_tokenizer": fingerprint_tokenizer(tokenizer),
    }


class Work:
    """The replies of a run, batch by batch, in a file that is only ever appended to.

    Args:
        path: JSON lines, each with a checksum; made if it is not there. What follows the last whole line is cut off.
        description: what the replies are of.

    Raises:
        ValueError: the file is of something else (the message has both values), or a whole line of it is damaged.
    """

    def __init__(self, path: Path, description: dict):
        self.path = path
        self._batches: dict[tuple[int, int], list] = {}
        description = json.loads(json.dumps(description))
        data = path.read_bytes() if path.exists() else b""
        lines, whole = data.splitlines(keepends=True), 0
        for number, line in enumerate(lines, 1):
            value = _checked(line)
            if value is None and line.endswith(b"\n"):
                raise ValueError(f"{path}:{number}: damaged, or no work file; delete it to start over")
            if value is None:
                break
            whole += len(line)
            if number > 1:
                self._batches[value["phase"], value["batch"]] = value["replies"]
                continue
            for name in description:
                if value.get(name) != description[name]:
                    raise ValueError(
                        f"{path}: was begun with another {name}: {value.get(name)!r}, now {description[name]!r}; run "
                        "the old command to continue it, choose another output_file, or delete it to start over"
                    )
        if whole < len(data):
            os.truncate(path, whole)
        if not whole:
            self._append(description)

    def get(self, phase: int, batch: int, names: list[list]) -> list[Reply] | None:
        """The replies to a batch, or None if they are still to be made; ``names`` are its ``[id, sample]`` pairs."""
        found = self._batches.get((phase, batch))
        if found is None:
            return None
        if [name for name, *_ in found] != names:
            raise ValueError(
                f"{self.path}: batch {batch} of phase {phase} is of other examples: delete it to start over"
            )
        return [Reply(text, ended) for _, text, ended in found]

    def put(self, phase: int, batch: int, names: list[list], replies: list[Reply]) -> None:
        rows = [[name, *reply] for name, reply in zip(names, replies, strict=True)]
        self._append({"phase": phase, "batch": batch, "replies": rows})

    def _append(self, value: dict) -> None:
        line = json.dumps({"check": _digest(value)} | value, ensure_ascii=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def _checked(line: bytes) -> dict | None:
    """What a line of the work file holds, or None if it is not whole."""
    try:
        value = json.loads(line)
        check = value.pop("check")
    except (ValueError, AttributeError, KeyError):
        return None
    return value if line.endswith(b"\n") and check == _digest(value) else None


class _Asked(NamedTuple):
    example: Example
    sample: int
    ids: list[int]


@dataclasses.dataclass
class _Keywords:
    found: dict[str, list[str]]
    strange: int


@dataclasses.dataclass
class _Run:
    config: AnnotateConfig
    form: Form
    shown: dict[str, list[Example]]
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    work: Work
    tokens: int = 0

    def rationales(
        self, examples: Sequence[Example]
    ) -> tuple[dict[str, list[Verdict]], collections.Counter, list[dict]]:
        """Right rationales by id; why the other examples have none, counted; every reply that was refused."""
        kept: dict[str, list[Verdict]] = {}
        reasons: dict[str, str] = {}
        refused = []
        for phase in (FIRST, SECOND):
            asked = []
            for example in examples:
                if example.id in kept:
                    continue
                ids = self._ids(self._turns(example, phase), self.config.instruction)
                if self._fits(ids, self.config.max_new_tokens):
                    asked += [_Asked(example, sample, ids) for sample in range(1, self.config.samples + 1)]
                else:
                    reasons[example.id] = TOO_LONG
                    refused.append(_refusal(example, phase, reason=TOO_LONG))
            with tqdm(total=len(asked), unit="reply", desc=f"annotate, phase {phase}") as bar:
                for batch in self._batches(phase, asked, self.config.max_new_tokens, self.config.temperature):
                    for (example, sample, _), reply in batch:
                        verdict = judge(example, reply, self.form, self.config.hint, phase)
                        if verdict.reason:
                            reasons[example.id] = verdict.reason
                            refused.append(_refusal(example, phase, sample, reply.text, verdict.answer, verdict.reason))
                        elif all(verdict.rationale != other.rationale for other in kept.get(example.id, [])):
                            kept.setdefault(example.id, []).append(verdict)
                    bar.update(len(batch))
                    counts = collections.Counter(found[0].phase for found in kept.values())
                    bar.set_postfix_str(
                        f"right {counts[FIRST]} + {counts[SECOND]}, not {len(reasons.keys() - kept.keys())}"
                    )
        order = {example.id: number for number, example in enumerate(examples)}
        refused.sort(key=lambda row: (order[row["id"]], row["phase"], row["sample"] or 0))
        return kept, collections.Counter(reasons[e.id] for e in examples if e.id not in kept), refused

    def keywords(self, examples: Sequence[Example], kept: dict[str, list[Verdict]]) -> _Keywords:
        """The key words of each kept text, by its id in the output: those of the teacher's that occur in it."""
        asked, result = [], _Keywords({}, 0)
        for example in examples:
            for number, verdict in enumerate(kept.get(example.id, []), 1):
                text = dataclasses.replace(
                    example, id=_sample_id(example.id, number), rationale=verdict.rationale, keywords=None
                )
                result.found[text.id] = []
                ids = self._ids(self._keyword_turns(text), KEYWORD_INSTRUCTION)
                if self._fits(ids, KEYWORD_TOKENS):
                    asked.append(_Asked(text, 1, ids))
        with tqdm(total=len(asked), unit="text", desc="annotate, keywords") as bar:
            for batch in self._batches(KEYWORDS, asked, KEYWORD_TOKENS, 0.0):
                for (text, _, _), reply in batch:
                    named = split_keywords(reply.text)
                    result.found[text.id] = [word for word in named if _occurs(word, text)]
                    result.strange += len(named) - len(result.found[text.id])
                bar.update(len(batch))
        return result

    def _batches(
        self, phase: int, asked: list[_Asked], new_tokens: int, temperature: float
    ) -> Iterator[list[tuple[_Asked, Reply]]]:
        stop = self.form.stop if phase != KEYWORDS else None if self.form.chat else "\n"
        for number, rows in enumerate(batches([one.ids for one in asked], self.config.batch_size)):
            batch = [asked[i] for i in rows]
            names = [[one.example.id, one.sample] for one in batch]
            replies = self.work.get(phase, number, names)
            if replies is None:
                seed = int(_digest([self.config.seed, phase, number])[:15], 16)
                prompts = [one.ids for one in batch]
                replies, tokens = decode(
                    self.teacher, self.tokenizer, prompts, new_tokens, stop=stop, temperature=temperature, seed=seed
                )
                self.tokens += tokens
                self.work.put(phase, number, names, replies)
            yield list(zip(batch, replies, strict=True))

    def _turns(self, example: Example, phase: int) -> list[str]:
        """What is asked and replied in turn, to the question itself."""
        turns = []
        for one in [*self.shown[_task(example)], example]:
            question = _with_choices(one)
            if phase == SECOND:
                question = _fill(self.config.hint, question=question, answer=one.answer)
            turns += [self.form.ask(question), self.form.reply(one)]
        return turns[:-1]

    def _keyword_turns(self, example: Example) -> list[str]:
        turns = []
        for one in [*(one for one in self.shown[_task(example)] if one.keywords), example]:
            text = _fill(KEYWORD_PROMPT, question=_with_choices(one), rationale=one.rationale.strip())
            turns += [text + " ", ", ".join(one.keywords or ())]
        return turns[:-1]

    def _ids(self, turns: list[str], instruction: str) -> list[int]:
        if not self.form.chat:
            blocks = ["".join(turns[i : i + 2]) for i in range(0, len(turns), 2)]
            return prompt("\n\n".join([instruction] * bool(instruction) + blocks), self.tokenizer)
        if instruction:
            turns = [f"{instruction}\n\n{turns[0]}", *turns[1:]]  # not every template takes a system's turn
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)]
        if not self.tokenizer.chat_template:
            raise ValueError("template: the teacher's tokenizer has no chat template; use plain or a format")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"template: the teacher's chat template failed: {error}") from error
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _fits(self, ids: list[int], new_tokens: int) -> bool:
        limit = context_length(self.teacher.config)
        return limit is None or len(ids) + new_tokens <= limit


def split_keywords(reply: str) -> list[str]:
    """The key words that a reply lists, separated by commas, semicolons or lines, each once in any case."""
    text = re.sub(r"^\s*key\s?words:", "", reply.rpartition("</think>")[2], flags=re.I)
    found: dict[str, str] = {}
    for piece in re.split(r"[,;\n]", text):
        word = re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", piece).strip(" \t\r.\"'*`")
        if re.search(r"\w", word):
            found.setdefault(" ".join(word.casefold().split()), word)
    return list(found.values())


def _occurs(word: str, example: Example) -> bool:
    return bool(segment(example.question, example.rationale, key=[word]).words)


def _with_choices(example: Example) -> str:
    """The question with its choices, where it does not name them itself."""
    if not example.choices or all(choice in example.question for choice in example.choices):
        return example.question
    return "\n".join(
        [example.question, "Answer Choices:", *(f"({chr(97 + i)}) {c}" for i, c in enumerate(example.choices))]
    )


def _task(example: Example) -> str:
    return example.task or ("commonsense" if example.choices else "math")


def _sample_id(id: str, number: int) -> str:
    return id if number == 1 else f"{id}/{number}"


def _check_examples(config: AnnotateConfig, examples: Sequence[Example]) -> None:
    ids = {example.id for example in examples}
    for example in examples:
        if example.choices and example.answer not in example.choices:
            raise ValueError(
                f"{config.data_file}: example {example.id}: gold: expected one of its choices "
                f"{', '.join(example.choices)}, got {example.answer!r}"
            )
        clash = next((n for n in range(2, config.samples + 1) if f"{example.id}/{n}" in ids), None)
        if clash:
            raise ValueError(f"{config.data_file}: id {example.id}/{clash} would be that of {example.id}'s next sample")


def _teacher_name(config: AnnotateConfig, teacher) -> str:
    name = config.teacher or getattr(teacher.config, "name_or_path", "") or type(teacher).__name__
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


def _refusal(example: Example, phase: int, sample=None, reply=None, answer=None, reason: str = "") -> dict:
    return {
        "id": example.id, "question": example.question, "gold": example.answer, "phase": phase, "sample": sample,
        "reply": reply, "answer": answer, "reason": reason,
    }  # fmt: skip


def _fill(template: str, **texts: str) -> str:
    return re.sub(r"\{(" + "|".join(texts) + r")\}", lambda match: texts[match[1]], template)


def _lines(rows: Sequence[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _digest(value) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
