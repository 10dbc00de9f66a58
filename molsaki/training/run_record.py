"""Records where, when and with which versions a run was trained, in ``run.json`` of its folder."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molsaki.io import write_json
from molsaki.machine import processor

logger = logging.getLogger(__name__)

RECORD = "run.json"
PACKAGES = ("molsaki-kernels", "torch", "transformers", "accelerate", "tokenizers", "peft", "triton", "liger-kernel")
RECORDED_EVERY = 30.0  # seconds, besides at checkpoints


class RunRecord(TrainerCallback):
    """Writes ``run.json``: a list ``attempts``, to which every continuation of a run adds one.

    An attempt has ``started`` (UTC), ``seconds``, ``from_step`` and ``to_step``, whether it is ``finished``, the
    ``folder`` in which relative paths of the options begin, ``versions``, ``machine``, and the number of ``examples``
    where it is known. It is written at the start, with log entries (at most every half minute), at checkpoints and at
    the end, so that interrupted attempts are recorded too.

    Args:
        folder: of the run.
        data: the training data.
    """

    def __init__(self, folder: Path, data: Any):
        self.path, self.data = folder / RECORD, data
        self._earlier: list[dict[str, Any]] = []
        self._attempt: dict[str, Any] = {}
        self._start = self._written = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._start = time.perf_counter()
        # A new run in the folder of an old one does not continue it.
        self._earlier = read_attempts(self.path) if state.global_step else []
        self._attempt = {
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "from_step": state.global_step,
            "folder": os.getcwd(),
            "examples": len(self.data) if hasattr(self.data, "__len__") else None,
            "versions": versions(),
            "machine": machine_of(args),
        }
        self._write(state, False)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.perf_counter() - self._written > RECORDED_EVERY:
            self._write(state, False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write(state, False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(state, True)

    def _write(self, state: TrainerState, finished: bool) -> None:
        if not state.is_world_process_zero or not self._attempt:  # not within train()
            return
        self._written = time.perf_counter()
        self._attempt |= {"to_step": state.global_step, "finished": finished}
        self._attempt["seconds"] = round(self._written - self._start, 3)
        if torch.cuda.is_available():
            self._attempt["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"attempts": [*self._earlier, self._attempt]}, indent=1)
        if finished:
            self._attempt = {}


def read_attempts(path: Path) -> list[dict[str, Any]]:
    """The attempts of a ``run.json``; none if it is missing or cannot be read."""
    if not path.is_file():
        return []
    try:
        attempts = json.loads(path.read_text(encoding="utf-8"))["attempts"]
        if not isinstance(attempts, list) or not all(isinstance(one, dict) for one in attempts):
            raise ValueError("attempts: expected a list of objects")
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s: cannot be read: %s", path, error)
        return []
    return attempts


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that results depend on; PyTorch's with its build."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = str(torch.__version__) if name == "torch" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda or torch.version.hip:
        found["cuda" if torch.version.cuda else "rocm"] = str(torch.version.cuda or torch.version.hip)
    return found


def machine_of(args: TrainingArguments) -> dict[str, str | int]:
    """The system, its processor and the device of the training."""
    device = args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "device": f"{device.type}: {name}",
        "processes": args.world_size,
    }
