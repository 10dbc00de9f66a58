"""`Teacher`: the protocol of teachers of ``molsaki annotate``, local or behind an endpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from tqdm.auto import tqdm

from molsaki.annotation.journal import ReplyJournal
from molsaki.evaluation.generate import Reply
from molsaki.text.examples import Example

TOO_LONG = "prompt and reply longer than the context"
REFUSED = "refused by the chat template"
FILTERED = "refused by the server's content filter"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt: token ids for a local model; a text, or the turns of a chat, for an endpoint."""

    example: Example
    sample: int  # from 1
    content: Any


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the replies of a phase are decoded: largest length in tokens, stop text, and temperature (0: greedy)."""

    new_tokens: int
    stop: str | None
    temperature: float


class Teacher(Protocol):
    """Replies to prompts, all of which it writes to a journal."""

    name: str

    def describe(self) -> dict[str, Any]:
        """The properties of the teacher that its replies depend on, besides its name and the options of the prompts."""

    def prompt(self, turns: list[str], instruction: str, new_tokens: int) -> tuple[Any, str]:
        """The content of a prompt, and the reason why it cannot be used (empty if it can)."""

    def replies(
        self, journal: ReplyJournal, phase: int, prompts: Sequence[Prompt], decoding: Decoding, bar: tqdm[Any]
    ) -> Iterator[tuple[Prompt, Reply | str]]:
        """The reply to each prompt, or the reason why there is none, from the journal or requested now."""

    def status(self) -> str:
        """Text that the progress bar shows besides the counts of replies; may be empty."""

    def summary(self, journal: ReplyJournal, seconds: float) -> dict[str, Any]:
        """The tokens, and time or cost, of the run."""
