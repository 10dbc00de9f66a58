"""Batched decoding gives the replies of one at a time."""

from __future__ import annotations

import pytest
import torch

from molsaki.evaluation.generate import decode
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401


def test_replies_and_stop_string():
    """tiny's Llama through batched decoding: replies are those of one at a time, cut at the stop string."""
    model, tok = tiny.model(2), tiny.tokenizer()
    prompts = [tok(text).input_ids for text in ("Question: How many?\nRationale:", "Hm\nRationale:", "x")]
    whole, _ = decode(model, tok, prompts, 24)
    for prompt, reply in zip(prompts, whole, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 24 and ids[-1] != tok.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert reply == (tok.decode(ids[len(prompt) :], skip_special_tokens=True), ids[-1] == tok.eos_token_id)
    stop = next(c for reply in whole for c in reply.text[4:] if "!" <= c <= "~")
    stopped, tokens = decode(model, tok, prompts, 24, stop=stop)
    for a, b in zip(stopped, whole, strict=True):
        assert a.text == b.text.partition(stop)[0]
        assert a.ended == (b.ended or stop in b.text)


def test_sampled_replies():
    """The same for a seed, whatever was sampled before, and others for another seed."""
    model, tok = tiny.model(1), tiny.tokenizer()
    prompts = [[5, 6, 7], [8, 9]]
    first, _ = decode(model, tok, prompts, 8, temperature=1.0, seed=3)
    state = torch.get_rng_state()
    torch.rand(5)
    assert decode(model, tok, prompts, 8, temperature=1.0, seed=3)[0] == first
    assert decode(model, tok, prompts, 8, temperature=1.0, seed=4)[0] != first
    torch.set_rng_state(state)
    a = torch.rand(3)
    torch.set_rng_state(state)
    decode(model, tok, prompts, 8, temperature=1.0, seed=3)
    assert torch.equal(torch.rand(3), a)  # the caller's generator is left alone


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(2, 200))},
     {"min_new_tokens": 20}, {"bad_words_ids": [[9]]}, {"do_sample": True, "temperature": 5.0}, {"num_beams": 3}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_greedy_is_greedy(options):
    """Whatever the model's own generation config says, which stays as it is."""
    model, tok = tiny.model(2), tiny.tokenizer()
    prompts = [[5, 6, 7], [8, 9]]
    expected, _ = decode(model, tok, prompts, 16)
    before = decode(model, tok, prompts, 16, temperature=0.7, seed=1)
    model.generation_config.update(**options)
    assert decode(model, tok, prompts, 16)[0] == expected
    assert decode(model, tok, prompts, 16, temperature=0.7, seed=1) == before  # sampled at that temperature alone
    assert all(getattr(model.generation_config, name) == value for name, value in options.items())
