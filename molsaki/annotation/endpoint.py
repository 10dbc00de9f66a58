"""`Endpoint`: requests single replies from an OpenAI-compatible server, and retries after temporary failures."""

from __future__ import annotations

import email.utils
import json
import logging
import os
import random
import re
import threading
import time
from typing import Any

from molsaki.annotation.journal import Answer
from molsaki.annotation.teacher import FILTERED, TOO_LONG
from molsaki.config import AnnotateConfig
from molsaki.evaluation.generate import Reply
from molsaki.extras import require

try:
    import httpx
except ImportError:
    require("train", "httpx", by="--endpoint:")
    raise

logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds before the second try, doubled for each further one
LONGEST_WAIT = 600.0  # seconds that a server may ask to wait; a longer wait ends the run

ENDED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence"}  # values of finish_reason of different servers
PER_PROMPT = {  # the messages with which servers refuse a prompt, with one of the statuses 400, 413 and 422
    TOO_LONG: r"context[ _-]?(length|window|size)|maximum model length|prompt is too long|`inputs` tokens"
    r"|exceeds the maximum number of tokens",
    FILTERED: r"content[ _](filter|management)",
}


class EndpointError(OSError):
    """The endpoint gives no reply, and a retry would not help or has not helped."""


class Refused(Exception):
    """The endpoint refuses one prompt; the message is the reason."""


class _Failure(Exception):
    """A request failed, and a retry may succeed.

    Attributes:
        busy: the server has asked for fewer requests.
        wait: the seconds that the server asks to wait, or None.
    """

    def __init__(self, text: str, busy: bool = False, wait: float | None = None):
        super().__init__(text)
        self.busy, self.wait = busy, wait


class Endpoint:
    """Sends one request after another. Several threads may use it.

    Args:
        config: its ``endpoint`` is the base URL, its ``template`` decides between chats and texts, and the environment
            variable ``api_key_env`` has the API key, which is sent with each request and used nowhere else.

    Raises:
        ValueError: the key cannot be sent as a header.
    """

    def __init__(self, config: AnnotateConfig):
        assert config.endpoint is not None
        path = "/chat/completions" if config.template == "chat" else "/completions"
        self.url = config.endpoint.rstrip("/") + path
        self._key_name, self._key = config.api_key_env, os.environ.get(config.api_key_env, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError(
                f"--api_key_env: the value of {self._key_name} cannot be sent: expected visible ASCII only"
            )
        self._retries = config.retries
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(config.timeout, connect=min(10.0, config.timeout), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.concurrency),
        )
        self._random = random.Random()
        self._answered = 0  # requests, of all threads
        self._not_before = 0.0  # earliest next request, as the server asked; seconds of time.monotonic
        self._has_warned = False

    def ask(self, body: dict[str, Any], stopped: threading.Event) -> Answer:
        """The answer to a request. Waits between tries, and stops as soon as ``stopped`` is set.

        Raises:
            EndpointError: the server refuses all such requests, or every try failed.
            Refused: the server refuses this prompt alone.
        """
        failures, answered = 0, self._answered
        while True:
            self._wait(self._not_before - time.monotonic(), stopped)
            try:
                answer = self._try(body)
            except _Failure as failure:
                if failure.busy and self._answered != answered:
                    failures = 0  # other requests were served meanwhile, so a retry will succeed eventually
                failures, answered = failures + 1, self._answered
                if failures > self._retries:
                    tries = f"after {failures} tries" if failures > 1 else "at the only try"
                    raise EndpointError(f"--endpoint: {self.url}: {failure} ({tries})") from None
                if failures == 3:  # tell the user why nothing happens
                    logger.warning("%s: %s; retrying up to %d times", self.url, failure, self._retries)
                if failure.wait is None:
                    delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (failures - 1))
                    self._wait(delay * self._random.uniform(0.5, 1), stopped)
                elif failure.wait <= LONGEST_WAIT:  # all threads wait
                    self._not_before = max(self._not_before, time.monotonic() + failure.wait)
                else:
                    asks = f"the server asks to wait {failure.wait:.0f} seconds"
                    raise EndpointError(f"--endpoint: {self.url}: {asks}: {failure}") from None
            else:
                self._answered += 1
                return answer

    def _wait(self, seconds: float, stopped: threading.Event) -> None:
        if stopped.wait(max(seconds, 0.0)):
            raise EndpointError(f"--endpoint: {self.url}: the run was stopped")

    def _try(self, body: dict[str, Any]) -> Answer:
        try:
            response = self._client.post(self.url, json=body)
        except httpx.TimeoutException as error:
            raise _Failure(f"no reply in time ({type(error).__name__}; --timeout)") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _Failure(self._hide_key(f"{type(error).__name__}: {error}")) from None
        except httpx.InvalidURL as error:
            raise EndpointError(f"--endpoint: {self.url}: {error}") from None
        status = response.status_code
        if status == 200:
            return self._read(response, body)
        said = f"status {status}: {self._message(response)}"
        if status in (408, 409, 425, 429) or status >= 500:
            raise _Failure(said, busy=status == 429, wait=_retry_after(response.headers.get("Retry-After")))
        for reason, pattern in PER_PROMPT.items():
            if status in (400, 413, 422) and re.search(pattern, response.text, re.I):
                if not self._has_warned:
                    self._has_warned = True
                    logger.warning("a prompt was left out, possibly the first of several: %s", said)
                raise Refused(reason)
        if status in (401, 403):
            is_set = "from" if self._key else "none is set in"
            said += f" (API key: {is_set} the environment variable {self._key_name}, --api_key_env)"
        raise EndpointError(f"--endpoint: {self.url}: {said}")

    def _read(self, response: httpx.Response, body: dict[str, Any]) -> Answer:
        try:
            data = response.json()
            choice = data["choices"][0]
            text = _text(choice)
            finish, usage = choice["finish_reason"], _usage(data)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Failure(f"expected a completion, got {self._hide_key(response.text[:300])!r}") from None
        text = text.encode(errors="replace").decode()  # half of a surrogate pair cannot be written
        if finish == "content_filter":
            return Answer(FILTERED, usage)
        if finish != "length" and finish not in ENDED:
            raise _Failure(f"expected finish_reason stop or length, got {finish!r}")
        ended = finish != "length"
        for stop in body.get("stop") or ():
            if stop in text:  # some servers do not cut the text there
                text, ended = text.partition(stop)[0], True
        return Answer(Reply(text, ended), usage)

    def _message(self, response: httpx.Response) -> str:
        """The server's own message, with the API key removed if it repeats it."""
        try:
            data = response.json()
            error = data.get("error") or data
            found = error if isinstance(error, str) else error.get("message") or error.get("detail") or data
        except (ValueError, AttributeError):
            found = response.text
        text = found if isinstance(found, str) else json.dumps(found)
        return self._hide_key(" ".join(text.split()))[:500] or response.reason_phrase

    def _hide_key(self, text: str) -> str:
        return text.replace(self._key, "[the API key]") if self._key else text


def _text(choice: dict[str, Any]) -> str:
    """The text of a choice, with the reasoning before it between ``<think>`` and ``</think>``."""
    if "message" not in choice:
        return _checked(choice["text"])
    message = choice["message"]
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    thinking = _checked(message.get("reasoning_content") or message.get("reasoning") or "").strip()
    return (f"<think>\n{thinking}\n</think>\n\n" if thinking else "") + _checked(content)


def _checked(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError  # `_read` says what the server sent
    return value


def _usage(data: dict[str, Any]) -> tuple[int, int] | None:
    usage = data.get("usage") or {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return (prompt, completion) if isinstance(prompt, int) and isinstance(completion, int) else None


def _retry_after(value: str | None) -> float | None:
    """The seconds of a Retry-After header, which is a number or a date."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
