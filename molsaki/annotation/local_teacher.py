"""`LocalTeacher`: a causal language model that is loaded here and replies batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.annotation.journal import ReplyJournal
from molsaki.annotation.prompts import PromptFormat, prompt_ids
from molsaki.annotation.teacher import REFUSED, TOO_LONG, Decoding, Prompt
from molsaki.config import AnnotateConfig
from molsaki.evaluation.generate import Reply, batches, decode
from molsaki.io import digest
from molsaki.modeling.loading import context_length, load_for_command
from molsaki.store.fingerprints import fingerprint_model, fingerprint_tokenizer
from molsaki.text.frames import TextChanged


class LocalTeacher:
    """A `Teacher` that is loaded here.

    Batches are formed independently of progress, so a resumed run decodes exactly what an uninterrupted one would.

    Args:
        config: the options of the command.
        form: the format of the prompts.
        model, tokenizer: used instead of loading ``config.teacher``; both or neither.
    """

    def __init__(
        self,
        config: AnnotateConfig,
        form: PromptFormat,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        model, tokenizer = load_for_command(config, "teacher", model, tokenizer, device_map=config.device_map)
        if config.device_map is None:
            model.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        self.name = _name_of(config, model)
        self._config, self._form, self._model, self._tokenizer = config, form, model, tokenizer
        self._tokens = 0  # decoded by this process

    def describe(self) -> dict[str, Any]:
        return {
            "teacher_dtype": str(self._model.dtype),
            "teacher_weights": fingerprint_model(self._model),
            "teacher_tokenizer": fingerprint_tokenizer(self._tokenizer),
        }

    def prompt(self, turns: list[str], instruction: str, new_tokens: int) -> tuple[list[int], str]:
        try:
            ids = prompt_ids(turns, instruction, self._form, self._tokenizer)
        except TextChanged:
            return [], REFUSED
        limit = context_length(self._model.config)
        return ids, "" if limit is None or len(ids) + new_tokens <= limit else TOO_LONG

    def replies(
        self, journal: ReplyJournal, phase: int, prompts: Sequence[Prompt], decoding: Decoding, bar: tqdm[Any]
    ) -> Iterator[tuple[Prompt, Reply | str]]:
        for number, indices in enumerate(batches([prompt.content for prompt in prompts], self._config.batch_size)):
            batch = [prompts[i] for i in indices]
            asked = [(prompt.example.id, prompt.sample) for prompt in batch]
            replies = journal.get(phase, number, asked)
            if replies is None:
                replies, tokens = decode(
                    self._model,
                    self._tokenizer,
                    [prompt.content for prompt in batch],
                    decoding.new_tokens,
                    stop=decoding.stop,
                    temperature=decoding.temperature,
                    seed=int(digest([self._config.seed, phase, number])[:15], 16),
                )
                self._tokens += tokens
                journal.put(phase, number, asked, replies)
            yield from zip(batch, replies, strict=True)
            bar.update(len(batch))

    def status(self) -> str:
        return ""

    def summary(self, journal: ReplyJournal, seconds: float) -> dict[str, Any]:
        return {"tokens": self._tokens, "seconds": seconds, "tokens_per_second": self._tokens / seconds}


def _name_of(config: AnnotateConfig, model: PreTrainedModel) -> str:
    name: str = config.teacher or getattr(model.config, "name_or_path", "") or type(model).__name__
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name
