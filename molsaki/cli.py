"""The program ``molsaki``: one command a word, each a thin script over its config and its module.

Modules are imported when their command runs, so ``molsaki --help`` is immediate. What a user got wrong is one line on
standard error and exit code 2; set ``MOLSAKI_TRACEBACK=1`` to see where it was raised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 (``store verify`` found faults), 2 (an error), 130 (interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="molsaki",
        description="Distil how a teacher attends to key information, step by step (arXiv 2604.15701).",
        epilog="commands:\n" + "\n".join(f"  {name:10}{run.__doc__}" for name, run in COMMANDS.items())
        + "\n\n`molsaki COMMAND --help` lists the command's flags; --config FILE reads them from YAML.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    command = parser.parse_args(argv[:1]).command
    try:
        return COMMANDS[command](argv[1:]) or 0
    except KeyboardInterrupt:
        print(f"\nmolsaki {command}: interrupted. {CONTINUE.get(command, 'Run it again.')}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError, ImportError) as error:
        if os.environ.get("MOLSAKI_TRACEBACK"):
            raise
        print(f"molsaki {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _annotate(argv: list[str]) -> None:
    """have a teacher write rationales, and keep the right ones"""
    from molsaki.annotation.annotate import annotate
    from molsaki.config import AnnotateConfig, parse

    _print(annotate(parse(AnnotateConfig, argv, "molsaki annotate")))


def _extract(argv: list[str]) -> None:
    """run the teacher once over a data set and store its maps"""
    from molsaki.config import ExtractConfig, parse
    from molsaki.teacher.extract import extract

    _print(extract(parse(ExtractConfig, argv, "molsaki extract")))


def _distill(argv: list[str]) -> None:
    """train a student, with the teacher live or from the store"""
    from molsaki.config import DistillConfig, parse
    from molsaki.training.trainer import distill

    _print(distill(parse(DistillConfig, argv, "molsaki distill")))


def _evaluate(argv: list[str]) -> None:
    """decode greedily, score exactly, write every prediction"""
    from molsaki.config import EvaluateConfig, parse
    from molsaki.evaluation.evaluate import evaluate

    _print(evaluate(parse(EvaluateConfig, argv, "molsaki evaluate")))


def _plot(argv: list[str]) -> None:
    """draw losses, layer weights and maps"""
    from molsaki.config import PlotConfig, parse
    from molsaki.plotting.plot_run import plot

    for path in plot(parse(PlotConfig, argv, "molsaki plot")):
        print(path)


def _store(argv: list[str]) -> int:
    """look at a store: verify, info or head"""
    parser = argparse.ArgumentParser(prog="molsaki store")
    parser.add_argument("action", choices=["verify", "info", "head"], help="check every file, describe, show examples")
    parser.add_argument("folder", help="folder of the store")
    parser.add_argument("-n", type=int, default=3, help="head: how many examples")
    args = parser.parse_args(argv)
    from molsaki.teacher.store import Store, verify

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


def _doctor(argv: list[str]) -> None:
    """print versions, devices, engines, and why each is or is not ready"""
    parser = argparse.ArgumentParser(prog="molsaki doctor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    from molsaki.doctor import render, report

    found = report()
    print(json.dumps(found, indent=2) if args.json else render(found))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "annotate": _annotate,
    "extract": _extract,
    "distill": _distill,
    "evaluate": _evaluate,
    "plot": _plot,
    "store": _store,
    "doctor": _doctor,
}
CONTINUE = {
    "annotate": "What is decoded stays; run the same command again to continue.",
    "extract": "What is stored stays; run the same command again to continue.",
    "distill": "Run the same command with --resume to continue from the last checkpoint.",
}


def _print(result: dict) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    for name, value in result.items():
        print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
