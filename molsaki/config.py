"""The config dataclasses, which are also the command line: every field is a flag, its help text is the flag's.

``parse(DistillConfig, argv)`` reads ``--config file.yaml`` first and lets the flags override it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

Config = TypeVar("Config")

PREDICT_TEMPLATE = "{question}\nAnswer: {answer}"
PREDICT_HELP = (
    "The text of the answer task, with {question} and then {answer}; under a chat template, what is before {answer} is "
    "the user's turn."
)


def option(default, help: str):
    """A dataclass field with its help text; lists and dicts are copied for each config."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class TextOptions:
    """How a text is read and cut: has to be the same when maps are stored and when they are used."""

    key: Literal["numbers", "keywords"] = option(
        "numbers", "What the key words are: every number, or each example's own keywords field."
    )
    splitter: Literal["rules", "periods"] = option(
        "rules", "What ends a step: rules that know abbreviations and decimals, or periods as in the paper."
    )
    number_words: bool = option(False, "Take numbers written out, such as twenty-five, for numbers too.")
    teacher_template: str = option(
        "plain",
        "How the teacher gets the texts: plain, chat (its chat template) or a format such as "
        "'Q: {question} A: {rationale}'.",
    )
    student_template: str = option("plain", "How the student gets the texts: plain, chat or a format, as above.")
    teacher_max_length: int | None = option(None, "Longest teacher text in tokens; the teacher's context if unset.")
    max_length: int | None = option(None, "Longest student text in tokens; the student's context if unset.")
    too_long: Literal["skip", "cut"] = option(
        "skip", "What happens to a text longer than that: counted and left out, or cut on both sides alike."
    )
    drop_wrong: bool = option(False, "Leave out examples whose rationale ended in another answer than the gold one.")


@dataclasses.dataclass
class MixtureOptions:
    """Which layers of the teacher teach which of the student."""

    mixture: Literal["mixture", "single", "last", "uniform", "one_to_one", "reverse", "random"] = option(
        "mixture", "The paper's weighted mixture of all layers, or one of the fixed pairings of layers."
    )
    tau_t: float = option(0.1, "Temperature of the teacher's layer weights (Eq. 4).")
    tau_s: float = option(0.5, "Temperature of the student's layer weights (Eq. 5).")
    teacher_scale: Literal["none", "std"] = option(
        "none", "Divide the teacher's layer scores by their standard deviation over layers before the temperature."
    )
    router: Literal["joint", "shared"] = option(
        "joint", "The student's router (Eq. 5): one linear map of all layers' values, or one for each layer."
    )
    value_heads: Literal["concat", "mean"] = option(
        "concat", "What the router reads of the value vectors: all KV heads side by side, or their mean."
    )
    pooling: Literal["sum", "mean"] = option("sum", "How value vectors are pooled over the tokens of a text (Eq. 5).")
    teacher_layer: int = option(-1, "mixture=single: the teacher's layer; negative counts from the end.")
    student_layer: int = option(-1, "mixture=single: the student's layer; negative counts from the end.")
    mixture_seed: int = option(0, "mixture=random: the seed of the pairing of layers.")


@dataclasses.dataclass
class ExtractConfig(TextOptions, MixtureOptions):
    """``molsaki extract``: run the teacher once over a data set and store its maps."""

    teacher: str | None = option(None, "Folder or hub name of the white-box teacher.")
    data_files: list[str] = option([], "JSON lines files with id, question, rationale and answer; one store for all.")
    store: str | None = option(None, "Folder of the store to write; an unfinished one is continued.")
    student: str | None = option(
        None, "Folder or hub name of the student; needed with too_long=cut and for mixtures that pair up layers."
    )
    all_layers: bool = option(False, "Store the map of every layer, so that any mixture can be used later.")
    packing: bool | None = option(
        None, "Run the texts of a forward pass in one row without padding; if unset, wherever the teacher can."
    )
    batch_tokens: int = option(8192, "Tokens, padding included, in one forward pass of the teacher.")
    shard_size: int = option(1024, "Examples in one file of the store, and the most work an interruption can lose.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "The teacher's floating-point type.")
    device_map: dict | str | None = option(
        None,
        "How a teacher larger than one device is spread, as in from_pretrained: auto (all devices, then memory, then "
        "disk), or JSON of modules and devices. Each process needs devices of its own (CUDA_VISIBLE_DEVICES).",
    )
    quantize: Literal["none", "8bit", "4bit"] = option(
        "none", "Load the teacher with linear layers of so many bits (needs bitsandbytes)."
    )
    limit: int | None = option(None, "Use only the first so many examples.")

    def __post_init__(self):
        check_choices(self)
        for name in ("batch_tokens", "shard_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")


@dataclasses.dataclass
class DistillConfig(TextOptions, MixtureOptions, TrainingArguments):
    """``molsaki distill``: train a student; everything of transformers' ``TrainingArguments`` and what follows."""

    student: str | None = option(None, "Folder or hub name of the student.")
    teacher: str | None = option(None, "Folder or hub name of the white-box teacher, to run it live.")
    store: str | None = option(None, "Folder of the teacher's stored maps, in place of a live teacher.")
    train_file: str | None = option(None, "JSON lines file with id, question, rationale and answer.")
    eval_file: str | None = option(None, "JSON lines file whose losses are computed with eval_strategy steps or epoch.")
    objective: Literal["vanilla", "dss", "mmi", "logits", "molsaki"] = option(
        "molsaki",
        "The loss: answers only; answers and rationales; with mutual information between the two; with the teacher's "
        "logits; with the teacher's attention.",
    )
    alpha: float = option(0.5, "Weight of the answer's cross-entropy; the rationale's has 1 - alpha (Eq. 7).")
    beta: float = option(1.0, "Weight of the attention loss (Eq. 7).")
    beta_mmi: float = option(0.1, "objective=mmi: weight of the cross-entropy between the two tasks' predictions.")
    beta_logits: float = option(0.3, "objective=logits: weight of the divergence from the teacher's logits.")
    temperature: float = option(2.0, "objective=logits: temperature that softens both models' logits.")
    normalise: Literal["softmax", "sum"] = option(
        "softmax", "How each step's row of a map becomes a distribution over words (Eq. 6)."
    )
    causal_words: bool = option(False, "Leave out of a step's row the words that no token of the step can see yet.")
    predict_template: str = option(PREDICT_TEMPLATE, PREDICT_HELP)
    packing: bool | None = option(
        None,
        "Run all texts of a batch, of both tasks, in one row without padding; if unset, wherever the student can.",
    )
    share_question: bool | None = option(
        None,
        "In such a row, run the question, with which both texts of an example begin, once; if unset, wherever the "
        "student can.",
    )
    fused_cross_entropy: Literal["auto", "torch", "liger"] = option(
        "auto",
        "What computes the cross-entropy of the labels: torch, in chunks of the vocabulary's logits, or liger-kernel's "
        "fused kernel; auto takes the latter on CUDA where it is installed.",
    )
    student_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "float32", "The student's floating-point type; float32 with --bf16 is mixed precision."
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "The live teacher's floating-point type."
    )
    freeze: list[str] = option([], "Regular expressions of the student's parameters that are not trained.")
    lora_rank: int = option(0, "Train LoRA adapters of this rank (needs peft); 0 trains the model itself.")
    lora_alpha: float = option(16.0, "Scale of the LoRA adapters.")
    lora_dropout: float = option(0.0, "Dropout of the LoRA adapters.")
    lora_targets: list[str] = option(["all-linear"], "Modules that get LoRA adapters: names, or all-linear.")
    router_learning_rate: float | None = option(
        None, "Learning rate of the student's router, if it is to differ from the student's."
    )
    resume: bool = option(False, "Continue from the last whole checkpoint in output_dir, if there is one.")
    limit: int | None = option(None, "Use only the first so many training examples.")

    logging_steps: float = option(10, "Log every so many steps, or below 1 every such part of all steps.")
    report_to: None | str | list[str] = option("none", "Trackers to report to, such as tensorboard.")
    remove_unused_columns: bool = option(False, "Has to stay False: the batches are nested.")
    ddp_find_unused_parameters: bool | None = option(False, "For models with parameters a batch may not use.")
    gradient_checkpointing_kwargs: dict | str | None = option(
        {"use_reentrant": False}, "Keyword arguments of the checkpoint function."
    )

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # else bf16 is refused on a CPU
        super().__post_init__()
        check_choices(self)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {self.alpha}")
        for name in ("beta", "beta_mmi", "beta_logits"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if self.share_question and (self.packing is False or self.objective == "vanilla"):
            raise ValueError(
                "share_question: expected packing and an objective of both tasks, got "
                f"packing={self.packing} and objective={self.objective}"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, the batches are nested")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: expected 0, the losses are the paper's")

    @property
    def device(self) -> torch.device:
        """Where this process trains; with several on a CPU not ``cpu:0``, which ``torch.load`` does not know."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


@dataclasses.dataclass
class EvaluateConfig:
    """``molsaki evaluate``: decode greedily, score exactly, write every prediction."""

    model: str | None = option(None, "Folder or hub name of the model: any causal language model.")
    data_file: str | None = option(None, "JSON lines file with id, question and gold (or answer); choices if any.")
    output_dir: str | None = option(None, "Folder for predictions.jsonl and summary.json.")
    mode: Literal["answer", "rationale"] = option(
        "answer", "Ask for the answer alone, or for a rationale whose last number (or choice) is the answer."
    )
    predict_template: str = option(PREDICT_TEMPLATE, PREDICT_HELP)
    template: str = option("plain", "How the question is put to the model: the student_template of its training.")
    compare: str | None = option(None, "predictions.jsonl of another model on the same data, for a paired test.")
    batch_size: int = option(32, "Questions decoded together.")
    max_new_tokens: int | None = option(None, "Longest reply in tokens; if unset 16 for answers, 256 for rationales.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "The model's floating-point type.")
    device: str | None = option(None, "Where to run; the first CUDA device if there is one, else the CPU.")
    limit: int | None = option(None, "Use only the first so many examples.")

    def __post_init__(self):
        check_choices(self)


@dataclasses.dataclass
class PlotConfig(TextOptions, MixtureOptions):
    """``molsaki plot``: draw a run's losses and layer weights, and maps of texts."""

    run: str | None = option(
        None, "Output folder of molsaki distill: its log is drawn, and its options and router are used for the maps."
    )
    data_file: str | None = option(None, "JSON lines file whose examples' maps are drawn.")
    teacher: str | None = option(None, "Folder or hub name of the teacher, run live for its maps if there is no store.")
    store: str | None = option(None, "Folder of the teacher's stored maps.")
    student: str | None = option(None, "Folder or hub name of the student, or a checkpoint with its router.")
    examples: int = option(3, "How many of the data's first examples to draw.")
    ids: list[str] = option([], "Which examples to draw, in place of the first.")
    output_dir: str | None = option(None, "Folder for the pictures; plots in the run's folder if unset.")
    format: Literal["png", "pdf", "svg"] = option("png", "Kind of file.")

    def __post_init__(self):
        check_choices(self)


@dataclasses.dataclass
class AnnotateConfig:
    """``molsaki annotate``: a teacher writes rationales, and those that end in the right answer are kept."""

    teacher: str | None = option(None, "Folder or hub name of the teacher: any causal language model.")
    data_file: str | None = option(
        None, "JSON lines file with id, question and gold (or answer); choices, task if any."
    )
    output_file: str | None = option(
        None, "JSON lines file to write; its .work.jsonl keeps what is decoded, so an interrupted run is continued."
    )
    examples: str | None = option(
        None,
        "Demonstrations: JSON lines file with question, rationale, answer; task, choices, keywords if any. If unset, "
        "the package's own four for math and four for commonsense.",
    )
    shots: int | None = option(None, "Show only the first so many demonstrations of a task; 0 shows none.")
    template: str = option(
        "plain",
        "How the teacher is asked: plain, chat (its chat template, demonstrations as earlier turns) or a format with "
        "{question}, {rationale} and {answer}; plain is 'Question: {question}', 'Rationale: {rationale}' and "
        "'Answer: {answer}' on lines of their own.",
    )
    instruction: str = option(
        "Answer each question: first reason step by step in a few sentences, then give the answer on a line of its own "
        "that starts with 'Answer:'.",
        "Said before the first demonstration; may be empty.",
    )
    hint: str = option(
        "{question}\nHint: The answer is {answer}.", "The question of the second phase, which shows the gold answer."
    )
    keywords: Literal["none", "teacher"] = option(
        "none", "teacher: ask the teacher for the key words of each kept text too, as key=keywords reads them."
    )
    keep_wrong: bool = option(False, "Write what was refused, with the reason, to the output's .wrong.jsonl.")
    max_new_tokens: int = option(256, "Longest reply in tokens.")
    batch_size: int = option(16, "Replies decoded together.")
    samples: int = option(
        1, "Replies to a question in a phase; every right one that is new is kept. Needs temperature."
    )
    temperature: float = option(0.0, "0 decodes greedily; above, replies are drawn at this temperature.")
    seed: int = option(0, "Seed of the draws.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "The teacher's floating-point type.")
    device: str | None = option(None, "Where to run; the first CUDA device if there is one, else the CPU.")
    device_map: str | None = option(None, "How the teacher is spread over devices, as in from_pretrained; e.g. auto.")
    limit: int | None = option(None, "Use only the first so many examples.")

    def __post_init__(self):
        check_choices(self)
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("samples", 1), ("shots", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.temperature < 0:
            raise ValueError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples: {self.samples} greedy replies are all the same; give a temperature above 0")
        if self.device is not None and self.device_map is not None:
            raise ValueError(f"device: give either device or device_map, got {self.device!r} and {self.device_map!r}")
        if "{question}" not in self.hint or "{answer}" not in self.hint:
            raise ValueError(f"hint: expected a text with {{question}} and {{answer}}, got {self.hint!r}")


def parse(config_class: type[Config], argv: Sequence[str] | None = None, prog: str | None = None) -> Config:
    """A config from the command line, on top of the YAML file that ``--config`` names.

    Raises:
        ValueError: an unknown flag or YAML key (with the nearest valid one) or a value of the wrong kind.
        FileNotFoundError: there is no such YAML file.
    """
    parser = _Parser(config_class, prog=prog, allow_abbrev=False, description=config_class.__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file that sets these flags; flags given here override.")
    argv = list(sys.argv[1:] if argv is None else argv)
    names = [field.name for field in dataclasses.fields(config_class) if field.init]
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"{unknown[0]}: no such flag" + _nearest(unknown[0].lstrip("-").split("=")[0], names, "--"))
    if given.config is None:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    values = _read_yaml(Path(given.config))
    for key in values:
        if key not in names:
            raise ValueError(f"{given.config}: {key}: no such key" + _nearest(str(key), names))
    lines = [word for key, value in values.items() if value is not None for word in _as_flag(key, value)]
    try:
        parser.parse_known_args(lines)
    except ValueError as error:
        raise ValueError(f"{given.config}: {error}") from None
    return parser.parse_args_into_dataclasses(lines + argv, look_for_args_file=False)[0]


def check_choices(config) -> None:
    """Refuse a value that a ``Literal`` field of a config does not list; Python callers get what the parser gives."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if get_origin(hints[field.name]) is Literal and getattr(config, field.name) not in get_args(hints[field.name]):
            choices = ", ".join(map(str, get_args(hints[field.name])))
            raise ValueError(f"{field.name}: expected one of {choices}, got {getattr(config, field.name)!r}")


def require(config, *names: str) -> None:
    """Refuse a config in which one of these fields is unset."""
    for name in names:
        if not getattr(config, name):
            help_text = next(f.metadata["help"] for f in dataclasses.fields(config) if f.name == name)
            raise ValueError(f"--{name}: required. {help_text}")


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path}: expected `name: value` lines, got {type(values).__name__}")
    return values or {}


def _as_flag(key: str, value) -> list[str]:
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)] if value else []
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def _nearest(name: str, names, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
