"""How the program ends when a command does not come to its end: a user's mistake, a fault of the program, a signal."""

from __future__ import annotations

import contextlib
import importlib
import linecache
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from molsaki import logs
from molsaki.extras import MissingExtra
from molsaki.terminal import styled

NEGATIVE, USER_ERROR, CRASH, INTERRUPTED = 1, 2, 70, 128  # the last one plus the number of the signal

logger = logging.getLogger("molsaki.cli")
CONTINUE = {
    "annotate": "All replies so far are kept",
    "keys": "All results so far are kept",
    "extract": "All finished shards are kept",
    "study": "All finished runs are kept",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""

    signal = signal.SIGTERM


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM, so that it ends a command as Ctrl-C does.

    A command that a signal already ends goes on ending: torchrun sends SIGTERM to all processes when one has ended.
    """

    outside = sys.exc_info()[1]

    def terminate(number: int, frame: Any) -> None:
        error = sys.exc_info()[1]
        while error is not None and error is not outside:
            if isinstance(error, KeyboardInterrupt):
                return
            error = error.__context__
        raise Terminated

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _OfTheUser(ValueError):
    """A mistake in the options, which a library may have found."""


def of_the_user(error: Exception) -> Exception:
    return _OfTheUser(str(error)) if _is_deliberate(error) else error


def is_user_error(error: Exception) -> bool:
    """Whether an exception is caused by the user's input, and not by a fault of the program.

    Missing files and missing extras are; so is a value or a package that a ``raise`` statement of ours or of a library
    refused. An error that Python itself raised in the middle of an expression is not, nor is an import that failed.
    """
    if isinstance(error, (_OfTheUser, OSError, MissingExtra, MemoryError)) or _is_out_of_memory(error):
        return True
    if isinstance(error, ImportError) and isinstance(error.__cause__, Exception):  # transformers' lazy imports
        return is_user_error(error.__cause__)
    return isinstance(error, (ValueError, TypeError, ArithmeticError, ImportError)) and _is_deliberate(error)


def refuse(command: str, message: str) -> int:
    """One line about a user's mistake."""
    if _out_of_memory_in(message):
        message = f"out of memory: {message[:200]}"
    if logs.is_json():
        logger.error("%s", message, extra={"values": {"command": command, "exit_code": USER_ERROR}})
    else:
        where = f"molsaki {command}".strip()
        print(f"{where}: {styled('error:', 'red', sys.stderr)} {message}", file=sys.stderr)
    return USER_ERROR


def crashed(command: str, error: Exception) -> int:
    """The traceback of a fault of the program, and how to report it."""
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    report = (
        "This is a fault of molsaki or of a library that it uses. Please report it with the lines above, the command, "
        "and the output of `molsaki doctor --json`."
    )
    if logs.is_json():
        logger.error("%s. %s", what, report, exc_info=error,
                     extra={"values": {"command": command, "exit_code": CRASH}})  # fmt: skip
        return CRASH
    print("".join(traceback.format_exception(error)), end="", file=sys.stderr)
    print(f"\nmolsaki {command}: {styled('internal error:', 'red', sys.stderr)} {what}\n{report}", file=sys.stderr)
    return CRASH


def interrupted(command: str, argv: Sequence[str], error: KeyboardInterrupt) -> int:
    """Say what was kept and how to continue."""
    number = int(getattr(error, "signal", signal.SIGINT))
    saved = getattr(error, "checkpoint", None)
    again = _again(argv, resume=command == "distill")
    if saved is not None and not getattr(error, "can_resume", True):
        message = f"saved {saved}, which cannot be continued, because save_only_model is set."
    elif saved is not None:
        message = f"saved {saved}. To continue: {again}"
    elif command == "distill":
        message = f"To continue from the last checkpoint, if there is one: {again}"
    else:
        message = f"{CONTINUE[command]}. To continue: {again}" if command in CONTINUE else "Run it again."
    what = "interrupted" if number == signal.SIGINT else "terminated"
    if os.environ.get("RANK", "0") != "0":
        return INTERRUPTED + number
    if logs.is_json():
        values = {"command": command, "exit_code": INTERRUPTED + number, "continue": again}
        logger.warning("%s. %s", what, message, extra={"values": values})
    else:
        print(f"\nmolsaki {command}: {what}. {message}", file=sys.stderr)
    return INTERRUPTED + number


def _is_deliberate(error: BaseException) -> bool:
    """Whether the statement that raised an exception is a ``raise``; also if its source is not there to look."""
    frames = traceback.extract_tb(error.__traceback__)
    while frames and (frames[-1].filename == importlib.__file__ or frames[-1].filename.startswith("<frozen importlib")):
        frames.pop()  # Python's own, below `importlib.import_module`
    if not frames:
        return True
    line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
    return line.startswith("raise") or not line


def _is_out_of_memory(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _out_of_memory_in(message: str) -> bool:
    return "CUDA out of memory" in message or "can't allocate memory" in message


def _again(argv: Sequence[str], resume: bool) -> str:
    """The command line once more, with --resume if it needs that."""
    words = list(argv)
    if resume and not any(word.partition("=")[0] == "--resume" for word in words):
        words.append("--resume")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    start = ["molsaki"] if processes == 1 else f"torchrun --nproc_per_node {processes} -m molsaki.cli".split()
    return shlex.join([*start, *map(str, words)])
