"""The command ``molsaki doctor``: versions, devices and attention engines, and why each is or is not ready."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sysconfig
from pathlib import Path

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

Section = dict[str, str | int]


def report() -> dict[str, Section]:
    """The sections ``machine``, ``packages``, ``devices``, ``engines``, ``auto``, ``optional`` and ``notes``.

    Values are versions, numbers or "ready"; where something is missing, the reason.
    """
    import torch

    import molsaki_kernels
    from molsaki_kernels._native.build import compiler
    from molsaki_kernels.attention import flash_attn
    from molsaki_kernels.engine_selection import DEFAULT_ORDER

    engines = {name: str(status) for name, status in molsaki_kernels.engines().items()}
    if torch.cuda.is_available() and engines["flash_attn"] == "ready":
        engines["flash_attn"] = f"ready: flash-attn {flash_attn.version_of(torch.device('cuda'))}"
    native = engines["native"]
    packages: Section = {name: _version(name) or "not installed" for name in ("molsaki-kernels", *REQUIRED)}
    for name in TRAINING:
        packages[name] = _version(name) or "not installed: needed for the package molsaki (extra train)"
    return {
        "machine": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu_cores": os.cpu_count() or "unknown",
            "torch_threads": torch.get_num_threads(),
            "c_compiler": compiler() or "none found (cc, gcc, clang or $CC)",
            "map_on_cpu": "native (C)" if native == "ready" else f"PyTorch: {native}",
        },
        "packages": packages,
        "devices": _devices(),
        "engines": dict(engines),
        "auto": {device: ", then ".join(names) for device, names in DEFAULT_ORDER.items()},
        "optional": {
            name: _version(name) or f"not installed: needed for {purpose}" for name, purpose in OPTIONAL.items()
        },
        "notes": _notes(compiler()),
    }


def render(found: dict[str, Section]) -> str:
    """The report as indented lines."""
    width = max(len(name) for section in found.values() for name in section)
    lines = []
    for section, entries in found.items():
        if not entries:
            continue
        lines.append(section)
        lines.extend(f"  {name:{width}}  {value}" for name, value in entries.items())
    return "\n".join(lines)


def _notes(compiler: str | None) -> Section:
    """What else installed packages need on a GPU."""
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


def processor() -> str:
    """The name of the processor, or that of its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
