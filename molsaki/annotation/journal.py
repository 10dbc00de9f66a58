"""`ReplyJournal`: the replies of a run, appended to a file as they arrive, so that an interrupted run can continue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from molsaki.evaluation.generate import Reply
from molsaki.io import digest

Asked = tuple[str, int]  # a prompt of a batch: the example's id and the number of the sample, from 1


class Request(NamedTuple):
    """The key of a single reply: phase, the example's id, the sample and the request's digest."""

    phase: int
    id: str
    sample: int
    digest: str


class Answer(NamedTuple):
    """The result of a request.

    Attributes:
        reply: the reply, or the reason why there is none.
        usage: tokens of the prompt and of the completion, if the server reported them.
    """

    reply: Reply | str
    usage: tuple[int, int] | None


class ReplyJournal:
    """The replies of a run in an append-only file: one line per batch of a local model, or per request to an endpoint.

    Args:
        path: JSON lines, each with a checksum: first the description, then one line per batch or per request. Created
            if it does not exist. An incomplete last line is removed.
        description: everything that the replies depend on, as JSON.

    Raises:
        ValueError: the file has another description (the message has both values), or one of its lines is damaged.
    """

    def __init__(self, path: Path, description: dict[str, Any]):
        self.path = path
        self._batches: dict[tuple[int, int], list[tuple[list[Any], str, bool]]] = {}
        self._answers: dict[Request, Answer] = {}
        description = json.loads(json.dumps(description))
        data = path.read_bytes() if path.exists() else b""
        lines, complete = data.splitlines(keepends=True), 0
        for number, line in enumerate(lines, 1):
            value = _checked(line)
            if value is None and line.endswith(b"\n"):
                raise ValueError(f"{path}:{number}: damaged, or not a journal of replies; delete it to start over")
            if value is None:
                break
            complete += len(line)
            if number > 1:
                self._keep(value)
                continue
            for name in description | value:
                if value.get(name) != description.get(name):
                    raise ValueError(
                        f"{path}: was begun with another {name}: {value.get(name)!r}, now {description.get(name)!r}; "
                        "run the old command to continue it, choose another output_file, or delete it to start over"
                    )
        if complete < len(data):
            os.truncate(path, complete)
        if not complete:
            self._append(description)

    def get(self, phase: int, batch: int, asked: Sequence[Asked]) -> list[Reply] | None:
        """The replies to a batch, or None if it has none yet."""
        found = self._batches.get((phase, batch))
        if found is None:
            return None
        if [tuple(name) for name, *_ in found] != list(asked):
            raise ValueError(f"{self.path}: batch {batch} of phase {phase} has other examples: delete it to start over")
        return [Reply(text, ended) for _, text, ended in found]

    def put(self, phase: int, batch: int, asked: Sequence[Asked], replies: Sequence[Reply]) -> None:
        """Append the replies to a batch, and flush them to the disk."""
        entries = [[name, *reply] for name, reply in zip(asked, replies, strict=True)]
        self._append({"phase": phase, "batch": batch, "replies": entries})

    def answer(self, request: Request) -> Answer | None:
        """The result of a request, or None if it has not been sent yet."""
        return self._answers.get(request)

    def answers(self) -> Iterator[Answer]:
        """All answers in the file, including those to requests that this run does not send."""
        yield from self._answers.values()

    def put_answers(self, found: Sequence[tuple[Request, Answer]]) -> None:
        """Append the answers to single requests, and flush them to the disk together."""
        self._append(*({**request._asdict(), **answer._asdict()} for request, answer in found))
        self._answers.update(found)

    def _keep(self, value: dict[str, Any]) -> None:
        if "batch" in value:
            self._batches[value["phase"], value["batch"]] = value["replies"]
            return
        reply, usage = value["reply"], value["usage"]
        request = Request(*(value[name] for name in Request._fields))
        self._answers[request] = Answer(
            reply if isinstance(reply, str) else Reply(*reply), None if usage is None else (usage[0], usage[1])
        )

    def _append(self, *values: dict[str, Any]) -> None:
        lines = [
            json.dumps({"check": digest(value, sort_keys=False)} | value, ensure_ascii=False) + "\n" for value in values
        ]
        with self.path.open("ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())


def _checked(line: bytes) -> dict[str, Any] | None:
    """The value of a line of the journal, or None if the line is incomplete or damaged."""
    try:
        value: dict[str, Any] = json.loads(line)
        check = value.pop("check")
    except (ValueError, AttributeError, KeyError):
        return None
    return value if line.endswith(b"\n") and check == digest(value, sort_keys=False) else None
