"""Asks the teacher for the key words of a text, and reads its list of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from molsaki.annotation.prompts import fill, with_choices
from molsaki.evaluation.generate import Reply
from molsaki.text.examples import Example
from molsaki.text.segment import segment

PROMPT = "Question: {question}\nRationale: {rationale}\nKeywords:"
INSTRUCTION = (
    "List the key words of each question and its rationale: the few words that decide the answer, as they are written "
    "there, separated by commas."
)
NEW_TOKENS = 64


def keyword_turns(demonstrations: Sequence[Example], example: Example) -> list[str]:
    """The texts and key words of the demonstrations that have some, alternating, and the example's text."""
    turns = []
    for one in [*(one for one in demonstrations if one.keywords), example]:
        question = "\n\n".join([*(text for _, text in one.context), with_choices(one)])
        text = fill(PROMPT, question=question, rationale=one.rationale.strip())
        turns += [text + " ", ", ".join(one.keywords or ())]
    return turns[:-1]


def is_cut_off(reply: Reply) -> bool:
    """Return whether the reply ends before its list: within or right after a thinking trace."""
    text = reply.text.rpartition("</think>")[2].strip()
    return not reply.ended and (not text or text.startswith("<think>"))


def split_keywords(reply: str) -> list[str]:
    """The key words that a reply lists, separated by commas, semicolons or lines, without duplicates in other case."""
    text = re.sub(r"^\s*key\s?words:", "", reply.rpartition("</think>")[2], flags=re.I)
    found: dict[str, str] = {}
    for piece in re.split(r"[,;\n、，；،]", text):
        word = re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", piece).strip(" \t\r.\"'*`")
        if re.search(r"\w", word):
            found.setdefault(" ".join(word.casefold().split()), word)
    return list(found.values())


def occurs(word: str, example: Example) -> bool:
    """Return whether the word is in the question, its context or the rationale."""
    return bool(segment(example.question, example.rationale, key=[word], context=example.context).words)
