"""Checks on a few tokens that a model gives packed texts the same results as each text alone.

Layers other than attention, such as convolutions and recurrent states, may carry information across packed texts.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from molsaki.batches.shared_prefix import SharedPrefix
from molsaki.modeling.decoder import decoder_configs, using_molsaki
from molsaki.modeling.unwrap import causal_model, input_device

_found: weakref.WeakKeyDictionary[nn.Module, dict[bool, bool]] = weakref.WeakKeyDictionary()


def can_pack(model: nn.Module, positions: bool = True) -> bool:
    """True if the model keeps packed texts separate. Checked once per model, on two short texts.

    Args:
        positions: whether the packed forward gets position_ids that start again in each text.

    Raises:
        ValueError: the model is sharded by FSDP and was not checked before.
    """
    inner = causal_model(model)
    decoder = inner.base_model
    found = _found.setdefault(decoder, {})
    if positions not in found:
        if _is_sharded(model):
            raise ValueError("model: expected can_pack(model) to be called before FSDP shards the model")
        # Llama 4 scales queries by their position in the sequence from the 8,192nd token on, which the probe cannot
        # reach.
        scales_positions = getattr(inner.config.get_text_config(), "attn_temperature_tuning", False)
        texts = [[0, 1, 2, 1, 0], [1, 2, 0, 0, 2, 1]]
        found[positions] = not scales_positions and _runs_alike(inner, texts, [0, 0], None, positions)
    return found[positions]


def _is_sharded(model: nn.Module) -> bool:
    if not torch.distributed.is_available():  # some builds of PyTorch have no torch.distributed.fsdp
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


def choose_packing(wanted: bool | None, model: nn.Module) -> bool:
    """Whether to pack the texts of ``model``: as the flag ``--packing`` says, by default if the model supports it."""
    packing = wanted is not False and can_pack(model)
    if wanted and not packing:
        raise ValueError(
            f"--packing: {type(model).__name__} does not keep packed texts separate (it may use convolutions or "
            "a recurrent state); use --packing false"
        )
    return packing


def can_share_prefix(model: nn.Module) -> bool:
    """True if the model gives a suffix the same results as in its whole text. Checked on two pairs of short texts."""
    shared = SharedPrefix.from_lengths(*(torch.tensor(lengths) for lengths in ([3, 2], [2, 1], [1, 2])))
    return _runs_alike(model, [[0, 1, 2], [1, 0], [0, 1, 1], [1, 2, 2]], [0, 0, 2, 1], shared)


@torch.no_grad()
def _runs_alike(
    model: nn.Module,
    texts: list[list[int]],
    prefixes: list[int],
    shared: SharedPrefix | None,
    positions: bool = True,
) -> bool:
    """Compare the decoder's output for texts, each from its prefix on, packed and alone."""
    causal = causal_model(model)
    was_training, device = causal.training, input_device(causal)
    pairs = list(zip(texts, prefixes, strict=True))
    input_ids = torch.tensor([[token for text, prefix in pairs for token in text[prefix:]]], device=device)
    position = torch.tensor([[at for text, prefix in pairs for at in range(prefix, len(text))]], device=device)
    bounds = torch.tensor([0, *(len(text) - prefix for text, prefix in pairs)], device=device).cumsum(0).int()
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs |= {"position_ids": position, "cu_seq_lens_q": bounds, "use_cache": False}
    if not positions:
        del inputs["position_ids"]
    if shared is not None:
        inputs["shared_prefix"] = shared.to(device)
    causal.eval()  # type: ignore[no-untyped-call]
    try:
        with using_molsaki(decoder_configs(causal)):
            run = causal.base_model.forward  # not __call__, which would run the hooks of a capture block
            alone = [run(input_ids=torch.tensor([text], device=device), use_cache=False)[0] for text in texts]
            expected = torch.cat([out[:, prefix:] for out, prefix in zip(alone, prefixes, strict=True)], 1).float()
            found: Tensor = run(**inputs)[0].float()
    except (TypeError, ValueError):
        return False  # the model accepts none of these keywords, or its attention is refused
    finally:
        causal.train(was_training)
    allowed = 1e-3 if causal.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((found - expected).norm() <= allowed * expected.norm())
