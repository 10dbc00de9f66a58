"""One forward of a causal language model over a task's texts: what its decoder gives, and the loss of its labels.

A task is a dict of tensors as :class:`molsaki.data.Collator` makes it: texts padded to one length, or packed one after
the other into one row. Only positions that predict a label are projected to the vocabulary, and of those not more at a
time than `LOGITS_AT_ONCE` allows.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from molsaki.batches.shared_prefix import Branches
from molsaki.modeling.hooks import NAME

# Numbers, 128 MiB in float32: more come in chunks, computed again in the backward. Half of it is slower and, since the
# weight's gradients of two chunks are added, takes no less memory (618 labels, 49,152 tokens, width 576).
LOGITS_AT_ONCE = 1 << 25
LIGER = "0.8.5"  # earlier ones give every label the gradient of the first


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a wrapper such as PEFT's."""
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its input; weights that a ``device_map`` left elsewhere are brought there when they run."""
    first = next(m for m in model.modules() if next(m.parameters(recurse=False), None) is not None)
    hook = getattr(first, "_hf_hook", None)
    return next(first.parameters(recurse=False)).device if hook is None else torch.device(hook.execution_device)


def model_inputs(task: dict) -> dict:
    """The keywords of a model's or decoder's forward."""
    names = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "branches")
    return {name: task[name] for name in names if name in task} | {"use_cache": False}


def label_logits(model: nn.Module, task: dict) -> Tensor:
    """Logits ``(n, V)`` of the model's own forward, a row for each label of the task."""
    index, width = task["index"], task["input_ids"].shape[1]
    columns = torch.unique(index % width)
    logits = model(**model_inputs(task), logits_to_keep=columns).logits
    return logits[index // width, torch.searchsorted(columns, index % width)]


@dataclasses.dataclass(frozen=True)
class Head:
    """What a causal language model makes of its decoder's output: ``softcap * tanh(x / softcap)`` (Gemma 2) with
    ``x = lm_head(hidden) * scale`` (Cohere) or ``/ divisor`` (Granite)."""

    scale: float | None = None
    divisor: float | None = None
    softcap: float | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> Head | None:
        """The head of a model, or None where its logits are something else: tried on two tokens."""
        causal = causal_model(model)
        decoder, config = causal.base_model, causal.config.get_text_config()
        if decoder is causal or causal.get_output_embeddings() is None:
            return None
        names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        head = cls(*(getattr(config, name, None) for name in names))
        seen = []
        handle = decoder.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        was_training = causal.training
        try:
            ids = torch.tensor([[0, 1]], device=causal.device)
            expected = causal.eval()(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
            causal.train(was_training)
        found = head.logits(model, seen[0])
        return head if found.shape == expected.shape and torch.equal(found, expected) else None

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """``(..., V)`` of the decoder's output ``(..., d)``."""
        x = causal_model(model).get_output_embeddings()(hidden)
        if self.scale is not None:
            x = x * self.scale
        if self.divisor is not None:
            x = x / self.divisor
        return x if self.softcap is None else torch.tanh(x / self.softcap) * self.softcap

    def cross_entropy(self, model: nn.Module, hidden: Tensor, labels: Tensor, fused: bool = False) -> Tensor:
        """Cross-entropy in nats of each label, ``(n,)`` float32, from the decoder's output there, ``(n, d)``.

        Args:
            fused: by liger-kernel, where the head is a plain linear layer that this process holds whole.
        """
        head = causal_model(model).get_output_embeddings()
        if fused and type(head) is nn.Linear and not isinstance(head.weight, DTensor) and head.weight.numel():
            return self._fused(head, hidden, labels)

        # The last operation saves none of its result (a plain linear layer, or a product with a number) and nobody else
        # has it. Elsewhere the logits are copied.
        unshared = self != Head() or (type(head) is nn.Linear and not head._forward_hooks)

        def part(hidden: Tensor, labels: Tensor) -> Tensor:
            logits = self.logits(model, hidden)
            rows = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if type(rows) is not Tensor or torch.compiler.is_compiling():
                return F.cross_entropy(rows, labels, reduction="none")
            return _CrossEntropy.apply(rows if unshared or rows is not logits else rows.clone(), labels)

        most = max(LOGITS_AT_ONCE // causal_model(model).config.get_text_config().vocab_size, 1)
        count = max(-(-len(labels) // most), 1)
        *first, last = zip(hidden.tensor_split(count), labels.tensor_split(count), strict=True)
        done = [checkpoint(part, *rows, use_reentrant=False, preserve_rng_state=False) for rows in first]
        return torch.cat([*done, part(*last)])

    def _fused(self, head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        scale = (self.scale or 1.0) / (self.divisor or 1.0)
        bias = None if head.bias is None else (head.bias * scale).to(hidden.dtype)
        return liger_fused_linear_cross_entropy(
            hidden * scale, head.weight.to(hidden.dtype), labels, bias, reduction="none", softcap=self.softcap
        ).float()


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy ``(n,)`` of the rows of logits ``x (n, V)``, float32 or float64, in no other memory of their size:
    there the forward leaves ``exp(x - max x)``, which the backward turns into the gradient. Whatever else has ``x``
    reads these, and what saved it for a backward is told so by its version."""

    @staticmethod
    def forward(ctx, x: Tensor, labels: Tensor) -> Tensor:
        x = x.detach()  # the same memory and version
        label_logits = x.gather(1, labels[:, None])
        largest = x.amax(1, keepdim=True)
        total = x.sub_(largest).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(x, labels, total)
        ctx.spent = False
        return (total.log() + (largest - label_logits)).squeeze(1)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        """``(softmax(x) - one_hot(labels)) upstream``"""
        if torch.is_grad_enabled():  # once_differentiable lets an upstream without a gradient pass
            raise RuntimeError("cross-entropy: create_graph=True is refused: it has no second derivative here")
        if ctx.spent:  # hooks on saved tensors keep autograd from seeing it
            raise RuntimeError(
                "cross-entropy: a second backward through the same graph; the first has made the gradient in the "
                "memory of the logits, so run the forward again"
            )
        ctx.spent = True
        x, labels, total = ctx.saved_tensors
        x.mul_(upstream[:, None] / total)
        x[torch.arange(len(x), device=x.device), labels] -= upstream
        return x, None


def use_fused(choice: str, device: torch.device) -> bool:
    """Whether the cross-entropy is liger-kernel's: "auto" takes it where it is installed and the device is CUDA.

    Raises:
        ValueError: "liger" was asked for and cannot be had.
    """
    if choice == "torch":
        return False
    reason = None
    if importlib.util.find_spec("liger_kernel") is None:
        reason = "liger-kernel is not installed (pip install molsaki-kernels[fused])"
    elif _version(importlib.metadata.version("liger-kernel")) < _version(LIGER):
        reason = f"liger-kernel {LIGER} or later is needed, this is {importlib.metadata.version('liger-kernel')}"
    elif device.type != "cuda":
        reason = f"its kernels need a CUDA device, this is {device.type}"
    if choice == "liger" and reason:
        raise ValueError(f"fused_cross_entropy: liger cannot be used: {reason}")
    return reason is None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def can_pack(model: nn.Module) -> bool:
    """Whether texts that share a row leave one another alone in this model: tried on two short ones.

    Layers other than attention, such as convolutions and recurrent states, may run on from one text into the next.
    """
    return _runs_alike(model, [[0, 1], [1, 2, 0]], [0, 0], None)


def can_branch(model: nn.Module) -> bool:
    """Whether a text that begins as another of its row does can be its tail alone: tried on two pairs of short ones.

    Where tokens reach one another other than by attention, a tail misses what its text began with.
    """
    branches = Branches.of(*(torch.tensor(lengths) for lengths in ([3, 2], [2, 1], [1, 2])))
    return _runs_alike(model, [[0, 1, 2], [1, 0], [0, 1, 1], [1, 2, 2]], [0, 0, 2, 1], branches)


@torch.no_grad()
def _runs_alike(model: nn.Module, texts: list[list[int]], prefixes: list[int], branches: Branches | None) -> bool:
    """Whether the decoder gives texts, each from its prefix on, in one row what it gives each alone."""
    causal = causal_model(model)
    previous, was_training, device = causal.config._attn_implementation, causal.training, input_device(causal)
    tails = [text[prefix:] for text, prefix in zip(texts, prefixes, strict=True)]
    row = torch.tensor([sum(tails, [])], device=device)
    position = torch.tensor([sum((list(range(p, len(t))) for t, p in zip(texts, prefixes, strict=True)), [])])
    bounds = torch.tensor([0, *map(len, tails)], device=device).cumsum(0).int()
    inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), "position_ids": position.to(device)}
    inputs |= {"cu_seq_lens_q": bounds} | ({} if branches is None else {"branches": branches.to(device)})
    causal.set_attn_implementation(NAME)
    causal.eval()
    try:
        alone = [causal.base_model(input_ids=torch.tensor([text], device=device), use_cache=False)[0] for text in texts]
        expected = torch.cat([out[:, prefix:] for out, prefix in zip(alone, prefixes, strict=True)], 1).float()
        found = causal.base_model(**model_inputs(inputs))[0].float()
    except TypeError:
        return False  # the model takes none of these keywords
    finally:
        causal.train(was_training)
        causal.set_attn_implementation(previous)
    allowed = 1e-3 if causal.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((found - expected).norm() <= allowed * expected.norm())
