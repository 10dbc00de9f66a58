"""Engine "flash_attn": the flash-attn packages, flash-attn 4 (``flash_attn.cute``) on Hopper and Blackwell, else 2.

flash-attn 4's backward takes the gradient of lse. flash-attn 2's drops it, so it is folded into O (``lse_gradient.py``;
float16 widens the head dimension). flash-attn 4 supports sinks on sm90, sm100 and sm110; elsewhere ``sinks.py`` adds
them after the forward pass, and no backward needs them: out and lse count them already.

Tensors are passed as views in flash-attn's layout, ``(B, M, H, D)`` or packed ``(total, H, D)``, and results are
allocated in the layout of the inputs, so nothing is copied. The functions called are those beneath the packages'
autograd, as of flash-attn 2.8.3 and 4.0.0b36.

flash-attn 4.0.0b36 was run on an H200 (sm90) against the float64 oracle. Other GPUs and flash-attn 2 were not run: for
these the tests check every call against stand-ins with the real functions' parameters, and what each architecture
supports was taken from the packages' sources.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molsaki_kernels._compile import constant_when_compiled
from molsaki_kernels._triton.support import why_no_triton
from molsaki_kernels.attention.lse_gradient import append_dlse_column, fold_dlse_into_out
from molsaki_kernels.attention.sinks import apply_sinks
from molsaki_kernels.spec import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutputs,
    AttentionRequest,
    InputGradients,
    MapInputs,
    OutputGradients,
    PlanTensors,
)
from molsaki_kernels.strides import aligned, empty_out, with_contiguous_head_dim

NAME = "flash_attn"
COMPUTES_MAP = False
DIFFERENTIABLE = False
FUSED_MAP = "triton"
PACKAGES = {
    4: ("flash-attn-4", "flash_attn.cute.interface"),
    2: ("flash-attn", "flash_attn.flash_attn_interface"),
}
# 1: where it can, the map's gradient is written into flash-attn 4's accumulator of dq (_triton/fa4_preprocess.py). Off:
# on an H200 that kernel takes 230 us at 1 x 4,096 tokens, the three that it replaces take 168 us.
FUSE = os.environ.get("MOLSAKI_FA4_PREPROCESS") == "1"
FUSED_VERSION = "4.0.0b36"  # the only one whose order of the accumulator is known
_preprocess = threading.local()  # .fill: the function that replaces the package's preprocess in this thread's call
# Widths of keys and values that flash-attn 4 (4.0.0b36) compiles for sm90, forward and backward. Its backward does not
# compile for values of 96, 144 or 160 beside other keys, nor its forward for 256 beside 64.
PAIRS_4 = frozenset({(64, 128), (64, 192), (128, 64), (128, 192), (128, 256), (192, 128)})
# Their backward needs more shared memory than sm90 has (264,192 of 232,448 bytes): its launch failed on an H200.
FORWARD_PAIRS_4 = frozenset({(128, 256)})


@constant_when_compiled
def available() -> str | None:
    """Return the reason why neither package can run on this machine, or None."""
    missing = [interface for interface in map(_interface, PACKAGES) if isinstance(interface, str)]
    if len(missing) == len(PACKAGES):
        return "; ".join(missing)
    return None if torch.cuda.is_available() else "no GPU"


def why_not(request: AttentionRequest) -> str | None:
    """Return the reason why the engine cannot serve a call, or None."""
    if request.device.type != "cuda":
        return f"flash-attn is for CUDA only, not for {request.device.type} tensors"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16 and float16, not {request.dtype}"
    if request.options.scale <= 0:
        return f"flash-attn takes a positive scale, not {request.options.scale}"
    version = version_of(request.device)
    if isinstance(version, str):
        return version
    return (_why_not_4 if version == 4 else _why_not_2)(request)


def _why_not_2(request: AttentionRequest) -> str | None:
    limit = 248 if request.dtype == torch.float16 and request.backward else 256  # float16's fold needs 8 more columns
    if request.head_dim % 8 or request.head_dim > limit:
        return f"flash-attn 2 takes head_dim in multiples of 8 up to {limit}, not {request.head_dim}"
    return None


def _why_not_4(request: AttentionRequest) -> str | None:
    major = _major(request.device)
    if request.head_dim % 8 or request.head_dim > (256 if major == 9 else 128):
        if major not in (10, 11) or request.head_dim != 256:
            return f"flash-attn 4 takes head_dim in multiples of 8 up to {_largest_head(major)}, not {request.head_dim}"
        if request.backward and request.options.softcap is not None:
            return "flash-attn 4 has no backward with a softcap at head_dim 256 on sm100"
        if request.backward and request.dtype == torch.float16:
            return "flash-attn 4 drops the gradient of lse at head_dim 256 on sm100, and float16 cannot be folded there"
    if major == 9 and request.backward and request.head_dim < 128 and 0 < request.head_dim % 32 <= 16:
        # Its kernel rounds the head dimension to 16 and the accumulator of dq, which other kernels clear and read, to
        # 32: dq is silently wrong (flash-attention pull request 2896; as of 4.0.0b36).
        return f"flash-attn 4: wrong dq on sm90 if head_dim is padded to an odd multiple of 16, as {request.head_dim}"
    if major in (8, 12) and request.options.window is not None:
        return f"flash-attn 4 has no finished window on sm{major}x"
    if major == 8 and request.backward:
        return "flash-attn 4 has no backward before sm90 (flash-attn 2 has)"
    if major == 12 and request.backward and torch.are_deterministic_algorithms_enabled():
        return "flash-attn 4 has no deterministic backward on sm120"
    return None


def _largest_head(major: int) -> str:
    return {9: "256", 10: "128, and 256", 11: "128, and 256"}.get(major, "128")


def takes_value_dim(request: AttentionRequest, value_dim: int) -> bool:
    """Return whether v may be ``value_dim`` wide: flash-attn 4 takes some widths of its own on sm90.

    Its backward refuses them where several query heads share a key head.
    """
    if value_dim == request.head_dim:
        return True
    if version_of(request.device) != 4 or _major(request.device) != 9:
        return False
    pair = request.head_dim, value_dim
    if request.backward and (request.q_heads != request.kv_heads or pair in FORWARD_PAIRS_4):
        return False
    return pair in PAIRS_4


def folds_dlse(inputs: AttentionInputs) -> bool:
    """Return whether backward takes O' and dO': with flash-attn 2, except in float16."""
    return not _takes_dlse(inputs.q) and inputs.q.dtype != torch.float16


def forward(inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> AttentionOutputs:
    """Compute out in q's dtype and lse in float32."""
    q, sinks, cu_seqlens = inputs.q, inputs.sinks, inputs.cu_seqlens
    if q.numel() == 0:
        return AttentionOutputs(empty_out(q, inputs.v), q.new_empty(q.shape[:3], dtype=torch.float32))
    version = version_of(q.device)
    packed, M = cu_seqlens is not None, q.shape[2]
    with torch.cuda.device_of(q):  # flash-attn 4 asks for the current device's architecture
        tensors = [_flash_layout(t, packed) for t in (q, inputs.k, inputs.v)]
        own_sinks = sinks is not None and version == 4 and _major(q.device) in (9, 10, 11)
        if version == 4:
            out, lse, *_ = _interface(4)._flash_attn_fwd(
                *tensors,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                **_options_4(options),
                learnable_sink=sinks.float() if sinks is not None and own_sinks else None,
                return_lse=True,
                out=_flash_layout(empty_out(q, inputs.v), packed),
            )
        elif packed:
            bounds = (cu_seqlens, cu_seqlens, _longest(M), _longest(M))
            out, lse, *_ = _interface(2)._flash_attn_varlen_forward(*tensors, *bounds, *_options_2(options), False)
        else:
            out, lse, *_ = _interface(2)._flash_attn_forward(*tensors, *_options_2(options), False)
        out, lse = _from_flash_layout(out, packed), lse[None] if packed else lse
        if sinks is not None and not own_sinks:
            out, lse = apply_sinks(out, lse, sinks)
        return AttentionOutputs(out, lse)


def backward(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
) -> InputGradients:
    """Compute dq, dk and dv in the dtypes of q, k and v."""
    q, k, v, out, lse = inputs.q, inputs.k, inputs.v, outputs.out, outputs.lse
    dout, dlse, cu_seqlens = gradients.dout, gradients.dlse, inputs.cu_seqlens
    assert dout is not None  # guaranteed by the protocol for engines that do not compute the map
    if q.numel() == 0:
        return InputGradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    version, D, packed, M = version_of(q.device), q.shape[3], cu_seqlens is not None, q.shape[2]
    with torch.cuda.device_of(q):
        if dlse is not None and not _takes_dlse(q):
            if q.dtype == torch.float16:
                q, k, v, out, dout = append_dlse_column(q, k, v, out, dout, dlse)
            else:
                out, dout = fold_dlse_into_out(out, dout, dlse)
            dlse = None
        q, k, v, out, dout = (_flash_layout(t, packed) for t in (q, k, v, out, dout))
        if packed:
            lse, dlse = lse[0], None if dlse is None else dlse[0]
        deterministic = torch.are_deterministic_algorithms_enabled()
        if version == 4:
            grads = _interface(4)._flash_attn_bwd(
                q,
                k,
                v,
                out,
                dout,
                lse,
                **_options_4(options),
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                deterministic=deterministic,
                dlse=dlse,
            )
        else:
            grads = [torch.empty_like(t) for t in (q, k, v)]
            tensors, rest = (dout, q, k, v, out, lse, *grads), (*_options_2(options), deterministic)
            if packed:
                bounds = (cu_seqlens, cu_seqlens, _longest(M), _longest(M))
                _interface(2)._flash_attn_varlen_backward(*tensors, *bounds, *rest)
            else:
                _interface(2)._flash_attn_backward(*tensors, *rest)
        dq, dk, dv = (_from_flash_layout(t, packed) for t in grads)
        return InputGradients(dq[..., :D], dk[..., :D], dv[..., : inputs.v.shape[3]])


def why_not_fused(inputs: AttentionInputs, options: AttentionOptions, plan: PlanTensors) -> str | None:
    """Return the reason why :func:`backward_with_map` cannot serve a call, or None."""
    q = inputs.q
    if not FUSE:
        return "MOLSAKI_FA4_PREPROCESS is not 1"
    if version_of(q.device) != 4 or _major(q.device) != 9:
        return "it needs flash-attn 4 on sm90"
    if (installed := _installed()) != FUSED_VERSION:
        return f"it needs flash-attn-4 {FUSED_VERSION}, not {installed}"
    if inputs.sinks is not None or options.softcap is not None or plan.is_empty(q) or inputs.v.shape != inputs.k.shape:
        return "it supports no sinks, no softcap, no empty plan and no values of another width"
    if (reason := why_no_triton(q.device, q.dtype)) is not None:
        return reason
    from molsaki_kernels._triton.fa4_preprocess import accumulator

    if accumulator(q.shape[3], options.causal, options.window is not None) is None:
        return f"the accumulator of head_dim {q.shape[3]} has another layout"
    return None


@functools.cache
def _installed() -> str:
    return importlib.metadata.version(PACKAGES[4][0])


def backward_with_map(
    gradients: OutputGradients,
    inputs: AttentionInputs,
    outputs: AttentionOutputs,
    options: AttentionOptions,
    plan: PlanTensors,
) -> InputGradients:
    """Compute dq, dk and dv of attention and map together; :func:`why_not_fused` says where.

    flash-attn 4's preprocess is replaced by a kernel that also starts the accumulator of dq with the map's.
    """
    from molsaki_kernels._triton import fa4_preprocess
    from molsaki_kernels._triton.map_backward import add_dk

    dmaps, packed = gradients.dmaps, inputs.cu_seqlens is not None
    assert dmaps is not None
    upstream = OutputGradients(torch.zeros_like(outputs.out) if gradients.dout is None else gradients.dout)
    q, k = with_contiguous_head_dim(inputs.q), with_contiguous_head_dim(inputs.k)
    map_inputs = MapInputs(q, k, outputs.lse, inputs.cu_seqlens)
    shape = fa4_preprocess.accumulator(inputs.q.shape[3], options.causal, options.window is not None)
    dlse = None if gradients.dlse is None else gradients.dlse.float().contiguous()
    steps: list[Tensor] = []

    def fill(out: Tensor, dout: Tensor, dpsum: Tensor, lse_log2: Tensor, accum: Tensor, rows: int) -> None:
        if shape is None or rows != shape.rows or accum.shape[-1] != dpsum.shape[-1] * shape.width:
            raise RuntimeError(f"flash-attn-4 {FUSED_VERSION}: its accumulator of dq is not the expected one")
        operands = (_from_flash_layout(out, packed), _from_flash_layout(dout, packed), dlse)
        arrays = (dpsum, lse_log2, accum)
        steps.append(fa4_preprocess.fa4_preprocess(dmaps, map_inputs, options, plan, operands, arrays))

    _replace_preprocess(_interface(4))
    _preprocess.fill = fill
    try:
        found = backward(upstream, inputs, outputs, options, plan)
    finally:
        _preprocess.fill = None
    add_dk(dmaps, map_inputs, options, plan, steps[0], found.dk)
    return found


def _replace_preprocess(interface: Any) -> None:
    """Have flash-attn 4's backward call ``_preprocess.fill``, if it is set, instead of its preprocess."""
    original: Callable[..., None] = interface._bwd_preprocess
    if getattr(original, "replaced_by_molsaki", False):
        return

    @functools.wraps(original)  # with the cache that the package keeps as an attribute
    def preprocess(out: Tensor, dout: Tensor, *arguments: Any, **named: Any) -> None:
        fill = getattr(_preprocess, "fill", None)
        if fill is None:
            original(out, dout, *arguments, **named)
            return
        dpsum, _, lse_log2, accum, _, _, _, _, _, _, rows = arguments
        fill(out, dout, dpsum, lse_log2, accum, rows)

    preprocess.replaced_by_molsaki = True  # type: ignore[attr-defined]
    interface._bwd_preprocess = preprocess


def _takes_dlse(q: Tensor) -> bool:
    return version_of(q.device) == 4 and not (q.shape[3] == 256 and _major(q.device) in (10, 11))


def _flash_layout(x: Tensor, packed: bool) -> Tensor:
    """Return ``x (B, H, M, D)`` in flash-attn's layout, ``(B, M, H, D)`` or packed ``(total, H, D)``."""
    x = aligned(x)
    return x[0].transpose(0, 1) if packed else x.transpose(1, 2)


def _from_flash_layout(x: Tensor, packed: bool) -> Tensor:
    return x.transpose(0, 1)[None] if packed else x.transpose(1, 2)


def _options_4(options: AttentionOptions) -> dict[str, Any]:
    """Return flash-attn 4's keywords for the options."""
    return {
        "softmax_scale": options.scale,
        "causal": options.causal,
        "softcap": options.softcap or 0.0,
        "window_size_left": _left(options, None),
        "window_size_right": _right(options, None),
    }


def _options_2(options: AttentionOptions) -> tuple[float, float, bool, int | None, int | None, float, None]:
    """Return flash-attn 2's dropout_p, softmax_scale, causal, left and right window, softcap and alibi_slopes."""
    left, right = _left(options, -1), _right(options, -1)
    return 0.0, options.scale, options.causal, left, right, options.softcap or 0.0, None


def _left(options: AttentionOptions, everything: int | None) -> int | None:
    """Return the number of visible keys before the query; ``everything`` is the package's value for no limit."""
    return everything if options.window is None else options.window - 1


def _right(options: AttentionOptions, everything: int | None) -> int | None:
    return 0 if options.causal and options.window is not None else everything


def _longest(total: int) -> int:
    """Return a bound on the longest sequence, which the host does not know: it costs idle thread blocks only.

    At least 2, because flash-attn takes 1 for decoding.
    """
    return max(total, 2)


@constant_when_compiled
def version_of(device: torch.device) -> int | str:
    """Return the version in use for tensors of ``device``, 4 or 2, or the reason why there is none."""
    if torch.version.hip is not None:
        return "flash-attn was not tried on ROCm"
    major = _major(device)
    if major < 8:
        return f"flash-attn needs sm80 or later, not sm{major}x"
    order = (4, 2) if major in (9, 10, 11) else (2, 4)  # elsewhere flash-attn 4 supports less
    reasons = []
    for version in order:
        interface = _interface(version)
        if not isinstance(interface, str):
            return version
        reasons.append(interface)
    return "; ".join(reasons)


@constant_when_compiled
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@functools.cache
def _interface(version: int) -> Any:
    """Return the module that holds a package's functions, or the reason why it cannot be imported."""
    package, module = PACKAGES[version]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "flash_attn":
            return f"{package} is not installed"
        return f"{package} does not import: {error}"
    except Exception as error:  # built for another torch or CUDA: its libraries raise anything
        return f"{package} does not import: {type(error).__name__}: {error}"
