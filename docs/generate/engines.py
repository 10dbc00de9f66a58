"""Tables of what each engine supports and refuses, by querying it, and where it was compared with the oracle.

An engine decides by the properties of a call (`Engine.why_not`), so the answers for GPUs need no GPU: the capability of
the chip and the version of flash-attn are replaced.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from docs.generate.marked import table
from molsaki_kernels._triton import support
from molsaki_kernels.attention import ENGINES, flash_attn
from molsaki_kernels.engine_selection import DEFAULT_ORDER, HOPPER, MEASURED
from molsaki_kernels.spec import AttentionOptions, AttentionRequest

ROOT = Path(__file__).parents[2]
SHARES = ROOT / "benchmarks/results/shares-h200.csv"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


@dataclasses.dataclass(frozen=True)
class Platform:
    """An engine on a kind of machine."""

    engine: str
    where: str
    device: str
    major: int = 9
    version: int = 4


PLATFORMS = (
    Platform("native", "CPU", "cpu"),
    Platform("sdpa", "CPU", "cpu"),
    Platform("sdpa", "CUDA", "cuda"),
    Platform("triton", "GPU", "cuda"),
    Platform("flash_attn", "flash-attn 2", "cuda", 8, 2),
    Platform("flash_attn", "flash-attn 4, sm90", "cuda", 9),
    Platform("flash_attn", "flash-attn 4, sm100, sm110", "cuda", 10),
    Platform("flash_attn", "flash-attn 4, sm120", "cuda", 12),
    Platform("flash_attn", "flash-attn 4, sm80", "cuda", 8),
    Platform("flex", "CUDA", "cuda"),
    Platform("eager", "everywhere", "cuda"),
)
# The features of a call, as changes of a causal call with a gradient.
FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": 16},
    "window, not causal": {"window": 16, "causal": False},
    "not causal": {"causal": False},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": True},
    "packed": {"packed": True},
    "deterministic": {"deterministic": True},
    "scale 0": {"scale": 0.0},
}
WIDTHS = range(1, 521)
PROBED = (64, 128, 256)  # widths of which an exception is named
# The tests that compare an engine with the float64 oracle without a GPU, and how.
WITHOUT_A_GPU = {
    "native": ("itself", ["kernels/test_native.py::test_attention", "kernels/test_attention.py::test_features"]),
    "sdpa": (
        "itself on a CPU; CUDA's operators through stand-ins",
        ["kernels/test_attention.py::test_features", "kernels/test_sdpa_cuda.py::test_features"],
    ),
    "triton": ("Triton's interpreter", ["kernels/triton/test_attention.py::test_results_and_gradients"]),
    "flash_attn": ("stand-ins of both versions", ["kernels/test_flash_attn.py::test_features"]),
    "flex": ("FlexAttention without its compiler", ["kernels/test_flex.py::test_features"]),
    "eager": ("itself", ["kernels/test_attention.py::test_features"]),
}


@contextlib.contextmanager
def on(platform: Platform, deterministic: bool = False) -> Iterator[ModuleType]:
    """The engine of a platform, which answers as on that platform."""
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (flash_attn, "_major", lambda device: platform.major),
            (flash_attn, "version_of", lambda device: platform.version),
            (support, "INSTALLED", True),
            (support, "why_too_old", lambda device: None),
            (importlib.import_module("molsaki_kernels.attention.sdpa"), "why_too_old", lambda device: None),
            (importlib.import_module("molsaki_kernels.attention.flex"), "why_too_old", lambda device: None),
            (torch, "are_deterministic_algorithms_enabled", lambda: deterministic),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield ENGINES[platform.engine]  # type: ignore[misc]


@functools.cache
def why_not(platform: Platform, head_dim: int, dtype: str, backward: bool, feature: str = "") -> str | None:
    """The reason why the engine refuses a call, or None."""
    changes = dict(FEATURES[feature]) if feature else {}
    with on(platform, changes.pop("deterministic", False)) as engine:
        return ask(engine, platform, head_dim, dtype, backward, changes)


def ask(
    engine: ModuleType, platform: Platform, head_dim: int, dtype: str, backward: bool, changes: dict[str, Any]
) -> str | None:
    """The reason that an engine gives, or None."""
    facts = {name: changes.pop(name) for name in ("sinks", "packed") if name in changes}
    multiple = engine.HEAD_DIM_MULTIPLE
    request = AttentionRequest(
        device=torch.device(platform.device), dtype=DTYPES[dtype], batch=2, q_heads=4, kv_heads=2, length=128,
        head_dim=-(-head_dim // multiple) * multiple, backward=backward,
        options=AttentionOptions(**{"causal": True, "scale": head_dim**-0.5, **changes}),
        **{"sinks": False, "packed": False, **facts},
    )  # fmt: skip
    reason: str | None = engine.why_not(request)
    return reason


def dtypes(platform: Platform) -> list[str]:
    """The dtypes of which some call is served."""
    return [name for name in DTYPES if why_not(platform, 64, name, False) is None]


@functools.cache
def widths(platform: Platform, dtype: str, backward: bool) -> list[int]:
    """The widths of a head that are served, of those up to 520."""
    with on(platform) as engine:
        return [D for D in WIDTHS if ask(engine, platform, D, dtype, backward, {}) is None]


def head_dims(platform: Platform) -> str:
    """The widths of a head in words: of the forward pass, and what the backward pass does not take of them."""
    first, *others = dtypes(platform)
    forward = widths(platform, first, False)
    text = in_words(forward)
    multiple = ENGINES[platform.engine].HEAD_DIM_MULTIPLE
    text += f" (padded to multiples of {multiple})" if multiple > 1 else ""
    backward = widths(platform, first, True)
    if not backward:
        return f"{text}; forward only"
    notes = [(first, sorted({*forward} - {*backward}))]
    notes += [(one, sorted({*backward} - {*widths(platform, one, True)})) for one in others]
    for dtype, missing in notes:
        if missing:
            also = "" if dtype == first else f"{dtype} "
            text += f"; {also}backward without {', '.join(map(str, missing))}"
    return text


def in_words(numbers: list[int]) -> str:
    """Such as: multiples of 8 to 128, and 256."""
    step = math.gcd(*numbers)
    regular = [n for index, n in enumerate(numbers) if n == numbers[0] + index * step]
    rest = numbers[len(regular) :]
    last = f"to {regular[-1]}" if regular[-1] < WIDTHS[-1] - step else "and more"
    text = (f"multiples of {step} {last}" if step > 1 else f"{regular[0]} {last}") if regular[-1] > 1 else "1"
    text = "all" if step == 1 and regular[0] == 1 and last == "and more" else text
    return text + (f", and {', '.join(map(str, rest))}" if rest else "")


def answer(platform: Platform, feature: str) -> str:
    """Whether the engine serves calls with a feature: yes, forward, no; with the widths where that differs."""
    dtype, *_ = dtypes(platform)
    found = {}
    for D in PROBED:
        if why_not(platform, D, dtype, False) is not None:
            continue
        plain = why_not(platform, D, dtype, True) is None
        forward, both = (why_not(platform, D, dtype, backward, feature) is None for backward in (False, True))
        found[D] = "yes" if both or (forward and not plain) else "forward" if forward else "no"
    most = found[min(found)]
    return most + "".join(f" ({D}: {one})" for D, one in found.items() if one != most)


def name_of(platform: Platform) -> str:
    """An engine with its platform."""
    return f"`{platform.engine}`, {platform.where}"


def features() -> str:
    """What each engine supports."""
    columns = [name for name in FEATURES if name != "scale 0"]
    rows = [
        [name_of(p), ", ".join(dtypes(p)), head_dims(p), *(answer(p, feature) for feature in columns)]
        for p in PLATFORMS
    ]
    return table(["engine", "dtypes", "head_dim", *columns], rows)


def refusals() -> str:
    """The reasons of every engine, by what was asked for."""
    found: dict[tuple[str, str], tuple[str, str, list[str]]] = {}
    for platform in PLATFORMS:
        best = dtypes(platform)[0]
        for asked, reason in (
            *((dtype, why_not(platform, 64, dtype, True)) for dtype in DTYPES),
            *((f"head_dim {D}", why_not(platform, D, best, True)) for D in (8, 20, 72, 128, 256, 264, 512)),
            ("fp16, head_dim 256", why_not(platform, 256, "fp16", True)),
            *((feature, why_not(platform, 64, best, True, feature)) for feature in FEATURES),
            *((f"{feature}, head_dim 256", why_not(platform, 256, best, True, feature)) for feature in FEATURES),
        ):
            if reason is None:
                continue
            kind = re.sub(r"(not|as) \d+$", "", reason)  # the width that was asked for does not make another reason
            *_, places = found.setdefault((platform.engine, kind), (asked, reason, []))
            if platform.where not in places:
                places.append(platform.where)
    rows = [[f"`{engine}`", "; ".join(places), asked, reason] for (engine, _), (asked, reason, places) in found.items()]
    return table(["engine", "on", "such as a call with", "reason"], rows)


def orders() -> str:
    """The order that "auto" tries, by device and by measured calls."""
    names = {"cpu": "CPU", "cuda": "CUDA", HOPPER: "CUDA, sm90 with flash-attn 4"}
    rows = [[names[key], "all others", listed(order), "the default"] for key, order in DEFAULT_ORDER.items()]
    for one in MEASURED:
        low, high = one.tokens
        calls = (
            f"{'both passes' if one.backward else 'forward'}, heads to {one.head_dim}, {low:,} to {high - 1:,} tokens"
        )
        calls += f", {', '.join(one.features)}" if one.features else ""
        source = f"[{one.source}](../benchmarks/results/{one.source})"
        rows.insert(0, [f"CUDA, {one.arch}", calls, f"{listed(one.engines)}, then the default", source])
    return table(["device", "calls", "order", "from"], rows)


def listed(names: tuple[str, ...]) -> str:
    """Engines in their order."""
    return ", ".join(f"`{name}`" for name in names)


def tests() -> str:
    """Where each engine was compared with the float64 oracle: by tests without a GPU, and by those recorded on one."""
    rows = []
    for engine in ENGINES:
        how, names = WITHOUT_A_GPU[engine]
        cpu = f"{how}: {', '.join(map(checked, names))}"
        is_for_gpus = any(one.device != "cpu" for one in PLATFORMS if one.engine == engine)
        gpu = "; ".join(recorded(engine)) or ("nothing" if is_for_gpus else "it is for CPUs only")
        rows.append([f"`{engine}`", cpu, gpu])
    return table(["engine", "without a GPU", "recorded on an H200, latest run of each test and dtype"], rows)


def recorded(engine: str) -> list[str]:
    """A summary of the records of an engine on a GPU, by dtype of the calls."""
    lines = []
    for dtype in NAMES:
        found = [one for one in hardware_records() if one["engine"] == engine and one["called"] == dtype]
        if not found:
            continue
        count, share = sum(int(one["comparisons"]) for one in found), max(float(one["largest_share"]) for one in found)
        over = sorted({f"`{one['test']}`" for one in found if int(one["over"])})
        number = sum(int(one["over"]) for one in found)
        budget = (
            f"{number} above the budget ({', '.join(over)})" if over else f"largest share of the budget {share:.2f}"
        )
        dates = ", ".join(sorted({f"{one['date']} {one['commit']}" for one in found}))
        lines.append(f"{NAMES[dtype]}: {count:,} comparisons, {budget} ({dates})")
    return lines


def recorded_tests() -> str:
    """Which tests were recorded on a GPU for each engine and for kernels alone."""
    rows = []
    for engine in (*ENGINES, *sorted({one["engine"] for one in hardware_records()} - {*ENGINES})):
        found = sorted({one["test"] for one in hardware_records() if one["engine"] == engine})
        if found:
            rows.append([f"`{engine}`", ", ".join(f"`{test}`" for test in found)])
    return table(["engine or part", "tests with records"], rows)


@functools.cache
def hardware_records() -> tuple[dict[str, str], ...]:
    """The records of the latest run of each engine, test and dtype of the calls (``called``); every test exists.

    Raises:
        ValueError: a record names a test that is not in tests/ any more.
    """
    with SHARES.open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    known = {test for path in (ROOT / "tests").rglob("test_*.py") for test in test_names(path)}
    narrow: dict[tuple[str, ...], str] = {}
    for one in records:
        if one["test"] not in known:
            raise ValueError(f"{SHARES.name}: no test {one['test']} in tests/")
        if one["dtype"] in ("bfloat16", "float16"):
            narrow[one["run"], one["engine"], one["test"]] = one["dtype"]
    latest = {}
    for one in records:  # the file grows at its end
        named = re.findall(r"torch\.(\w+)", one["case"])
        # A case without a dtype is of the test's only one; results in float32, such as lse, are part of 16-bit calls.
        one["called"] = named[0] if named else narrow.get((one["run"], one["engine"], one["test"]), one["dtype"])
        latest[one["engine"], one["test"], one["called"]] = one["run"]
    return tuple(one for one in records if one["run"] == latest[one["engine"], one["test"], one["called"]])


def checked(name: str) -> str:
    """The name of a test as code.

    Raises:
        ValueError: there is no such test.
    """
    file, _, test = name.partition("::")
    path = ROOT / "tests" / file
    if not path.exists() or test not in test_names(path):
        raise ValueError(f"no test {name} in tests/")
    return f"`{file}::{test}`"


@functools.cache
def test_names(path: Path) -> frozenset[str]:
    """The test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(one.name for one in tree.body if isinstance(one, ast.FunctionDef) and one.name.startswith("test_"))


PARTS: dict[str, Callable[[], str]] = {
    "engine features": features,
    "engine refusals": refusals,
    "engine orders": orders,
    "engine tests": tests,
    "recorded tests": recorded_tests,
}
