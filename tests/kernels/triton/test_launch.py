"""Tests that the fast launch uses the compiled kernel that Triton itself would launch."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from benchmarks.null_driver import null_driver
from molsaki_kernels._triton import attention_backward, launch, lse_gradient, map_backward
from molsaki_kernels._triton.decorators import RAGGED
from molsaki_kernels._triton.integers import cdiv, next_power_of_2
from molsaki_kernels._triton.launch import Kernel

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
INTEGERS = (
    0,
    1,
    2,
    8,
    15,
    16,
    17,
    48,
    1024,
    -1,
    -16,
    2**31 - 1,
    2**31,
    2**31 - 16,
    -(2**31),
    -(2**31) - 1,
    2**32,
    2**33,
)
HUGE = (2**63 - 1, 2**63, 2**63 + 16, 2**64 - 1, -(2**63))
MEMORY = torch.zeros(256, dtype=torch.uint8)


def add(x, y, n, stride, M, factor, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    i = tl.arange(0, BLOCK) * stride
    tl.store(y + i, tl.load(x + i, mask=i < M + n) * factor)


@pytest.fixture
def compiled(monkeypatch):
    """Kernels are launched, through the driver that launches nothing."""
    monkeypatch.setitem(knobs.runtime.__dict__, "interpret", False)
    with null_driver(90, compile_kernels=False) as record:
        yield record


@pytest.fixture
def ordinary(monkeypatch):
    """The names of the kernels that were launched by Triton's own ``run``."""
    calls = []
    run = JITFunction.run

    def counted(self, *args, **keywords):
        calls.append(self.__name__)
        return run(self, *args, **keywords)

    monkeypatch.setattr(JITFunction, "run", counted)
    return calls


def random_argument(rng: random.Random):
    kind = rng.random()
    if kind < 0.1:
        return None
    if kind < 0.45:
        dtype = rng.choice(DTYPES)
        start = rng.choice((0, 0, 16, 32, 8, 4, 2, 1)) // dtype.itemsize * dtype.itemsize
        tensor = MEMORY[start : start + 8 * rng.randrange(3)].view(dtype)  # may be empty, whose address is 0
        return torch.nn.Parameter(tensor) if dtype.is_floating_point and rng.random() < 0.1 else tensor
    if kind < 0.95:
        return rng.choice(INTEGERS) if rng.random() < 0.95 else rng.choice(HUGE)
    return rng.choice((0.0, 1.0, 0.5))


def likely_arguments(kernel: Kernel, rng: random.Random) -> list:
    """Arguments as launchers pass them, pointers and then numbers, of which at most two differ from the usual ones."""
    floats = ("scale", "factor", "inner", "weight")
    numbers = (*RAGGED, "n", "H", "heads", "group_size")
    found: list = []
    for p in kernel.runtime_params:
        if p.name.startswith("stride") or p.name in numbers:
            found.append(64)
        else:
            found.append(0.5 if p.name in floats else MEMORY[:32].view(torch.bfloat16))
    for _ in range(rng.randrange(3)):
        found[rng.randrange(len(found))] = random_argument(rng)
    return found


KERNELS = (
    add,
    *(
        kernel.fn
        for kernel in (lse_gradient.fold_kernel, map_backward.map_dq_kernel, attention_backward.flash_dkv_kernel)
    ),
)


@pytest.mark.skipif(not launch.KNOWN, reason="no short way with this version of Triton")
@pytest.mark.parametrize("choose", ["likely", "any"])
@pytest.mark.parametrize("function", KERNELS, ids=lambda f: f.__name__)
def test_equal_facts_are_equal_keys(function, choose):
    """Equal facts have one key of Triton's, for the types that have a short way, and the key never merges layouts."""
    kernel = Kernel(function, RAGGED)
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    rng = random.Random(0)
    key_of_facts: dict = {}
    repeated = 0
    for _ in range(600):
        if choose == "any":
            args = [random_argument(rng) for _ in kernel.runtime_params]
        else:
            args = likely_arguments(kernel, rng)
        keywords = {name: rng.choice((16, 32)) for name in kernel.constexpr_names[:1]}
        keywords |= {name: 7 for name in kernel.constexpr_names[1:]} | {"num_warps": rng.choice((4, 8))}
        signature = kernel.signature_of(tuple(args))
        assert signature is not None
        facts, addresses = signature.key(tuple(args), keywords, 0)
        try:
            _, specialization, options = binder(*args, **keywords)
        except OverflowError:  # no integer type holds the number
            continue
        key = compute_cache_key({}, specialization, options)
        facts = (tuple(map(type, args)), facts)
        repeated += facts in key_of_facts
        assert key_of_facts.setdefault(facts, key) == key, args
        expected = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
        assert list(signature.with_addresses((*args, *addresses))) == expected
    assert choose == "any" or repeated > 20


@pytest.mark.skipif(not launch.KNOWN, reason="no short way with this version of Triton")
def test_every_fact_counts(compiled, ordinary):
    """A call that differs from another in one argument launches the kernel that Triton would, at once and again."""
    kernel = Kernel(add, ["M"])
    x = MEMORY[:64].view(torch.float32)
    first = dict(x=x, y=x, n=5, stride=64, M=5, factor=2.0, BLOCK=16, FLAG=True, num_warps=4)
    changes = [
        {},
        {"x": x[1:]},
        {"y": x[4:]},
        {"x": x.view(torch.int32)},
        {"x": None},
        {"x": torch.nn.Parameter(x)},
        {"stride": 1},
        {"stride": 16},
        {"stride": 65},
        {"stride": 2**31},
        {"stride": 2**32},
        {"stride": 2**63},
        {"stride": -16},
        {"n": 16},
        {"M": 1},
        {"M": 16},
        {"M": 2**31},
        {"factor": 1},
        {"factor": 1.0},
        {"BLOCK": 32},
        {"FLAG": False},
        {"FLAG": None},
        {"num_warps": 8},
    ]

    def call(changed, launcher):
        keywords = {**first, **changed}
        args = [keywords.pop(name) for name in ("x", "y", "n", "stride", "M", "factor")]
        found = launcher(*args, **keywords)
        arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in compiled.arguments]
        return found, arguments[:6], arguments[9:]

    for _ in range(2):
        for changed in changes:
            assert call(changed, kernel[(3, 2)]) == call(
                changed, lambda *args, **keywords: kernel.run(*args, grid=(3, 2), warmup=False, **keywords)
            )
    ordinary.clear()
    for changed in changes:
        call(changed, kernel[(3, 2)])
    assert not ordinary and len(compiled.compiled) == len({id(call(c, kernel[(3,)])[0]) for c in changes})


@pytest.mark.skipif(not launch.KNOWN, reason="no short way with this version of Triton")
def test_who_goes_through_triton(compiled, ordinary, monkeypatch):
    x = MEMORY[:64].view(torch.float32)
    kernel = Kernel(add, ["M"])

    def goes_through_triton(*args, kernel=kernel, grid=(1,), **keywords) -> bool:
        ordinary.clear()
        for _ in range(2):
            kernel[grid](*args, **keywords)
        return len(ordinary) == 2

    usual, flags = (x, x, 5, 64, 5, 2.0), dict(BLOCK=16, FLAG=True)
    kernel[(1,)](*usual, **flags)
    assert not goes_through_triton(*usual, **flags)
    assert not goes_through_triton(*usual, grid=(1, 2, 3), **flags) and compiled.arguments[:3] == (1, 2, 3)

    pointer = SimpleNamespace(dtype=torch.float32, data_ptr=x.data_ptr)  # a pointer that is no tensor
    assert goes_through_triton(pointer, *usual[1:], **flags)
    assert goes_through_triton(*usual[:2], True, *usual[3:], **flags)  # a truth value
    assert goes_through_triton(*usual[:5], factor=2.0, **flags)
    assert goes_through_triton(*usual, **flags, maxnreg=64)

    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(knobs.runtime.launch_enter_hook, "calls", [seen.append])
        assert goes_through_triton(*usual, **flags)
        hook = compiled.arguments[7]
        hook("launch")
        assert seen == ["launch"]
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_exit_hook", seen.append)
        assert goes_through_triton(*usual, **flags)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        assert goes_through_triton(*usual, **flags)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *_: ("", ""))
        assert goes_through_triton(*usual, **flags)
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "pre_run_hooks", [lambda *_, **__: None])
        assert goes_through_triton(*usual, **flags)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "KNOWN", False)
        assert goes_through_triton(*usual, kernel=Kernel(add, ["M"]), **flags)

    def annotated(x: tl.int64, y, n, stride, M, factor, BLOCK: tl.constexpr, FLAG: tl.constexpr):
        tl.store(y, x)

    assert goes_through_triton(*usual, kernel=Kernel(annotated, ["M"]), **flags)
    assert not goes_through_triton(*usual, **flags)


@pytest.mark.skipif(not launch.KNOWN, reason="no short way with this version of Triton")
def test_each_device_has_its_own_kernels(monkeypatch):
    monkeypatch.setitem(knobs.runtime.__dict__, "interpret", False)
    x = MEMORY[:64].view(torch.float32)
    kernel = Kernel(add, ["M"])
    found = []
    for chip in (80, 90):
        with null_driver(chip, compile_kernels=False) as record:
            for _ in range(2):
                found.append(kernel[(1,)](x, x, 5, 64, 5, 2.0, BLOCK=16, FLAG=True))
            assert record.launches == 2 and len(record.compiled) == 1
    assert found[0] is found[1] is not found[2] is found[3]


def test_other_backends_go_through_triton(compiled, ordinary, monkeypatch):
    """HIP specialises pointers on the size of their memory too."""
    kernel = Kernel(add, ["M"])
    x = MEMORY[:64].view(torch.float32)
    caches = kernel.create_binder()
    target = SimpleNamespace(backend="hip", arch="gfx942", warp_size=64)
    monkeypatch.setattr(kernel, "device_caches", {d: (*caches[:2], target, *caches[3:]) for d in range(9999)})
    for _ in range(3):
        kernel[(1,)](x, x, 5, 64, 5, 2.0, BLOCK=16, FLAG=True)
    assert len(ordinary) == 3


def test_integer_functions_are_tritons():
    for n in (*range(70), 1000, 1024, 1025, 2**20 + 1):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n, m) for m in (1, 2, 63, 64, 65)] == [triton.cdiv(n, m) for m in (1, 2, 63, 64, 65)]


def test_full_dictionaries_are_emptied(compiled, monkeypatch):
    monkeypatch.setattr(launch, "MAX_ENTRIES", 4)
    kernel = Kernel(add, ["M"])
    x = MEMORY[:64].view(torch.float32)
    for stride in (*range(1, 20), *range(1, 20)):
        for warps in (1, 2, 4, 8, 16):
            kernel[(1,)](x, x, 5, stride, 5, 2.0, BLOCK=16, FLAG=True, num_warps=warps)
    if launch.KNOWN:
        (signature,) = kernel.signatures_of_types.values()
        assert len(signature.compiled) <= 4 and len(signature.integer_facts) <= 4
    assert compiled.launches == 190
