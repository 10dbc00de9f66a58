"""The options of ``molsaki keys``."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from molsaki.config.options import (
    COT_TEMPLATE,
    DATA_FILES,
    DataOptions,
    Dtype,
    check_options,
    option,
)
from molsaki.text.key_words import selector_of
from molsaki.text.sentences import splitter_of


@dataclasses.dataclass
class KeysConfig(DataOptions):
    """``molsaki keys``: write the words that matter most to a teacher as the key words of each text."""

    teacher: str | None = option(None, "Folder or hub name of the teacher: any causal language model.")
    data_file: str | None = option(None, f"File with id, question, rationale and answer: {DATA_FILES}.")
    output_file: str | None = option(
        None,
        "JSON lines file to write: the same records with key_spans, for --key given. An interrupted run is continued.",
    )
    by: Literal["attention", "gradient"] = option(
        "attention",
        "The score of a word: the attention it receives from the later steps of the rationale and from the answer "
        "(attention), or the norm of the gradient of the answer's cross-entropy in its embeddings (gradient, as in "
        "arXiv 2506.07851).",
    )
    top: int | None = option(None, "The number of key words of a text, those with the largest scores.")
    top_share: float | None = option(None, "Alternatively, the share of the text's words that are key words.")
    among: str = option("words", "The words that are scored: any value of --key of molsaki extract, such as numbers.")
    of: Literal["all", "question"] = option("all", "Words of the whole text, or of the question only.")
    number_words: bool = option(False, "among=numbers: numbers written out, such as twenty-five, too.")
    splitter: str = option("rules", "by=attention: how steps end, as in molsaki extract.")
    layers: list[int] = option([], "by=attention: the decoder layers to use, from 0. Default: all.")
    labels: Literal["answer", "reply"] = option(
        "answer", "by=gradient: the cross-entropy of the answer, or of rationale and answer (reply)."
    )
    cot_template: str = option(
        COT_TEMPLATE, "The text after the question, with {rationale} and then {answer}, once each."
    )
    teacher_template: str = option("plain", "The template of the texts: plain, chat or a format, as in extract.")
    teacher_max_length: int | None = option(None, "Longest text in tokens; the teacher's context if unset.")
    drop_wrong: bool = option(False, "Leave out examples whose rationale ends in an answer other than the gold one.")
    batch_tokens: int = option(2048, "Tokens per forward pass of the teacher, padding included.")
    dtype: Dtype = option("auto", "The teacher's floating-point type.")
    device_map: dict[str, Any] | str | None = option(
        None, "How the teacher is spread over devices, as in extract. Default: the first CUDA device, else the CPU."
    )
    quantize: Literal["none", "8bit", "4bit"] = option(
        "none", "Load the teacher's linear layers with 8 or 4 bits (needs bitsandbytes)."
    )
    limit: int | None = option(None, "Use only this many examples, the first ones.")

    def __post_init__(self) -> None:
        check_options(self, top=1, batch_tokens=1, teacher_max_length=1, limit=1)
        if (self.top is None) == (self.top_share is None):
            raise ValueError(f"top, top_share: expected one of them, got {self.top} and {self.top_share}")
        if self.top_share is not None and not 0 < self.top_share <= 1:
            raise ValueError(f"top_share: expected a share above 0, at most 1, got {self.top_share}")
        selector_of(self.among, self.number_words, option="among")
        splitter_of(self.splitter)
        if self.by == "gradient" and self.layers:
            raise ValueError(f"layers: expected none with by=gradient, got {self.layers}")
        if self.by == "attention" and self.labels != "answer":
            raise ValueError(f"labels: {self.labels} needs by=gradient, got by=attention")
        before, _, after = self.cot_template.partition("{answer}")
        if before.count("{rationale}") != 1 or f"{before}{{answer}}{after}".count("{answer}") != 1:
            raise ValueError(
                "cot_template: expected a text with {rationale} and then {answer}, once each, got "
                f"{self.cot_template!r}"
            )
