"""Reads conversations: the last assistant turn is taught, and the turns before it are its context and question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molsaki.text.thinking import CLOSE, without_traces

Turn = tuple[str, str]
"""The role, ``"system"``, ``"user"`` or ``"assistant"``, and its text."""

# The names of roles in data sets, and those of chat templates.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}


def turns_of(messages: Any, where: str, until_reply: bool = False) -> list[Turn]:
    """The turns of a list of messages, each with ``role`` and ``content``, or ``from`` and ``value``.

    An assistant's field ``reasoning_content``, ``reasoning`` or ``thinking`` becomes a ``<think>`` block before the
    content, unless the content has one. A blank system turn is left out.

    Args:
        until_reply: whether all turns after the last assistant turn are left out.

    Raises:
        ValueError, TypeError: it is not such a list, a role is unknown (such as that of a tool), or a turn has no text;
            the message begins with ``where``.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise TypeError(f"{where}: expected a list of messages, got {type(messages).__name__}")
    if until_reply:
        roles = [_role(message) if isinstance(message, Mapping) else None for message in messages]
        messages = messages[: len(roles) - roles[::-1].index("assistant")] if "assistant" in roles else messages
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"{where}[{number}]: expected an object with role and content, got {message!r}")
        role = _role(message)
        if role is None:
            got = message.get("role") or message.get("from")
            raise ValueError(f"{where}[{number}]: expected the role system, user or assistant, got {got!r}")
        content = message.get("value") if message.get("content") is None else message["content"]
        if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
            content = "\n".join(part["text"] for part in content)
        thinking = None
        if role == "assistant" and not (isinstance(content, str) and CLOSE in content):
            thinking = next(filter(None, map(message.get, ("reasoning_content", "reasoning", "thinking"))), None)
        if thinking is not None and not isinstance(thinking, str):
            raise TypeError(f"{where}[{number}]: expected a text of the thinking, got {str(thinking)[:60]!r}")
        if role == "system" and not str(content or "").strip():
            continue
        if not isinstance(content, str) or not (content.strip() or thinking):
            what = "a turn of tools" if message.get("tool_calls") else "none" if content is None else repr(content)[:60]
            raise ValueError(f"{where}[{number}]: expected text in the turn of the {role}, got {what}")
        turns.append((role, f"<think>\n{thinking.strip()}\n</think>\n\n{content}" if thinking else content))
    return turns


def _role(message: Mapping[str, Any]) -> str | None:
    name = message.get("role") or message.get("from")
    return ROLES.get(name) if isinstance(name, str) else None


def split_turns(turns: Sequence[Turn], where: str) -> tuple[list[Turn], str, str]:
    """The context, the question and the reply: the last assistant turn is the reply, the user turn before it the
    question.

    Turns after the last one of the assistant are not used. The thinking traces of earlier turns are dropped, as the
    chat templates of reasoning models drop them.

    Raises:
        ValueError: there is no assistant turn, or no user turn directly before the last one.
    """
    roles = [role for role, _ in turns]
    last = max((n for n, role in enumerate(roles) if role == "assistant"), default=-1)
    if last < 1 or roles[last - 1] != "user":
        raise ValueError(
            f"{where}: expected a turn of the user and then one of the assistant at the end, got "
            f"{', '.join(roles) or 'none'}"
        )
    return checked_context(turns[: last - 1], where), turns[last - 1][1], turns[last][1]


def checked_context(context: Iterable[Turn], where: str = "context") -> list[Turn]:
    """The turns before a question, without white space around them and without the thinking traces of the assistant.

    Raises:
        ValueError, TypeError: a turn is not a pair of a role and a non-blank text, or a system turn is not the first;
            the message begins with ``where``.
    """
    checked = []
    for number, turn in enumerate(context):
        try:
            role, text = turn
        except (TypeError, ValueError):
            raise TypeError(f"{where}[{number}]: expected a role and a text, got {turn!r}") from None
        if role not in ("system", "user", "assistant") or (role == "system" and number):
            expected = (
                "the role user or assistant after the first turn" if number else "the role system, user or assistant"
            )
            raise ValueError(f"{where}[{number}]: expected {expected}, got {role!r}")
        if not isinstance(text, str):
            raise TypeError(f"{where}[{number}]: expected a text, got {type(text).__name__}")
        text = (without_traces(text) if role == "assistant" else text).strip()
        if not text:
            raise ValueError(f"{where}[{number}]: expected a text of the {role}, got a blank one")
        checked.append((role, text))
    return checked
