"""A Triton driver that launches nothing, so that everything before a launch can be run and measured without a GPU.

    with null_driver(90) as record:
        stepwise_attention(q, k, v, plan, engine="triton")  # CPU tensors; the results are uninitialised memory
    print(record.launches, len(record.compiled), len(record.keys), len(record.launchers))

Inside the context, CPU tensors stand for CUDA ones of the given compute capability: the package chooses the Triton
kernels and the tiles of that architecture, Triton compiles what a launch would compile, for the same chip and with the
same key in its cache on disk, and the launch itself is only counted. With ``compile_kernels=False`` nothing is compiled
either, which leaves the host's work for a launch: the subject of ``benchmarks/host.py``.

Works with Triton 3.6 to 3.9, without a GPU and in a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import resource
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_key
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from molsaki_kernels import attention, attention_map, engine_selection, value_pooling
from molsaki_kernels._triton import configs, lse_gradient, support
from molsaki_kernels.attention import sdpa
from molsaki_kernels.attention import triton as engine

# Shared memory per program in KB, by compute capability (CUDA programming guide, table "technical specifications").
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# Every context counts as a device of its own, because Triton keeps compiled kernels by device number.
_devices = itertools.count(1000)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel that a launch needed for the first time.

    Attributes:
        kernel: its name. key: Triton's key of it, in hexadecimal; the folder in Triton's cache is its base32.
        signature: the type of every argument, which also determines the C launcher (Triton before 3.7 compiles it).
        seconds: of processor time, children included; next to nothing if it came from the cache.
        shared: bytes of shared memory per program, None if it was not compiled.
    """

    kernel: str
    key: str
    signature: tuple[str, ...]
    num_warps: int
    num_stages: int
    seconds: float
    shared: int | None


@dataclasses.dataclass
class Record:
    """The record of a context.

    Attributes:
        launched: the names of the launched kernels, in order.
        compiled: the kernels in the order of their first launches.
        arguments: of the last launch: grid, stream, function, metadata, hooks and the kernel's own.
    """

    launched: list[str] = dataclasses.field(default_factory=list)
    compiled: list[Compiled] = dataclasses.field(default_factory=list)
    arguments: tuple[Any, ...] = ()

    @property
    def launches(self) -> int:
        return len(self.launched)

    @property
    def keys(self) -> set[str]:
        """The distinct keys of the compiled kernels; several calls to the compiler may have the same."""
        return {c.key for c in self.compiled}

    @property
    def launchers(self) -> set[tuple[str, ...]]:
        """The distinct signatures, for each of which Triton before 3.7 compiles a launcher in C."""
        return {c.signature for c in self.compiled}


class NullDriver(DriverBase):  # type: ignore[misc]
    """Answers Triton's runtime like the CUDA driver, except that launches are only counted."""

    def __init__(self, chip: int, record: Record):
        self.chip = chip
        self.device = next(_devices)
        self.record = record
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY[chip] * 1024},
            load_binary=lambda name, binary, shared, device: (0, 0, 0, 0, 1024),  # registers and spills are not read
            unload_module=lambda module: None,
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the null driver measures nothing")

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self.launcher(source.fn.__name__)

    def launcher(self, name: str) -> Any:
        """A function that takes the place of a kernel's launcher, ``CompiledKernel.run``."""
        record = self.record

        def launch(*arguments: Any) -> None:
            record.launched.append(name)
            record.arguments = arguments

        return launch


@contextlib.contextmanager
def null_driver(chip: int = 90, *, compile_kernels: bool = True) -> Iterator[Record]:
    """Treat CPU tensors as CUDA tensors of compute capability ``chip`` (80, 86, 89, 90, 100 or 120).

    Raises:
        RuntimeError: this process interprets Triton kernels.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected to be unset, since interpreted kernels are not launched")
    record = Record()
    null = NullDriver(chip, record)
    compile_kernel = JITFunction._do_compile

    def compile_and_record(
        self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> Any:
        begin = _cpu_seconds()
        digest = _cache_key(self, signature, device, constexprs, options, attrs)
        if compile_kernels:
            kernel = compile_kernel(self, key, signature, device, constexprs, options, attrs, warmup)
        else:
            kernel = _Uncompiled(null.launcher(self.__name__), options)
            self.device_caches[device][0][key] = kernel
        shared = kernel.metadata.shared if compile_kernels else None
        types_ = tuple(map(str, signature.values()))
        seconds = _cpu_seconds() - begin
        record.compiled.append(
            Compiled(self.__name__, digest, types_, options.num_warps, options.num_stages, seconds, shared)
        )
        return kernel

    before = driver._active
    with contextlib.ExitStack() as patches:
        patches.callback(driver.set_active, before)
        driver.set_active(null)
        patches.enter_context(mock.patch.object(JITFunction, "_do_compile", compile_and_record))
        for patch in _as_on_cuda(chip):
            patches.enter_context(patch)
        yield record


class _Uncompiled(CompiledKernel):  # type: ignore[misc]
    """Takes the place of a compiled kernel."""

    def __init__(self, run: Any, options: Any):
        self.module = None
        self._run = run
        self.function = 0
        self.packed_metadata = (options.num_warps, 1, 0)

    def launch_metadata(self, *arguments: Any) -> None:
        return None


def _as_on_cuda(chip: int) -> list[Any]:
    """Patches for what depends on a tensor's device."""
    arch = {80: "sm80", 90: "sm90", 100: "sm100"}.get(chip, "sm86")  # as configs does
    return [
        mock.patch.object(configs, "arch_of", lambda tensor: arch),
        mock.patch.object(support, "INTERPRETED", True),  # Triton's kernels serve CPU tensors
        mock.patch.object(engine, "INTERPRETED", True),
        mock.patch.object(engine_selection, "arch_of", lambda device: f"sm{chip}"),
        mock.patch.object(engine_selection, "DEFAULT_ORDER", {"cpu": engine_selection.DEFAULT_ORDER["cuda"]}),
        mock.patch.object(engine_selection, "choose_map_engine", _choose_triton(attention_map.MAP_ENGINES)),
        mock.patch.object(engine_selection, "choose_pooling_engine", _choose_triton(value_pooling.POOLING_ENGINES)),
        mock.patch.object(attention.lse_gradient, "fold_dlse_into_out", lse_gradient.fold_dlse_into_out),
        mock.patch.object(sdpa, "fold_dlse_into_out", lse_gradient.fold_dlse_into_out),
        mock.patch.object(sdpa, "folds_dlse", lambda inputs: inputs.q.dtype != torch.float16),
    ]


def _choose_triton(engines: dict[str, Any]) -> Any:
    def choose(engine: str, x: Tensor, *options: Any) -> str:
        name = "triton" if engine == "auto" else engine
        reason = engines[name].why_not(x, *options)
        if reason is not None:
            raise ValueError(f'engine: "{name}" cannot serve this call: {reason}')
        return name

    return choose


def _cache_key(function: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any) -> str:
    """The name under which Triton caches the kernel on disk, as ``triton.compile`` computes it."""
    backend = function.device_caches[device][3]
    source = triton.compiler.ASTSource(function, signature, constexprs, attrs)
    key: str = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
