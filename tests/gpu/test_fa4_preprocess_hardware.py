"""The replacement of flash-attn 4's preprocess on a Hopper GPU, against the oracle and the path without it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from molsaki_kernels import stepwise_attention
from molsaki_kernels.attention import flash_attn
from tests.helpers.kernel_cases import Case, Inputs, check, make, oracle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    Case("default", M=1000, B=2, Hq=4, Hkv=2, D=64, dtype=BF16),
    Case("wide", M=511, Hq=8, Hkv=2, D=128, dtype=BF16),
    Case("mha", M=300, Hq=4, Hkv=4, D=128, dtype=FP16),
    Case("one_group", M=511, D=96, dtype=BF16),
    Case("full", M=511, D=64, causal=False, dtype=BF16),
    Case("window", M=1000, D=128, window=200, dtype=BF16),
    Case("full_window", M=511, D=128, causal=False, window=65, dtype=BF16),
    Case("packed", D=64, lengths=(300, 0, 1, 700, 63), dtype=BF16),
    Case("packed_wide", D=128, lengths=(130, 500), Hq=8, Hkv=2, dtype=BF16),
    Case("heads", M=511, D=128, per_head=True, B=2, dtype=BF16),
    Case("transposed", M=511, D=128, Hq=4, Hkv=4, layout="transposed", dtype=BF16),
    Case("slice", M=511, D=128, layout="slice", dtype=BF16),
    Case("middle", M=900, D=128, plan="middle", dtype=BF16),
    *(Case(f"rows_{M}", M=M, D=128, dtype=BF16) for M in (1, 17, 64, 65, 128)),
]


def run(case: Case, x: Inputs, source: str) -> dict[str, torch.Tensor]:
    leaves = {"dq": x.q, "dk": x.k, "dv": x.v}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    out, maps = stepwise_attention(
        *leaves.values(), x.plan, cu_seqlens=x.cu_seqlens, engine="flash_attn", **case.keywords()
    )
    results, upstream = ([out, maps], [x.dout, x.dmaps]) if source == "both" else ([maps], [x.dmaps])
    grads = torch.autograd.grad(results, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "maps": maps.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.fixture
def served(monkeypatch) -> list[bool]:
    """Switches the kernel on and lists the backward passes that it served."""
    calls, backward = [], flash_attn.backward_with_map
    monkeypatch.setattr(flash_attn, "FUSE", True)
    monkeypatch.setattr(flash_attn, "backward_with_map", lambda *call: calls.append(True) or backward(*call))
    return calls


@pytest.mark.parametrize("source", ["both", "map"])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_against_the_oracle(served, monkeypatch, case, source):
    case = dataclasses.replace(case, device="cuda")
    x = make(case)
    x.dout[..., ::3, :] = 0  # as in rows whose label is masked
    reason = flash_attn.why_not_fused(x.attention_inputs(), case.options(), x.plan_tensors())
    if reason is not None:
        pytest.skip(reason)
    exact, eager = (oracle(case, x, dtype, source) for dtype in (torch.float64, case.dtype))
    exact, eager = ({name: t for name, t in found.items() if name != "lse"} for found in (exact, eager))
    found = run(case, x, source)
    assert served == [True]
    check(f"fa4 preprocess {case.name} {source}", found, exact, eager)
    monkeypatch.setattr(flash_attn, "FUSE", False)
    check(f"fa4 public {case.name} {source}", run(case, x, source), exact, eager)
    assert served == [True]


def test_deterministic_results_are_bitwise_reproducible(served):
    case = Case("repeat", M=2048, Hq=8, Hkv=2, D=128, dtype=BF16, device="cuda")
    x = make(case)
    if (reason := flash_attn.why_not_fused(x.attention_inputs(), case.options(), x.plan_tensors())) is not None:
        pytest.skip(reason)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(case, x, "both")
        assert all(torch.equal(first[name], t) for _ in range(3) for name, t in run(case, x, "both").items())
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(served) == 4
