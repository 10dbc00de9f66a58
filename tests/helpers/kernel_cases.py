"""Shared by the kernel tests: a case, its inputs and plan, the float64 oracle, and the comparison with the budget."""

from __future__ import annotations

import dataclasses
import random

import torch

from molsaki_kernels import StepPlan, reference
from molsaki_kernels._triton.attention_backward import attention_backward
from molsaki_kernels._triton.attention_forward import attention_forward
from molsaki_kernels._triton.map_backward import map_backward
from molsaki_kernels._triton.map_forward import map_forward
from molsaki_kernels.spec import AttentionInputs, AttentionOptions, MapInputs, OutputGradients, PlanTensors
from tests.helpers.budget import assert_within_budget, assert_zero, error, record

SEED = 7


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    M: int = 63
    D: int = 32
    B: int = 1
    Hq: int = 2
    Hkv: int = 1
    dtype: torch.dtype = torch.float32
    plan: str = "mixed"
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    lengths: tuple[int, ...] | None = None  # packed
    per_head: bool = False
    layout: str = "contiguous"
    device: str = "cpu"
    value_dim: int | None = None  # D where it is None

    def options(self) -> AttentionOptions:
        scale = self.D**-0.5 if self.scale is None else self.scale
        return AttentionOptions(self.causal, scale, self.window, self.softcap, self.per_head)

    def score_keywords(self) -> dict:
        """The options of the attention weights, as keywords of the oracle."""
        return {"causal": self.causal, "scale": self.scale, "window": self.window, "softcap": self.softcap}

    def keywords(self) -> dict:
        """The options of ``stepwise_attention`` and ``stepwise_map``."""
        return {**self.score_keywords(), "head_reduction": "none" if self.per_head else "mean"}


@dataclasses.dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    plan: StepPlan
    dout: torch.Tensor
    dmaps: torch.Tensor
    dlse: torch.Tensor

    def attention_inputs(self) -> AttentionInputs:
        return AttentionInputs(self.q, self.k, self.v, self.sinks, self.cu_seqlens)

    def map_inputs(self, lse: torch.Tensor) -> MapInputs:
        return MapInputs(self.q, self.k, lse, self.cu_seqlens)

    def plan_tensors(self) -> PlanTensors:
        return PlanTensors(self.plan.steps, self.plan.tokens, self.plan.word_of_token, self.plan.num_words)


def spans(length: int, kind: str, rng: random.Random) -> tuple[list, list]:
    """Steps and words of one sequence."""
    tokens = list(range(length))
    if kind == "whole":  # every row in one step, every token a word
        return [(0, length)], [[t] for t in tokens]
    if kind == "rows":  # every row a step
        return [(t, t + 1) for t in tokens], [[0], tokens[-2:-1]] if length > 2 else [[0]]
    if kind == "dense":  # more steps and key tokens than a kernel takes at once
        return [(t, t + 1) for t in tokens], [[t] for t in tokens]
    if kind == "no_steps":
        return [], [[0]]
    if kind == "no_words":
        return [(0, length)], []
    if kind == "middle":  # tiles without a step before and after, and rows of a step without a visible key token
        start, stop = length // 3, 2 * length // 3
        return [(start, stop)], [[start + 9], [length - 1]]
    # Gaps, a step of no row, one of one row, and one longer than a tile; words of one to three tokens in any order.
    steps, at = [], rng.randrange(min(3, length))
    for size in (min(5, length), 0, 1, length // 2, length):
        stop = min(at + size, length)
        if stop < at:
            break
        steps.append((at, stop))
        at = stop + rng.randrange(4)
    chosen = [0, *rng.sample(tokens[1:], k=min(length - 1, 3 + length // 8))]
    words = []
    while chosen:
        size = min(len(chosen), rng.randrange(1, 4))
        words.append(chosen[:size])
        chosen = chosen[size:]
    rng.shuffle(words)
    return steps, words


def random_rows(shape, layout: str, dtype, device, generator) -> torch.Tensor:
    B, H, M, D = shape
    if layout == "contiguous":
        x = torch.randn(shape, generator=generator)
    elif layout == "transposed":  # the output of a projection: (B, M, H, D)
        x = torch.randn((B, M, H, D), generator=generator).transpose(1, 2)
    else:  # a slice of a fused projection
        x = torch.randn((B, M, H, 3 * D), generator=generator)[..., D : 2 * D].transpose(1, 2)
    return x.to(device=device, dtype=dtype)


def make(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(SEED)
    rng = random.Random(SEED)
    lengths = case.lengths or (case.M,) * case.B
    B, M = (1, sum(lengths)) if case.lengths else (case.B, case.M)
    shapes = [(B, heads, M, D) for D in (case.D, case.value_dim or case.D) for heads in (case.Hq, case.Hkv)]
    order = (0, 2, 1, 3)  # q, dO, k, v
    q, dout, k, v = (random_rows(shapes[i], case.layout, case.dtype, case.device, generator) for i in order)
    sinks = torch.randn(case.Hq, generator=generator).to(case.device, case.dtype) if case.sinks else None
    chosen = [spans(length, case.plan, rng) if length else ([], []) for length in lengths]
    plan = StepPlan.from_spans([s for s, _ in chosen], [w for _, w in chosen], device=case.device)
    shape = (len(plan), *((case.Hq,) if case.per_head else ()), plan.num_steps, plan.num_words)
    dmaps = torch.randn(shape, generator=generator).to(case.device)
    dlse = torch.randn((B, case.Hq, M), generator=generator).to(case.device)
    cu_seqlens = None
    if case.lengths:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(case.device, torch.int32)
    return Inputs(q, k, v, sinks, cu_seqlens, plan, dout, dmaps, dlse)


FAR_STRIDES = {"batch": (2**31 + 64, 16, 16, 1), "rows": (16, 16, 2**27 + 64, 1)}


def far_copy(x: torch.Tensor, strides: tuple[int, ...], folder) -> torch.Tensor:
    """x in a sparse file with a flat index past 2**31: only pages that are accessed exist."""
    size = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    path = str(folder / f"{len(list(folder.iterdir()))}")
    return torch.from_file(path, shared=True, size=size, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


def sequences(cu_seqlens: torch.Tensor | None, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The batch itself, or one ``(1, H, length, ...)`` slice of each tensor per packed sequence."""
    if cu_seqlens is None:
        return [tensors]
    bounds = cu_seqlens.tolist()
    return [tuple(t[:, :, a:b] for t in tensors) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def oracle(case: Case, x: Inputs, dtype: torch.dtype, source: str) -> dict[str, torch.Tensor]:
    """The reference in ``dtype``: results, and gradients of a loss of ``source`` ("both", "map", "out" or "lse")."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (x.q, x.k, x.v))
    sinks = None if x.sinks is None else x.sinks.detach().to(dtype).requires_grad_()
    out, maps = reference.stepwise_attention(q, k, v, x.plan, sinks=sinks, cu_seqlens=x.cu_seqlens, **case.keywords())
    parts = sequences(x.cu_seqlens, q, k)
    lse = torch.cat([reference.attention_weights(a, b, sinks=sinks, **case.score_keywords())[1] for a, b in parts], -1)
    loss = out.new_zeros((), dtype=lse.dtype)
    if source in ("both", "out"):
        loss = loss + (out * x.dout.to(out.dtype)).sum()
    if source in ("both", "map"):
        loss = loss + (maps * x.dmaps.to(maps.dtype)).sum()
    if source == "lse":
        loss = loss + (lse * x.dlse.to(lse.dtype)).sum()
    leaves = {"dq": q, "dk": k, "dv": v} | ({} if sinks is None else {"dsinks": sinks})
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach(), "maps": maps.detach(), **dict(zip(leaves, grads, strict=True))}


def kernels(case: Case, x: Inputs, source: str) -> dict[str, torch.Tensor]:
    """The same results from the fused kernels."""
    inputs, options, plan = x.attention_inputs(), case.options(), x.plan_tensors()
    outputs = attention_forward(inputs, options, plan)
    upstream = OutputGradients(
        dout=x.dout if source in ("both", "out") else None,
        dlse=x.dlse if source == "lse" else None,
        dmaps=x.dmaps if source in ("both", "map") else None,
    )
    grads = attention_backward(upstream, inputs, outputs, options, plan)
    found = {**vars(outputs), **vars(grads)}
    return {key: value for key, value in found.items() if value is not None}


def map_oracle(case: Case, x: Inputs, lse: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The map alone, from q, k and lse, and its gradients."""
    q, k = (t.detach().to(dtype).requires_grad_() for t in (x.q, x.k))
    lse = lse.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    maps = reference.stepwise_map(q, k, lse, x.plan, cu_seqlens=x.cu_seqlens, **case.keywords())
    loss = (maps * x.dmaps.to(maps.dtype)).sum()
    dq, dk, dlse = torch.autograd.grad(loss, (q, k, lse), allow_unused=True, materialize_grads=True)
    return {"maps": maps.detach(), "dq": dq, "dk": dk, "dlse": dlse}


def map_kernels(case: Case, x: Inputs, lse: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same results from the kernels of the map alone."""
    inputs, options, plan = x.map_inputs(lse), case.options(), x.plan_tensors()
    maps = map_forward(inputs, options, plan)
    dq, dk, dlse = map_backward(x.dmaps, inputs, options, plan)
    return {"maps": maps, "dq": dq, "dk": dk, "dlse": dlse}


def check(name: str, found: dict, exact: dict, eager: dict) -> None:
    """Assert that every result is within its budget; one that is exactly zero everywhere has a budget of its own."""
    assert found.keys() == exact.keys()
    for key, right in exact.items():
        if right.any():
            assert_within_budget(f"{name}: {key}", found[key], right, eager[key])
        else:
            assert_zero(f"{name}: {key}", found[key], right)


def check_widened(name: str, found: dict, exact: dict, eager: dict) -> None:
    """Like ``check``; in half precision the map's masses were rounded as the output is, at most eps / 4."""
    dtype = found["out"].dtype
    if dtype != torch.float32:
        allowed = 2 * error(eager["maps"], exact["maps"]) + torch.finfo(dtype).eps / 4
        got = error(found["maps"], exact["maps"])
        record(f"{name}: maps", dtype, got, allowed)
        assert found["maps"].isfinite().all() and got <= allowed, f"{name}: maps {got:.2e}, {allowed:.2e}"
        found, exact, eager = ({k: v for k, v in x.items() if k != "maps"} for x in (found, exact, eager))
    check(name, found, exact, eager)


def check_fused(case: Case, source: str = "both") -> None:
    x = make(case)
    exact = oracle(case, x, torch.float64, source)
    eager = oracle(case, x, case.dtype, source)
    check(f"{case.name}/{source}", kernels(case, x, source), exact, eager)


def check_map(case: Case) -> None:
    x = make(case)
    lse = oracle(case, x, torch.float64, "out")["lse"].float()
    exact = map_oracle(case, x, lse, torch.float64)
    check(f"{case.name}/alone", map_kernels(case, x, lse), exact, map_oracle(case, x, lse, case.dtype))
