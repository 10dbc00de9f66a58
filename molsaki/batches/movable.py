"""Base class of dataclasses that hold tensors and can be moved to a device as a whole."""

from __future__ import annotations

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
                return [apply(item) for item in value]
            return function(value) if isinstance(value, (Tensor, StepPlan, Movable)) else value

        moved = {name: apply(value) for name, value in vars(self).items()}
        unchanged = all(_is_same(moved[name], value) for name, value in vars(self).items())
        return self if unchanged else type(self)(**moved)


def _is_same(a: Any, b: Any) -> bool:
    """Return whether nothing was moved: the same object, or lists of the same objects."""
    if isinstance(a, list) and isinstance(b, list):
        return all(_is_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b
