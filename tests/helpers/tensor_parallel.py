"""The program of each process of a tensor-parallel test: ``python tests/helpers/tensor_parallel.py FOLDER REPORT``."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from molsaki import capture
from molsaki_kernels import StepPlan


def results(model, value_heads: str, map_heads: str) -> dict:
    """Maps, values, logits and gradients of a loss of all three, for one batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    plan = StepPlan.from_spans([[(1, 9), (9, 24)], [(0, 8), (8, 17)]], [[[3], [5, 6]], [[2], [11]]])
    model.zero_grad()
    with capture(model, plan, values=True, value_heads=value_heads, map_heads=map_heads) as record:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = _whole(logits)
    weight = torch.randn(record.maps.shape, generator=generator, dtype=record.maps.dtype)
    loss = (record.maps * weight).sum() + record.values.square().mean() + logits[mask.bool()].logsumexp(-1).mean()
    loss.backward()
    gradients = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    found = {"maps": record.maps, "values": record.values, "logits": logits}
    return {name: tensor.detach() for name, tensor in found.items()} | {"gradients": gradients}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(folder: str, report: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)
    found = {heads: results(model, *heads) for heads in (("concat", "mean"), ("mean", "each"))}
    found["query_rows"] = model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
    torch.save(found, f"{report}.{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()
