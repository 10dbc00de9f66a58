"""A CUDA device that computes nothing, for machines without a GPU: it compiles kernels and checks the GPU scripts.

    python -m benchmarks.stand_in [--keys FILE] [--dry] PROGRAM ARGUMENTS...

``PROGRAM`` is a module, as for ``python -m``. With ``--dry`` no kernel is compiled, which takes seconds, not minutes.

Tensors on device "cuda" are PyTorch's fake tensors: they have shapes, strides and dtypes, but no memory, and are on an
H100. Triton's own CUDA driver runs over a libcuda that accepts every call. So a launch takes the whole path of a real
one: the kernel is compiled for sm_90 into Triton's cache, its C launcher is built, and the launch itself does nothing.
The kernels that a test or a benchmark would compile on an H100 are then in the cache under the right keys.

``FILE`` gets a line of JSON for each kernel that the program asks for: its name and key, whether it was in the cache,
CPU seconds. Comparisons with the oracle are skipped, and so is the rest of a test once it needs a value. Numbers that
are printed under the stand-in are meaningless.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything is replaced: it looks at every function of torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "stand-in for an H100, computes nothing"
CAPABILITY = (9, 0)
ADDRESS = 1 << 40  # of every storage: a multiple of 512, as the caching allocator's

# Every call succeeds. Attributes: 97 is the shared memory that a block can opt in to, 0 the threads of a block.
LIBCUDA = r"""
#include <stddef.h>
#define ACCEPT(name) int name() { return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 97 ? 232448 : attribute == 8 ? 49152 : attribute == 16 ? 132 : 1;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long long address) {
  *(unsigned long long *)value = address;
  return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "none"; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
ACCEPT(cuInit) ACCEPT(cuCtxSetCurrent) ACCEPT(cuFuncSetCacheConfig) ACCEPT(cuFuncSetAttribute) ACCEPT(cuCtxSetLimit)
ACCEPT(cuCtxGetDevice) ACCEPT(cuModuleUnload) ACCEPT(cuStreamIsCapturing)
ACCEPT(cuTensorMapEncodeTiled) ACCEPT(cuLaunchKernelEx) ACCEPT(cuLaunchKernel)
"""


# Tests that compare values which the stand-in does not have. They run, because their kernels belong to the kit.
NEED_VALUES = (
    "tests/gpu/test_triton_hardware.py::test_tf32_only_if_asked",
    "tests/kernels/triton/test_lse_gradient.py::test_gradient_of_the_scores",
    "tests/kernels/triton/test_value_pooling.py::test_empty",
)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Let these tests fail, where this module is a plugin of pytest."""
    for item in items:
        if item.nodeid.partition("[")[0] in NEED_VALUES:
            item.add_marker(sys.modules["pytest"].mark.xfail(reason="the stand-in has no values"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stand_in", description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=Path, help="append a line for each kernel to this file")
    parser.add_argument("--dry", action="store_true", help="compile nothing")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    with stand_in():
        observe_compiler(arguments.keys, arguments.dry)
        skip_comparisons(arguments.arguments)
        plugin = ["-p", "benchmarks.stand_in"] if arguments.program == "pytest" else []
        sys.argv = [arguments.program, *plugin, *arguments.arguments]
        try:
            runpy.run_module(arguments.program, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


@contextlib.contextmanager
def stand_in() -> Iterator[FakeTensorMode]:
    """Have "cuda" be the stand-in inside the context. Triton must not have been used before in this process."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 runs kernels by Triton's interpreter, which compiles nothing")
    with contextlib.ExitStack() as stack:
        for target, name, value in _replacements():
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        _activate_triton_driver()
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then dispatches its copy
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        _patch_project(stack, fake)
        stack.enter_context(_OnDevice(fake))
        yield fake


class _OnDevice(TorchDispatchMode):
    """Makes fake tensors of what is created on or copied to the device; host tensors stay real."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            if kwargs.get("generator") is not None:
                kwargs["generator"] = None
            kwargs["device"] = torch.device("cuda", 0)
            with self.fake:
                return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
            return _no_value()


class _Nothing:
    """A stream, event or graph on which everything succeeds; also a context."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def elapsed_time(self, _: Any) -> float:
        return 1e4  # milliseconds: so that a measured function is called only a few times

    def events(self) -> list[Any]:
        return []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _no_value(*_: Any) -> None:
    if "pytest" in sys.modules:
        sys.modules["pytest"].skip("the stand-in has no values")
    raise RuntimeError("the stand-in has no values")


def _address(x: FakeTensor) -> int:
    return ADDRESS + x.storage_offset() * x.element_size() if x.is_cuda else _no_value() or 0


_host_equal = torch.equal


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    fake = isinstance(a, FakeTensor) or isinstance(b, FakeTensor)
    return a.shape == b.shape if fake else _host_equal(a, b)


class _NoKernel:
    """Stands for a compiled kernel."""

    function = packed_metadata = None
    launch_metadata = run = staticmethod(lambda *_: None)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _replacements() -> list[tuple[Any, str, Any]]:
    properties = types.SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132, L2_cache_size=50 << 20,
        total_memory=80 << 30, warp_size=32, shared_memory_per_block_optin=232448, regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, gcnArchName="",
    )  # fmt: skip
    generator = torch.Generator
    on_cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": _nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: NAME,
        "device": _Nothing,
        "device_of": _Nothing,
        "stream": _Nothing,
        "Stream": _Nothing,
        "Event": _Nothing,
        "CUDAGraph": _Nothing,
        "graph": _Nothing,
        "current_stream": _Nothing,
        "default_stream": _Nothing,
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "mem_get_info": lambda *_: (80 << 30, 80 << 30),
        "is_bf16_supported": lambda *_, **__: True,
    }
    silent = ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_sync_debug_mode", "_sleep",
              "manual_seed", "manual_seed_all", "set_device")  # fmt: skip
    on_cuda |= dict.fromkeys(silent, _nothing)
    of_random = {  # checkpoints hold the states
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": _nothing,
        "set_rng_state_all": _nothing,
    }

    class Generator(generator):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator("cpu")

    return [
        *((torch.cuda, name, value) for name, value in (on_cuda | of_random).items()),
        *((torch.cuda.random, name, value) for name, value in of_random.items()),
        (torch, "Generator", Generator),
        (torch.autograd, "grad", _grad),
        (torch.Tensor, "backward", _backward),
        (torch._C, "_cuda_getCurrentRawStream", lambda *_: 0),
        (torch._C, "_cuda_getDevice", lambda *_: 0),
        (fake_tensor, "init_gpu_context", _nothing),
        (FakeTensorMode, "avoid_device_init", True),
        (FakeTensor, "data_ptr", _address),
        (FakeTensor, "record_stream", _nothing),
        (FakeTensor, "__bool__", lambda x: True),
        (FakeTensor, "__float__", lambda x: 0.0),
        (FakeTensor, "tolist", _no_value),
        (FakeTensor, "item", _no_value),
        (torch, "equal", _equal),
        (torch.profiler, "profile", _Nothing),
        (torch, "compile", lambda function=None, **_: function if function else lambda f: f),
    ]


def _gradients(outputs: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor | None]) -> dict[int, torch.Tensor]:
    """Return the gradients of the leaves by their ids; PyTorch's own engine asks the driver for devices."""
    buffers: dict[Any, dict[int, torch.Tensor]] = {}
    leaves: dict[int, torch.Tensor] = {}

    def add(sums: dict[int, torch.Tensor], key: int, gradient: torch.Tensor) -> None:
        sums[key] = sums[key] + gradient if key in sums else gradient

    order: list[Any] = []
    visited: set[Any] = set()
    stack = [(output.grad_fn, False) for output in outputs if output.grad_fn is not None]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in visited:
            visited.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    for output, gradient in zip(outputs, upstream, strict=True):
        if output.grad_fn is not None:
            add(
                buffers.setdefault(output.grad_fn, {}),
                output.output_nr,
                torch.ones_like(output) if gradient is None else gradient,
            )
    for node in reversed(order):
        arriving = buffers.pop(node, None)
        if arriving is None:
            continue
        if hasattr(node, "variable"):
            add(leaves, id(node.variable), arriving[0])
            continue
        arguments = [arriving.get(i) for i in range(len(node._input_metadata))]
        results = (
            node.apply(*arguments) if isinstance(node, torch.autograd.function.BackwardCFunction) else node(*arguments)
        )
        results = results if isinstance(results, tuple) else (results,)
        for (following, i), gradient in zip(node.next_functions, results, strict=False):
            if following is not None and gradient is not None:
                add(buffers.setdefault(following, {}), i, gradient)
    return leaves


_host_grad, _host_backward = torch.autograd.grad, torch.Tensor.backward


def _grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> tuple[torch.Tensor, ...]:
    outputs, inputs = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (outputs, inputs))
    if not any(isinstance(x, FakeTensor) for x in outputs):
        return _host_grad(outputs, inputs, grad_outputs, **options)
    upstream = [None] * len(outputs) if grad_outputs is None else grad_outputs
    with torch.no_grad():
        leaves = _gradients(outputs, [upstream] if isinstance(upstream, torch.Tensor) else upstream)
        return tuple(leaves[id(x)] if id(x) in leaves else torch.zeros_like(x) for x in inputs)


def _backward(output: torch.Tensor, gradient: torch.Tensor | None = None, **options: Any) -> None:
    if not isinstance(output, FakeTensor):
        return _host_backward(output, gradient, **options)
    with torch.no_grad():
        _gradients([output], [gradient])


def _activate_triton_driver() -> None:
    """Have Triton use its CUDA driver over :data:`LIBCUDA`."""
    folder = Path(tempfile.mkdtemp(prefix="libcuda-"))
    (folder / "libcuda.c").write_text(LIBCUDA)
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", folder / "libcuda.so.1", folder / "libcuda.c"], check=True)
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    knobs.nvidia.libcuda_path = str(folder)
    driver.set_active(CudaDriver())
    driver.active.get_current_device = lambda: 0
    driver.active.get_current_stream = lambda *_: 0
    driver.active.get_device_capability = lambda *_: CAPABILITY


def _patch_project(stack: contextlib.ExitStack, fake: FakeTensorMode) -> None:
    """Call functions instead of operators, whose fakes launch nothing, and flash-attn 4 as fake tensors need it.

    ``python -m benchmarks`` has nothing to compare.
    """
    from molsaki_kernels.attention import flash_attn
    from molsaki_kernels.ops import attention, attention_map, split_widened, value_pooling

    from . import check

    stack.enter_context(mock.patch.object(check, "expected", _nothing))
    stack.enter_context(mock.patch.object(check, "largest_error", lambda *_: (0.0, None)))
    for operation in (attention, attention_map, split_widened, value_pooling):
        stack.enter_context(mock.patch.object(operation, "runs_untraced", lambda *_: True))
    interface = flash_attn._interface(4)
    if not isinstance(interface, str):
        for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
            stack.enter_context(mock.patch.object(interface, name, _inside(fake, getattr(interface, name))))


def _inside(fake: FakeTensorMode, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # flash-attn 4 keeps its compiled kernels as an attribute of its functions
    def run(*args: Any, **kwargs: Any) -> Any:
        with fake:
            return function(*args, **kwargs)

    return run


def observe_compiler(path: Path | None, dry: bool) -> None:
    """Append a line to ``path`` for each kernel that this process asks Triton for, and with ``dry`` compile none."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_key
    from triton.runtime.jit import JITFunction

    do_compile = JITFunction._do_compile

    def observed(
        self: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> Any:
        kernels, _, _, backend, _ = self.device_caches[device]
        source = ASTSource(self, signature, constexprs, attrs)
        text = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
        name = hashlib.sha256(text.encode()).hexdigest()
        known, begin = in_cache(name), _cpu_seconds()
        if dry:
            kernel = kernels[key] = _NoKernel()
        else:
            kernel = do_compile(self, key, signature, device, constexprs, options, attrs, warmup)
            kernel._init_handles()  # builds the launcher
        line = {"kernel": self.__name__, "key": name, "known": known, "seconds": round(_cpu_seconds() - begin, 2)}
        if path:
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return kernel

    JITFunction._do_compile = observed


def in_cache(key: str) -> bool:
    """Return whether Triton's cache has the kernel of a key."""
    from triton import knobs

    from benchmarks.gpu_kit import cache_folder

    return any((Path(knobs.cache.dir) / cache_folder(key)).glob("*.cubin"))


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def skip_comparisons(arguments: Sequence[str]) -> None:
    """Disable the oracle and the comparisons of the tests' helpers: there are no values to compare."""
    from tests.helpers import budget, hardware_cases, kernel_cases

    def no_oracle(case: Any, x: Any, *_: Any) -> dict[str, Any]:
        return {"lse": torch.empty(x.q.shape[:3], device=x.q.device)}

    kernel_cases.oracle = no_oracle
    kernel_cases.map_oracle = lambda *_: {}
    kernel_cases.check = kernel_cases.check_widened = _nothing
    hardware_cases.walk = lambda *_: {}
    for name in ("test_models_hardware", "test_training_hardware"):
        if any(name in argument for argument in arguments):
            shadow(name)  # which has values, and compares them
    budget.assert_within_budget = _nothing


def shadow(name: str) -> None:
    """Run the tests of this module of tests/gpu on the CPU, and every attention call of theirs on the stand-in too.

    Models, the check of their masks, and training need values. Float64 is the reference's; no kernel computes it.
    """
    from molsaki.modeling import attention_hook

    attention = attention_hook.stepwise_attention

    def shadowed(q: Any, k: Any, v: Any, plan: Any, **options: Any) -> Any:
        if q.dtype != torch.float64:
            has_gradient = torch.is_grad_enabled()
            # Operators of the CPU round under its autocast; for "cuda" they do so only under that of "cuda".
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            there = [x.detach().to("cuda", dtype).requires_grad_(has_gradient) for x in (q, k, v)]
            moved = {name: x.to("cuda") if isinstance(x, torch.Tensor) else x for name, x in options.items()}
            results = attention(*there, plan.to("cuda"), **moved)
            if has_gradient:
                torch.autograd.grad(results, there, [torch.empty_like(x) for x in results])
        return attention(q, k, v, plan, **options)

    attention_hook.stepwise_attention = shadowed
    importlib.import_module(f"tests.gpu.{name}").DEVICE = "cpu"


if __name__ == "__main__":
    begin = time.monotonic()
    status = main()
    print(f"stand-in: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    sys.exit(status)
