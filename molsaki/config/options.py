"""What several commands have in common: options of data, texts and mixtures, and how a config is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from molsaki.functions import is_named
from molsaki.method.layer_pairs import MIXTURE_NAMES
from molsaki.method.objectives import OBJECTIVES
from molsaki.text.formats import AUTO, FORMATS
from molsaki.text.key_words import KEY_WORDS, selector_of
from molsaki.text.sentences import splitter_of

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# Options whose value may also be ``module:name``, see `molsaki.functions`.
OR_YOUR_OWN: dict[str, Collection[str]] = {"mixture": MIXTURE_NAMES, "objective": OBJECTIVES}

PREDICT_TEMPLATE = "{question}\nAnswer: {answer}"
COT_TEMPLATE = "{rationale} The answer is {answer}."
PREDICT_HELP = (
    "The text of the answer task, with {question} and then {answer}; with a chat template, the part before {answer} is "
    "the user's turn."
)

DATA_FILES = "JSON lines, a JSON array, CSV, TSV or Parquet"


def option(default: Any, help: str, choices: Iterable[str] = ()) -> Any:
    """A dataclass field with a help text and, for some, choices; default lists and dicts are copied per config."""
    metadata = {"help": help} | ({"choices": list(choices)} if choices else {})
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class DataOptions:
    """How the records of data files are read."""

    data_format: str = option(
        AUTO,
        "The format of the records: auto recognises it by their keys, for each record, and logs it; or one of "
        f"{', '.join(FORMATS)}; molsaki is our own format: question, rationale and answer.",
        choices=(AUTO, *FORMATS),
    )


@dataclasses.dataclass
class TextOptions:
    """How a text is read and cut: must be the same when maps are stored and when they are used."""

    key: str = option(
        "numbers",
        f"The key words: {'; '.join(f'{name} = {one.help}' for name, one in KEY_WORDS.items())}; "
        "regex:PATTERN = the matches of a regular expression; module:function = your own function from a text to "
        "spans.",
    )
    key_of: Literal["all", "question"] = option("all", "Key words of the whole text, or of the question only.")
    key_occurrence: Literal["all", "first", "last"] = option(
        "all", "Of key words that differ only in case: all, or only the first or the last."
    )
    max_key_words: int = option(0, "The most key words of a text, the first ones; 0: no limit.")
    splitter: str = option(
        "rules",
        "How steps end: by rules for abbreviations and decimals (rules), at every period as in the paper (periods), by "
        "rules and before every number (numbers), at line ends (lines), at blank lines (paragraphs), after N words "
        "(words:N), by the package sentencex (sentencex:LANGUAGE), or by your own function from a text to the ends of "
        "its steps (module:function).",
    )
    number_words: bool = option(False, "Numbers written out, such as twenty-five, are key words too.")
    teacher_template: str = option(
        "plain",
        "The template of the teacher's texts: plain, chat (its chat template) or a format such as "
        "'Q: {question} A: {rationale}'.",
    )
    student_template: str = option("plain", "The template of the student's texts: plain, chat or a format, as above.")
    teacher_max_length: int | None = option(None, "Longest teacher text in tokens; the teacher's context if unset.")
    max_length: int | None = option(None, "Longest student text in tokens; the student's context if unset.")
    too_long: Literal["skip", "cut"] = option(
        "skip",
        "A text longer than that is left out and counted (skip), or cut at the same place for both models (cut).",
    )
    drop_wrong: bool = option(False, "Leave out examples whose rationale ends in an answer other than the gold one.")


@dataclasses.dataclass
class MixtureOptions:
    """Which layers of the teacher are matched with which layers of the student."""

    mixture: str = option(
        "mixture",
        "The paper's weighted mixture of all layers (mixture), learnt weights for each of teacher_layers (matched), "
        "one of the fixed pairings of layers (single, last, uniform, one_to_one, reverse, random), or your own: "
        "module:function of the numbers of layers of teacher and student, which returns pairs of layers.",
    )
    map_heads: Literal["mean", "each"] = option(
        "mean", "One map per layer, the mean over its heads, or one per head, which then counts as a layer (each)."
    )
    tau_t: float = option(0.1, "Temperature of the teacher's layer weights (Eq. 4).")
    tau_s: float = option(0.5, "Temperature of the student's layer weights (Eq. 5).")
    teacher_scale: Literal["none", "std"] = option(
        "none", "Divide the teacher's layer scores by their standard deviation over layers before the temperature."
    )
    router: Literal["joint", "shared"] = option(
        "joint", "The student's router (Eq. 5): one linear map of all layers' values, or one per layer."
    )
    value_heads: Literal["concat", "mean"] = option(
        "concat", "The router's input from the value vectors: all KV heads side by side, or their mean."
    )
    pooling: Literal["sum", "mean"] = option("sum", "How value vectors are pooled over the tokens of a text (Eq. 5).")
    teacher_layer: int = option(-1, "mixture=single: the teacher's layer; negative counts from the end.")
    student_layer: int = option(-1, "mixture=single: the student's layer; negative counts from the end.")
    teacher_layers: list[int] = option([], "mixture=matched: the teacher's layers. Default: all.")
    mixture_seed: int = option(0, "mixture=random: the seed of the pairing of layers.")


def check_options(config: Any, **least: float) -> None:
    """Refuse a value that is not among its field's choices or is below the ``least`` value given for it.

    The parser checks choices too, but not for configs that are built in Python.
    """
    hints = get_type_hints(type(config))
    if isinstance(config, TextOptions):
        selector_of(config.key, config.number_words)
        splitter_of(config.splitter)
        if config.max_key_words < 0:
            raise ValueError(f"max_key_words: expected at least 0, got {config.max_key_words}")
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name, None), hints[field.name]
        names = OR_YOUR_OWN.get(field.name)
        if names is not None and value not in (None, *names) and not is_named(value):
            raise ValueError(f"{field.name}: expected one of {', '.join(names)}, or module:name, got {value!r}")
        literals = [one for one in (hint, *get_args(hint)) if get_origin(one) is Literal]  # or None, if that is allowed
        choices = get_args(literals[0]) if literals else field.metadata.get("choices", ())
        is_checked = literals or field.default in choices
        if is_checked and value != field.default and value not in choices:
            raise ValueError(f"{field.name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
        if field.name in least and value is not None and value < least[field.name]:
            raise ValueError(f"{field.name}: expected at least {least[field.name]}, got {value}")


def require(config: Any, name: str) -> Any:
    """The value of a field of a config; an error with the field's help text if it is unset."""
    value = getattr(config, name)
    if not value:
        help_text = next(field.metadata["help"] for field in dataclasses.fields(config) if field.name == name)
        raise ValueError(f"--{name}: required. {help_text}")
    return value
