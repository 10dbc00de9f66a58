"""Context and sequence parallelism are refused."""

from __future__ import annotations

import os

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import molsaki
from tests.helpers.architectures import batch, make


def test_sequence_parallelism_is_refused(monkeypatch):
    from torch.distributed.tensor.experimental import context_parallel

    model = make("Llama", torch.float32)
    inputs, plan = batch()
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    monkeypatch.setitem(os.environ, "MASTER_PORT", "0")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        with context_parallel(mesh, buffers=[inputs["input_ids"].clone()], buffer_seq_dims=[1]):
            with molsaki.capture(model, plan), pytest.raises(ValueError, match="context parallelism of PyTorch"):
                model(**inputs)
            model.set_attn_implementation("molsaki")
            with pytest.raises(ValueError, match="context parallelism of PyTorch"):
                model(**inputs)
    finally:
        torch.distributed.destroy_process_group()
    model(**inputs)

    def ulysses() -> None: ...

    ulysses.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", ulysses)
    with pytest.raises(ValueError, match="Ulysses"):
        model(**inputs)
