"""The text that a template puts around question and rationale, found once with placeholders; runs chat templates."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from molsaki.text.conversations import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Placeholders for the two texts in a chat template, and for a rationale with a thinking trace.
QUESTION_MARK, RATIONALE_MARK = "molsakiquestion7d1c", "molsakirationale7d1c"
THINKING_MARK = f"<think>\n{RATIONALE_MARK}\n</think>\n\n{RATIONALE_MARK}2"


class TextChanged(ValueError):
    """A chat template refuses the texts of one example, or changes them so that they cannot be found in its result."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """The text that a template puts around each turn up to the question and around the rationale.

    Attributes:
        joints: the text before each turn, before the rationale and after it.
        special_tokens: whether the tokenizer adds its own special tokens.
        merges_system: whether a system turn is shown at the beginning of the user's turn.
    """

    joints: tuple[str, ...]
    special_tokens: bool
    merges_system: bool = False

    @property
    def between(self) -> str:
        """Between the question and the rationale."""
        return self.joints[-2]

    @property
    def after(self) -> str:
        """After the rationale."""
        return self.joints[-1]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an error unless ``tokenizer`` is a transformers tokenizer with character offsets."""
    is_fast = getattr(tokenizer, "is_fast", None)
    if is_fast is None:
        raise TypeError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")
    if not is_fast:
        raise ValueError(
            f"tokenizer: {name_of(tokenizer)} gives no character offsets (its is_fast is False); expected one that "
            "the tokenizers library runs, as AutoTokenizer loads"
        )


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer's class and path, for error messages."""
    return f"{type(tokenizer).__name__} {tokenizer.name_or_path!r}"


def frame_of(tokenizer: PreTrainedTokenizerBase, template: str, roles: Sequence[str] = ("user",)) -> Frame:
    """The frame of a template; a chat template is run once on placeholders for the texts.

    Args:
        roles: of the turns up to the question, for a chat template; others show them as one text.
    """
    if not isinstance(template, str):
        raise TypeError(f"template: expected a str, got {type(template).__name__}")
    if template == "plain":
        return Frame(("", " ", ""), special_tokens=True)
    return _chat_frame(tokenizer, roles) if template == "chat" else _format_frame(template)


def check_template(tokenizer: PreTrainedTokenizerBase, template: str, option: str) -> None:
    """Refuse a template that fails for every text; the message names the option."""
    try:
        frame_of(tokenizer, template)
    except ValueError as error:
        raise ValueError(f"{option}: {str(error).removeprefix('template: ')}") from error


def _format_frame(template: str) -> Frame:
    expected = 'template: expected "plain", "chat" or a format string with {question} and then {rationale}, once each'
    literals, fields = [""], []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(template):
            literals[-1] += literal
            if field is not None:
                fields.append((field, spec, conversion))
                literals.append("")
    except ValueError as error:
        raise ValueError(f"{expected}, got {template!r} ({error})") from None
    if fields != [("question", "", None), ("rationale", "", None)]:
        raise ValueError(f"{expected}, got {template!r}")
    return Frame(tuple(literals), special_tokens=True)


def _chat_frame(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> Frame:
    marks = [*(f"molsakiturn{n}x7d1c" for n in range(len(roles) - 1)), QUESTION_MARK, RATIONALE_MARK]
    turns = list(zip((*roles, "assistant"), marks, strict=True))
    failure = None
    for merge in (False, True)[: 1 + (roles[0] == "system" and len(roles) > 1)]:
        try:
            text = apply_chat(tokenizer, turns, merge_system=merge)
        except TextChanged as error:
            failure = failure or ValueError(str(error))  # fails for every example with these roles
            continue
        parts = re.split("(" + "|".join(marks) + ")", text)
        if parts[1::2] == marks:
            return Frame(tuple(parts[::2]), special_tokens=False, merges_system=merge)
        wanted = "the question and then the rationale" if len(marks) == 2 else "all turns in their order"
        failure = failure or ValueError(
            f"template: the chat template of {name_of(tokenizer)} does not show {wanted}, once each and unchanged: "
            f"{text!r}"
        )
        if sorted(parts[1::2]) == sorted(marks):
            break  # with a turn of the system, but in another order
    assert failure is not None
    raise failure


def apply_chat(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[str | Turn | Mapping[str, Any]],
    add_generation_prompt: bool = False,
    merge_system: bool = False,
    thinking: bool = False,
) -> str:
    """The text of a tokenizer's chat template.

    Args:
        turns: roles and texts, messages of the template, or texts of user and assistant in turn.
        merge_system: put an initial system turn at the beginning of the user's turn, for templates without a system
            turn.
        thinking: request a reply with a trace, by the options that templates have for this.
    """
    if not tokenizer.chat_template:
        raise ValueError(f'template: {name_of(tokenizer)} has no chat template; use "plain" or a format string')
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        if isinstance(turn, Mapping):
            messages.append(dict(turn))
        else:
            role, content = (("user", "assistant")[number % 2], turn) if isinstance(turn, str) else turn
            messages.append({"role": role, "content": content})
    if merge_system and len(messages) > 1 and messages[0]["role"] == "system":
        system, first, *others = messages
        messages = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *others]
    try:
        options: dict[str, Any] = {"enable_thinking": True, "thinking": True} if thinking else {}
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except TemplateError as error:
        raise TextChanged(f"template: the chat template of {name_of(tokenizer)} failed: {error}") from error
    return cast(str, text)
