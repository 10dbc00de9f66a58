"""Chooses the demonstrations that ``molsaki annotate`` shows a teacher: from a file, or the package's own."""

from __future__ import annotations

from collections.abc import Sequence

from molsaki.annotation.judge import judge
from molsaki.annotation.prompts import FIRST, PromptFormat
from molsaki.config import AnnotateConfig
from molsaki.evaluation.generate import Reply
from molsaki.text.examples import Example, read_examples


def demonstrations_by_task(
    config: AnnotateConfig, examples: Sequence[Example], form: PromptFormat
) -> dict[str, list[Example]]:
    """The demonstrations shown before the examples of each task: those of the same task or of none.

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
        task = task_of(example)
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


def task_of(example: Example) -> str:
    """The example's task; without one, commonsense if it has choices, else math."""
    return example.task or ("commonsense" if example.choices else "math")


def _math(question: str, rationale: str, answer: str, keywords: str) -> Example:
    return Example("", question, rationale, answer, tuple(keywords.split(", ")), task="math")


def _choice(question: str, choices: str, rationale: str, answer: str, keywords: str) -> Example:
    return Example(
        "", question, rationale, answer, tuple(keywords.split(", ")), tuple(choices.split(", ")), task="commonsense"
    )


DEMONSTRATIONS = [
    _math(
        "A baker fills 6 trays with 12 rolls each and sells 45 rolls before noon. How many rolls are left?",
        "The baker makes 6 trays of 12 rolls, which is 6 * 12 = 72 rolls. After selling 45 of them, there are "
        "72 - 45 = 27 rolls left.",
        "27",
        "trays, rolls, sells, left",
    ),
    _math(
        "Nora read 38 pages on Monday and 17 pages more than that on Tuesday. Her book has 240 pages. How many pages "
        "did she read on the two days?",
        "On Tuesday Nora read 38 + 17 = 55 pages. How long the book is does not matter here. On the two days she read "
        "38 + 55 = 93 pages.",
        "93",
        "read, pages, more, two days",
    ),
    _math(
        "A rope of 63 meters is cut into pieces of 7 meters. How many pieces are there?",
        "Each piece takes 7 meters of the 63 meters. So the number of pieces is 63 / 7 = 9.",
        "9",
        "rope, cut, pieces, meters",
    ),
    _math(
        "Tickets cost $4 for a child and $9 for an adult. What do 3 children and 2 adults pay?",
        "The children pay 3 * 4 = 12 dollars. The adults pay 2 * 9 = 18 dollars. In total they pay 12 + 18 = 30 "
        "dollars.",
        "30",
        "child, adult, pay, total",
    ),
    _choice(
        "Where would you keep milk so that it stays fresh?",
        "cupboard, refrigerator, car, windowsill, bathtub",
        "Milk spoils when it is warm, so it has to be kept cold. A cupboard, a car, a windowsill and a bathtub are all "
        "about as warm as the room. The only cold place is the refrigerator.",
        "refrigerator",
        "milk, fresh, cold, warm, refrigerator",
    ),
    _choice(
        "What do people usually open when it starts to rain?",
        "book, umbrella, letter, bottle, gift",
        "Rain makes people wet, so they want something that covers them. Of these things, the one that covers a person "
        "when it is open is an umbrella.",
        "umbrella",
        "open, rain, wet, covers, umbrella",
    ),
    _choice(
        "The hikers were lost in the fog and could not see the sun. What helped them to find the north?",
        "mirror, blanket, compass, lantern, whistle",
        "To find the north without the sun, the hikers need a tool that shows directions. A lantern gives light and a "
        "whistle gives sound, but neither shows directions. The needle that points north is that of a compass.",
        "compass",
        "lost, north, sun, directions, compass",
    ),
    _choice(
        "Why did the gardener water the plants every evening in July?",
        "hot weather, heavy snow, too much shade, new neighbors, loud music",
        "Plants need more water when their soil dries out. In July the soil dries out because the sun is strong. So "
        "the reason is hot weather.",
        "hot weather",
        "water, plants, July, soil, dries out, hot weather",
    ),
]
