"""Reads a config from the command line, a YAML file or a dict: every field of the dataclass is a flag.

``parse(ExtractConfig, argv)`` reads ``--config file.yaml`` first; the flags override it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import difflib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from molsaki import presets
from molsaki.config import MixtureOptions
from molsaki.exits import is_user_error

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def parse(config_class: type[Config], argv: Sequence[str] | None = None, prog: str | None = None) -> Config:
    """A config from the command line, on top of the YAML file that ``--config`` names, on top of ``--preset``.

    Raises:
        ValueError: an unknown flag or YAML key (with the nearest valid one), a value of the wrong kind, or several
            values for a flag that takes one.
        FileNotFoundError: there is no such YAML file.
    """
    return parse_command(config_class, list(sys.argv[1:] if argv is None else argv), prog, has_dry_run=False)[0]


def parse_command(
    config_class: type[Config], argv: list[str], prog: str | None, has_dry_run: bool
) -> tuple[Config, bool]:
    """As `parse`, and whether ``dry_run`` was requested, by flag or in the YAML file, for a command that has it."""
    parser, names = _parser(config_class, prog, has_dry_run)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(_about_unknown(unknown[0], argv, names))
    _check_repeated(parser, argv)
    preset, dry_run = getattr(given, "preset", None), getattr(given, "dry_run", None)
    if given.config is not None:
        path = Path(given.config)
        values = read_yaml(path, "--config: ")
        check_keys(values, names, path)
        preset = preset or values.pop("preset", None)
        argv = _flags(parser, values, path) + argv
        if dry_run is None and has_dry_run:
            dry_run = parser.parse_known_args(argv)[0].dry_run
    if preset is not None:
        argv = _flags(parser, presets.options(preset, config_class), f"--preset {preset}") + argv
    return cast(Config, parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]), bool(dry_run)


def build(config_class: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A config from values as a YAML file has them, such as ``"1e-3"`` for a number; errors begin with ``where``.

    Raises:
        ValueError: an unknown name (with the nearest valid one) or a value of the wrong kind.
    """
    parser, names = _parser(config_class)
    check_keys(values, names, where)
    preset = {} if values.get("preset") is None else presets.options(values["preset"], config_class)
    given = {name: value for name, value in values.items() if name != "preset"}
    argv = _flags(parser, preset | given, where)
    try:
        return cast(Config, parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0])
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, ImportError) and not is_user_error(error):
            raise
        raise ValueError(f"{where}: {error}") from error


def _parser(config_class: type[Config], prog: str | None = None, has_dry_run: bool = False) -> tuple[Any, list[str]]:
    """A parser whose errors are ValueErrors, and the names of its flags. `molsaki.command_parser` shows their help."""
    from transformers.hf_argparser import HfArgumentParser, string_to_bool

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise_error(message)

    parser = Parser(cast(Any, config_class), prog=prog, allow_abbrev=False, add_help=False)
    parser.add_argument("--config")
    names = [field.name for field in dataclasses.fields(config_class) if field.init]
    if issubclass(config_class, MixtureOptions):
        parser.add_argument("--preset", choices=list(presets.PRESETS))
        names.append("preset")
    if has_dry_run:
        parser.add_argument("--dry_run", nargs="?", const=True, type=string_to_bool)
        names.append("dry_run")
    return parser, names


def raise_error(message: str) -> NoReturn:
    """Raise argparse's error with the flag in one spelling, and with the cure where a value seems to be missing."""
    flag, colon, what = message.removeprefix("argument ").partition(": ")
    if not message.startswith("argument --") or not colon:
        raise ValueError(message)
    flag = flag.partition("/")[0]
    if re.fullmatch("expected (one|at least one) argument", what):
        raise ValueError(f"{flag}: expected a value; one that begins with a dash is written {flag}=VALUE")
    raise ValueError(f"{flag}: {what}")


def read_yaml(path: Path, flag: str = "") -> dict[Any, Any]:
    """The mapping that a YAML file holds, empty if it holds nothing; ``flag`` begins the error of a missing file."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{flag}{path}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ValueError(f"{flag}{path}: expected a YAML file of `name: value` lines") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `name: value` lines, got {type(values).__name__}")
    return values


def check_keys(values: Iterable[Any], names: Sequence[str], where: str | Path) -> None:
    """Refuse the first of the keys that is not among the names; the message begins with ``where``."""
    for key in values:
        if key not in names:
            raise ValueError(f"{where}: {key}: no such key" + nearest(str(key), names))


def _flags(parser: argparse.ArgumentParser, values: Mapping[str, Any], where: str | Path) -> list[str]:
    """The flags that set these values, checked by the parser; None leaves the default."""
    flags: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        words = _as_flag(key, value)
        try:
            unknown = parser.parse_known_args(words)[1]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if unknown:
            raise ValueError(f"{where}: {key}: expected one value, got {value!r}")
        flags += words
    return flags


def _as_flag(key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)] if value else []
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def _about_unknown(word: str, argv: Sequence[str], names: Sequence[str]) -> str:
    """The error message for a word that belongs to no flag."""
    if word.startswith("-"):
        return f"{word.partition('=')[0]}: no such flag" + nearest(word, names, "--")
    at = argv.index(word)
    flags = [number for number in range(at) if argv[number].startswith("--")]
    if not flags:
        return f"{word}: no such flag; expected --name value"
    flag, equals, value = argv[flags[-1]].partition("=")
    values = ([value] if equals else []) + list(
        itertools.takewhile(lambda one: not one.startswith("--"), argv[flags[-1] + 1 :])
    )
    return f"{flag}: expected one value, got {len(values)}: {' '.join(values)}"


def _check_repeated(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse a flag for files, or for a list, that is given twice: only the last one would count."""
    flags = collections.Counter(word.partition("=")[0] for word in argv if word.startswith("--"))
    for action in parser._actions:
        count = sum(flags[name] for name in action.option_strings)
        name = action.option_strings[0] if action.option_strings else ""
        if count > 1 and action.nargs == "+":
            raise ValueError(f"{name}: given {count} times; give all values once, after one {name}")
        if count > 1 and name.endswith("_file"):
            raise ValueError(f"{name}: given {count} times; expected one file")


# Names used by other programs or by other commands of this one: what a user may have meant.
MEANT = {
    "limit": ("examples",),
    "lr": ("learning_rate",),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "batch_size": ("per_device_train_batch_size", "batch_tokens"),
    "model": ("student", "teacher", "model"),
    "model_name_or_path": ("student", "teacher", "model"),
    "data": ("data_file", "data_files", "train_file"),
    "input": ("data_file", "data_files", "train_file"),
    "file": ("data_file", "data_files", "train_file"),
    "data_file": ("data_files", "train_file"),
    "dataset": ("data_file", "data_files", "train_file"),
    "output": ("output_file", "output_dir", "store"),
    "out": ("output_file", "output_dir", "store"),
    "fp32": ("student_dtype", "dtype"),
    "max_tokens": ("max_new_tokens",),
    "num_examples": ("examples", "limit"),
    "verbose": ("log_format",),
}


def nearest(flag: str, names: Sequence[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the name that was probably meant, if there is one."""
    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    meant = [one for one in MEANT.get(name, ()) if one in names]
    parts = set(name.split("_"))
    close = (
        meant
        or difflib.get_close_matches(name, names, n=1)
        or [one for one in names if len(name) > 2 and parts <= set(one.split("_"))]
    )
    return f"; did you mean {prefix}{close[0]}?" if close else ""
