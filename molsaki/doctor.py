"""What this machine has: versions, devices, attention engines, and why each is or is not ready."""

from __future__ import annotations

import importlib.metadata
import os
import platform

OPTIONAL = {
    "triton": "the project's own GPU kernels",
    "flash-attn-4": "engine flash_attn on sm90 and later",
    "flash-attn": "engine flash_attn on older GPUs",
    "peft": "LoRA (distill --lora_rank)",
    "matplotlib": "molsaki plot",
    "tensorboard": "distill --report_to tensorboard",
    "bitsandbytes": "quantised teachers and 8-bit optimisers",
    "deepspeed": "DeepSpeed ZeRO",
}
REQUIRED = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "scipy")


def report() -> dict:
    """What ``molsaki doctor`` prints: ``machine``, ``packages``, ``devices``, ``engines``, ``auto`` and ``optional``.

    Values are versions, numbers or "ready"; where something is missing, the reason.
    """
    import torch

    import molsaki_kernels
    from molsaki_kernels._native import build as library
    from molsaki_kernels.api import AUTO

    return {
        "machine": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "c_compiler": library.compiler() or "none found (cc, gcc, clang or $CC)",
            "map_on_cpu": "native (C)" if library.why_not() is None else f"plain PyTorch: {library.why_not()}",
        },
        "packages": {name: _version(name) or "not installed" for name in ("molsaki-kernels", *REQUIRED)},
        "devices": _devices(torch),
        "engines": molsaki_kernels.engines(),
        "auto": {device: ", then ".join(names) for device, names in AUTO.items()},
        "optional": {
            name: _version(name) or f"not installed: needed for {purpose}" for name, purpose in OPTIONAL.items()
        },
    }


def render(found: dict) -> str:
    """The report as indented lines."""
    width = max(len(name) for section in found.values() for name in section)
    lines = []
    for section, entries in found.items():
        lines.append(section)
        lines.extend(f"  {name:{width}}  {value}" for name, value in entries.items())
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(torch) -> dict:
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no usable CUDA device or driver"
        return {"cpu": platform.processor() or platform.machine(), "cuda": f"not available: {reason}"}
    devices = {"cpu": platform.processor() or platform.machine()}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{p.name}, sm{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    return devices
