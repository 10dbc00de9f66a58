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

from molsaki.branches import Branches
from molsaki.hooks import NAME

LOGITS_AT_ONCE = 1 << 25  # numbers, 128 MiB in float32: more come in chunks, computed again in the backward
LIGER = "0.8.5"  # earlier ones give every label the gradient of the first


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside a wrapper such as PEFT's."""
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


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

        def part(hidden: Tensor, labels: Tensor) -> Tensor:
            logits = self.logits(model, hidden)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(logits, labels, reduction="none")

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
    previous, was_training, device = causal.config._attn_implementation, causal.training, causal.device
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
