"""Causal masks described by a few numbers instead of ``M x M`` elements, for the attention implementation "molsaki"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from molsaki.modeling.record import Record


class CompactMask:
    """A causal mask of M queries and M keys, described by a few numbers.

    Code that operates on it (an addition, an index, an attribute of tensors) gets the additive mask ``(B, 1, M, M)``
    that the model's eager attention would get.

    Attributes:
        batch_size, length: B and M.
        padding: ``(B, M)`` bool, True at the tokens before the right padding; None if there is none.
        lengths: ``(B,)`` tokens before the padding; None if there is none.
        window: a query sees its last ``window`` keys, itself included; None: no limit.
        chunk: a query sees the keys of its own chunk of ``chunk`` tokens only; None: no chunks.
        cu_seqlens: ``(N + 1,)`` int32 bounds of packed texts that position_ids separate; None: the texts are not
            packed, or their bounds are given as cu_seq_lens_q.
        record: of the `capture` block in whose forward the mask was created.
        is_checked: False under ``torch.compile`` if the values of the mask are not known yet: the pattern of the mask
            function, or whether the padding is on the right. `check` then adds the checks to the graph.
    """

    def __init__(
        self,
        build: functools.partial[Tensor],
        batch_size: int,
        length: int,
        padding: Tensor | None,
        window: int | None,
        chunk: int | None,
        cu_seqlens: Tensor | None,
        *,
        record: Record | None,
        is_checked: bool,
    ):
        self._build = build
        self._tensor: Tensor | None = None
        self.batch_size, self.length, self.padding, self.window, self.chunk = batch_size, length, padding, window, chunk
        self.cu_seqlens, self.record, self.is_checked = cu_seqlens, record, is_checked
        self.lengths = None if padding is None else padding.sum(-1)
        self.is_compared = False  # with the bounds given as a keyword or, in a compiled graph, with the mask function

    def tensor(self) -> Tensor:
        """The additive mask ``(B, 1, M, M)``."""
        if self.record is not None and self.record.has_ended:
            raise ValueError(
                "capture: a layer ran again after the block had ended, under another attention implementation "
                "(gradient checkpointing other than the model's own); call backward inside the block"
            )
        if self._tensor is None:
            self._tensor = self._build()
        return self._tensor

    def check(self, cu_seqlens: Tensor | None) -> None:
        """Check in a compiled graph that the mask matches its attributes within each packed text.

        All layers share a mask; it is checked in the first of them.
        """
        if self.is_compared:
            return
        self.is_compared = True
        if self.padding is not None and cu_seqlens is not None:
            message = "attention_mask: expected no padding with packed texts (cu_seq_lens_q), got some"
            torch._assert_async(self.padding.all(), message)
        if self.padding is not None:
            is_right_padded = ~(self.padding[:, 1:] & ~self.padding[:, :-1]).any()
            torch._assert_async(is_right_padded, "attention_mask: expected a right-padded batch with a plan")
        equal = self._equal()
        if cu_seqlens is not None:
            text = torch.searchsorted(cu_seqlens[1:], torch.arange(self.length, device=self.device), right=True)
            equal = equal | (text[:, None] != text)
        message = "attention_mask: expected a causal mask, and packed texts with their bounds as cu_seq_lens_q"
        torch._assert_async(equal.all(), message)

    def hides_the_same(self) -> bool:
        """Whether the additive mask matches its attributes. False for a mask per head."""
        return self.tensor().shape == self.shape and bool(self._equal().all())

    def _equal(self) -> Tensor:
        position = torch.arange(self.length, device=self.device)
        query, key = position[:, None], position[None, :]
        expected = key <= query
        if self.window is not None:
            expected = expected & (key > query - self.window)
        if self.chunk is not None:
            expected = expected & (key // self.chunk == query // self.chunk)
        if self.padding is not None:
            expected = expected & self.padding[:, None, None, :]
        return (self.tensor() == 0) == expected

    @property
    def device(self) -> torch.device:
        return torch.device(self._build.keywords["device"])

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A copy on another device; any other conversion is that of the additive mask."""
        target = args[0] if args else kwargs.get("device")
        if not isinstance(target, (torch.device, str, int)) or len(args) > 1 or kwargs.get("dtype") is not None:
            return self.tensor().to(*args, **kwargs)
        padding, cu_seqlens = (None if t is None else t.to(target) for t in (self.padding, self.cu_seqlens))
        build = functools.partial(_moved, self._build, device=torch.device(target))
        numbers = (self.batch_size, self.length, padding, self.window, self.chunk, cu_seqlens)
        return CompactMask(build, *numbers, record=self.record, is_checked=self.is_checked)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch_size, 1, self.length, self.length))

    @property
    def ndim(self) -> int:
        return 4

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def built(value: Any) -> Any:
            if isinstance(value, CompactMask):
                return value.tensor()
            return type(value)(map(built, value)) if type(value) in (tuple, list) else value

        return function(*map(built, args), **{name: built(value) for name, value in (kwargs or {}).items()})


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: CompactMask, *operands: Any) -> Any:
        return getattr(self.tensor(), name)(*operands)

    return operate


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "and", "rand", "or", "ror", "invert", "neg",
              "eq", "ne", "lt", "le", "gt", "ge", "len", "iter"):  # fmt: skip
    setattr(CompactMask, f"__{_name}__", _operator(f"__{_name}__"))
CompactMask.__hash__ = object.__hash__  # type: ignore[method-assign]


def _moved(build: Callable[[], Tensor], device: torch.device) -> Tensor:
    return build().to(device)
