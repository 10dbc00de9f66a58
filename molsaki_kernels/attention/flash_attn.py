"""The flash-attn packages: flash-attn 4 (``flash_attn.cute``) on Hopper and Blackwell, else flash-attn 2.

flash-attn 4's backward takes the gradient of lse. flash-attn 2's drops it, so it is folded into O (``fold.py``; float16
widens the head dimension). flash-attn 4 has sinks on sm90, sm100 and sm110; elsewhere ``sinks.py`` adds them after the
forward, and no backward needs to know of them: out and lse count them already.

Tensors go in and come out as views in flash-attn's layout, ``(B, M, H, D)`` or packed ``(total, H, D)``, and results
are allocated in the layout of the inputs, so nothing is copied. The functions called are those beneath the packages'
autograd, as of flash-attn 2.8.3 and 4.0.0b36.

Unproven: neither package runs without a GPU. What is tested is every call made here, against stand-ins with the real
functions' parameters; what is declared below of each architecture was read in the packages' sources.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from molsaki_kernels.attention.lse_gradient import fold, widen
from molsaki_kernels.attention.sinks import with_sinks
from molsaki_kernels.spec import AttentionOptions, AttentionRequest

NAME = "flash_attn"
PACKAGES = {
    4: ("flash-attn-4", "flash_attn.cute.interface"),
    2: ("flash-attn", "flash_attn.flash_attn_interface"),
}


@torch.compiler.assume_constant_result
def available() -> str | None:
    """Why neither package can run on this machine, or None."""
    missing = [interface for interface in map(_interface, PACKAGES) if isinstance(interface, str)]
    if len(missing) == len(PACKAGES):
        return "; ".join(missing)
    return None if torch.cuda.is_available() else "no GPU"


def why_not(call: AttentionRequest) -> str | None:
    """Why this engine cannot do ``call``, or None."""
    if call.device.type != "cuda":
        return f"flash-attn is for CUDA only, not for {call.device.type} tensors"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16 and float16, not {call.dtype}"
    if call.options.scale <= 0:
        return f"flash-attn takes a positive scale, not {call.options.scale}"
    version = _version(call.device)
    if isinstance(version, str):
        return version
    return (_why_not_4 if version == 4 else _why_not_2)(call)


def _why_not_2(call: AttentionRequest) -> str | None:
    limit = 248 if call.dtype == torch.float16 and call.backward else 256  # float16's fold needs 8 more columns
    if call.head_dim % 8 or call.head_dim > limit:
        return f"flash-attn 2 takes head_dim in multiples of 8 up to {limit}, not {call.head_dim}"
    return None


def _why_not_4(call: AttentionRequest) -> str | None:
    major = _major(call.device)
    if call.head_dim % 8 or call.head_dim > (256 if major == 9 else 128):
        if major not in (10, 11) or call.head_dim != 256:
            return f"flash-attn 4 takes head_dim in multiples of 8 up to {_largest_head(major)}, not {call.head_dim}"
        if call.backward and call.options.softcap is not None:
            return "flash-attn 4 has no backward with a softcap at head_dim 256 on sm100"
        if call.backward and call.dtype == torch.float16:
            return "flash-attn 4 drops the gradient of lse at head_dim 256 on sm100, and float16 cannot be folded there"
    if major in (8, 12) and call.options.window is not None:
        return f"flash-attn 4 has no finished window on sm{major}x"
    if major == 8 and call.backward:
        return "flash-attn 4 has no backward before sm90 (flash-attn 2 has)"
    if major == 12 and call.backward and torch.are_deterministic_algorithms_enabled():
        return "flash-attn 4 has no deterministic backward on sm120"
    return None


def _largest_head(major: int) -> str:
    return {9: "256", 10: "128, and 256", 11: "128, and 256"}.get(major, "128")


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """out ``(B, Hq, M, D)`` in q's dtype and lse ``(B, Hq, M)`` float32."""
    if q.numel() == 0:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    version = _version(q.device)
    packed, M = cu_seqlens is not None, q.shape[2]
    with torch.cuda.device_of(q):  # flash-attn 4 asks the current device what it is
        rows_first = [_rows_first(t, packed) for t in (q, k, v)]
        if version == 4:
            native_sinks = sinks is not None and _major(q.device) in (9, 10, 11)
            out, lse, *_ = _interface(4)._flash_attn_fwd(
                *rows_first, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, softmax_scale=options.scale,
                causal=options.causal, softcap=options.softcap or 0.0, window_size_left=_left(options, None),
                window_size_right=_right(options, None), learnable_sink=sinks.float() if native_sinks else None,
                return_lse=True, out=torch.empty_like(rows_first[0]),
            )  # fmt: skip
        else:
            native_sinks = False
            if packed:
                bounds = (cu_seqlens, cu_seqlens, _longest(M), _longest(M))
                result = _interface(2)._flash_attn_varlen_forward(*rows_first, *bounds, *_options_2(options), False)
            else:
                result = _interface(2)._flash_attn_forward(*rows_first, *_options_2(options), False)
            out, lse, *_ = result
        out, lse = _heads_first(out, packed), lse[None] if packed else lse
        return with_sinks(out, lse, sinks) if sinks is not None and not native_sinks else (out, lse)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v."""
    del sinks  # out and lse count them already
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    version, D, packed, M = _version(q.device), q.shape[3], cu_seqlens is not None, q.shape[2]
    takes_dlse = version == 4 and not (D == 256 and _major(q.device) in (10, 11))
    with torch.cuda.device_of(q):
        if dlse is not None and not takes_dlse:
            if q.dtype == torch.float16:
                q, k, v, out, dout = widen(q, k, v, out, dout, dlse)
            else:
                out, dout = fold(out, dout, dlse)
            dlse = None
        q, k, v, out, dout = (_rows_first(t, packed) for t in (q, k, v, out, dout))
        lse, dlse = (t[0] if packed and t is not None else t for t in (lse, dlse))
        deterministic = torch.are_deterministic_algorithms_enabled()
        if version == 4:
            grads = _interface(4)._flash_attn_bwd(
                q, k, v, out, dout, lse, softmax_scale=options.scale, causal=options.causal,
                softcap=options.softcap or 0.0, window_size_left=_left(options, None),
                window_size_right=_right(options, None), cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
                deterministic=deterministic, dlse=dlse,
            )  # fmt: skip
        else:
            grads = [torch.empty_like(t) for t in (q, k, v)]
            tensors, rest = (dout, q, k, v, out, lse, *grads), (*_options_2(options), deterministic)
            if packed:
                bounds = (cu_seqlens, cu_seqlens, _longest(M), _longest(M))
                _interface(2)._flash_attn_varlen_backward(*tensors, *bounds, *rest)
            else:
                _interface(2)._flash_attn_backward(*tensors, *rest)
        dq, dk, dv = (_heads_first(t, packed)[..., :D] for t in grads)
        return dq, dk, dv


def _rows_first(x: Tensor, packed: bool) -> Tensor:
    """``(B, H, M, D)`` as ``(B, M, H, D)``, or packed as ``(total, H, D)``."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x[0].transpose(0, 1) if packed else x.transpose(1, 2)


def _heads_first(x: Tensor, packed: bool) -> Tensor:
    return x.transpose(0, 1)[None] if packed else x.transpose(1, 2)


def _options_2(options: AttentionOptions) -> tuple[float, float, bool, int, int, float, None]:
    """flash-attn 2's dropout_p, softmax_scale, causal, the window's two sides, softcap and alibi_slopes."""
    left, right = _left(options, -1), _right(options, -1)
    return 0.0, options.scale, options.causal, left, right, options.softcap or 0.0, None


def _left(options: AttentionOptions, everything: int | None) -> int | None:
    """Keys before the query that it sees; ``everything`` is how a package says "all of them"."""
    return everything if options.window is None else options.window - 1


def _right(options: AttentionOptions, everything: int | None) -> int | None:
    return 0 if options.causal and options.window is not None else everything


def _longest(total: int) -> int:
    """A bound on the longest sequence, which no host knows: it costs idle blocks only. 1 would mean decoding."""
    return max(total, 2)


@torch.compiler.assume_constant_result
def _version(device: torch.device) -> int | str:
    """The flash-attn that serves tensors of ``device``, forward and backward, or why none does."""
    if torch.version.hip is not None:
        return "flash-attn is not tried on ROCm"
    major = _major(device)
    if major < 8:
        return f"flash-attn needs sm80 or later, not sm{major}x"
    order = (4, 2) if major in (9, 10, 11) else (2, 4)  # elsewhere flash-attn 4 can do less
    reasons = []
    for version in order:
        interface = _interface(version)
        if not isinstance(interface, str):
            return version
        reasons.append(interface)
    return "; ".join(reasons)


@torch.compiler.assume_constant_result
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@functools.cache
def _interface(version: int) -> ModuleType | str:
    """The module that holds a package's functions, or why it cannot be had."""
    package, module = PACKAGES[version]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "flash_attn":
            return f"{package} is not installed"
        return f"{package} does not import: {error}"
    except Exception as error:  # built for another torch or CUDA: whatever its libraries raise
        return f"{package} does not import: {type(error).__name__}: {error}"
