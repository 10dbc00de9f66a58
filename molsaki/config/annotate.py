"""The options of ``molsaki annotate``."""

from __future__ import annotations

import dataclasses
import json
import urllib.parse
from typing import Any, Literal

from molsaki.config.options import (
    DATA_FILES,
    DataOptions,
    Dtype,
    check_options,
    option,
)


@dataclasses.dataclass
class AnnotateConfig(DataOptions):
    """``molsaki annotate``: a teacher writes rationales, and those that end in the right answer are kept."""

    teacher: str | None = option(
        None, "Folder or hub name of the teacher: any causal language model; with endpoint, the model's name there."
    )
    data_file: str | None = option(
        None, f"File with id, question and gold (or answer), and optionally choices and task: {DATA_FILES}."
    )
    output_file: str | None = option(
        None, "JSON lines file to write. Its .work.jsonl keeps all replies, so an interrupted run can be continued."
    )
    examples: str | None = option(
        None,
        "Demonstrations: JSON lines file with question, rationale, answer, and optionally task, choices and keywords. "
        "Default: the package's own, four for math and four for commonsense.",
    )
    shots: int | None = option(None, "Show only this many demonstrations per task, the first ones; 0 shows none.")
    template: str = option(
        "plain",
        "The form of the prompt: plain, chat (its chat template, demonstrations as earlier turns) or a format with "
        "{question}, {rationale} and {answer}; plain is 'Question: {question}', 'Rationale: {rationale}' and 'Answer: "
        "{answer}', each on a separate line.",
    )
    instruction: str = option(
        "Answer each question: first reason step by step in a few sentences, then give the answer on a line of its own "
        "that starts with 'Answer:'.",
        "The text before the first demonstration; may be empty.",
    )
    hint: str = option(
        "{question}\nHint: The answer is {answer}.", "The question of the second phase, which shows the gold answer."
    )
    rationales: Literal["write", "keep"] = option(
        "write",
        "keep: write no rationales; ask for the key words of the rationales in data_file, and write its records with "
        "the field keywords added. Records that have key words keep them.",
    )
    keywords: Literal["none", "teacher"] = option(
        "none", "teacher: also ask the teacher for the key words of each kept text, for key=keywords."
    )
    thinking: Literal["drop", "keep"] = option(
        "drop",
        "A thinking trace before the rationale: drop it, or keep it in <think> tags at the beginning of the "
        "rationale, so that the student learns it too.",
    )
    keep_wrong: bool = option(False, "Write the refused replies, with their reasons, to the output's .wrong.jsonl.")
    max_new_tokens: int = option(256, "Longest reply in tokens.")
    batch_size: int = option(16, "Replies per batch.")
    samples: int = option(1, "Replies per question and phase; every distinct right reply is kept. Needs temperature.")
    temperature: float = option(0.0, "0 decodes greedily; above 0, replies are sampled at this temperature.")
    seed: int = option(0, "Seed of the sampling.")
    dtype: Dtype = option("auto", "The teacher's floating-point type.")
    device: str | None = option(None, "The device. Default: the first CUDA device, else the CPU.")
    device_map: str | None = option(None, "How the teacher is spread over devices, as in from_pretrained; e.g. auto.")
    limit: int | None = option(None, "Use only this many examples, the first ones.")

    endpoint: str | None = option(
        None,
        "Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1, to use instead of a local model: "
        "its chat completions with template=chat, else its completions.",
    )
    api_key_env: str = option(
        "OPENAI_API_KEY", "The environment variable with the endpoint's API key; none is sent if it is not set."
    )
    concurrency: int = option(8, "Number of concurrent requests.")
    request: dict[str, Any] | str | None = option(
        None,
        "Further fields of each request, as JSON, such as '{\"top_p\": 0.9}'; null leaves a field out, as in "
        '\'{"max_tokens": null, "max_completion_tokens": 2048}\' for servers that want the other name.',
    )
    timeout: float = option(600.0, "Seconds after which a request without a reply fails.")
    retries: int = option(
        8,
        "How often a request is repeated after status 408, 409, 425, 429 or 5xx, a timeout or a lost connection, with "
        "increasing pauses, or the pause that the server asks for.",
    )
    price_in: float | None = option(None, "Price of a million prompt tokens; with price_out, the cost is computed.")
    price_out: float | None = option(None, "Price of a million completion tokens, reasoning included.")
    max_cost: float | None = option(
        None,
        "Stop before a request could raise the cost above this, keeping all replies. Assumes the longest reply and a "
        "token per byte of the prompt. Needs both prices.",
    )

    def __post_init__(self) -> None:
        check_options(
            self, max_new_tokens=1, batch_size=1, samples=1, shots=0, limit=1, concurrency=1, retries=0, price_in=0,
            price_out=0, max_cost=0,
        )  # fmt: skip
        self._check_endpoint()
        if self.rationales == "keep":
            if self.keywords == "none":
                raise ValueError("rationales: keep needs keywords=teacher, or there is nothing to ask for")
            self._refuse(
                "rationales=keep", "instruction", "hint", "keep_wrong", "samples", "temperature", "seed", "thinking"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples: {self.samples} greedy replies are all the same; give a temperature above 0")
        if self.device is not None and self.device_map is not None:
            raise ValueError(f"device: give either device or device_map, got {self.device!r} and {self.device_map!r}")
        if "{question}" not in self.hint or "{answer}" not in self.hint:
            raise ValueError(f"hint: expected a text with {{question}} and {{answer}}, got {self.hint!r}")

    def _check_endpoint(self) -> None:
        """Refuse options that have no effect with an endpoint, or without one, and values that no server takes."""
        if self.endpoint is None:
            names = ("api_key_env", "concurrency", "request", "timeout", "retries", "price_in", "price_out", "max_cost")
            self._refuse("a teacher that is loaded here; it needs endpoint", *names)
            return
        self._refuse("endpoint, whose server decides it", "dtype", "device", "device_map", "batch_size")
        url = urllib.parse.urlsplit(self.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.query or url.fragment:
            raise ValueError(
                "endpoint: expected a base URL such as http://localhost:8000/v1, without user, password and query, got "
                f"{url._replace(netloc=url.netloc.rpartition('@')[2], query='', fragment='').geturl()!r}"
            )
        if self.timeout <= 0:
            raise ValueError(f"timeout: expected seconds above 0, got {self.timeout}")
        if isinstance(self.request, str):
            try:
                self.request = json.loads(self.request)
            except ValueError as error:
                raise ValueError(f"request: expected a JSON object, got {self.request!r}: {error}") from None
        fields = self.request or {}
        if not isinstance(fields, dict):
            raise ValueError(f"request: expected a JSON object, got {fields!r}")
        for name in ("model", "messages", "prompt", "n", "stream"):
            if name in fields:
                raise ValueError(f"request: {name}: is set by the command and cannot be changed")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in, price_out: expected both or neither, got one of them")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError("max_cost: needs price_in and price_out")
        limit = fields.get("max_completion_tokens") or fields.get("max_tokens", self.max_new_tokens)
        if self.max_cost is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"max_cost: needs a longest reply in tokens; by request it is {limit!r}")

    def _refuse(self, reason: str, *names: str) -> None:
        """Refuse the options of these names that are set."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ValueError(f"{field.name}: {value!r} has no effect with {reason}")
