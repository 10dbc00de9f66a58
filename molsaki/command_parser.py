"""The parsers that print the help of the commands.

`parser_of` builds an argparse parser of a command from its dataclass, without torch and, but for the inherited options
of ``molsaki distill``, without transformers. It prints ``--help``, and shell completion is generated from it.
`molsaki.flags` reads the options themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from molsaki.command_help import CONFIG, DRY_RUN, HELP, HELP_ALL, LOG_FORMAT, OTHERS, PRESET, TRAINING, Help
from molsaki.flags import raise_error
from molsaki.terminal import styled_help


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, and whose help has colours on a terminal only."""

    color: bool

    def error(self, message: str) -> NoReturn:
        raise_error(message)

    def print_help(self, file: Any = None) -> None:
        file = sys.stdout if file is None else file
        file.write(styled_help(self.format_help(), file))


class _Formatter(argparse.HelpFormatter):
    """As wide as the terminal, 40 to 120 columns; keeps the lines of the examples."""

    def __init__(self, prog: str, **options: Any):
        width = text_width()
        super().__init__(prog, max_help_position=min(27, width // 3), width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n")
        return "\n".join(
            one if one.startswith("  ") or not one else super(_Formatter, self)._fill_text(one, width, indent)
            for one in paragraphs
        )

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":  # argparse writes FILE [FILE ...]
            return f"{action.metavar}..."
        return super()._format_args(action, default_metavar)


def text_width() -> int:
    """Columns for text: of the terminal, also where standard output is a pipe to a pager; at most 120."""
    columns = 0
    for stream in (sys.__stdout__, sys.__stderr__, sys.__stdin__):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            columns = columns or os.get_terminal_size(stream.fileno()).columns  # type: ignore[union-attr]
    size = shutil.get_terminal_size((columns or 80, 24))  # $COLUMNS, else standard output, else that
    return min(max(size.columns, 40), 120) - 1


def examples_of(examples: Iterable[tuple[str, str]], width: int) -> str:
    """The examples as a shell takes them: long commands are broken with backslashes, and never inside a word."""
    lines = ["examples:"]
    for what, command in examples:
        lines += _wrapped("  # ", what.split(), "  # ", width, "")
        words = re.sub(r" (?=[->])|(?<=\.) (?=\w)", "\n", command).split("\n")  # a flag and its values stay together
        lines += _wrapped("  ", words, "      ", width, " \\")
    return "\n".join(lines)


def _usage(program: str, usage: str) -> str:
    """The usage, wrapped between arguments."""
    words = re.findall(r"\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^]]*\]|--\w+ [A-Z.]+|\S+", usage)
    lines = _wrapped(f"{program} ", words, " " * len(f"usage: {program} "), text_width() - len("usage: "), "")
    return "\n".join(lines)


def _wrapped(first: str, words: Sequence[str], next_line: str, width: int, end: str) -> list[str]:
    lines, line = [], first
    for number, word in enumerate(words):
        if number and len(line) + len(word) + len(end) > width:
            lines.append(line.rstrip() + end)
            line = next_line
        line += word + " "
    return [*lines, line.rstrip()]


def parser_of(
    command: str,
    summary: str = "",
    config: type[Any] | None = None,
    inherited: bool = False,
    fill: Callable[[argparse.ArgumentParser], None] | None = None,
) -> Parser:
    """The parser of a command, whose help has its groups and examples.

    Args:
        command: its name.
        summary: its line in ``molsaki --help``, for a command without an entry in `HELP`.
        config: its dataclass, if it has one.
        inherited: whether the options that `config` inherits from TrainingArguments are shown.
        fill: adds the arguments of a command without a dataclass.
    """
    about = HELP.get(command, Help("[options]", summary, {}, []))
    parser = Parser(
        prog=f"molsaki {command}",
        usage=_usage(f"molsaki {command}", about.usage),
        description=about.about,
        epilog=examples_of(about.examples, text_width()) if about.examples else None,
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.color = False  # of Python 3.14, which would colour by rules of its own
    general = None
    if config is not None:
        _add_fields(parser, config, about, inherited)
    if fill is not None:
        group = parser.add_argument_group("arguments")
        fill(group)  # type: ignore[arg-type]
        general = group
    group = general or parser.add_argument_group("general")
    if config is not None:
        group.add_argument("--config", metavar="FILE", help=CONFIG)
        if any(field.name == "tau_t" for field in dataclasses.fields(config)):
            from molsaki.presets import PRESETS

            group.add_argument("--preset", choices=list(PRESETS), metavar="NAME", help=PRESET)
    if about.dry_run:
        group.add_argument("--dry_run", action="store_true", help=DRY_RUN)
    group.add_argument("--log_format", choices=["text", "json"], help=LOG_FORMAT + " [default: text]")
    if command == "distill":
        group.add_argument("--help_all", action="store_true", help=HELP_ALL)
    group.add_argument("-h", "--help", action="help", help="Show this help.")
    return parser


def _add_fields(parser: argparse.ArgumentParser, config: type[Any], about: Help, inherited: bool) -> None:
    fields = {field.name: field for field in dataclasses.fields(config) if field.init}
    hints = get_type_hints(config)
    shown: set[str] = set()
    for title, names in about.groups.items():
        group = parser.add_argument_group(title)
        is_required = title.startswith("required")
        for name in names:
            shown.add(name)
            if name == "output_dir" and name not in fields:
                group.add_argument("--output_dir", metavar="FOLDER", help="Folder for checkpoints and the student.")
            elif name in TRAINING:
                text, default = TRAINING[name]
                _add_training(group, name, text, default)
            else:
                _add(group, fields[name], hints[name], is_required)
    rest = [field for name, field in fields.items() if name not in shown]
    if rest and not about.groups:
        group = parser.add_argument_group("options")
        for field in rest:
            _add(group, field, hints[field.name], False)
    elif rest and inherited:
        from molsaki.training.config import REFUSED

        group = parser.add_argument_group("the other options of TrainingArguments (docs/training-options.md)")
        for field in rest:
            if field.name not in REFUSED and not field.name.startswith("_"):
                _add(group, field, hints[field.name], False)
    elif rest:
        group = parser.add_argument_group(OTHERS)
        for field in rest:
            _add(group, field, hints[field.name], False)


def _add_training(group: Any, name: str, text: str, default: Any) -> None:
    """An inherited option of distill, which is known here without transformers."""
    if default is False:
        group.add_argument(f"--{name}", nargs="?", metavar="true|false", help=f"{text} [default: false]")
    else:
        metavar = {float: "X", int: "N", str: "NAME", type(None): "N"}[type(default)]
        group.add_argument(f"--{name}", metavar=metavar, help=text + _default_text(text, default))


def _add(group: Any, field: dataclasses.Field[Any], hint: Any, is_required: bool) -> None:
    """An argument for a field, with its default in the help text."""
    text = str(field.metadata.get("help") or "")
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        default = None
    options: dict[str, Any] = {"metavar": metavar_of(field.name, hint)}
    choices = choices_of(hint) or [str(one) for one in field.metadata.get("choices", ())]
    if choices:
        options["choices"] = choices
        listed = "{" + ",".join(choices) + "}"
        options["metavar"] = listed if len(listed) < 40 else "NAME"
    if _is_bool(hint):
        options |= {"nargs": "?", "choices": ["true", "false"], "metavar": "true|false"}
    elif _is_list(hint):
        options["nargs"] = "+"
    text = " ".join(text.split()) + ("" if is_required else _default_text(text, default))
    group.add_argument(f"--{field.name}", help=text.replace("%", "%%"), **options)


def _default_text(text: str, default: Any) -> str:
    """The default in brackets, unless the text says it or there is none."""
    if "Default:" in text or default is None or default == [] or "Must stay" in text:
        return ""
    if isinstance(default, bool):
        return f" [default: {str(default).lower()}]"
    if isinstance(default, list):
        return f" [default: {' '.join(map(str, default))}]"
    if hasattr(default, "value"):  # an Enum of transformers
        default = default.value
    shown = str(default).replace("\n", "\\n")
    return f" [default: {shown}]" if shown.strip() == shown and shown else f" [default: {shown!r}]"


def metavar_of(name: str, hint: Any) -> str:
    """What stands for the value of an option."""
    if name in ("teacher", "student", "model"):
        return "MODEL"
    if name.endswith(("_file", "_files")) or name in ("examples", "predictions", "compare") and hint is not int:
        return "FILE"
    if name.endswith("_dir") or name in ("store", "run"):
        return "FOLDER"
    kinds = {one for one in (hint, *get_args(hint)) if isinstance(one, type)}
    if int in kinds:
        return "N"
    if float in kinds:
        return "X"
    if "template" in name or name in ("hint", "instruction"):
        return "TEXT"
    return "VALUE"


def choices_of(hint: Any) -> list[str]:
    """The values that a type allows, if it lists them."""
    for one in (hint, *get_args(hint)):
        if get_origin(one) is Literal:
            return [str(value) for value in get_args(one)]
        if isinstance(one, type) and hasattr(one, "__members__"):
            return [str(member.value) for member in one]  # type: ignore[attr-defined]
    return []


def _is_bool(hint: Any) -> bool:
    return hint is bool or (get_origin(hint) in (Union, types.UnionType) and bool in get_args(hint))


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is list


def config_of(module: str, name: str) -> type[Any]:
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found
