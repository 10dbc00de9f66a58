"""Base class of dataclasses that hold tensors and can be moved to a device as a whole."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from molsaki_kernels import StepPlan

Self = TypeVar("Self", bound="Movable")


class Movable:
    """A dataclass whose fields hold tensors, plans, other movables, or lists of those.

    accelerate moves a batch by its method ``to``, and a ``DataLoader`` with ``pin_memory=True`` calls ``pin_memory``.
    """

    def to(self: Self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same with its tensors on ``device``; itself if they are there already."""
        return self._with_each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: Self) -> Self:
        """The same with its tensors in page-locked memory."""
        return self._with_each(lambda value: value.pin_memory())

    def _with_each(self: Self, function: Callable[[Any], Any]) -> Self:
        def apply(value: Any) -> Any:
            if isinstance(value, list):
                items = [apply(item) for item in value]
                return value if all(map(operator.is_, items, value)) else items
            return function(value) if isinstance(value, (Tensor, StepPlan, Movable)) else value

        moved = {name: apply(value) for name, value in vars(self).items()}
        is_same = all(moved[name] is value for name, value in vars(self).items())
        return self if is_same else type(self)(**moved)
