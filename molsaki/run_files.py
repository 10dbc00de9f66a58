"""The files in the folder of a training run, which other commands read."""

from __future__ import annotations

import json
from pathlib import Path

ROUTER = "router.safetensors"  # of a checkpoint: the mixture's parameters
CONFIG = "distill.json"  # the options of the run
WEIGHTS_LOG = "layer_weights.jsonl"  # the layer weights of both sides at each logging step
STATE = "trainer_state.json"


def checkpoints(folder: str | Path) -> list[Path]:
    """The ``checkpoint-STEP`` folders of a run, the last one first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: str | Path) -> int:
    """The number of optimizer steps before a checkpoint."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def last_state(folder: str | Path) -> Path | None:
    """The file of the trainer's state after the most steps, of the run's folder or of a checkpoint, if there is one."""
    files = [path / STATE for path in (Path(folder), *checkpoints(folder))]
    steps = {
        file: json.loads(file.read_text(encoding="utf-8")).get("global_step", 0) for file in files if file.is_file()
    }
    return max(steps, key=lambda file: steps[file], default=None)
