"""Whether float32 products may be TF32, by each of PyTorch's switches, and exact float32 divisions and exponentials."""

import pytest
import torch
import triton.language as tl

from molsaki_kernels._triton import tiles
from molsaki_kernels._triton.tiles import score_flags
from molsaki_kernels.spec import AttentionOptions
from tests.helpers.kernel_cases import Case, check_fused, check_map


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def set_float32_matmul_precision():
    torch.set_float32_matmul_precision("high")


def set_fp32_precision_of_everything():  # what transformers does for --tf32 true
    torch.backends.fp32_precision = "tf32"


def set_fp32_precision_of_products():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


SWITCHES = [
    allow_tf32,
    set_float32_matmul_precision,
    set_fp32_precision_of_everything,
    set_fp32_precision_of_products,
]


def precision(dtype):
    options = AttentionOptions(causal=True, scale=1.0, window=None, softcap=None, per_head=False)
    return score_flags(torch.zeros(1, 1, 1, 16, dtype=dtype), options, None)["PRECISION"]


@pytest.mark.parametrize("switch", SWITCHES)
def test_tf32_only_if_asked(switch):
    everything, products = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    assert precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "none"  # inherits that of everything
    try:
        switch()
        assert precision(torch.float32) == "tf32"
        assert precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = everything
        torch.backends.cuda.matmul.fp32_precision = products
    assert precision(torch.float32) == "ieee"


@pytest.mark.parametrize("exact", [False, True])
def test_exact_math(exact, monkeypatch):
    """Both settings of MOLSAKI_EXACT_MATH are within the budget."""
    monkeypatch.setattr(tiles, "EXACT_MATH", tl.constexpr(exact))
    for case in (
        Case(f"exact_{exact}", M=40),
        Case(f"exact_softcap_{exact}", M=33, softcap=2.0, sinks=True),
        Case(f"exact_window_{exact}", M=33, window=7, scale=0.5),
    ):
        check_map(case)
        check_fused(case)
