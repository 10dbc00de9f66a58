"""The program ``molsaki``: one command a word, each a thin script over its config and its module.

Modules are imported when their command runs, so ``molsaki --help`` is immediate. What a user got wrong is one line on
standard error and exit code 2; set ``MOLSAKI_TRACEBACK=1`` to see where it was raised.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 (store verify found faults), 2 (error), 130 (interrupted)."""
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


def _extract(argv: list[str]) -> None:
    """run the teacher once over a data set and store its maps"""
    from molsaki.config import ExtractConfig, parse
    from molsaki.extract import extract

    _print(extract(parse(ExtractConfig, argv, "molsaki extract")))


def _distill(argv: list[str]) -> None:
    """train a student, with the teacher live or from the store"""
    from molsaki.config import DistillConfig, parse
    from molsaki.trainer import distill

    _print(distill(parse(DistillConfig, argv, "molsaki distill")))


def _evaluate(argv: list[str]) -> None:
    """decode greedily, score exactly, write every prediction"""
    from molsaki.config import EvaluateConfig, parse
    from molsaki.evaluate import evaluate

    _print(evaluate(parse(EvaluateConfig, argv, "molsaki evaluate")))


def _doctor(argv: list[str]) -> None:
    """print versions, devices, engines, and why each is or is not ready"""
    parser = argparse.ArgumentParser(prog="molsaki doctor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    from molsaki.doctor import render, report

    found = report()
    print(json.dumps(found, indent=2) if args.json else render(found))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "extract": _extract,
    "distill": _distill,
    "evaluate": _evaluate,
    "doctor": _doctor,
}
CONTINUE = {
    "extract": "What is stored stays; run the same command again to continue.",
    "distill": "Run the same command with --resume to continue from the last checkpoint.",
}


def _print(result: dict) -> None:
    for name, value in result.items():
        print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
