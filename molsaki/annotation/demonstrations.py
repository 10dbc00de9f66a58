"""Chooses the demonstrations that ``molsaki annotate`` shows a teacher: from a file, or from demonstrations.jsonl."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from molsaki.annotation.judge import judge
from molsaki.annotation.prompts import FIRST, PromptFormat
from molsaki.config import AnnotateConfig
from molsaki.evaluation.generate import Reply
from molsaki.text.examples import Example, read_examples

OWN = Path(__file__).with_name("demonstrations.jsonl")


def demonstrations_by_task(
    config: AnnotateConfig, examples: Sequence[Example], form: PromptFormat
) -> dict[str, list[Example]]:
    """The demonstrations shown before the examples of each task: those of the same task or without a task."""
    found = list(read_examples(config.examples or OWN))
    if config.examples is None:
        found = [dataclasses.replace(one, id="") for one in found]  # so that they match the journals of earlier runs
    for one in found:
        reason = judge(one, Reply(form.reply(one), True), form, config.hint, FIRST).reason
        if reason:
            raise ValueError(f"--examples: {config.examples}: example {one.id}: {reason}: {one.rationale!r}")
    shown: dict[str, list[Example]] = {}
    for example in examples:
        task = task_of(example)
        if task in shown:
            continue
        shown[task] = [one for one in found if one.task in (None, task)][: config.shots]
        by_keywords = config.keywords == "teacher"
        if config.shots != 0 and not any(one.keywords or not by_keywords for one in shown[task]):
            wanted = "demonstration with keywords" if by_keywords else "demonstration"
            there = ", ".join(sorted({str(one.task) for one in found}))
            raise ValueError(
                f"--examples: no {wanted} of task {task!r}, which example {example.id} belongs to; there are those of "
                f"{there}; give a file that has some, or --shots 0"
            )
    return shown


def task_of(example: Example) -> str:
    """The example's task; without one, commonsense if it has choices, else math."""
    return example.task or ("commonsense" if example.choices else "math")
