"""Logits and cross-entropy of a language model's labels: only positions that predict a label are projected.

At most `LOGITS_AT_ONCE` logits are in memory at a time. On CUDA liger-kernel's fused kernel can be used instead.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from typing import Any, cast

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from molsaki.batches.batch import TextBatch
from molsaki.modeling.unwrap import causal_model

# 128 MiB in float32. More logits are computed in chunks, and recomputed in the backward. Half the size is slower and
# saves no memory, because the weight gradients of two chunks have to be added (measured: 618 labels, 49,152 tokens,
# width 576).
LOGITS_AT_ONCE = 1 << 25
LIGER = "0.8.5"  # earlier versions give every label the gradient of the first one


def label_logits(model: nn.Module, texts: TextBatch) -> Tensor:
    """Logits ``(n, V)`` from the model's own forward, for the n labels of ``texts``."""
    width = texts.input_ids.shape[1]
    columns = torch.unique(texts.index % width)
    logits: Tensor = model(**texts.model_inputs(), logits_to_keep=columns).logits
    return logits[texts.index // width, torch.searchsorted(columns, texts.index % width)]


@dataclasses.dataclass(frozen=True)
class Head:
    """The function from a decoder's output to the logits: ``softcap * tanh(x / softcap)`` (Gemma 2) with
    ``x = lm_head(hidden) * scale`` (Cohere) or ``/ divisor`` (Granite)."""

    scale: float | None = None
    divisor: float | None = None
    softcap: float | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> Head | None:
        """The head of a model, or None if its logits are computed in another way. Checked on two tokens."""
        causal = causal_model(model)
        decoder, config = causal.base_model, causal.config.get_text_config()
        if decoder is causal or causal.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            return None
        names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        head = cls(*(getattr(config, name, None) for name in names))
        seen: list[Tensor] = []
        handle = decoder.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        was_training = causal.training
        try:
            ids = torch.tensor([[0, 1]], device=causal.device)
            causal.eval()  # type: ignore[no-untyped-call]
            expected = causal(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
            causal.train(was_training)
        found = head.logits(model, seen[0])
        return head if found.shape == expected.shape and torch.equal(found, expected) else None

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """``(..., V)`` from the decoder's output ``(..., d)``."""
        x: Tensor = _output_embeddings(model)(hidden)
        if self.scale is not None:
            x = x * self.scale
        if self.divisor is not None:
            x = x / self.divisor
        return x if self.softcap is None else torch.tanh(x / self.softcap) * self.softcap

    def cross_entropy(self, model: nn.Module, hidden: Tensor, labels: Tensor, fused: bool = False) -> Tensor:
        """Cross-entropy in nats ``(n,)`` float32 of ``labels (n,)`` from the decoder's output ``hidden (n, d)``.

        Args:
            fused: use liger-kernel, if the head is an ``nn.Linear`` that this process holds whole.
        """
        head = _output_embeddings(model)
        if fused and type(head) is nn.Linear and not isinstance(head.weight, DTensor) and head.weight.numel():
            return self._fused(head, hidden, labels)

        # The logits may be overwritten if their last operation (an ``nn.Linear`` or a product with a number) does not
        # save its result and no hook can keep them. Otherwise they are copied.
        unshared = self != Head() or (type(head) is nn.Linear and not head._forward_hooks)

        def chunk_loss(hidden: Tensor, labels: Tensor) -> Tensor:
            logits = self.logits(model, hidden)
            x = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if type(x) is not Tensor or torch.compiler.is_compiling():
                return F.cross_entropy(x, labels, reduction="none")
            x = x if unshared or x is not logits else x.clone()
            return cast(Tensor, _CrossEntropy.apply(x, labels))  # type: ignore[no-untyped-call]

        most = max(LOGITS_AT_ONCE // causal_model(model).config.get_text_config().vocab_size, 1)
        count = max(-(-len(labels) // most), 1)
        *first, last = zip(hidden.tensor_split(count), labels.tensor_split(count), strict=True)
        done = [checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in first]
        return torch.cat([*done, chunk_loss(*last)])

    def _fused(self, head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        scale = (self.scale or 1.0) / (self.divisor or 1.0)
        bias = None if head.bias is None else (head.bias * scale).to(hidden.dtype)
        losses: Tensor = liger_fused_linear_cross_entropy(
            hidden * scale, head.weight.to(hidden.dtype), labels, bias, reduction="none", softcap=self.softcap
        )
        return losses.float()


def _output_embeddings(model: nn.Module) -> nn.Module:
    return cast(nn.Module, causal_model(model).get_output_embeddings())  # type: ignore[no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy ``(n,)`` of the logits ``x (n, V)``, float32 or float64, that reuses the memory of the logits.

    The forward overwrites ``x`` with ``exp(x - max x)``, and the backward overwrites that with the gradient. Do not
    read ``x`` afterwards; an operation that has saved it for its backward raises autograd's error about in-place
    changes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor) -> Tensor:
        x = x.detach()  # the same memory and version counter
        label_logits = x.gather(1, labels[:, None])
        largest = x.amax(1, keepdim=True)
        total = x.sub_(largest).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(x, labels, total)
        ctx.spent = False
        return (total.log() + (largest - label_logits)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """``(softmax(x) - one_hot(labels)) upstream``"""
        if torch.is_grad_enabled():  # once_differentiable would allow it for an upstream without a gradient
            raise RuntimeError("cross-entropy: create_graph=True is not supported: there is no second derivative")
        if ctx.spent:  # autograd does not detect it if hooks on saved tensors are set
            raise RuntimeError(
                "cross-entropy: a second backward through the same graph; the first one has overwritten the logits "
                "with the gradient, so run the forward again"
            )
        ctx.spent = True
        x, labels, total = ctx.saved_tensors
        x.mul_(upstream[:, None] / total)
        x[torch.arange(len(x), device=x.device), labels] -= upstream
        return x, None


def use_fused(choice: str, device: torch.device) -> bool:
    """True if liger-kernel computes the cross-entropy: "auto" uses it if it is installed and the device is CUDA."""
    if choice == "torch":
        return False
    reason = None
    if importlib.util.find_spec("liger_kernel") is None:
        reason = "liger-kernel is not installed (pip install molsaki-kernels[fused])"
    elif Version(found := importlib.metadata.version("liger-kernel")) < Version(LIGER):
        reason = f"liger-kernel {LIGER} or later is needed, this is {found}"
    elif device.type != "cuda":
        reason = f"its kernels need a CUDA device, this is {device.type}"
    if choice == "liger" and reason:
        raise ValueError(f"fused_cross_entropy: liger cannot be used: {reason}")
    return reason is None
