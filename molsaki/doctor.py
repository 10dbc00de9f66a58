"""The command ``molsaki doctor``: what this machine can run, what is missing, and how to fix it.

Every engine that is ready runs a small attention with its map and gradient once and is compared with eager attention.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sysconfig
from pathlib import Path
from typing import Any

from molsaki.machine import processor
from molsaki.terminal import styled

REQUIRED = ("torch", "numpy")
TRAINING = ("transformers", "accelerate", "tokenizers", "safetensors", "scipy")
OPTIONAL = {
    "matplotlib": "molsaki plot (extra plot)",
    "triton": "the project's own GPU kernels",
    "flash-attn-4": "engine flash_attn on sm90 (where auto takes it first) and later",
    "flash-attn": "engine flash_attn on older GPUs",
    "peft": "LoRA (distill --lora_rank)",
    "tensorboard": "distill --report_to tensorboard",
    "bitsandbytes": "quantised teachers and 8-bit optimisers",
    "deepspeed": "DeepSpeed ZeRO",
}

# How to install what is missing, where that is not `pip install NAME`.
INSTALL = {
    "matplotlib": 'pip install "molsaki-kernels[plot]"',
    "flash-attn": 'pip install "molsaki-kernels[flash]"',
} | {name: 'pip install "molsaki-kernels[train]"' for name in (*TRAINING, "peft", "tensorboard")}
# What to do about an engine that is not ready: a pattern of the reason, and the advice. None if nothing helps.
ENGINE_ADVICE = (
    (r"no C compiler", "install a C compiler: apt install gcc (or dnf, brew, conda; or set $CC)"),
    (r"switched off by MOLSAKI_NATIVE", "unset MOLSAKI_NATIVE"),
    (r"could not be compiled or loaded", "set MOLSAKI_CACHE to a folder that can be written and allows programs"),
    (r"^\S*(cc|gcc|clang)\S* failed", "try another C compiler: CC=gcc or CC=clang; else PyTorch computes the map"),
    (r"does not fit this package", 'install it again: pip install --force-reinstall --no-deps "molsaki-kernels"'),
    (
        r"compute capability",
        "this GPU is too old for it: use engine eager, or a GPU of compute capability 8.0 or later",
    ),
)
# Advice that helps only on a machine with a GPU.
GPU_ADVICE = (
    (r"triton is not installed", "pip install triton"),
    (
        r"flash-attn.*not installed|No module named",
        'optional: pip install flash-attn-4 (Hopper and later), or "molsaki-kernels[flash]" for flash-attn 2',
    ),
)
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of the largest value; eager's own rounding in bfloat16 is about 1e-2
PRODUCTS = (
    "native, products in float32",
    "native, products by AVX-512 BF16",
    "native, products by AMX",
)  # by unit of the C library
NOT_READY, OK, FAILED = "not ready", "ok", "FAILED"

Section = dict[str, str | int]


def report() -> dict[str, Section]:
    """The sections ``machine``, ``packages``, ``devices``, ``engines``, ``auto``, ``selftest``, ``optional``,
    ``notes``, ``to_do`` and ``summary``.

    Values are versions, numbers or "ready"; where something is missing, the reason. ``selftest`` has a line per engine
    and device, which begins with ok or FAILED. ``to_do`` has an action for each fault that can be fixed.
    """
    to_do: Section = {}
    packages: Section = {name: _version(name) or "not installed" for name in ("molsaki-kernels", *REQUIRED)}
    for name in TRAINING:
        packages[name] = _version(name) or "not installed: needed for the package molsaki (extra train)"
        if _version(name) is None:
            to_do[name] = INSTALL[name]
    to_do |= _too_old()
    try:
        import torch
    except Exception as error:  # also a library that does not load, or an incompatible numpy
        reason = " ".join(str(error).split())
        packages["torch"] = f"cannot be imported: {reason}"
        to_do["torch"] = "pip install torch (on a CPU: PyTorch's CPU build; see pytorch.org/get-started)"
        found: dict[str, Section] = {"machine": _machine(), "packages": packages, "to_do": to_do}
        return found | {"summary": {"broken": 1, "result": "nothing can run: torch cannot be imported"}}

    import molsaki_kernels
    from molsaki_kernels._native.build import bf16_unit, compiler
    from molsaki_kernels.attention import flash_attn
    from molsaki_kernels.engine_selection import DEFAULT_ORDER

    engines = {name: str(status) for name, status in molsaki_kernels.engines().items()}
    if torch.cuda.is_available() and engines["flash_attn"] == "ready":
        engines["flash_attn"] = f"ready: flash-attn {flash_attn.version_of(torch.device('cuda'))}"
    native = engines["native"]
    selftest = self_test([name for name, status in engines.items() if status.startswith("ready")])
    to_do |= _advice(engines, selftest, torch.cuda.is_available())
    to_do |= _about_gpu(torch.cuda.is_available(), torch.version.cuda or torch.version.hip)
    notes = _notes(compiler())
    if torch.cuda.is_available() and _version("triton") and "missing here" in str(notes.get("triton")):
        to_do["triton"] = "install what triton needs to build its launchers: apt install gcc python3-dev"
    failed = [name for name, result in selftest.items() if str(result).startswith(FAILED)]
    broken = len(failed) + sum(name in to_do for name in REQUIRED)
    ready = sum(str(result).startswith(OK) for result in selftest.values())
    result = f"{ready} of {ready + len(failed)} engines that are ready passed the self-test"
    if lacking := [name for name in TRAINING if name in to_do]:
        result += f"; training and most commands need {', '.join(lacking)}"
    if broken:
        result = f"{broken} broken: {', '.join([*failed, *(name for name in REQUIRED if name in to_do)])}; " + result
    return {
        "machine": _machine()
        | {
            "torch_threads": torch.get_num_threads(),
            "c_compiler": compiler() or "none found (cc, gcc, clang or $CC)",
            "map_on_cpu": "native (C)" if native == "ready" else f"PyTorch: {native}",
            "bfloat16_on_cpu": PRODUCTS[bf16_unit()] if native == "ready" else "PyTorch",
        },
        "packages": packages,
        "devices": _devices(),
        "engines": dict(engines),
        "auto": {device: ", then ".join(names) for device, names in DEFAULT_ORDER.items()},
        "selftest": selftest,
        "optional": {
            name: _version(name) or f"not installed: needed for {purpose}; {INSTALL.get(name, f'pip install {name}')}"
            for name, purpose in OPTIONAL.items()
        },
        "notes": notes,
        "to_do": to_do,
        "summary": {"broken": broken, "result": result},
    }


def is_broken(found: dict[str, Section]) -> bool:
    """Whether a requirement is missing or the results of an engine differ from those of eager attention."""
    return found["summary"]["broken"] != 0


def render(found: dict[str, Section], stream: Any = None) -> str:
    """The report as indented lines, in colours if the stream has them; the summary is the last line."""
    width = max(len(name) for section in found.values() for name in section)
    lines = []
    for section, entries in found.items():
        if not entries or section == "summary":
            continue
        lines.append(styled(section.replace("_", " "), "bold", stream))
        for name, value in entries.items():
            text = str(value)
            style = "green" if re.match(r"(ready|ok)\b", text) else "red" if text.startswith(FAILED) else None
            lines.append(f"  {name:{width}}  {text if style is None else styled(text, style, stream)}")
    summary = found.get("summary")
    if summary is not None:
        style = "red" if summary["broken"] else "green"
        to_do = len(found.get("to_do", {}))
        hint = f"; {to_do} thing{'s' * (to_do > 1)} to do, listed above" if to_do else "; nothing to do"
        lines.append(styled(f"{summary['result']}{hint}", style, stream))
    return "\n".join(lines)


def self_test(engines: list[str]) -> Section:
    """Run each engine on each kind of device that it serves; "ok" or "FAILED" with the error, by engine and device."""
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    results: Section = {}
    for device in devices:
        for engine in engines:
            found = _test_engine(engine, device)
            if found is not None:
                results[f"{engine} on {device}"] = found
    return results


def _test_engine(engine: str, device: str) -> str | None:
    """The result of one engine; None if it does not serve the device."""
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    found = _compare(engine, device, dtype)
    if found is None or not found.startswith(OK) or (engine, device) != ("native", "cpu"):
        return found
    rounded = _compare(engine, device, torch.bfloat16) or ""  # its products differ from float32's, by AMX for example
    return f"{found}; in bfloat16,{rounded.rpartition(',')[2]}" if rounded.startswith(OK) else rounded


def _compare(engine: str, device: str, dtype: Any) -> str | None:
    """The result of one engine in one dtype; None if it does not serve the device."""
    import torch

    try:
        expected = _attention("eager", device, dtype, torch.float64)
    except Exception as error:
        return f"{FAILED}: eager: {type(error).__name__}: {' '.join(str(error).split())}"
    try:
        found = _attention(engine, device, dtype)
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and "cannot serve this call" in text:
            reason = text.partition(f"({engine}: ")[2].rstrip(")") or text
            other = re.search(r"not for|takes CPU tensors|need a GPU|for CUDA only|no flash attention for", reason)
            return None if other else f"{NOT_READY}: {reason}"
        return f"{FAILED}: {type(error).__name__}: {text}"
    worst = max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(found, expected, strict=True)
    )
    name = str(dtype).removeprefix("torch.")
    if not worst <= TOLERANCE[name]:  # NaN too
        return f"{FAILED}: in {name} differs from eager attention in float64 by {worst:.1e} of the largest value"
    return f"{OK}: output, map and gradients in {name} as by eager attention in float64, to {worst:.0e}"


def _attention(engine: str, device: str, dtype: Any, computed_in: Any = None) -> list[Any]:
    """Output, map and gradients of q, k and v of a small attention, with the same inputs for every engine."""
    import torch

    from molsaki_kernels import StepPlan, stepwise_attention

    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 70, 64), (1, 2, 70, 64), (1, 2, 70, 64))
    made = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    q, k, v = (one.to(computed_in or dtype).requires_grad_() for one in made)
    plan = StepPlan.from_spans(steps=[[(0, 20), (20, 70)]], words=[[[3], [17, 18], [40]]], device=device)
    out, maps = stepwise_attention(q, k, v, plan, engine=engine)
    (out.square().sum() + maps.square().sum()).backward()
    return [out.detach(), maps.detach(), *(one.grad for one in (q, k, v))]


def _advice(engines: dict[str, str], selftest: Section, has_gpu: bool) -> Section:
    """What to do about engines that are not ready, or fail."""
    found: Section = {}
    rules = ENGINE_ADVICE + (GPU_ADVICE if has_gpu else ())
    states = {name: status for name, status in engines.items() if not status.startswith("ready")}
    states |= {name: str(result) for name, result in selftest.items() if str(result).startswith(NOT_READY)}
    for name, reason in states.items():
        for pattern, action in rules:
            if re.search(pattern, reason):
                found[name] = action
                break
    for name, result in selftest.items():
        if str(result).startswith(FAILED):
            found[name] = "report it with `molsaki doctor --json`; until then choose another engine, such as eager"
    return found


def _about_gpu(is_available: bool, built_for: str | None) -> Section:
    """What to do about an NVIDIA GPU that torch does not see."""
    if is_available or not Path("/proc/driver/nvidia/version").is_file():
        return {}
    if built_for is None:
        return {"cuda": "this machine has an NVIDIA driver: install a CUDA build of torch (pytorch.org/get-started)"}
    return {"cuda": "torch sees no GPU: look at nvidia-smi, CUDA_VISIBLE_DEVICES and the driver's version"}


def _too_old() -> Section:
    """Packages that are older than this one needs, and how to update them."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return {}
    try:
        needed = [Requirement(line) for line in importlib.metadata.requires("molsaki-kernels") or []]
    except importlib.metadata.PackageNotFoundError:  # a checkout on Python's path, not installed
        return {}
    found: Section = {}
    for one in needed:
        version = _version(one.name) if one.name in (*REQUIRED, *TRAINING) else None
        if version is not None and not one.specifier.contains(version, prereleases=True):
            found[one.name] = f'{version} is installed: pip install "{one.name}{one.specifier}"'
    return found


def _machine() -> Section:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count() or "unknown",
    }


def _notes(compiler: str | None) -> Section:
    """Further requirements of installed packages on a GPU."""
    notes: Section = {}
    if _version("triton"):
        header = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
        missing = [name for name, found in (("a C compiler", compiler), ("Python.h", header)) if not found]
        needs = f"missing here: {', '.join(missing)}" if missing else "both were found"
        notes["triton"] = f"builds a launcher per kernel on first use, with a C compiler and Python.h ({needs})"
    if _version("flash-attn-4"):
        kept = os.environ.get("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED") == "1"
        notes["flash-attn-4"] = "compiles each kind of call on first use, about 10 s for forward and backward" + (
            "; kept on disk (FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1)"
            if kept
            else ", again in every process unless FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1"
        )
        notes["flash-attn-4 in PyTorch"] = (
            'torch.nn.attention.activate_flash_attention_impl("FA4") (PyTorch 2.11 to 2.13) fails with 4.0.0b36: its '
            "forward returns five values. Engine flash_attn does not need it, and engine sdpa would use it"
        )
    return notes


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Section:
    import torch

    devices: Section = {"cpu": processor()}
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no usable CUDA device or driver"
        devices["cuda"] = f"not available: {reason}"
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{p.name}, sm{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    return devices
