"""Replaces PyTorch's CUDA attention operators where there is no GPU: the same parameters and conventions, on a CPU.

The backwards read O and lse as the real ones do, so that their results show whether both were given correctly. cuDNN's
stand-in keeps the strides of a plan's first call and refuses others, because the real plan computes with the old ones.
"""

from __future__ import annotations

import types

import torch

from molsaki_kernels import reference


class Operators:
    """What ``torch.ops.aten`` has of CUDA attention; ``calls`` lists the operators called."""

    def __init__(self):
        self.calls: list[str] = []
        self.plans: dict[tuple, tuple] = {}

    def namespace(self) -> types.SimpleNamespace:
        names = [name for name in dir(self) if name.startswith("_flash") or name.startswith("_scaled")]
        return types.SimpleNamespace(**{name: getattr(self, name) for name in names})

    def _flash_attention_forward(
        self, q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left=None,
        window_size_right=None,
    ):  # fmt: skip
        self.calls.append("flash forward")
        assert dropout == 0 and debug is False and max_q == max_k
        assert window_size_left is None or (causal and window_size_right == 0)
        window = None if window_size_left is None else window_size_left + 1
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        q, k, v = (_heads_first(t, cum_q) for t in (q, k, v))
        out, lse = _attend(q, k, v, dict(scale=scale, causal=causal, window=window), cum_q)
        return (*_as_flash(cum_q, out), lse if cum_q is None else lse[0], None, None, None)

    def _flash_attention_backward(
        self, dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, state, unused, *, scale,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        self.calls.append("flash backward")
        window = None if window_size_left is None else window_size_left + 1
        assert all(t.stride(-1) == 1 for t in (dout, q, k, v, out))
        dout, q, k, v, out = (_heads_first(t, cum_q) for t in (dout, q, k, v, out))
        lse = lse if cum_q is None else lse[None]
        options = dict(scale=scale, causal=causal, window=window)
        return _as_flash(cum_q, *_differentiate(dout, q, k, v, out, lse, options, cum_q))

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
        self.calls.append("cudnn forward")
        assert bias is None and with_lse is True and dropout == 0 and debug is False
        self._plan("forward", q, k, v)
        out, lse = _attend(q, k, v, dict(scale=scale, causal=causal))
        return torch.empty_like(q).copy_(out), lse[..., None], None, None, None, None, None, None, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, dout, q, k, v, out, lse, state, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale
    ):
        self.calls.append("cudnn backward")
        B, H, M, _ = q.shape
        assert lse.shape == (B, H, M, 1) and lse.stride() == (H * M, M, 1, 1)
        assert bias is None and cum_q is None and cum_k is None and max_q == max_k == M and dropout == 0
        self._plan("backward", q, k, v, out, dout)
        return _differentiate(dout, q, k, v, out, lse[..., 0], dict(scale=scale, causal=causal))

    def _plan(self, name, q, k, v, *others):
        assert all(t.stride(-1) == 1 for t in (q, k, v, *others))
        key = (name, *((t.shape, t.stride()) for t in (q, k, v)))
        strides = tuple(t.stride() for t in others)
        assert self.plans.setdefault(key, strides) == strides, "the plan was built for other strides"


def _heads_first(x, cum):
    return x.transpose(1, 2) if cum is None else x.transpose(0, 1)[None]


def _as_flash(cum, *tensors):
    return tuple(x.transpose(1, 2) if cum is None else x[0].transpose(0, 1) for x in tensors)


def _sequences(M, cu):
    bounds = [0, M] if cu is None else cu.tolist()
    return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if a < b]


def _attend(q, k, v, options, cu=None):
    outs, lses = [], []
    for rows in _sequences(q.shape[2], cu):
        weights, lse = reference.attention_weights(q[:, :, rows].double(), k[:, :, rows].double(), **options)
        outs.append(weights @ v[:, :, rows].double().repeat_interleave(q.shape[1] // v.shape[1], 1))
        lses.append(lse)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2).float()


def _differentiate(dout, q, k, v, out, lse, options, cu=None):
    """dq, dk and dv of a flash backward: D comes from O, the weights from lse."""
    grads, groups = [torch.empty_like(t) for t in (q, k, v)], q.shape[1] // k.shape[1]
    for rows in _sequences(q.shape[2], cu):
        q_n, k_n, v_n, do, o, total = (t[:, :, rows].double() for t in (q, k, v, dout, out, lse))
        visible = reference.attention_weights(q_n, k_n, **options)[0] > 0
        k_all, v_all = (t.repeat_interleave(groups, 1) for t in (k_n, v_n))
        p = (q_n @ k_all.mT * options["scale"] - total[..., None]).exp() * visible
        ds = p * (do @ v_all.mT - (do * o).sum(-1, keepdim=True)) * options["scale"]
        dk, dv = (t.unflatten(1, (-1, groups)).sum(2) for t in (ds.mT @ q_n, p.mT @ do))
        for grad, value in zip(grads, (ds @ k_all, dk, dv), strict=True):
            grad[:, :, rows] = value.to(grad.dtype)
    return tuple(grads)
