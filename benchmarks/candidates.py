"""Lists all attentions to compare on this machine, with the reasons why some of them cannot run here."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

import molsaki_kernels as mk

from .contenders import SLOW_TO_BUILD, Contender, contenders, plain_flash_attn, plain_sdpa, with_engine
from .shapes import Shape

EAGER = "eager with weights"
MATERIALISES = ("sdpa, math", "molsaki, eager", EAGER)  # these store the M x M weights
COPIES_OF_WEIGHTS = 6  # at the peak of forward and backward; 5.1 were measured for eager at 1 x 4,096
FLASH_ATTN = {"flash-attn 4": "flash_attn.cute", "flash-attn 3": "flash_attn_interface", "flash-attn 2": "flash_attn"}
SDPA = {
    "sdpa, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "sdpa, aten flash": SDPBackend.FLASH_ATTENTION,
    "sdpa, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa, math": SDPBackend.MATH,
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A contender, or the reason why there is none."""

    name: str
    kind: str
    contender: Contender | None = None
    reason: str | None = None


def candidates(device: torch.device, shape: Shape, slow_builds: bool = False) -> list[Candidate]:
    """Return every candidate: plain attentions, ours by engine, the map alone, eager with weights.

    Args:
        slow_builds: include those that compile for half a minute per shape.
    """
    # The contenders do not depend on the number of words, and only a shape like this includes FlexAttention.
    known = {c.name: c for c in contenders(device, dataclasses.replace(shape, tier=0, words=20))}
    plain = _plain(device, known)
    ours = [Candidate(c.name, c.kind, c) for c in known.values() if c.kind == "map"]
    for name, status in mk.engines().items():
        if not any(c.name.startswith(f"molsaki, {name}") for c in ours):
            ours.append(_engine(name, status.reason, device))
    rest = [Candidate(c.name, c.kind, c) for c in known.values() if c.kind == "map alone"]
    reason = None if EAGER in known else f"its weights take more than {2 if device.type == 'cpu' else 6} GiB"
    rest.append(Candidate(EAGER, "eager", known.get(EAGER), reason))
    found = [*plain, *ours, *rest]
    if not slow_builds:
        found = [_left_out(c) if c.contender and any(word in c.name for word in SLOW_TO_BUILD) else c for c in found]
    return [_fitting(c, shape, device) for c in found]


def _plain(device: torch.device, known: dict[str, Contender]) -> list[Candidate]:
    found = []
    own = [c for c in known.values() if c.kind == "plain"]
    for name, backend in SDPA.items():
        if name in known:
            found.append(Candidate(name, "plain", known[name]))
        elif device.type == "cpu" and name == "sdpa, aten flash":
            continue  # the CPU's flash attention has a name of its own
        elif device.type == "cpu" and name != "sdpa, math":
            found.append(Candidate(name, "plain", reason="PyTorch has it for GPUs only"))
        else:
            found.append(Candidate(name, "plain", Contender(name, "plain", plain_sdpa(backend))))
    for name, module in FLASH_ATTN.items():
        if name in known:
            found.append(Candidate(name, "plain", known[name]))
        else:
            found.append(_flash_attn(name, module, device))
    if "FlexAttention" not in known:
        reason = "its backward is compiled for GPUs only"
        found.append(Candidate("FlexAttention", "plain", reason=reason))
    listed = {c.name for c in found}
    first = [Candidate(c.name, "plain", c) for c in own if c.name not in listed]
    return [*first, *found]


def _flash_attn(name: str, module: str, device: torch.device) -> Candidate:
    if device.type == "cpu":
        return Candidate(name, "plain", reason="it is for GPUs only")
    try:
        function = importlib.import_module(module).flash_attn_func
    except ModuleNotFoundError as reason:
        return Candidate(name, "plain", reason=f"the module {reason.name} is not installed")
    except (ImportError, AttributeError) as reason:  # flash-attn 4 installs a namespace without flash_attn 2
        return Candidate(name, "plain", reason=f"{module} cannot be imported: {(str(reason).splitlines() or ['?'])[0]}")
    return Candidate(name, "plain", Contender(name, "plain", plain_flash_attn(function)))


def _engine(name: str, reason: str | None, device: torch.device) -> Candidate:
    """Return the engines that ``contenders`` leaves out."""
    full = f"molsaki, {name}"
    if reason is not None:
        return Candidate(full, "map", reason=reason)
    if name == "eager":
        return Candidate(full, "map", Contender(full, "map", with_engine(name)))
    if name == "triton" and device.type == "cpu":
        return Candidate(full, "map", reason="on a CPU it runs in Triton's interpreter, whose time means nothing")
    return Candidate(full, "map", reason=f"it is not for {device.type} tensors")


def _left_out(candidate: Candidate) -> Candidate:
    reason = "it compiles for half a minute per shape; --size full measures it"
    return dataclasses.replace(candidate, contender=None, reason=reason)


def _fitting(candidate: Candidate, shape: Shape, device: torch.device) -> Candidate:
    """Refuse a contender whose weights would not fit in free memory."""
    if candidate.contender is None or candidate.name not in MATERIALISES:
        return candidate
    needed = COPIES_OF_WEIGHTS * shape.batch * shape.q_heads * shape.tokens**2 * 4
    free = free_bytes(device)
    if free is None or needed <= 0.8 * free:
        return candidate
    reason = f"its weights need about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return dataclasses.replace(candidate, contender=None, reason=reason)


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated, or None if the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
