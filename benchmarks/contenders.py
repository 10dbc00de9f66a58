"""Defines the contenders: plain attentions (without a map), ours with the map, and eager attention with its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import molsaki_kernels as mk
from molsaki_kernels import StepPlan, reference
from molsaki_kernels.attention import flash_attn, flex, sdpa

from .shapes import Inputs, Shape

MAP_ALONE = "the map alone"
CPU_FLASH = "sdpa, CPU flash"
NATIVE_ALONE = "molsaki's native attention"  # without a map, to measure the cost of the map itself
PRODUCT, PRODUCT_SIZE = "matrix product of 2,048", 2048  # not attention: the machine's speed at that moment
SLOW_TO_BUILD = ("Flex", "flex")  # compiles for every shape, half a minute for both passes


@dataclasses.dataclass(frozen=True)
class Contender:
    """``run(inputs)`` returns out, ``(out, map)`` or the map, as ``kind`` says.

    ``kind`` is "plain", "map", "map alone" or "eager", or "product", which is no attention and returns anything.
    ``setting`` is a context in which both passes run.
    """

    name: str
    kind: str
    run: Callable[[Inputs], Tensor | tuple[Tensor, Tensor]]
    setting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def contenders(device: torch.device, shape: Shape) -> list[Contender]:
    """Return all contenders that can serve ``shape`` on ``device``, the plain ones first."""
    found = [*_plain(device, shape), *_with_map(device)]
    found.append(Contender(MAP_ALONE, "map alone", lambda x: mk.stepwise_map(x.q, x.k, x.lse, x.plan)))
    if fits_eager(shape, device):
        found.append(Contender("eager with weights", "eager", _eager))
    if device.type == "cuda" and not shape.slow_to_build:
        found = [c for c in found if not any(word in c.name for word in SLOW_TO_BUILD)]
    return found


def matrix_product(shape: Shape) -> Contender:
    """Return a product of two square matrices in the shape's dtype, forward only: the rate to compare with."""
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=getattr(torch, shape.dtype)) for _ in range(2))
    return Contender(PRODUCT, "product", lambda x: a @ b)


def fits_eager(shape: Shape, device: torch.device) -> bool:
    """Return whether eager attention's weights in float32, and its copies of them, fit in memory."""
    return shape.batch * shape.q_heads * shape.tokens**2 * 4 < (2 << 30 if device.type == "cpu" else 6 << 30)


def with_lse(inputs: Inputs) -> Inputs:
    """Return the inputs with the log-sum-exp of the attention, an input of the map alone."""
    with torch.no_grad():
        *_, lse = mk.stepwise_attention(inputs.q, inputs.k, inputs.v, inputs.plan, return_lse=True)
    return inputs._replace(lse=lse.contiguous().requires_grad_())


def step(contender: Contender, inputs: Inputs, backward: bool) -> tuple[object, tuple[Tensor, ...] | None]:
    """Run one forward, or one forward and backward; return the result and the gradients of the leaves."""
    with contender.setting():
        return _step(contender, inputs, backward)


@contextlib.contextmanager
def engine_sdpa_takes(cudnn: bool) -> Iterator[None]:
    """Have engine sdpa call cuDNN, or aten's flash attention, regardless of its counts."""
    before = sdpa.CUDNN_PAYS, torch.backends.cuda.cudnn_sdp_enabled()
    sdpa.CUDNN_PAYS = 0.0
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        yield
    finally:
        sdpa.CUDNN_PAYS = before[0]
        torch.backends.cuda.enable_cudnn_sdp(before[1])


@contextlib.contextmanager
def own_preprocess() -> Iterator[None]:
    """Have engine flash_attn write the map's gradient into flash-attn 4's accumulator of dq."""
    before, flash_attn.FUSE = flash_attn.FUSE, True
    try:
        yield
    finally:
        flash_attn.FUSE = before


def _step(contender: Contender, inputs: Inputs, backward: bool) -> tuple[object, tuple[Tensor, ...] | None]:
    if not backward or contender.kind == "product":
        with torch.no_grad():
            return contender.run(inputs), None
    result = contender.run(inputs)
    leaves, upstream = inputs[:3], (inputs.dout, inputs.dmaps)
    if contender.kind == "plain":
        upstream = upstream[:1]
    elif contender.kind == "map alone":
        leaves, upstream = (inputs.q, inputs.k, inputs.lse), upstream[1:]
    return result, torch.autograd.grad(result, leaves, upstream)


def plain_sdpa(backend: SDPBackend) -> Callable[[Inputs], Tensor]:
    """Return PyTorch's attention by one of its backends; an error where that backend cannot serve the inputs."""

    def run(x: Inputs) -> Tensor:
        with sdpa_kernel(backend):
            grouped = x.q.shape[1] != x.k.shape[1]
            return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=grouped)

    return run


def with_engine(engine: str, map_engine: str = "auto") -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """Return ours, with its map, by one engine."""
    return lambda x: mk.stepwise_attention(x.q, x.k, x.v, x.plan, engine=engine, map_engine=map_engine)


def _plain(device: torch.device, shape: Shape) -> list[Contender]:
    if device.type == "cpu":
        found = [Contender(CPU_FLASH, "plain", plain_sdpa(SDPBackend.FLASH_ATTENTION))]
        if mk.engines()["native"].ready:
            found.append(Contender(NATIVE_ALONE, "plain", _native_alone(shape.batch)))
        return found
    found = [
        Contender("sdpa, cuDNN", "plain", plain_sdpa(SDPBackend.CUDNN_ATTENTION)),
        Contender("sdpa, aten flash", "plain", plain_sdpa(SDPBackend.FLASH_ATTENTION)),
        Contender("FlexAttention", "plain", _flex()),
    ]
    for name, module in (("flash-attn 4", "flash_attn.cute"), ("flash-attn 2", "flash_attn")):
        try:
            function = importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError):  # flash-attn 4 installs a namespace without flash_attn 2
            continue
        found.append(Contender(name, "plain", plain_flash_attn(function)))
    return found


def plain_flash_attn(function: Callable) -> Callable[[Inputs], Tensor]:
    """Return attention by the function ``flash_attn_func`` of any release of flash-attn."""

    def run(x: Inputs) -> Tensor:
        out = function(*(t.transpose(1, 2) for t in x[:3]), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _flex() -> Callable[[Inputs], Tensor]:
    """Compile as engine flex does (an error where it cannot) and use its block mask: the one that PyTorch builds
    examines every pair of tokens, 17 GB of them at 131,072 tokens."""

    def run(x: Inputs) -> Tensor:
        mask = flex.kept_mask(x.q.shape[2], True, None, x.q.device)
        return flex.compiled()(*x[:3], block_mask=mask, enable_gqa=x.q.shape[1] != x.k.shape[1])

    return run


def _with_map(device: torch.device) -> list[Contender]:
    others = {"eager", "triton" if device.type == "cpu" else "native"}  # the interpreter is not measured
    names = [name for name, status in mk.engines().items() if status.ready and name not in others]
    if device.type == "cpu":
        return [Contender(f"molsaki, {name}", "map", with_engine(name)) for name in names]
    found = []
    for name in names:  # each way of computing the map by its name, since "auto" chooses by the shape
        settings = {"": contextlib.nullcontext}
        if name == "sdpa":  # by default the engine takes cuDNN only after thousands of calls
            settings = {"": lambda: engine_sdpa_takes(False), " (cuDNN)": lambda: engine_sdpa_takes(True)}
            if torch.cuda.get_device_capability(device)[0] < 9:
                del settings[" (cuDNN)"]
        for text, setting in settings.items():
            own_map = "auto" if name == "triton" else "triton"
            found.append(Contender(f"molsaki, {name}{text}", "map", with_engine(name, own_map), setting))
            if name in ("sdpa", "flash_attn"):
                found.append(Contender(f"molsaki, {name}{text}, widened", "map", with_engine(name, "widened"), setting))
        if name == "flash_attn" and flash_attn.version_of(device) == 4:
            run = with_engine(name, "triton")
            found.append(Contender("molsaki, flash_attn (own preprocess)", "map", run, own_preprocess))
    return found


def _native_alone(batch: int) -> Callable[[Inputs], Tensor]:
    nothing = StepPlan.from_spans([[]] * batch, [[]] * batch)
    return lambda x: mk.stepwise_attention(x.q, x.k, x.v, nothing, engine="native")[0]


def _eager(x: Inputs) -> tuple[Tensor, Tensor]:
    """Compute as a model's eager attention does with ``output_attentions``: weights in the dtype of q, then reduced."""
    weights, _ = reference.attention_weights(x.q, x.k)
    weights = weights.to(x.q.dtype)
    out = weights @ x.v.repeat_interleave(x.q.shape[1] // x.v.shape[1], dim=1)
    wide = torch.promote_types(weights.dtype, torch.float32)
    return out, reference.reduce_weights(weights.to(wide), x.plan)
