"""Replaces the flash-attn packages where there is no GPU: functions with the same parameters, in PyTorch.

``PARAMETERS`` lists the parameters in flash-attn 2.8.3.post2 and flash-attn 4.0.0b36. The stand-ins accept no others,
refuse the shapes, strides and dtypes that the packages refuse, and follow the packages' conventions: the layout,
``(left, right)`` windows, an lse in natural logarithm without padding, and flash-attn 4's ``D - dlse``.
"""

from __future__ import annotations

import sys
import types

import torch

FWD_2 = ["q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap",
         "alibi_slopes", "return_softmax"]  # fmt: skip
BWD_2 = ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "dropout_p", "softmax_scale", "causal",
         "window_size_left", "window_size_right", "softcap", "alibi_slopes", "deterministic", "rng_state"]  # fmt: skip
BOUNDS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
PARAMETERS = {
    2: {
        "_flash_attn_forward": FWD_2,
        "_flash_attn_varlen_forward": [*FWD_2[:3], *BOUNDS, *FWD_2[3:], "block_table", "leftpad_k", "seqused_k",
                                       "zero_tensors"],
        "_flash_attn_backward": BWD_2,
        "_flash_attn_varlen_backward": [*BWD_2[:9], *BOUNDS, *BWD_2[9:], "zero_tensors"],
    },
    4: {
        "_flash_attn_fwd": [
            "q", "k", "v", "qv", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q",
            "max_seqlen_k", "min_seqlen_k", "page_table", "softmax_scale", "causal", "softcap", "window_size_left",
            "window_size_right", "learnable_sink", "tile_mn", "mma_pv_is_rs", "intra_wg_overlap", "num_threads",
            "num_splits", "pack_gqa", "_arch", "score_mod", "mask_mod", "block_sparse_tensors", "return_lse", "out",
            "lse", "aux_tensors", "aux_scalars", "q_descale", "k_descale", "v_descale", "gather_kv_indices",
            "scheduler_metadata", "seqlen_k_per_split", "disable_scheduler_metadata", "gather_bwd_recompute_p",
        ],
        "_flash_attn_bwd": [
            "q", "k", "v", "out", "dout", "lse", "softmax_scale", "causal", "softcap", "window_size_left",
            "window_size_right", "m_block_size", "n_block_size", "num_threads", "pack_gqa", "num_stages_Q",
            "num_stages_dO", "SdP_swapAB", "dKV_swapAB", "dQ_swapAB", "AtomLayoutMSdP", "AtomLayoutNdKV",
            "AtomLayoutMdQ", "V_in_regs", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q",
            "max_seqlen_k", "deterministic", "dq", "dk", "dv", "score_mod", "score_mod_bwd", "mask_mod", "aux_tensors",
            "aux_scalars", "block_sparse_tensors", "dlse", "learnable_sink",
        ],
    },
}  # fmt: skip

CALLS: list[tuple[str, dict]] = []  # the function and arguments of every call


def install(monkeypatch, *versions: int) -> None:
    """Makes the stand-ins of ``versions`` importable, and the other versions not."""
    modules = {"flash_attn": types.ModuleType("flash_attn"), "flash_attn.cute": types.ModuleType("flash_attn.cute")}
    modules["flash_attn"].__path__ = []
    modules["flash_attn.cute"].__path__ = []
    for version, name in ((2, "flash_attn.flash_attn_interface"), (4, "flash_attn.cute.interface")):
        monkeypatch.delitem(sys.modules, name, raising=False)
        if version in versions:
            modules[name] = types.ModuleType(name)
            for function in PARAMETERS[version]:
                setattr(modules[name], function, _recorded(version, function))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    CALLS.clear()


def _recorded(version: int, function: str):
    """The stand-in with the real function's parameters, in order; omitted arguments are None."""
    parameters = PARAMETERS[version][function]
    run = globals()[f"_{'backward' if 'b' in function.split('_')[-1] else 'forward'}_{version}"]

    def call(*arguments, **named):
        given = dict(zip(parameters, arguments, strict=False))
        assert len(arguments) <= len(parameters), f"{function} takes {len(parameters)} arguments"
        assert not given.keys() & named.keys(), f"{function}: given twice: {given.keys() & named.keys()}"
        assert named.keys() <= set(parameters), f"{function} has no {named.keys() - set(parameters)}"
        given |= named
        CALLS.append((function, given))
        return run(types.SimpleNamespace(**dict.fromkeys(parameters) | given), "varlen" in function)

    return call


def _forward_2(x, varlen):
    _check_2(x, varlen, (x.q, x.k, x.v))
    assert x.return_softmax is False
    out, lse = torch.empty_like(x.q), x.q.new_empty(_lse_shape(x.q, varlen), dtype=torch.float32)
    _attend(x, x.cu_seqlens_q if varlen else None, -1, None, out, lse)
    return out, lse, x.q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _backward_2(x, varlen):
    gradients = (x.dq, x.dk, x.dv)
    _check_2(x, varlen, (x.q, x.k, x.v, x.out, x.dout, *gradients))
    assert type(x.deterministic) is bool
    assert [t.shape for t in gradients] == [x.q.shape, x.k.shape, x.v.shape]
    for given, grad in zip(gradients, _differentiate(x, x.cu_seqlens_q if varlen else None, -1, None), strict=True):
        given.copy_(grad)
    return x.softmax_lse.new_empty(0)


def _check_2(x, varlen, tensors):
    """The checks of the extension and of its operators' schemas."""
    assert all(t.stride(-1) == 1 and t.dtype == x.q.dtype for t in tensors)
    assert x.q.dim() == (3 if varlen else 4) and x.q.shape[-1] % 8 == 0 and x.q.shape[-1] <= 256 and x.q.shape[0] > 0
    for name, kind in dict(dropout_p=float, softmax_scale=float, causal=bool, softcap=float).items():
        assert type(getattr(x, name)) is kind, name
    assert type(x.window_size_left) is int and type(x.window_size_right) is int
    assert x.dropout_p == 0 and x.alibi_slopes is None
    if varlen:
        assert torch.equal(x.cu_seqlens_q, x.cu_seqlens_k) and x.cu_seqlens_q.dtype == torch.int32
        assert x.max_seqlen_q == x.max_seqlen_k >= x.cu_seqlens_q.diff().max()
        assert x.max_seqlen_q > 1  # the package treats 1 as decoding, and regroups q by batch


def _forward_4(x, _):
    assert x.return_lse is True
    assert x.learnable_sink is None or x.learnable_sink.dtype != torch.float64
    varlen = x.cu_seqlens_q is not None
    assert x.out.shape == (*x.q.shape[:-1], x.v.shape[-1])
    assert x.out.stride(-1) == 1 and 0 not in x.out.stride()
    lse = x.q.new_empty(_lse_shape(x.q, varlen), dtype=torch.float32)
    _attend(x, x.cu_seqlens_q, None, x.learnable_sink, x.out, lse)
    return x.out, lse, None, None, None


def _backward_4(x, _):
    varlen = x.cu_seqlens_q is not None
    assert x.lse.shape == _lse_shape(x.q, varlen) and x.lse.dtype == torch.float32
    assert x.dlse is None or (x.dlse.shape == x.lse.shape and x.dlse.dtype == torch.float32)
    assert x.out.shape == x.dout.shape == (*x.q.shape[:-1], x.v.shape[-1]) and x.learnable_sink is None
    assert x.q.dtype == x.k.dtype == x.v.dtype == x.out.dtype == x.dout.dtype
    if x.q.shape[-1] != x.v.shape[-1]:
        assert x.q.shape[-2] == x.k.shape[-2] and x.q.shape[-1] % 64 == x.v.shape[-1] % 64 == 0
    assert type(x.deterministic) is bool
    grads = _differentiate(x, x.cu_seqlens_q, None, x.dlse)
    return tuple(torch.empty_like(like).copy_(t) for like, t in zip((x.q, x.k, x.v), grads, strict=True))


def _lse_shape(q, varlen):
    return (q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1])


def _sequences(cu_seqlens, *tensors):
    """The slices of each sequence: ``(M, H, D)``, or ``(H, M)`` of an lse."""
    if cu_seqlens is None:
        yield from zip(*tensors, strict=True)
        return
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        yield tuple(t[:, a:b] if t.dim() == 2 else t[a:b] for t in tensors)


def _scores(x, q, k, unlimited):
    """Capped, masked scores ``(H, M, M)`` in float64 and the derivative of the cap.

    A window side equal to ``unlimited`` does not mask.
    """
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * x.softmax_scale
    slope = torch.ones_like(scores)
    if x.softcap:
        slope = 1 - torch.tanh(scores / x.softcap) ** 2
        scores = x.softcap * torch.tanh(scores / x.softcap)
    i = torch.arange(len(q))[:, None]
    j = torch.arange(len(q))
    left, right = x.window_size_left, 0 if x.causal else x.window_size_right
    if left != unlimited:
        scores = scores.masked_fill(j < i - left, float("-inf"))
    if right != unlimited:
        scores = scores.masked_fill(j > i + right, float("-inf"))
    return scores, slope


def _attend(x, cu_seqlens, unlimited, sink, out, lse):
    for q, k, v, o, s in _sequences(cu_seqlens, x.q, x.k, x.v, out, lse):
        scores, _ = _scores(x, q, k, unlimited)
        total = scores.logsumexp(-1)
        if sink is not None:
            total = torch.logaddexp(total, sink.double()[:, None])
        v = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        o.copy_(torch.einsum("hij,jhd->ihd", (scores - total[..., None]).exp(), v))
        s.copy_(total)


def _differentiate(x, cu_seqlens, unlimited, dlse):
    lse = x.lse if hasattr(x, "lse") else x.softmax_lse
    dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float64) for t in (x.q, x.k, x.v))
    given = torch.zeros_like(lse) if dlse is None else dlse
    pieces = _sequences(cu_seqlens, x.q, x.k, x.v, x.out, x.dout, dq, dk, dv, lse, given)
    for q, k, v, out, dout, dq_n, dk_n, dv_n, total, dtotal in pieces:
        G = q.shape[1] // k.shape[1]
        scores, slope = _scores(x, q, k, unlimited)
        p = (scores - total.double()[..., None]).exp()
        delta = (dout.double() * out.double()).sum(-1).T - dtotal
        dp = torch.einsum("ihd,jhd->hij", dout.double(), v.double().repeat_interleave(G, dim=1))
        ds = p * (dp - delta[..., None]) * slope * x.softmax_scale
        dq_n += torch.einsum("hij,jhd->ihd", ds, k.double().repeat_interleave(G, dim=1))
        dk_n += torch.einsum("hij,ihd->jhd", ds, q.double()).unflatten(1, (-1, G)).sum(2)
        dv_n += torch.einsum("hij,ihd->jhd", p, dout.double()).unflatten(1, (-1, G)).sum(2)
    return dq, dk, dv
