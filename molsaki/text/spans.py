"""`Spans`: a question and its rationale as one text, with its steps and key words as ranges of characters."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterable, Mapping

Span = tuple[int, int]
LINE_ENDS = "\n\r\v\f\x85\u2028\u2029"
_SPACE = re.compile(r"\s*")


@dataclasses.dataclass(frozen=True)
class Spans:
    """A text cut into steps and key words. All offsets are characters of ``text``, half-open.

    Attributes:
        text: the question, a space and the rationale (no space where one of the two is empty). In a conversation the
            turns before the question, each followed by a blank line, are part of the question here.
        steps: S pairs that tile the text; the white space after a step belongs to it. No step has characters of both
            the question and the rationale.
        words: W pairs, every occurrence of a key word, ascending and disjoint, none empty.
        question_end: ``text[:question_end]`` is the question, without the separator.
        turns: in a conversation, the role (``"system"``, ``"user"`` or ``"assistant"``) and the span of each turn up to
            the question; empty if the question is the only turn.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: the spans are not as described above; the message names the field and the entry.
    """

    text: str
    steps: tuple[Span, ...]
    words: tuple[Span, ...]
    question_end: int
    turns: tuple[tuple[str, Span], ...] = ()

    def __post_init__(self) -> None:
        check_str("text", self.text)
        length = len(self.text)
        if not 0 <= self.question_end <= length:
            raise ValueError(f"question_end: expected 0 to {length} (the text's length), got {self.question_end}")
        end, rationale_start = 0, self.rationale_start
        for s, (start, stop) in enumerate(self.steps):
            if start != end or stop <= start:
                raise ValueError(f"steps[{s}]: expected a non-empty span that starts at {end}, got {start, stop}")
            if start < self.question_end and stop > rationale_start:
                raise ValueError(f"steps[{s}]: {start, stop} has characters of both the question and the rationale")
            end = stop
        if end != length:
            raise ValueError(f"steps: expected them to tile the text, 0 to {length}, but they end at {end}")
        end = 0
        for w, (start, stop) in enumerate(self.words):
            if start < end or not start < stop <= length:
                raise ValueError(f"words[{w}]: expected a non-empty span within {end, length}, got {start, stop}")
            if start < self.question_end < stop:
                raise ValueError(f"words[{w}]: {start, stop} crosses the question's end at {self.question_end}")
            end = stop
        end = 0
        for n, (role, (start, stop)) in enumerate(self.turns):
            if not end <= start < stop <= self.question_end:
                raise ValueError(
                    f"turns[{n}]: expected a non-empty span of the {role} within {end, self.question_end}, got "
                    f"{start, stop}"
                )
            end = stop
        if self.turns and (end != self.question_end or self.turns[-1][0] != "user"):
            raise ValueError(
                f"turns: expected the last to be the user's, up to {self.question_end}, got {self.turns[-1]}"
            )

    @property
    def rationale_start(self) -> int:
        """Where the rationale starts: the first non-space character after the question."""
        match = _SPACE.match(self.text, self.question_end)
        return match.end() if match else self.question_end

    @property
    def question(self) -> str:
        return self.text[: self.question_end]

    @property
    def rationale(self) -> str:
        return self.text[self.rationale_start :]

    @property
    def asked(self) -> list[tuple[str, Span]]:
        """The turns up to the question; only the question if there are no others."""
        return list(self.turns) or [("user", (0, self.question_end))]


def shown(text: str) -> str:
    """A quoted text for an error message; if it is long, its beginning and end."""
    return repr(text) if len(text) <= 200 else f"{text[:100]!r} ... {text[-60:]!r} ({len(text)} characters)"


def check_str(name: str, value: object) -> None:
    """Raise a TypeError that names the argument, unless ``value`` is a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")


def checked_key_spans(
    key_spans: tuple[Iterable[Span], Iterable[Span]] | Mapping[str, Iterable[Span]], question: str, rationale: str
) -> list[list[Span]]:
    """Given key words as spans of a question and its rationale, both without outer white space.

    Also accepts the form of the record's field: ``{"question": [...], "rationale": [...]}``.

    Raises:
        TypeError, ValueError: they are not two lists of pairs of ints, ascending, disjoint, within their text and not
            blank; the message names the entry.
    """
    if isinstance(key_spans, Mapping):
        key_spans = key_spans.get("question") or (), key_spans.get("rationale") or ()
    sides = []
    for side, spans, text in zip(("question", "rationale"), key_spans, (question, rationale), strict=True):
        shift, end, found = len(text) - len(text.lstrip()), 0, []
        for number, span in enumerate(spans):
            where = f"key_spans: {side}[{number}]"
            try:
                if isinstance(span, str):
                    raise TypeError
                start, stop = map(operator.index, span)
            except (TypeError, ValueError):
                raise TypeError(f"{where}: expected [start, stop], two ints, got {span!r}") from None
            if not end <= start < stop <= len(text):
                expected = f"a span that is not empty within {(end, len(text))}"
                raise ValueError(f"{where}: expected {expected}, got {(start, stop)}")
            if not text[start:stop].strip():
                raise ValueError(f"{where}: {(start, stop)} is blank")
            end = stop
            found.append((max(start - shift, 0), min(stop - shift, len(text.strip()))))
        sides.append(found)
    return sides
