"""`EndpointTeacher`: a model behind an OpenAI-compatible endpoint, with several concurrent requests.

The main thread builds the requests, writes the answers and counts tokens; the other threads only send requests. An
answer is written to the journal before it is used. Replies are returned in the order of the prompts.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from molsaki.annotation.demonstrations import OWN
from molsaki.annotation.endpoint import Endpoint, EndpointError, Refused
from molsaki.annotation.journal import Answer, ReplyJournal, Request
from molsaki.annotation.prompts import KEYWORDS, PromptFormat, chat_turns, prompt_text
from molsaki.annotation.teacher import Decoding, Prompt
from molsaki.config import AnnotateConfig, require
from molsaki.evaluation.generate import Reply
from molsaki.io import digest

Body = dict[str, Any]


@dataclasses.dataclass
class Spending:
    """The tokens that the server reported, and their price.

    Attributes:
        prompt_tokens, completion_tokens: sums over all answers that report them.
        unreported: the number of answers without them.
        answers: the number of all answers.
        reserved: the most that the requests in flight may cost.
    """

    price_in: float | None
    price_out: float | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0
    answers: int = 0
    reserved: float = 0.0

    def add(self, answer: Answer) -> None:
        self.answers += 1
        if answer.usage is None:
            self.unreported += 1
        else:
            self.prompt_tokens += answer.usage[0]
            self.completion_tokens += answer.usage[1]

    @property
    def known(self) -> float | None:
        """The cost of the reported tokens, or None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (self.prompt_tokens * self.price_in + self.completion_tokens * self.price_out) / 1e6

    def most(self, body: Body) -> float:
        """The most that a request can cost: one token per byte of the prompt, and the longest allowed reply."""
        reply = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        prompt = len(json.dumps(body.get("messages") or body["prompt"], ensure_ascii=False).encode())
        return (prompt * (self.price_in or 0.0) + reply * (self.price_out or 0.0)) / 1e6


class EndpointTeacher:
    """A `Teacher` behind the endpoint that ``config.endpoint`` names; no tokenizer or weights are needed.

    Each reply is in the journal with a digest of its request, so data, samples and phases may be added later, and a
    changed request is sent again. The digest includes neither URL nor concurrency.
    """

    def __init__(self, config: AnnotateConfig, form: PromptFormat):
        self.name: str = require(config, "teacher")
        self._config, self._form = config, form
        self._endpoint = Endpoint(config)
        self._spending = Spending(config.price_in, config.price_out)
        self._asked = 0  # requests of this process that were answered

    def describe(self) -> dict[str, Any]:
        examples = Path(self._config.examples or OWN).read_bytes().decode(errors="replace")
        return {
            "endpoint": "chat/completions" if self._form.chat else "completions",
            "request": self._config.request or {},
            "shots": self._config.shots,
            "examples": digest(examples),
        }

    def prompt(self, turns: list[str], instruction: str, new_tokens: int) -> tuple[Any, str]:
        return chat_turns(turns, instruction) if self._form.chat else prompt_text(turns, instruction), ""

    def replies(
        self, journal: ReplyJournal, phase: int, prompts: Sequence[Prompt], decoding: Decoding, bar: tqdm[Any]
    ) -> Iterator[tuple[Prompt, Reply | str]]:
        """As in `Teacher`.

        Raises:
            EndpointError: the endpoint gives no reply, or the next one may exceed ``max_cost``. All replies that arrive
                are kept, including those to requests in flight.
        """
        self._count_kept(journal)
        done: dict[int, Reply | str] = {}
        todo: collections.deque[tuple[int, Request, Body]] = collections.deque()
        for number, prompt in enumerate(prompts):
            body = self._body(phase, prompt, decoding)
            request = Request(phase, prompt.example.id, prompt.sample, digest(body))
            answer = journal.answer(request)
            if answer is None:
                todo.append((number, request, body))
            else:
                done[number] = answer.reply
        bar.update(len(done))
        pool = _Pool(min(self._config.concurrency, len(todo)), self._endpoint.ask)
        try:
            for number, prompt in enumerate(prompts):
                while True:
                    self._submit(pool, todo, journal)
                    self._collect(pool, done, journal, bar, wait=number not in done)
                    if number in done:
                        break
                yield prompt, done.pop(number)
        finally:
            pool.close()
            self._take(pool, done, journal, bar, wait=False)

    def status(self) -> str:
        spent = self._spending
        cost = "" if spent.known is None or spent.unreported else f", cost {spent.known:.4f}"
        return f", {spent.prompt_tokens:,} + {spent.completion_tokens:,} tokens{cost}"

    def summary(self, journal: ReplyJournal, seconds: float) -> dict[str, Any]:
        """Tokens and cost of all answers in the journal; None if the server reported no tokens."""
        spent = self._spending
        is_known = spent.unreported < spent.answers or not spent.answers
        return {
            "answers": spent.answers,
            "asked_now": self._asked,
            "prompt_tokens": spent.prompt_tokens if is_known else None,
            "completion_tokens": spent.completion_tokens if is_known else None,
            "answers_without_usage": spent.unreported,
            "cost": None if spent.unreported else spent.known,
            "seconds": seconds,
        }

    def _count_kept(self, journal: ReplyJournal) -> None:
        """Count everything in the journal, since the replies of earlier runs were also paid for."""
        self._spending = dataclasses.replace(
            self._spending, prompt_tokens=0, completion_tokens=0, unreported=0, answers=0, reserved=0.0
        )
        for answer in journal.answers():
            self._spending.add(answer)

    def _body(self, phase: int, prompt: Prompt, decoding: Decoding) -> Body:
        new_tokens = decoding.new_tokens
        body: Body = {"model": self.name}
        if self._form.chat:
            roles = ("user", "assistant")
            body["messages"] = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(prompt.content)]
            if phase == KEYWORDS:  # a reasoning model thinks before it lists them
                new_tokens = max(new_tokens, self._config.max_new_tokens)
        else:
            body["prompt"] = prompt.content
        body |= {"max_tokens": new_tokens, "temperature": decoding.temperature}
        if decoding.stop is not None:
            body["stop"] = [decoding.stop]
        if decoding.temperature > 0:  # a different seed for each sample
            of = [self._config.seed, phase, prompt.example.id, prompt.sample]
            body["seed"] = int(digest(of)[:15], 16) % 2**31
        assert not isinstance(self._config.request, str)
        return {name: value for name, value in (body | (self._config.request or {})).items() if value is not None}

    def _submit(self, pool: _Pool, todo: collections.deque[tuple[int, Request, Body]], journal: ReplyJournal) -> None:
        """Pass as many requests to the threads as the number of threads and the budget allow."""
        limit, spent = self._config.max_cost, self._spending
        while todo and pool.under_way < pool.size:
            if limit is not None:
                most = spent.most(todo[0][2])
                is_over = (spent.known or 0.0) + spent.reserved + most > limit
                if pool.under_way and (is_over or spent.unreported):
                    return  # requests in flight may cost less than reserved
                if spent.unreported:
                    raise EndpointError(
                        "--max_cost: cannot be enforced: the server reported no tokens for "
                        f"{spent.unreported} replies; {_kept(journal)}, without max_cost, to continue"
                    )
                if is_over:
                    raise EndpointError(
                        f"--max_cost: {spent.known:.6g} of {limit:g} is spent, and the next reply may cost up to "
                        f"{most:.6g}; {_kept(journal)}, with a larger max_cost, to continue"
                    )
                spent.reserved += most
            pool.submit(todo.popleft())

    def _collect(
        self, pool: _Pool, done: dict[int, Reply | str], journal: ReplyJournal, bar: tqdm[Any], wait: bool
    ) -> None:
        """Write the answers that have arrived; after an error, also wait for all requests in flight."""
        error = self._take(pool, done, journal, bar, wait)
        if error is None:
            return
        pool.stopped.set()
        while pool.under_way:
            self._take(pool, done, journal, bar, wait=True)
        if isinstance(error, EndpointError):
            raise EndpointError(f"{error}; {_kept(journal)} to continue") from error
        raise error

    def _take(
        self, pool: _Pool, done: dict[int, Reply | str], journal: ReplyJournal, bar: tqdm[Any], wait: bool
    ) -> Exception | None:
        """Write the answers that have arrived, with ``wait`` at least one; return the first error among them."""
        errors: list[Exception] = []
        found, num_refused = [], 0
        for (number, request, body), answer in pool.results(wait):
            if self._config.max_cost is not None:
                self._spending.reserved -= self._spending.most(body)
            if isinstance(answer, Answer):
                found.append((request, answer))
                done[number] = answer.reply
            elif isinstance(answer, Refused):
                done[number] = str(answer)
                num_refused += 1
            else:
                errors.append(_with_id(answer, request))
        if found:
            journal.put_answers(found)
        for _, answer in found:
            self._spending.add(answer)
        self._asked += len(found)
        bar.update(len(found) + num_refused)
        return errors[0] if errors else None


def _with_id(error: Exception, request: Request) -> Exception:
    return EndpointError(f"{error}, at example {request.id}") if isinstance(error, EndpointError) else error


def _kept(journal: ReplyJournal) -> str:
    return f"{sum(1 for _ in journal.answers())} replies are kept in {journal.path}; run the same command again"


class _Pool:
    """Threads that send requests. They end with the process, so an interrupted run need not wait for a slow reply."""

    def __init__(self, size: int, ask: Callable[[Body, threading.Event], Answer]):
        self.size, self.under_way, self.stopped = size, 0, threading.Event()
        self._ask = ask
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[tuple[int, Request, Body], Answer | Exception]] = queue.SimpleQueue()
        for _ in range(size):
            threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: tuple[int, Request, Body]) -> None:
        self.under_way += 1
        self._requests.put(request)

    def results(self, wait: bool) -> Iterator[tuple[tuple[int, Request, Body], Answer | Exception]]:
        """The results that have arrived; with ``wait``, at least one if a request is in flight."""
        while self.under_way:
            try:
                result = self._results.get(block=wait)
            except queue.Empty:
                return
            self.under_way -= 1
            wait = False
            yield result

    def close(self) -> None:
        """Let each thread end after its current request."""
        self.stopped.set()
        for _ in range(self.size):
            self._requests.put(None)

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                self._results.put((request, self._ask(request[2], self.stopped)))
            except Exception as error:  # raised by the main thread
                self._results.put((request, error))
