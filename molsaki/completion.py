"""The command ``molsaki completion``: a script that completes commands, flags, choices and files in a shell.

The package shtab writes it from the parsers of all commands, inherited options of distill included. It is static:
completion does not start Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from molsaki.command_parser import Parser
from molsaki.extras import require

FILES, FOLDERS = ("FILE",), ("FOLDER", "MODEL")  # metavars whose values are files, or folders


def script(shell: str, parsers: Mapping[str, Parser], summaries: Mapping[str, str]) -> str:
    """The script for bash, zsh or fish.

    Args:
        parsers: of each command.
        summaries: of each command, one line.

    Raises:
        ImportError: shtab is not installed.
    """
    require("completion")
    import shtab

    return str(shtab.complete(_whole(parsers, summaries), shell=shell))


def _whole(parsers: Mapping[str, Parser], summaries: Mapping[str, str]) -> argparse.ArgumentParser:
    """One parser with a subparser per command, whose actions define how their values are completed."""
    import shtab

    whole = Parser(prog="molsaki", description="Distil a teacher's attention to key words, step by step.")
    whole.add_argument("--version", action="store_true", help="Show the version.")
    commands = whole.add_subparsers(dest="command")
    for name, parser in parsers.items():
        below = commands.add_parser(name, help=summaries[name], add_help=False, parents=[parser])
        for action in below._actions:
            metavar = str(action.metavar).rstrip(".")
            if metavar in FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif metavar in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            action.help = " ".join((action.help or "").partition(". ")[0].split())  # one line in the shell's list
    return whole
