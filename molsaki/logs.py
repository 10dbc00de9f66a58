"""Log messages of the commands on standard error, as text or as one JSON object per line.

``--log_format json`` or ``MOLSAKI_LOG=json`` chooses JSON. Child processes inherit it.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

VARIABLE = "MOLSAKI_LOG"
FORMATS = ("text", "json")
VARIABLES = (VARIABLE, "TQDM_DISABLE", "TQDM_MININTERVAL")  # set here, for libraries and child processes


def choose(name: str) -> None:
    """Choose the format for this process and for those that it starts."""
    if name not in FORMATS:
        raise ValueError(f"--log_format, {VARIABLE}: expected one of {', '.join(FORMATS)}, got {name!r}")
    os.environ[VARIABLE] = name
    if name == "json":  # tqdm reads it when it is imported
        os.environ["TQDM_DISABLE"] = "1"


def is_json() -> bool:
    """Whether logs and results are JSON."""
    return os.environ.get(VARIABLE) == "json"


def show() -> None:
    """Write the package's log messages to standard error: all of them in the first process, warnings in others."""
    logger = logging.getLogger("molsaki")
    if not sys.stderr.isatty():  # a file would get a line per refreshed progress bar; tqdm reads it when it is imported
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    if is_json():
        root = logging.getLogger()
        if not any(isinstance(handler, Stderr) for handler in root.handlers):
            handler = Stderr()
            handler.setFormatter(JsonFormatter())
            root.addHandler(handler)
            logging.captureWarnings(True)
    elif not logger.hasHandlers():
        logger.addHandler(Stderr())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def take_over_libraries() -> None:
    """With JSON: replace the handlers that imported libraries, such as transformers, have installed."""
    if not is_json():
        return
    for name in ("transformers", "huggingface_hub", "datasets", "torch", "accelerate", "peft"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                logger.removeHandler(handler)
        logger.propagate = True


class Stderr(logging.Handler):
    """Writes lines to the standard error of the moment, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
            if tqdm is not None and getattr(tqdm, "_instances", None):
                tqdm.write(line, file=sys.stderr)
            else:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ``time`` (ISO 8601, UTC), ``level``, ``name`` and ``message``.

    ``logger.info(..., extra={"values": {...}})`` adds numbers by name, and an exception adds its ``traceback``.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "name": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in getattr(record, "values", {}).items() if name not in line}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return as_json(line)


def as_json(value: Any) -> str:
    """One line of standard JSON: numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(_standard(value), ensure_ascii=False, default=str)


def _standard(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _standard(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_standard(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of NumPy or PyTorch
        return _standard(value.item())
    return value
