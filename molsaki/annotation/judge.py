"""Judges a teacher's reply: splits it into rationale and answer, and gives the reason if it is refused."""

from __future__ import annotations

import dataclasses
import re

from molsaki.annotation.prompts import SECOND, PromptFormat
from molsaki.evaluation.generate import Reply
from molsaki.evaluation.scoring import score
from molsaki.extras import regex
from molsaki.text.answers import kind_of
from molsaki.text.examples import Example
from molsaki.text.thinking import state_of, with_opening


def _words(text: str) -> list[str]:
    """The words of a text; in Chinese, Japanese and Thai, which do not separate words, its characters."""
    found: list[str] = regex.findall(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]\p{M}*|[\w--[\p{Han}\p{Hiragana}"
                                     r"\p{Katakana}\p{Thai}]]+", text.casefold(), regex.V1)  # fmt: skip
    return found


# A rationale with fewer than two words besides these, the hint's and the answer's only states the answer.
FILLER = _words(
    "a an and are be choice correct final hence is it must of only right so that the therefore this thus "
    "答案选项選択肢正确確解最终終结結果所以因此故是为為即的一共有总共計合计はがのですだこたえよって"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The parts of a reply. It is right if ``reason`` is empty.

    Attributes:
        phase: 1, or 2 for a reply to a question with a hint.
        rationale, answer: as they are in the reply; ``answer`` is None if it has none.
        reason: why the reply is refused.
    """

    phase: int
    rationale: str
    answer: str | None
    reason: str


def judge(
    example: Example, reply: Reply, form: PromptFormat, hint: str, phase: int, keep_thinking: bool = False
) -> Verdict:
    """Split a reply into rationale and answer, with the reason if it is refused.

    The answer is the first number (or choice) after the label, or after an equals sign there. A reply without a label
    is a rationale whose last number (or choice) is the answer. A reply is right if its rationale has some words and
    ends in the right answer: in its last number (or choice), as ``evaluate --mode rationale`` reads a student's.

    Args:
        example: the question with its gold answer.
        form: the format of the prompt, with the answer's label.
        hint: the template of the second phase's question; a rationale that only repeats it is refused.
        phase: 1 or 2.
        keep_thinking: whether a thinking trace before the rationale is part of it. The rationale is judged without it.
    """
    text = reply.text.rpartition("</think>")[2].strip()
    label = re.search(rf"(?<!\w)(?:the\s+)?(?:final\s+)?{re.escape(form.label.strip())}", text, re.I)
    head, tail = (text[: label.start()], text[label.end() :].lstrip(" *")) if label else (text, "")
    rationale = re.sub(r"[\s*#_]+$", "", head)
    line, newline, _ = tail.strip().partition("\n")
    written = line.rpartition("=")[2]
    answer = score(example, written, "answer") if label else score(example, rationale, "rationale")
    has_ending = kind_of(example.answer, example.choices) in ("choice", "number")
    filler = {*FILLER, *_words(f"{hint} {example.answer}")}
    reason = ""
    if not reply.ended and (not newline or text.startswith("<think>")):  # the label may be in an unfinished trace
        reason = "cut off at max_new_tokens"
    elif not rationale:
        reason = "no rationale"
    elif answer["prediction"] is None:
        reason = "no answer"
    elif not answer["right"]:
        reason = "wrong answer"
    elif has_ending and not score(example, rationale, "rationale")["right"]:
        reason = "rationale ends in another answer"
    elif sum(word not in filler for word in _words(rationale)) < 2:
        reason = "rationale only states the answer"
    elif phase == SECOND and "hint" in _words(rationale) and "hint" not in _words(example.question):
        reason = "rationale mentions the hint"
    if keep_thinking and "</think>" in reply.text:
        trace = with_opening(reply.text.rpartition("</think>")[0] + "</think>")[0].strip()
        rationale = f"{trace}\n\n{rationale}"
        if not reason and state_of(trace) != "whole":
            reason = "broken thinking trace"
    return Verdict(phase, rationale, answer["prediction"], reason)
