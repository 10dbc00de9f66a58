"""Launch a compiled kernel without most of the work that Triton does for each launch.

``kernel[grid](*args, **constexprs)`` of Triton derives the kernel's key from every argument in every launch, with its
options as text. It also compares the globals that the kernel uses, and prepares hooks even if none is set. The host
needs three times as long for this as for the rest (``python -m benchmarks.host``). :class:`Kernel` finds the compiled
kernel by the facts that Triton's key depends on, and calls its launcher:

    the current device; the compile-time arguments and options; the type of every argument;
    of a tensor            its dtype, and its address modulo 16
    of an integer          whether it fits int32, int64 or uint64;
                           unless it is in ``do_not_specialize``, whether it is 1 or a multiple of 16

(``specialize_impl`` in ``python/src/specialize.cc``; ``BaseBackend`` in ``triton/backends/compiler.py``.) Calls with
equal facts have equal keys; ``tests/kernels/triton/test_launch.py`` compares the two for random arguments. The first
launch with new facts goes through Triton, which compiles the kernel. So does every launch that a hook observes, in
debug or instrumentation mode, with arguments of other types, on a backend other than CUDA, or under a version of Triton
with which the comparison was not run.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable, Iterable
from types import NoneType
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.knobs import HookChain
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

__all__ = ["Kernel"]

COMPARED_VERSIONS = ("3.6", "3.7", "3.8", "3.9")  # with which test_launch.py was run
KNOWN = ".".join(triton.__version__.split(".")[:2]) in COMPARED_VERSIONS
OPTIONS = frozenset({"num_warps", "num_stages"})
MAX_ENTRIES = 1 << 14  # of a dictionary below; a full one is emptied

Arguments = tuple[Any, ...]


class _IntegerFacts(dict[tuple[int, ...], tuple[int, ...]]):
    """The integers of a call -> one number for the facts about each, which repeat from layer to layer."""

    def __init__(self, specialized: list[bool]):
        super().__init__()
        self.specialized = specialized

    def __missing__(self, values: tuple[int, ...]) -> tuple[int, ...]:
        if len(self) >= MAX_ENTRIES:
            self.clear()
        facts = tuple(map(_integer_facts, values, self.specialized))
        self[values] = facts
        return facts


def _integer_facts(value: int, specialized: bool) -> int:
    if -(1 << 31) <= value < 1 << 31:
        width = 0
    elif -(1 << 63) <= value < 1 << 63:
        width = 1
    else:
        width = 2 if 0 <= value < 1 << 64 else 3
    return 3 * width + ((1 if value == 1 else 2 if value % 16 == 0 else 0) if specialized else 0)


@dataclasses.dataclass(frozen=True)
class _Signature:
    """The positions of the arguments of each kind, for one tuple of argument types, and the kernels compiled for it.

    Attributes:
        tensors, integers: pick these from the arguments.
        with_addresses: from the arguments followed by the tensors' addresses, pick the arguments with an address in
            place of each tensor.
        compiled: by key, a kernel and its compile-time arguments.
    """

    tensors: Callable[[Arguments], tuple[Tensor, ...]]
    integers: Callable[[Arguments], tuple[int, ...]]
    integer_facts: _IntegerFacts
    with_addresses: Callable[[Arguments], Arguments]
    compiled: dict[Hashable, tuple[Any, Arguments]] = dataclasses.field(default_factory=dict)

    def key(self, args: Arguments, keywords: dict[str, Any], device: int) -> tuple[Hashable, list[int]]:
        """The facts that decide which compiled kernel is launched, besides the types; and the tensors' addresses."""
        tensors = self.tensors(args)
        addresses = [x.data_ptr() for x in tensors]
        key = (
            device,
            tuple(keywords),
            tuple(keywords.values()),
            tuple([x.dtype for x in tensors]),
            tuple([address & 15 for address in addresses]),
            self.integer_facts[self.integers(args)],
        )
        return key, addresses


class Kernel(JITFunction):  # type: ignore[misc]
    """A ``triton.jit`` function with a fast launch of its compiled kernels."""

    def __init__(self, function: Callable[..., Any], do_not_specialize: Iterable[str]):
        super().__init__(function, do_not_specialize=list(do_not_specialize))
        self.runtime_params = [p for p in self.params if not p.is_constexpr]
        self.constexpr_names = [p.name for p in self.params if p.is_constexpr]
        # Compile-time arguments come last. No other argument has an annotation, which Triton would treat differently.
        self.has_short_way = (
            KNOWN
            and self.params[: len(self.runtime_params)] == self.runtime_params
            and not any(p.annotation or p.do_not_specialize_on_alignment for p in self.runtime_params)
        )
        self.signatures_of_types: dict[tuple[type, ...], _Signature | None] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **keywords: Any) -> Any:
        """Launch the kernel and return it, as ``triton.jit`` functions do."""
        signature = self.signature_of(args)
        if signature is None or _is_observed() or self.pre_run_hooks:
            return self.run(*args, grid=grid, warmup=False, **keywords)
        active = driver.active
        device = active.get_current_device()
        key, addresses = signature.key(args, keywords, device)
        found = signature.compiled.get(key)
        if found is None:
            kernel = self.run(*args, grid=grid, warmup=False, **keywords)
            self._remember(signature, key, device, kernel, keywords)
            return kernel
        kernel, constexprs = found
        x, y, z = (*grid, 1, 1)[:3]
        kernel.run(
            x, y, z, active.get_current_stream(device), kernel.function, kernel.packed_metadata, None, None, None,
            *signature.with_addresses((*args, *addresses)), *constexprs,
        )  # fmt: skip
        return kernel

    def signature_of(self, args: Arguments) -> _Signature | None:
        """The signature of the arguments, or None if their types need Triton's own launch."""
        types = tuple(map(type, args))
        try:
            return self.signatures_of_types[types]
        except KeyError:
            signature = self.signatures_of_types[types] = self._new_signature(types)
            return signature

    def _new_signature(self, types: tuple[type, ...]) -> _Signature | None:
        if not self.has_short_way or len(types) != len(self.runtime_params):
            return None
        order = list(range(len(types)))
        tensors: list[int] = []
        integers: list[int] = []
        specialized: list[bool] = []
        for i, (parameter, kind) in enumerate(zip(self.runtime_params, types, strict=True)):
            if kind is Tensor or kind is torch.nn.Parameter:
                order[i] = len(types) + len(tensors)
                tensors.append(i)
            elif kind is int:
                integers.append(i)
                specialized.append(not parameter.do_not_specialize)
            elif kind is not float and kind is not NoneType:
                return None
        return _Signature(_picker(tensors), _picker(integers), _IntegerFacts(specialized), _picker(order))

    def _remember(
        self, signature: _Signature, key: Hashable, device: int, kernel: Any, keywords: dict[str, Any]
    ) -> None:
        """Keep a compiled kernel, unless it is launched in another way than the one above."""
        if (
            isinstance(kernel, self.CompiledKernel)
            and self.device_caches[device][2].backend == "cuda"
            and set(keywords) - OPTIONS == set(self.constexpr_names)
        ):
            if len(signature.compiled) >= MAX_ENTRIES:
                signature.compiled.clear()
            signature.compiled[key] = kernel, tuple(keywords[name] for name in self.constexpr_names)


def _picker(positions: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function from the arguments to the tuple of those at the positions."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda args: tuple(args[i] for i in positions)


def _is_observed() -> bool:
    """Whether a hook or a debugging setting observes or changes launches."""
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        type(before) is not HookChain
        or type(after) is not HookChain
        or before.calls
        or after.calls
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or knobs.compilation.instrumentation_mode
    )
