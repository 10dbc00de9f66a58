"""Decodes in batches with ``generate``: prompts of like length together, padded on the left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Reply(NamedTuple):
    """What a model replied to one prompt.

    Attributes:
        text: the reply up to its stop string, without special tokens.
        ended: whether it came to its end token or a stop string, and was not cut off at the longest reply.
    """

    text: str
    ended: bool


def batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The prompts' indices in batches of like length, the longest first."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


@torch.no_grad()
def decode(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    new_tokens: int,
    stop: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> tuple[list[Reply], int]:
    """Replies to one batch of prompts, and how many tokens were decoded, padding included.

    Args:
        model: a causal language model whose ``device`` takes the token ids.
        tokenizer: one with a padding token.
        prompts: token ids, not padded.
        new_tokens: the longest reply.
        stop: a text that ends a reply, besides the model's end tokens.
        temperature: 0 decodes greedily; above, tokens are drawn, the same ones for the same batch, seed and machine.
    """
    pad, width = tokenizer.pad_token_id, max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    options: dict = dict(do_sample=False, temperature=None, top_p=None, top_k=None)
    if temperature > 0:
        options = dict(do_sample=True, temperature=temperature, top_p=1.0, top_k=0)
    if stop is not None:
        options |= dict(stop_strings=[stop], tokenizer=tokenizer)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=temperature > 0):
        if temperature > 0:
            torch.manual_seed(seed)
        out = model.generate(
            input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=new_tokens,
            num_beams=1, use_cache=True, pad_token_id=pad, **options,
        )[:, width:]  # fmt: skip
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    replies = []
    for tokens in out.tolist():
        text, ended = tokenizer.decode(tokens, skip_special_tokens=True), not ends.isdisjoint(tokens)
        if stop is not None and stop in text:
            text, ended = text.partition(stop)[0], True
        replies.append(Reply(text, ended))
    return replies, out.numel()


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name that then takes its place: a half-written one is never seen."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
