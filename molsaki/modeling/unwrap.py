"""Finds the Hugging Face model inside wrappers such as PEFT's or DDP's, and the device of its inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside ``model``, or ``model`` itself."""
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"model: expected a Hugging Face model or a wrapper around one, got {type(model).__name__}")
    return found


def input_device(model: nn.Module) -> torch.device:
    """The device of a model's inputs. A ``device_map`` may keep weights elsewhere and move them when they are used."""
    first = next(m for m in model.modules() if next(m.parameters(recurse=False), None) is not None)
    hook = getattr(first, "_hf_hook", None)
    return next(first.parameters(recurse=False)).device if hook is None else torch.device(hook.execution_device)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Disables dropout inside the block; afterwards the mode of every module is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
