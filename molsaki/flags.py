"""Reads a config from the command line, a YAML file or values: every field of the dataclass is a flag.

``parse(ExtractConfig, argv)`` reads ``--config file.yaml`` first; the flags override it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from molsaki import presets
from molsaki.config import DistillOptions, MixtureOptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def parse(config_class: type[Config], argv: Sequence[str] | None = None, prog: str | None = None) -> Config:
    """A config from the command line, on top of the YAML file that ``--config`` names, on top of ``--preset``.

    Raises:
        ValueError: an unknown flag or YAML key (with the nearest valid one) or a value of the wrong kind.
        FileNotFoundError: there is no such YAML file.
    """
    parser, names = _parser(config_class, prog)
    argv = list(sys.argv[1:] if argv is None else argv)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"{unknown[0]}: no such flag" + _nearest(unknown[0].lstrip("-").split("=")[0], names, "--"))
    preset = getattr(given, "preset", None)
    if given.config is not None:
        path = Path(given.config)
        values = read_yaml(path)
        check_keys(values, names, path)
        preset = preset or values.pop("preset", None)
        argv = _flags(parser, values, path) + argv
    if preset is not None:
        argv = _flags(parser, presets.options(preset, config_class), f"--preset {preset}") + argv
    return cast(Config, parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0])


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
        raise ValueError(f"{where}: {error}") from error


def _parser(config_class: type[Config], prog: str | None = None) -> tuple[Any, list[str]]:
    """A parser whose errors are ValueErrors, and the names of its flags."""
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = Parser(cast(Any, config_class), prog=prog, allow_abbrev=False, description=config_class.__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file that sets these flags; flags given here override.")
    names = [field.name for field in dataclasses.fields(config_class) if field.init]
    if issubclass(config_class, MixtureOptions):
        parser.add_argument(
            "--preset",
            choices=list(presets.PRESETS),
            help="paper: every option of the method as in arXiv 2604.15701; recommended: objective "
            "dss, since no form of the attention loss was clearly better in docs/evidence.md. Options that are given "
            "override it.",
        )
        names.append("preset")
    if issubclass(config_class, DistillOptions):
        parser.add_argument("--help_all", action="help", help="List the options of TrainingArguments as well.")
    return parser, names


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds, empty if it holds nothing."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `name: value` lines, got {type(values).__name__}")
    return values


def check_keys(values: Iterable[Any], names: Sequence[str], where: str | Path) -> None:
    """Refuse the first of the keys that is not among the names; the message begins with ``where``."""
    for key in values:
        if key not in names:
            raise ValueError(f"{where}: {key}: no such key" + _nearest(str(key), names))


def _flags(parser: argparse.ArgumentParser, values: Mapping[str, Any], where: str | Path) -> list[str]:
    """The flags that set these values, checked by the parser; None leaves the default."""
    flags = [word for key, value in values.items() if value is not None for word in _as_flag(key, value)]
    try:
        parser.parse_known_args(flags)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return flags


def _as_flag(key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)] if value else []
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def _nearest(name: str, names: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
