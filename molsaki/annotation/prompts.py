"""Builds the teacher's prompts: instruction, demonstrations, question, and the hint of the second phase."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from molsaki.text.alignment import prompt
from molsaki.text.examples import Example
from molsaki.text.frames import apply_chat

PLAIN = "Question: {question}\nRationale: {rationale}\nAnswer: {answer}"
FIRST, SECOND, KEYWORDS = 1, 2, 3  # the phases, as the journal names them


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a question, its rationale and its answer are joined into one text or into the turns of a chat.

    Attributes:
        before, between, label, after: the texts before the question, the rationale and the answer, and at the end.
        chat: whether question and reply are turns of the tokenizer's chat template.
    """

    before: str
    between: str
    label: str
    after: str
    chat: bool = False

    @classmethod
    def of(cls, template: str) -> PromptFormat:
        """The format of ``config.template``."""
        if template == "chat":
            return cls("", "", "\nAnswer: ", "", chat=True)
        parts = re.split(r"\{(question|rationale|answer)\}", PLAIN if template == "plain" else template)
        if parts[1::2] != ["question", "rationale", "answer"] or not all(part.strip() for part in parts[:-1:2]):
            raise ValueError(
                "template: expected plain, chat, or a format with {question}, {rationale} and {answer} in this order, "
                f"once each and each after some text, got {template!r}"
            )
        before, between, label, after = parts[::2]
        return cls(before, between, label, after)

    @property
    def stop(self) -> str | None:
        """The text that ends a reply: the start of another question. None for a chat, which ends by its end token."""
        return None if self.chat else "\n" + self.before.strip()

    def ask(self, question: str) -> str:
        return self.before + question + self.between

    def reply(self, example: Example) -> str:
        return example.rationale.strip() + self.label + example.answer + self.after


def question_turns(
    form: PromptFormat, demonstrations: Sequence[Example], example: Example, hint: str | None
) -> list[str]:
    """The questions and replies of the demonstrations, alternating, and the example's question.

    Args:
        hint: the template of a question that shows the gold answer, or None for the first phase.
    """
    turns = []
    for one in [*demonstrations, example]:
        before, question = _context(one, form.chat)
        if hint is not None:
            question = fill(hint, question=question, answer=one.answer)
        turns += [*before, form.ask(question), form.reply(one)]
    return turns[:-1]


def _context(example: Example, chat: bool) -> tuple[list[str], str]:
    """The turns of a chat before an example's question, alternating between user and assistant, and the question.

    A system turn is put at the start of the first user turn. In prompts that are not a chat, and if the roles do not
    alternate, the context is part of the question.
    """
    texts = [text for _, text in example.context] + [with_choices(example)]
    roles = [role for role, _ in example.context] + ["user"]
    if chat and roles[0] == "system":
        texts, roles = [f"{texts[0]}\n\n{texts[1]}", *texts[2:]], roles[1:]
    if chat and roles == [("user", "assistant")[n % 2] for n in range(len(roles))]:
        return texts[:-1], texts[-1]
    return [], "\n\n".join(texts)


def prompt_text(turns: list[str], instruction: str) -> str:
    """The text of a prompt that is not a chat: the instruction, then the turns, without surrounding white space."""
    blocks = ["".join(turns[i : i + 2]) for i in range(0, len(turns), 2)]
    return "\n\n".join([instruction] * bool(instruction) + blocks).strip()


def chat_turns(turns: list[str], instruction: str) -> list[str]:
    """The turns of a chat, alternating between user and assistant; the first one begins with the instruction."""
    if instruction:
        turns = [f"{instruction}\n\n{turns[0]}", *turns[1:]]  # not every chat template has a system turn
    return [turn.strip() for turn in turns]


def prompt_ids(turns: list[str], instruction: str, form: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a prompt: the instruction, then the turns."""
    if not form.chat:
        return prompt(prompt_text(turns, instruction), tokenizer)
    text = apply_chat(tokenizer, chat_turns(turns, instruction), add_generation_prompt=True)
    return cast(list[int], tokenizer(text, add_special_tokens=False).input_ids)


def with_choices(example: Example) -> str:
    """The question, followed by its choices unless it names all of them itself."""
    if not example.choices or all(choice in example.question for choice in example.choices):
        return example.question
    return "\n".join(
        [example.question, "Answer Choices:", *(f"({chr(97 + i)}) {c}" for i, c in enumerate(example.choices))]
    )


def fill(template: str, **texts: str) -> str:
    """Replace ``{name}`` by each text; braces in the texts are kept."""
    return re.sub(r"\{(" + "|".join(texts) + r")\}", lambda match: texts[match[1]], template)
