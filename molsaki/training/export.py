"""Writes a student, or a checkpoint of it, into a folder, each file complete or not at all; reads a router back."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molsaki.io import write_json
from molsaki.method.mixture import MixtureOfLayers
from molsaki.run_files import CONFIG, ROUTER
from molsaki.training.distiller import Distiller
from molsaki.training.trainable import is_peft


def export(
    folder: Path,
    distiller: Distiller,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    is_checkpoint: bool,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write the student, its tokenizer, the options and, into a checkpoint, the router.

    A student with adapters is exported whole, and its adapters in the folder ``adapter``; a checkpoint has the adapters
    only.

    Args:
        state_dict: the weights of the distiller where they are sharded: gathered, tied weights in it twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    student, mixture, weights = distiller.student, distiller.mixture, None
    router: dict[str, Tensor] = {}
    if state_dict is not None:
        twice = {name for name, _ in student.named_parameters(remove_duplicate=False)}
        twice -= {name for name, _ in student.named_parameters()}
        weights = {name: w for name, w in _part(state_dict, "student.").items() if name not in twice}
    if is_checkpoint and mixture is not None:
        router = mixture.state_dict() if state_dict is None else _part(state_dict, "mixture.")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        if not is_checkpoint and is_peft(student):
            student.save_pretrained(Path(part, "adapter"), state_dict=weights)
            student, weights = cast(Any, copy.deepcopy(student)).merge_and_unload(), None
        student.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
        write_json(Path(part, CONFIG), options, indent=2)
        if router:
            save_file({name: value.contiguous() for name, value in router.items()}, Path(part, ROUTER))
        for path in [path for path in Path(part).rglob("*") if path.is_file()]:
            target = folder / path.relative_to(part)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)


def load_router(checkpoint: str, mixture: MixtureOfLayers, teacher_layers: Any) -> None:
    """Load a mixture's parameters from a checkpoint; refuse those that belong to other ``teacher_layers``."""
    saved = load_file(Path(checkpoint, ROUTER))
    layers = saved.get("_teacher_pairs")
    if layers is not None and not torch.equal(layers.cpu(), mixture._teacher_pairs.cpu()):
        raise ValueError(
            f"teacher_layers: expected those of {checkpoint}, whose weights belong to its layers; got {teacher_layers}"
        )
    mixture.load_state_dict(saved)


def _part(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
