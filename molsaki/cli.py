"""The program ``molsaki``: one word per command, each a config, a module and the function that runs it.

A module is imported when its command runs, so ``molsaki --help`` imports neither torch nor transformers. A user's
mistake is one line on standard error and exit code 2; set ``MOLSAKI_TRACEBACK=1`` to see where it was raised.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 (``store verify`` found faults, or runs of a study are not finished), 2 (an error),
        130 (interrupted).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:10}{help}" for name, help in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="molsaki",
        description="Distil a teacher's attention to key words, step by step (arXiv 2604.15701).",
        epilog=f"commands:\n{listed}\n\n`molsaki COMMAND --help` lists the command's flags; --config FILE reads them "
        "from YAML.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    command = parser.parse_args(argv[:1]).command
    _show_log()
    try:
        if command in CONFIGURED:
            return _run_configured(command, argv[1:])
        return {"study": _study, "store": _store, "doctor": _doctor}[command](argv[1:])
    except KeyboardInterrupt:
        print(f"\nmolsaki {command}: interrupted. {CONTINUE.get(command, 'Run it again.')}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError, ImportError) as error:
        if os.environ.get("MOLSAKI_TRACEBACK"):
            raise
        print(f"molsaki {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what standard error is at the time of a message."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


def _show_log() -> None:
    """Show what the package logs: everything in the first process, warnings in others."""
    logger = logging.getLogger("molsaki")
    if not logger.hasHandlers():
        logger.addHandler(_Stderr())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


COMMANDS = {
    "annotate": "have a teacher write rationales, and keep the right ones",
    "keys": "choose key words by a teacher's attention or gradient",
    "extract": "run the teacher once over a data set and store its maps",
    "distill": "train a student, with the teacher live or from the store",
    "evaluate": "decode greedily, score exactly, write every prediction",
    "plot": "draw losses, layer weights and maps",
    "report": "write a page about a run: curves, maps, predictions",
    "study": "train and compare a grid of methods, seeds and data sets",
    "store": "look at a store: verify, info or head",
    "doctor": "print versions, devices, engines, and why each is or is not ready",
}
# The commands with a config: its module and name, and the module of the function with the command's name.
CONFIGURED = {
    "annotate": ("molsaki.config", "AnnotateConfig", "molsaki.annotation.annotate"),
    "keys": ("molsaki.config", "KeysConfig", "molsaki.teacher.keys"),
    "extract": ("molsaki.config", "ExtractConfig", "molsaki.teacher.extract"),
    "distill": ("molsaki.training.config", "DistillConfig", "molsaki.training.trainer"),
    "evaluate": ("molsaki.config", "EvaluateConfig", "molsaki.evaluation.evaluate"),
    "plot": ("molsaki.config", "PlotConfig", "molsaki.plotting.plot_run"),
    "report": ("molsaki.config", "ReportConfig", "molsaki.reporting.report"),
}
CONTINUE = {
    "annotate": "All replies so far are kept; run the same command again to continue.",
    "keys": "All results so far are kept; run the same command again to continue.",
    "extract": "All finished shards are kept; run the same command again to continue.",
    "distill": "Run the same command with --resume to continue from the last checkpoint.",
    "study": "All finished runs are kept; run the same command again to continue.",
}


def _run_configured(command: str, argv: Sequence[str]) -> int:
    from molsaki.extras import require
    from molsaki.flags import parse

    config_module, config_name, module = CONFIGURED[command]
    require("train")
    if command == "distill" and not {"-h", "--help"}.isdisjoint(argv):  # TrainingArguments take seconds to import
        config_module, config_name = "molsaki.config", "DistillOptions"
    config_class = getattr(importlib.import_module(config_module), config_name)
    if command == "report" and argv and not argv[0].startswith("-"):  # molsaki report RUN
        argv = [f"--run={argv[0]}", *argv[1:]]
    options = parse(config_class, argv, f"molsaki {command}")
    result = getattr(importlib.import_module(module), command)(options)
    if os.environ.get("RANK", "0") == "0":
        _print(result)
    return 0


def _study(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="molsaki study")
    parser.add_argument("config", help="YAML file of the study: see docs/study.md")
    parser.add_argument("--processes", type=int, default=1, help="how many to start here; others may join, also later")
    parser.add_argument("--threads", type=int, help="threads per process. Default: all processors, shared evenly")
    parser.add_argument("--arms", nargs="+", default=[], help="only the runs of these arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="only the runs of these seeds")
    parser.add_argument("--report", action="store_true", help="run nothing; write the CSV files and the report")
    args = parser.parse_args(argv)
    from molsaki.extras import require

    require("train")
    os.environ.setdefault("TQDM_DISABLE", "1")  # a line per run in place of bars; tqdm reads it when it is imported
    from molsaki.study.report import write_report
    from molsaki.study.run import study

    unfinished = [] if args.report else study(args.config, args.processes, args.threads, args.arms, args.seeds)
    print(*write_report(args.config), sep="\n")
    if unfinished:
        print(f"{len(unfinished)} runs are not finished:", *unfinished, sep="\n", file=sys.stderr)
    return 1 if unfinished else 0


def _store(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="molsaki store")
    parser.add_argument("action", choices=["verify", "info", "head"], help="check every file, describe, show examples")
    parser.add_argument("folder", help="folder of the store")
    parser.add_argument("-n", type=int, default=3, help="head: how many examples")
    args = parser.parse_args(argv)
    from molsaki.extras import require

    require("train")
    from molsaki.teacher.map_store import Store, verify

    if args.action == "verify":
        faults = verify(args.folder)
        store = None if faults else Store(args.folder)
        print("\n".join(faults) if store is None else f"{len(store)} examples in {store.num_shards} shards, all whole")
        return 1 if faults else 0
    store = Store(args.folder)
    if args.action == "info":
        counts = {"left_out": store.left_out, "shards": store.num_shards, "bytes": store.num_bytes}
        _print(store.description | counts | {"bytes_per_example": store.num_bytes / max(len(store), 1)})
        return 0
    for entry in itertools.islice(store, args.n):
        shape = f"left out: {entry.reason}" if entry.maps is None else "map " + " x ".join(map(str, entry.maps.shape))
        print(f"{entry.id}: {shape}")
        if entry.weights is not None:
            print(f"  layer weights: {' '.join(f'{w:.3f}' for w in entry.weights.mean(0).tolist())}")
    return 0


def _doctor(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="molsaki doctor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    from molsaki.doctor import render, report

    found = report()
    print(json.dumps(found, indent=2) if args.json else render(found))
    return 0


def _print(result: Mapping[str, Any] | Iterable[Any]) -> None:
    """Print a summary by name, or one item per line."""
    if not isinstance(result, Mapping):
        print(*result, sep="\n")
        return
    for name, value in result.items():
        print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
