"""Maps and values of models whose heads are divided among processes (tensor parallelism, ``tp_plan="auto"``).

Every process computes the same loss from the same map, so the gradient of a process's contribution is the gradient of
the map, and the backward needs no communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """The processes among which the heads of a model's attention are divided."""

    group: dist.ProcessGroup
    size: int

    def mean(self, maps: Tensor, heads: int, module: nn.Module) -> Tensor:
        """The mean over all heads of maps that are the mean over this process's ``heads`` query heads."""
        if not self._divides(heads, _total(module, "num_attention_heads"), module):
            return maps
        return _apply_mean(maps, self)

    def gather_queries(self, maps: Tensor, heads: int, module: nn.Module) -> Tensor:
        """The maps ``(N, H, S, W)`` of all query heads, from those of this process's ``heads``."""
        if not self._divides(heads, _total(module, "num_attention_heads"), module):
            return maps
        return _apply_gather(maps, self)

    def gather(self, value: Tensor, module: nn.Module) -> Tensor:
        """The values ``(B, Hkv, M, D)`` of all heads, from those of this process's heads."""
        names = (
            "num_key_value_heads",
            "num_attention_heads",
        )  # with MLA, keys and values have as many heads as queries
        totals = [total for name in names if (total := _total(module, name)) is not None]
        heads = value.shape[1]
        total = next((total for total in totals if heads in (total, total // self.size)), None)
        if not self._divides(heads, total, module):
            return value
        return _apply_gather(value, self)

    def _divides(self, heads: int, total: int | None, module: nn.Module) -> bool:
        """Whether ``heads`` are a process's share of ``total`` heads; False if they are all heads."""
        if total is not None and heads * self.size == total:
            return True
        if heads == total:
            return False
        raise ValueError(
            f"capture: {type(module).__name__} has {heads} heads in this process; expected {total} divided equally "
            f"among the {self.size} processes of tensor parallelism"
        )


def head_group(model: PreTrainedModel) -> HeadGroup | None:
    """The group among which transformers divided the heads of ``model``, None if it did not.

    Raises:
        ValueError: the parameters are divided in a way that transformers does not describe.
    """
    size = getattr(model, "_tp_size", None) or 1
    if size > 1:
        mesh: Any = model._device_mesh
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        return HeadGroup(mesh.get_group(), size)
    if any(_is_head_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            "capture: expected a model without tensor parallelism, or one that transformers divided "
            '(from_pretrained(..., tp_plan="auto")), got parameters that are DTensors over a dimension "tp"'
        )
    return None


def _is_head_sharded(parameter: Tensor) -> bool:
    mesh = getattr(parameter, "device_mesh", None)  # of a DTensor
    return mesh is not None and "tp" in (mesh.mesh_dim_names or ())


def _total(module: nn.Module, name: str) -> int | None:
    return getattr(getattr(module, "config", None), name, None)


class _Mean(Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, heads: HeadGroup) -> Tensor:
        ctx.size = heads.size
        total = maps.contiguous().clone()
        dist.all_reduce(total, group=heads.group)
        return total / heads.size

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient / ctx.size, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, heads: HeadGroup) -> Tensor:
        ctx.first, ctx.count = dist.get_rank(heads.group) * value.shape[1], value.shape[1]
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(heads.size)]
        dist.all_gather(parts, value.contiguous(), group=heads.group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient[:, ctx.first : ctx.first + ctx.count], None


_apply_mean: Callable[..., Tensor] = _Mean.apply
_apply_gather: Callable[..., Tensor] = _Gather.apply
