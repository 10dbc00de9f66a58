"""The reference of all options, from the config dataclasses that are also the command line."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin, get_type_hints

from docs.generate.marked import table
from molsaki import presets
from molsaki.cli import COMMANDS, CONFIGURED
from molsaki.command_help import HELP, OTHERS
from molsaki.config import OR_YOUR_OWN, DataOptions, DistillOptions, MixtureOptions, TextOptions

# Options that several commands share, and the heading of their section.
SHARED = {DataOptions: "Data", TextOptions: "Texts", MixtureOptions: "Mixture of layers"}
# The required options of each command, as in its YAML file.
EXAMPLES: dict[str, dict[str, Any]] = {
    "annotate": {"teacher": "TEACHER", "data_file": "questions.jsonl", "output_file": "train.jsonl"},
    "keys": {"teacher": "TEACHER", "data_file": "train.jsonl", "output_file": "keyed.jsonl", "top": 8},
    "extract": {"teacher": "TEACHER", "data_files": ["train.jsonl"], "store": "maps"},
    "distill": {
        "student": "STUDENT", "store": "maps", "train_file": ["train.jsonl"], "output_dir": "run",
        "per_device_train_batch_size": 8, "num_train_epochs": 3,
    },
    "evaluate": {"model": "run", "data_file": "test.jsonl", "output_dir": "result"},
    "plot": {"teacher": "TEACHER", "student": "run", "run": "run", "data_file": "test.jsonl", "output_dir": "plots"},
    "report": {"run": "run", "data_file": "test.jsonl", "predictions": ["result"]},
}  # fmt: skip


def config_class(command: str) -> Any:
    """The dataclass with our options of a command; for distill without those of TrainingArguments."""
    module, name, _ = CONFIGURED[command]
    return DistillOptions if name == "DistillConfig" else getattr(importlib.import_module(module), name)


def own_fields(config: Any) -> list[dataclasses.Field[Any]]:
    """The options of a command that no other command shares, in order."""
    shared = {field.name for base in SHARED if issubclass(config, base) for field in dataclasses.fields(base)}
    return [field for field in dataclasses.fields(config) if field.name not in shared and field.init]


def overview() -> str:
    """Which command has which options."""
    rows = []
    for command in CONFIGURED:
        config = config_class(command)
        marks = [f"[yes](#{anchor(SHARED[base])})" if issubclass(config, base) else "" for base in SHARED]
        rows.append([f"[`{command}`](#{anchor(f'molsaki {command}')})", str(len(own_fields(config))), *marks])
    rest = [command for command in COMMANDS if command not in CONFIGURED]
    listed = ", ".join(f"`{command}`" for command in rest)
    head = ["command", "options of its own", *(f"options of section {name}" for name in SHARED.values())]
    return f"{table(head, rows)}\n\nCommands without a config: {listed} ([command line](../command-line.md))."


def preset_table() -> str:
    """What each preset sets for `distill`."""
    found = {name: presets.options(name, DistillOptions) for name in presets.PRESETS}
    names = [
        field.name for field in dataclasses.fields(DistillOptions) if any(field.name in one for one in found.values())
    ]
    return table(
        ["option", *(f"`{name}`" for name in found)],
        [[f"`{name}`", *(value(one[name]) if name in one else "" for one in found.values())] for name in names],
    )


def shared_options() -> str:
    """The options that several commands share."""
    parts = []
    for base, heading in SHARED.items():
        users = [f"`{command}`" for command in CONFIGURED if issubclass(config_class(command), base)]
        parts.append(f"## {heading}\n\n{(base.__doc__ or '').strip()} Commands: {', '.join(users)}.")
        parts.append("\n".join(option(field, base, "") for field in dataclasses.fields(base)))
    return "\n\n".join(parts)


def commands() -> str:
    """The options of each command."""
    parts = []
    for command in CONFIGURED:
        config = config_class(command)
        parts.append(f"## molsaki {command}\n\n{description(config)}")
        links = [f"[{SHARED[base]}](#{anchor(SHARED[base])})" for base in SHARED if issubclass(config, base)]
        parts.append(f"Also the options of {', '.join(links)}." if links else "")
        parts.append(f"```yaml\n{yaml_lines(EXAMPLES[command])}\n```")
        for group, fields in groups(command):
            parts.append(f"### {command}: {group}")
            parts.append("\n".join(option(field, config, f"{command}-") for field in fields))
        everything = yaml_lines({field.name: default(field) for field in dataclasses.fields(config) if field.init})
        parts.append(
            f"<details><summary>All our options of <code>molsaki {command}</code> with their defaults, as a YAML file"
            f"</summary>\n\n```yaml\n{everything}\n```\n\n</details>"
        )
    return "\n\n".join(part for part in parts if part)


def description(config: Any) -> str:
    """The docstring of a config without the command's name."""
    text = " ".join((config.__doc__ or "").split())
    return re.sub(r"^``molsaki \w+``: (\w)", lambda found: found[1].upper(), text).replace("``", "`")


def groups(command: str) -> Iterator[tuple[str, list[dataclasses.Field[Any]]]]:
    """A command's own options by the groups of its help; the rest has the last."""
    fields = {field.name: field for field in own_fields(config_class(command))}
    for title, names in HELP[command].groups.items():
        found = [fields.pop(name) for name in names if name in fields]
        if found:
            yield title, found
    if fields:
        yield OTHERS if HELP[command].groups else "options", [*fields.values()]


def option(field: dataclasses.Field[Any], config: Any, prefix: str) -> str:
    """One option: an item of a list with its name, values, default and help."""
    kind = ", ".join(values(field, config))
    shown = value(default(field))
    help_text = " ".join(str(field.metadata.get("help", "")).split())
    return f'- <a id="{prefix}{field.name}"></a>**`{field.name}`**: {kind}; default {shown}.<br>{escaped(help_text)}'


def values(field: dataclasses.Field[Any], config: Any) -> list[str]:
    """The kinds of value that an option takes; literal ones each."""
    hint = get_type_hints(config)[field.name]
    names = field.metadata.get("choices") or OR_YOUR_OWN.get(field.name, ())
    if names:
        return [f"`{name}`" for name in names] + ["`module:name`"] * (field.name in OR_YOUR_OWN)
    return kinds(hint)


def kinds(hint: Any) -> list[str]:
    """The parts of a type in words; None, which stands for an option that is not set, is left out."""
    arguments = get_args(hint)
    if hint is type(None):
        return []
    if str(get_origin(hint)) == "typing.Literal":
        return [f"`{one}`" for one in arguments]
    if get_origin(hint) is list:
        return [f"list of {kinds(arguments[0])[0]}"]
    if get_origin(hint) is dict:
        return ["JSON object"]
    if not arguments:
        return [{str: "text", int: "whole number", float: "number", bool: "true or false"}[hint]]
    return [word for one in arguments for word in kinds(one)]


def default(field: dataclasses.Field[Any]) -> Any:
    """The default of an option."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def value(one: Any) -> str:
    """A value as YAML writes it."""
    if one is None:
        return "not set"
    return f"`{scalar(one)}`" if one != "" else "an empty text"


def yaml_lines(options: dict[str, Any]) -> str:
    """A YAML file with these options; one that is not set is a comment."""
    return "\n".join(f"# {name}:" if one is None else f"{name}: {scalar(one)}" for name, one in options.items())


def scalar(one: Any) -> str:
    """A value in one line of YAML, of which JSON is a part; plain words need no quotes."""
    special = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    if isinstance(one, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", one) and one.lower() not in special:
        return one
    return json.dumps(one, ensure_ascii=False)


def escaped(text: str) -> str:
    """A help text with its options, values and braces as code where Markdown would change them."""
    text = re.sub(r"(?<![\w`])(--\w+(?: \w+:\w+)?)", r"`\1`", text)
    text = re.sub(r"<(\w+)>", r"`<\1>`", text)
    text = re.sub(r"(?<![\w/`.])docs/([\w-]+)\.md", r"[\1](../\1.md)", text)
    return re.sub(r"(?<![\w`./])([a-z_]+=[a-z0-9_]+)\b(?!`)", r"`\1`", text)


def anchor(heading: str) -> str:
    """The anchor of a heading."""
    return heading.lower().replace(" ", "-")


PARTS: dict[str, Callable[[], str]] = {
    "options by command": overview,
    "presets": preset_table,
    "shared options": shared_options,
    "options of each command": commands,
}
