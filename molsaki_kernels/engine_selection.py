"""Choose the engine of a call: by the measured order if there are measurements, else by the documented default order.

Engines that were registered with ``first_on`` come before both (:func:`register_engine`).

A record of :data:`MEASURED` is computed from a committed CSV by ``python -m benchmarks.auto_table`` and names that
file. It holds for one architecture, pass, padded head dimension and set of features, and for a range of sequence
lengths. All other calls keep the default order. No record is an estimate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from molsaki_kernels import widened_values
from molsaki_kernels._compile import constant_when_compiled
from molsaki_kernels._native.build import pytorch_is_faster_in_bfloat16
from molsaki_kernels.attention import ENGINES, flash_attn
from molsaki_kernels.attention.defaults import defines, with_defaults
from molsaki_kernels.attention.protocol import RequiredNames, as_served
from molsaki_kernels.attention_map import MAP_ENGINES
from molsaki_kernels.spec import AttentionOptions, AttentionRequest
from molsaki_kernels.value_pooling import POOLING_ENGINES

# Default order by device. CPU: measured (docs/performance.md). CUDA: by the time of the kernels at 4,096 tokens and
# more on an H200 (layer-h200.csv and kernels-h200.csv in benchmarks/results); other GPUs were not measured.
# flash-attn 4 is first on Hopper: it is as fast as cuDNN or faster, and its backward takes the gradient of lse, which
# saves a pass over O and dO. Elsewhere flash_attn and flex, which support nothing that triton and eager lack, are used
# only by name.
HOPPER = "cuda, sm90 with flash-attn 4"
DEFAULT_ORDER = {
    "cpu": ("native", "sdpa", "eager"),
    "cuda": ("sdpa", "triton", "eager"),
    HOPPER: ("flash_attn", "sdpa", "triton", "eager"),
}
FIRST: dict[str, tuple[str, ...]] = {}  # registered engines that "auto" tries before all others, by type of device
REQUIRED = ("NAME", "COMPUTES_MAP", "DIFFERENTIABLE", "available", "why_not", "takes_value_dim", "forward", "backward")


@dataclasses.dataclass(frozen=True)
class Measured:
    """The engines for one kind of call, fastest first, and the record of the measurement."""

    arch: str  # "sm90", "gfx942", "cpu"
    backward: bool
    head_dim: int  # padded to one of HEAD_DIMS
    tokens: tuple[int, int]  # sequence lengths from the first to before the second
    features: tuple[str, ...]  # the subset of FEATURES that the measured calls used
    engines: tuple[str, ...]
    source: str  # the CSV in benchmarks/results


HEAD_DIMS = (64, 128, 256)
FEATURES = ("full", "window", "softcap", "sinks", "packed")

# From python -m benchmarks.auto_table benchmarks/results/layer-h200.csv, head dimension 64 only: with 128 the times of
# mode "eager" are the host's up to 4,096 tokens, and the host works while other kernels of a model run.
MEASURED: tuple[Measured, ...] = (
    Measured(
        arch="sm90",
        backward=False,
        head_dim=64,
        tokens=(256, 512),
        features=(),
        engines=("triton", "sdpa"),
        source="layer-h200.csv",
    ),
    Measured(
        arch="sm90",
        backward=True,
        head_dim=64,
        tokens=(256, 512),
        features=(),
        engines=("triton", "sdpa", "flash_attn"),
        source="layer-h200.csv",
    ),
)


def register_engine(engine: RequiredNames, first_on: Sequence[str] = ()) -> None:
    """Add an attention engine of your own, which ``engine=`` then takes by its ``NAME``.

    Args:
        engine: a module, or an object, with the names of :class:`~molsaki_kernels.attention.protocol.RequiredNames`.
            The optional names of ``protocol.Engine`` that it lacks are added to it.
        first_on: types of devices, such as ``("cuda",)``, on which "auto" tries it before all other engines.

    Raises:
        TypeError: a required name is missing, some of FUSED_MAP and its two functions are, or ``first_on`` is a str.
        AttributeError: an optional name is missing, and the object does not take attributes.
        ValueError: another engine has this name.
    """
    missing = [name for name in REQUIRED if not defines(engine, name)]
    if missing:
        raise TypeError(f"engine: expected {', '.join(missing)} as in molsaki_kernels.attention.protocol, got none")
    if isinstance(first_on, str):
        raise TypeError(f'first_on: expected types of devices such as ("cuda",), got {first_on!r}')
    if engine.NAME == "auto" or ENGINES.get(engine.NAME, engine) is not engine:
        raise ValueError(f"engine: expected a NAME that no other engine has, got {engine.NAME!r}")
    ENGINES[engine.NAME] = with_defaults(engine)
    for device, names in list(FIRST.items()):
        FIRST[device] = tuple(name for name in names if name != engine.NAME)
    for device in first_on:
        FIRST[device] = (engine.NAME, *FIRST.get(device, ()))


def choose_engine(engine: str, request: AttentionRequest, map_engine: str = "auto") -> str:
    """Return the name of the first engine, in order of speed, that supports the call, or the one asked for.

    Engines that compute the map themselves do not support one of :data:`MAP_ENGINES` as the map engine.

    Raises:
        ValueError: there is no such engine, or no engine considered supports the call; the message lists the reasons.
    """
    names = (*FIRST.get(request.device.type, ()), *order(request)) if engine == "auto" else (engine,)
    reasons = {}
    for name in names:
        if name not in ENGINES:
            raise ValueError(f'engine: expected "auto" or one of {sorted(ENGINES)}, got {engine!r}')
        fits = request.value_dim is None and not request.head_dim % ENGINES[name].HEAD_DIM_MULTIPLE
        served = request if fits else as_served(ENGINES[name], request)
        reason = ENGINES[name].why_not(served) or ENGINES[name].available()
        if reason is not None and served is not request:
            given, padded = (f"{one.head_dim} and {one.value_dim or one.head_dim}" for one in (request, served))
            reason += f" (keys and values of {given} are padded to {padded})"
        if reason is None and map_engine in MAP_ENGINES and ENGINES[name].COMPUTES_MAP:
            reason = f"it computes the map itself, without map_engine {map_engine!r}"
        if reason is None:
            return name
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"engine: {engine!r} cannot serve this call ({listed})")


def choose_map(map_engine: str, q: Tensor, request: AttentionRequest) -> str:
    """Return how the map is computed: "widened", or one of :data:`MAP_ENGINES` for an engine that does not compute it.

    "auto" never takes "widened": computing the map separately was faster wherever both were measured, on a CPU
    (docs/performance.md) and on an H200, where widened values took 1.5 to 1.9 times as long at 16 x 256 tokens and 4
    times at 1 x 4,096.

    Raises:
        ValueError: there is no such map engine, or it does not support the call.
    """
    if map_engine == "auto":
        return choose_map_engine("auto", q, request.options)
    if map_engine == widened_values.NAME:
        return map_engine
    if map_engine not in MAP_ENGINES:
        listed = ", ".join(f'"{name}"' for name in (widened_values.NAME, *MAP_ENGINES))
        raise ValueError(f'map_engine: expected "auto" or one of {listed}, got {map_engine!r}')
    reason = MAP_ENGINES[map_engine].why_not(q, request.options)
    if reason is not None:
        raise ValueError(f"map_engine: {map_engine!r} cannot serve this call: {reason}")
    return map_engine


def choose_map_engine(engine: str, q: Tensor, options: AttentionOptions) -> str:
    """Return the name of the first of :data:`MAP_ENGINES` that supports the map of ``q``, or the one asked for."""
    reasons = {}
    for name, implementation in MAP_ENGINES.items():
        if engine != name and (engine != "auto" or (name == "triton" and not q.is_cuda)):
            continue
        reasons[name] = implementation.why_not(q, options)
        if reasons[name] is None:
            return name
    raise _cannot_serve(engine, tuple(MAP_ENGINES), reasons)


def choose_pooling_engine(engine: str, v: Tensor) -> str:
    """Return the name of the first of :data:`POOLING_ENGINES` that supports ``v``, or the one asked for."""
    reasons = {}
    for name, implementation in POOLING_ENGINES.items():
        if engine != name and (engine != "auto" or (name == "triton" and not v.is_cuda)):
            continue
        reasons[name] = implementation.why_not(v)
        if reasons[name] is None:
            return name
    raise _cannot_serve(engine, tuple(POOLING_ENGINES), reasons)


def _cannot_serve(engine: str, names: tuple[str, ...], reasons: dict[str, str | None]) -> ValueError:
    if engine not in reasons:
        listed = ", ".join(f'"{name}"' for name in names)
        return ValueError(f'engine: expected "auto" or one of {listed}, got {engine!r}')
    return ValueError(f'engine: "{engine}" cannot serve this call: {reasons[engine]}')


def order(request: AttentionRequest) -> tuple[str, ...]:
    """Return the engines in the order to try: the measured ones, then the rest of the default order."""
    default = DEFAULT_ORDER.get(_kind(request.device), ("eager",))
    forward_in_bfloat16 = request.dtype == torch.bfloat16 and not request.backward
    if default[0] == "native" and forward_in_bfloat16 and pytorch_is_faster_in_bfloat16():
        default = ("sdpa", "native", "eager")  # about twice as fast as products in float32 (docs/performance.md)
    if not MEASURED or request.value_dim is not None:
        return default
    key = (arch_of(request.device), request.backward, padded_head_dim(request.head_dim), features(request))
    for record in MEASURED:
        if key != (record.arch, record.backward, record.head_dim, record.features):
            continue
        if record.tokens[0] <= request.length < record.tokens[1]:
            return record.engines + tuple(name for name in default if name not in record.engines)
    return default


def _kind(device: torch.device) -> str:
    """Return the key of :data:`DEFAULT_ORDER` for a device."""
    hopper = device.type == "cuda" and arch_of(device) == "sm90" and flash_attn.version_of(device) == 4
    return HOPPER if hopper else device.type


def features(request: AttentionRequest) -> tuple[str, ...]:
    """Return the subset of :data:`FEATURES` that a call uses."""
    options = request.options
    used = (not options.causal, options.window is not None, options.softcap is not None, request.sinks, request.packed)
    return tuple(name for name, on in zip(FEATURES, used, strict=True) if on)


def padded_head_dim(head_dim: int) -> int:
    """Return the smallest of :data:`HEAD_DIMS` that holds ``head_dim``, or ``head_dim`` if none does."""
    return next((D for D in HEAD_DIMS if head_dim <= D), head_dim)


@constant_when_compiled
def arch_of(device: torch.device) -> str:
    """Return :attr:`Measured.arch` of a device: "sm90" and so on for CUDA, AMD's name for ROCm, else its type."""
    if device.type != "cuda" or not torch.cuda.is_available():  # fake CUDA tensors without a GPU
        return device.type
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
