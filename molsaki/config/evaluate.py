"""The options of ``molsaki evaluate``."""

from __future__ import annotations

import dataclasses
from typing import Literal

from molsaki.config.options import (
    DATA_FILES,
    PREDICT_HELP,
    DataOptions,
    Dtype,
    check_options,
    option,
)


@dataclasses.dataclass
class EvaluateConfig(DataOptions):
    """``molsaki evaluate``: decode greedily, score exactly, write every prediction."""

    model: str | None = option(None, "Folder or hub name of the model: any causal language model.")
    data_file: str | None = option(
        None, f"File with id, question and gold (or answer), and optionally choices: {DATA_FILES}."
    )
    output_dir: str | None = option(
        None, "Folder for predictions.jsonl and summary.json; with --predictions for summary.json and compare.csv."
    )
    mode: Literal["answer", "rationale"] = option(
        "answer", "Ask for the answer alone, or for a rationale whose last number (or choice) is the answer."
    )
    predict_template: str | None = option(None, f"{PREDICT_HELP} Default: that of the model's run of molsaki distill.")
    template: str | None = option(
        None, "The template of the question. Default: the student_template of the model's run, else plain."
    )
    thinking: bool | None = option(
        None,
        "With mode rationale: whether the reply begins with a <think> trace, which some chat templates need to know. "
        "Default: whether most rationales of the model's run have one.",
    )
    predictions: list[str] = option(
        [],
        "Score earlier output of evaluate without running a model: its folders or predictions.jsonl files, one per "
        "seed, all on the same data.",
    )
    compare: list[str] = option(
        [],
        "predictions.jsonl of another model on the same data, or its folder, for a paired test; with --predictions one "
        "per seed, in the same order.",
    )
    batch_size: int = option(32, "Questions per batch.")
    max_new_tokens: int | None = option(None, "Longest reply in tokens. Default: 16 for answers, 256 for rationales.")
    dtype: Dtype = option("auto", "The model's floating-point type.")
    device: str | None = option(None, "The device. Default: the first CUDA device, else the CPU.")
    limit: int | None = option(None, "Use only this many examples, the first ones.")

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("predictions", "compare"):
            if not isinstance(getattr(self, name), list):
                raise ValueError(f"{name}: expected a list of paths, got {getattr(self, name)!r}")
