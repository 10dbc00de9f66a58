"""The program ``molsaki``: the commands, each with its config, module and function.

A module is imported when its command runs, so ``molsaki --help`` imports neither torch nor transformers. Results go to
standard output, everything else to standard error. A user's mistake is one line there and exit code 2; set
``MOLSAKI_TRACEBACK=1`` to see where it was raised. The exit codes are described in docs/command-line.md.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from molsaki import logs
from molsaki.exits import (
    INTERRUPTED,
    NEGATIVE,
    USER_ERROR,
    crashed,
    interrupted,
    is_user_error,
    of_the_user,
    refuse,
    sigterm_raises,
)
from molsaki.terminal import styled_help

if TYPE_CHECKING:
    from molsaki.command_parser import Parser

FLAG = re.compile(r"--[A-Za-z][\w-]*(?=\Z|=)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 1 if the result is negative (``store verify`` found faults, runs of a study are not finished,
        ``doctor`` found something broken); 2 after a user's mistake; 70 after a fault of the program; 130 or 143 after
        SIGINT or SIGTERM.
    """
    argv = given = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else ""
    before = {name: os.environ.get(name) for name in logs.VARIABLES}
    _open_streams()
    try:
        argv = _take_log_format(argv)
        command = argv[0] if argv else ""
        logs.show()
        if command in ("", "-h", "--help", "--version"):
            code = _about(command)
        elif command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else "`molsaki --help` lists them"
            return refuse("", f"{command}: no such command; {hint}")
        else:
            with sigterm_raises():
                try:
                    code = _run(command, argv[1:])
                except KeyboardInterrupt as error:
                    return interrupted(command, given, error)
        sys.stdout.flush()  # so that what cannot be written is an error of this command, not of Python's end
        return code
    except KeyboardInterrupt as error:
        return interrupted(command, given, error)
    except BrokenPipeError:  # the reader, such as head, has closed its input
        _close_output()
        return INTERRUPTED + 13  # SIGPIPE
    except SystemExit as end:  # argparse has shown a help
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        if is_user_error(error):
            if os.environ.get("MOLSAKI_TRACEBACK"):
                raise
            if isinstance(error, OSError) and error.filename is None:
                _discard_output()  # if it is standard output that cannot be written, Python's end would fail again
            return refuse(command, " ".join(str(error).split()))
        return crashed(command, error)
    finally:  # --log_format applies to this call only
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


COMMANDS = {
    "annotate": "have a teacher write rationales, and keep the right ones",
    "keys": "choose key words by a teacher's attention or gradient",
    "extract": "run the teacher once over a data set and store its maps",
    "distill": "train a student, with the teacher live or from the store",
    "evaluate": "decode greedily, score exactly, write every prediction",
    "plot": "draw losses, layer weights and maps",
    "report": "write a page about a run: curves, maps, predictions",
    "study": "train and compare a grid of methods, seeds and data sets",
    "store": "inspect a store: verify, info or head",
    "doctor": "report what this machine can run, and how to fix the rest",
    "completion": "print a script that completes commands and flags in a shell",
}
# The commands with a config: its module and name, and the module of the function with the command's name.
CONFIGURED = {
    "annotate": ("molsaki.config", "AnnotateConfig", "molsaki.annotation.annotate"),
    "keys": ("molsaki.config", "KeysConfig", "molsaki.teacher.keys"),
    "extract": ("molsaki.config", "ExtractConfig", "molsaki.teacher.extract"),
    "distill": ("molsaki.training.config", "DistillConfig", "molsaki.training.distill"),
    "evaluate": ("molsaki.config", "EvaluateConfig", "molsaki.evaluation.evaluate"),
    "plot": ("molsaki.config", "PlotConfig", "molsaki.reporting.plot_run"),
    "report": ("molsaki.config", "ReportConfig", "molsaki.reporting.report"),
}
OVERVIEW = """\
usage: molsaki COMMAND [options]

Distil a teacher's attention to key words, step by step (arXiv 2604.15701).

commands:
{commands}

examples:
  # Store the teacher's maps once, train a student with them, score it
  molsaki extract --teacher MODEL --data_files train.jsonl --store maps
  molsaki distill --student MODEL --store maps --train_file train.jsonl \\
      --output_dir run
  molsaki evaluate --model run --data_file test.jsonl --output_dir results
  molsaki report run --predictions results

options:
  -h, --help             Show this help; `molsaki COMMAND --help` shows the
                         options of a command, with examples.
  --version              Show the version.
  --log_format FORMAT    text or json: see `molsaki COMMAND --help`.

Dashes and underscores in flags are the same: --data-file is --data_file.
Exit codes: 0 done, 1 the result is negative, 2 a mistake in what was asked,
70 a fault of molsaki, 130 interrupted. More: docs/command-line.md.
"""


def parsers(inherited: bool = False) -> dict[str, Parser]:
    """The parser of every command, from which its help is printed and shell completion is generated.

    Args:
        inherited: with the options that distill inherits from TrainingArguments, which imports transformers.
    """
    return {command: parser_of_command(command, inherited) for command in COMMANDS}


def parser_of_command(command: str, inherited: bool = False) -> Parser:
    """The parser of one command; see `parsers`."""
    from molsaki.command_parser import config_of, parser_of
    from molsaki.extras import require

    if command not in CONFIGURED:
        return parser_of(command, COMMANDS[command], fill=ARGUMENTS[command])
    module, name, _ = CONFIGURED[command]
    if command == "distill" and not inherited:  # TrainingArguments take seconds to import
        module, name = "molsaki.config", "DistillOptions"
    elif command == "distill":
        require("train")
    return parser_of(command, COMMANDS[command], config_of(module, name), inherited)


def _open_streams() -> None:
    """Let output that the program was started without, as by ``>&-``, go nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _discard_output() -> None:
    """Let what standard output still holds, and all that follows, go nowhere, if it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        _close_output()


def _close_output() -> None:
    """Let what standard output still holds, and all that follows, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _about(word: str) -> int:
    """The help of the program, or its version."""
    if word == "--version":
        import molsaki

        print(f"molsaki {molsaki.__version__}")
        return 0
    stream = sys.stdout if word else sys.stderr
    listed = "\n".join(f"  {name:12}{help}" for name, help in COMMANDS.items())
    stream.write(styled_help(OVERVIEW.format(commands=listed), stream))
    return 0 if word else USER_ERROR


def _run(command: str, argv: Sequence[str]) -> int:
    before = list(itertools.takewhile(lambda word: word != "--", argv))
    everything = any(word.replace("-", "_") == "__help_all" for word in before)
    if everything or not {"-h", "--help"}.isdisjoint(before):
        parser_of_command(command, inherited=everything).print_help()
        return 0
    if command in CONFIGURED:
        return _run_configured(command, argv)
    parser = parser_of_command(command)
    args, unknown = parser.parse_known_args(_underscores(argv))
    if unknown:
        from molsaki.flags import nearest

        names = [action.dest for action in parser._actions if action.option_strings]
        raise ValueError(f"{unknown[0]}: no such argument" + nearest(unknown[0], names, "--"))
    return {"study": _study, "store": _store, "doctor": _doctor, "completion": _completion}[command](args)


def run_by_position(command: str, argv: Sequence[str]) -> list[str]:
    """The words after a command, with the flag before the run in ``molsaki report RUN``."""
    if command == "report" and argv and not argv[0].startswith("-"):
        return [f"--run={argv[0]}", *argv[1:]]
    return list(argv)


def _run_configured(command: str, argv: Sequence[str]) -> int:
    from molsaki.command_help import HELP
    from molsaki.extras import require
    from molsaki.flags import parse_command

    config_module, config_name, module = CONFIGURED[command]
    require("train")
    config_class = getattr(importlib.import_module(config_module), config_name)
    argv = run_by_position(command, argv)
    has_dry_run = command in HELP and HELP[command].dry_run
    try:
        options, dry_run = parse_command(config_class, _underscores(argv), f"molsaki {command}", has_dry_run)
    except (ValueError, TypeError) as error:
        raise of_the_user(error) from error
    logs.take_over_libraries()
    if dry_run:
        from molsaki.dry_run.text import render

        found = getattr(importlib.import_module(f"molsaki.dry_run.{command}"), f"dry_run_{command}")(options)
        if os.environ.get("RANK", "0") == "0":
            print(logs.as_json(found) if logs.is_json() else render(found))
        return 0
    result = getattr(importlib.import_module(module), command)(options)
    if os.environ.get("RANK", "0") == "0":
        _print(result)
    return 0


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="FILE", help="YAML file of the study: see docs/study.md.")
    parser.add_argument("--processes", metavar="N", type=int, default=1,
                        help="Number of processes to start; others may join later. [default: 1]")  # fmt: skip
    parser.add_argument("--threads", metavar="N", type=int,
                        help="Threads per process. Default: all processors, shared evenly.")  # fmt: skip
    parser.add_argument("--arms", metavar="NAME", nargs="+", default=[], help="Only the runs of these arms.")
    parser.add_argument("--seeds", metavar="N", nargs="+", type=int, default=[], help="Only the runs of these seeds.")
    parser.add_argument("--report", action="store_true", help="Run nothing; write the CSV files and the report.")


def _study(args: argparse.Namespace) -> int:
    from molsaki.extras import require

    require("train")
    os.environ.setdefault("TQDM_DISABLE", "1")  # one line per run instead of bars; tqdm reads it when it is imported
    if args.dry_run:
        from molsaki.dry_run.study import dry_run_study
        from molsaki.dry_run.text import render

        found = dry_run_study(args.config, args.arms, args.seeds)
        print(logs.as_json(found) if logs.is_json() else render(found))
        return 0
    from molsaki.study.report import write_report
    from molsaki.study.run import study

    logs.take_over_libraries()
    unfinished = [] if args.report else study(args.config, args.processes, args.threads, args.arms, args.seeds)
    files = [str(path) for path in write_report(args.config)]
    if logs.is_json():
        print(logs.as_json({"files": files, "unfinished": unfinished}))
    else:
        print(*files, sep="\n")
    if unfinished and not logs.is_json():
        print(f"{len(unfinished)} runs are not finished:", *unfinished, sep="\n", file=sys.stderr)
    return NEGATIVE if unfinished else 0


def _store_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="ACTION", choices=["verify", "info", "head"],
                        help="verify: check every file; info: describe the store; head: show examples.")  # fmt: skip
    parser.add_argument("folder", metavar="FOLDER", help="Folder of the store.")
    parser.add_argument("-n", metavar="N", type=int, default=3, help="head: how many examples. [default: 3]")


def _store(args: argparse.Namespace) -> int:
    from molsaki.extras import require

    require("train")
    from molsaki.store.map_store import Store, verify

    if args.action == "verify":
        faults = verify(args.folder)
        store = None if faults else Store(args.folder)
        if logs.is_json():
            print(logs.as_json({"faults": faults, "examples": None if store is None else len(store)}))
        else:
            whole = "" if store is None else f"{len(store)} examples in {store.num_shards} shards, all whole"
            print("\n".join(faults) if faults else whole)
        return NEGATIVE if faults else 0
    store = Store(args.folder)
    if args.action == "info":
        counts = {"left_out": store.left_out, "shards": store.num_shards, "bytes": store.num_bytes}
        _print(store.description | counts | {"bytes_per_example": store.num_bytes / max(len(store), 1)})
        return 0
    examples = []
    for entry in itertools.islice(store, args.n):
        shape = None if entry.maps is None else list(entry.maps.shape)
        weights = None if entry.weights is None else entry.weights.mean(0).tolist()
        examples.append({"id": entry.id, "left_out": entry.reason, "map": shape, "layer_weights": weights})
        if not logs.is_json():
            print(f"{entry.id}: " + (f"left out: {entry.reason}" if shape is None else f"map {_by(shape)}"))
            if weights is not None:
                print(f"  layer weights: {' '.join(f'{w:.3f}' for w in weights)}")
    if logs.is_json():
        print(logs.as_json({"examples": examples}))
    return 0


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _doctor(args: argparse.Namespace) -> int:
    from molsaki.doctor import is_broken, render, report

    found = report()
    print(json.dumps(found, indent=2) if args.json or logs.is_json() else render(found, sys.stdout))
    return NEGATIVE if is_broken(found) else 0


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=["bash", "zsh", "fish"], help="bash, zsh or fish.")


def _completion(args: argparse.Namespace) -> int:
    from molsaki.completion import script
    from molsaki.extras import missing

    print(script(args.shell, parsers(inherited=not missing("train")), COMMANDS))
    return 0


ARGUMENTS = {
    "study": _study_arguments,
    "store": _store_arguments,
    "doctor": _doctor_arguments,
    "completion": _completion_arguments,
}


def _take_log_format(argv: list[str]) -> list[str]:
    """The words without ``--log_format``, which may be anywhere and whose value is chosen here."""
    chosen, rest, words = os.environ.get(logs.VARIABLE), [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("-", "_") != "__log_format":
            rest.append(word)
            continue
        chosen = value if equals else next(words, "")
    if chosen:
        logs.choose(chosen)
    return rest


def _underscores(argv: Iterable[str]) -> list[str]:
    """The words with underscores for the dashes within the names of flags; other texts that begin with -- stay."""
    return [FLAG.sub(lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in argv]


def _print(result: Mapping[str, Any] | Iterable[Any]) -> None:
    """Print a summary by name, or one item per line; with JSON one object."""
    if logs.is_json():
        print(logs.as_json(result if isinstance(result, Mapping) else {"files": [str(one) for one in result]}))
        return
    if not isinstance(result, Mapping):
        print(*result, sep="\n")
        return
    for name, value in result.items():
        shown = f"{value:.6g}" if isinstance(value, float) else "none" if value in ({}, []) else value
        print(f"{name}: {shown}")


if __name__ == "__main__":
    sys.exit(main())
