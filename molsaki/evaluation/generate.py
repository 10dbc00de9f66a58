"""Decodes in batches with ``generate``: prompts of similar length together, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from molsaki.modeling.unwrap import causal_model


class Reply(NamedTuple):
    """A model's reply to one prompt.

    Attributes:
        text: the reply up to its stop string, without special tokens.
        ended: True if it reached an end token or a stop string, False if it was cut off at the longest reply.
    """

    text: str
    ended: bool


def batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The prompts' indices in batches of similar length, the longest first."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
    *,
    stop: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[list[Reply], int]:
    """Replies to one batch of prompts, and how many tokens were decoded, padding included.

    Only the end tokens and the cache of the model's generation config are used: no penalties, no suppressed tokens.

    Args:
        model: a causal language model whose ``device`` takes the token ids.
        tokenizer: one with a padding token.
        prompts: token ids, not padded.
        new_tokens: the longest reply.
        stop: a text that ends a reply, besides the model's end tokens.
        temperature: 0 decodes greedily; above 0, tokens are sampled, reproducibly for the same batch, seed and machine.
    """
    ids = [torch.tensor(prompt) for prompt in prompts]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in ids], batch_first=True, padding_side="left")
    options: dict[str, Any] = dict(max_new_tokens=new_tokens, num_beams=1, pad_token_id=tokenizer.pad_token_id)
    if temperature > 0:
        options |= dict(do_sample=True, temperature=temperature, top_p=1.0, top_k=0)
    else:
        options |= dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    own = causal_model(model).generation_config
    ends = own.eos_token_id
    bare = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=ends, use_cache=own.use_cache, cache_implementation=own.cache_implementation
    )
    if stop is not None:
        options |= dict(stop_strings=[stop], tokenizer=tokenizer)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=temperature > 0):
        if temperature > 0:
            torch.manual_seed(seed)
        inputs = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}
        causal_model(model).generation_config = bare  # a config passed to generate would be completed from the model's
        try:
            out: Tensor = cast(Any, model).generate(**inputs, **options)[:, input_ids.shape[1] :]
        finally:
            causal_model(model).generation_config = own
    ends = set(ends) if isinstance(ends, list) else {ends}
    replies = []
    for tokens in out.tolist():
        text = cast(str, tokenizer.decode(tokens, skip_special_tokens=True))
        ended = not ends.isdisjoint(tokens)
        if stop is not None and stop in text:
            text, ended = text.partition(stop)[0], True
        replies.append(Reply(text, ended))
    return replies, out.numel()
