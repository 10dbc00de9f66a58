"""The replacement of flash-attn 4's preprocess, interpreted: the tile order, and a whole backward around it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import math

import pytest
import torch

from molsaki_kernels._triton import fa4_preprocess as fa4
from molsaki_kernels.attention import flash_attn
from molsaki_kernels.ops import attention as attention_ops
from molsaki_kernels.spec import AttentionOutputs, OutputGradients
from tests.helpers.kernel_cases import Case, check, make, oracle

BF16, FP16 = torch.bfloat16, torch.float16
WIDTHS = (32, 64, 96, 128)
# The start of the sha256 of a tile's positions, computed from flash-attn 4.0.0b36's own layouts for every thread of the
# kernel that reads the accumulator, and the same for the kernel that adds to it.
ORDERS = {32: "f7b745d02d135f34", 64: "00c439d18fec1f2b", 96: "14b5cef2859a3a3c", 128: "18bd072f1c132e84"}


def positions(width: int) -> torch.Tensor:
    """The position of every element of a tile: ``(rows, width)`` int32."""
    found = fa4.accumulator(width, causal=True, windowed=False)
    row, column = torch.arange(found.rows)[:, None], torch.arange(width)[None, :]
    order = fa4.tile_order.fn(row, column, found.rows, width, found.warp_groups, found.row_groups)
    return order.to(torch.int32)


@pytest.mark.parametrize("width", WIDTHS)
def test_order(width):
    found = positions(width)
    assert torch.equal(found.flatten().sort().values, torch.arange(found.numel(), dtype=torch.int32))
    assert hashlib.sha256(found.contiguous().numpy().tobytes()).hexdigest().startswith(ORDERS[width])


@pytest.mark.parametrize("width", WIDTHS)
def test_order_of_the_package(monkeypatch, width):
    """The registers of some threads, and where they go, by the layouts of the installed flash-attn 4."""
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")  # no GPU is needed
    try:
        installed = importlib.metadata.version("flash-attn-4")
        interface = importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        pytest.skip(f"flash-attn-4: {error}")
    assert installed == flash_attn.FUSED_VERSION == fa4.VERSION
    cutlass, cute = importlib.import_module("cutlass"), importlib.import_module("cutlass.cute")
    tile, config = fa4.accumulator(width, True, False), interface._tile_size_bwd_sm90(width, width, True, False)
    groups = 1 if config.dQ_single_wg else config.num_wg
    assert (config.m_block_size, groups, config.AtomLayoutMdQ) == (tile.rows, tile.warp_groups, tile.row_groups)
    assert not config.dQ_swapAB and not config.dKV_swapAB
    arguments = cutlass.BFloat16, width, 90, tile.rows, 128 * groups, config.AtomLayoutMdQ, config.dQ_swapAB
    kernel, found = interface.FlashAttentionBackwardPostprocess(*arguments), {}

    def trace():  # layouts exist while a function is compiled
        kernel.tiled_mma = kernel._get_tiled_mma()
        kernel._setup_attributes()
        tiles = cute.make_identity_tensor((tile.rows, width))
        stored = cute.make_identity_tensor(kernel.sdQaccum_layout.shape)
        for thread in {0, 37, 101, 128 * groups - 1}:
            registers = kernel.tiled_mma.get_slice(thread).partition_C(tiles)
            places = kernel.s2r_tiled_copy_dQaccum.get_slice(thread).partition_S(stored)
            for i in range(cute.size(registers)):
                place, group = (int(str(x)) for x in places[i])
                element = tuple(int(str(x)) for x in registers[i])
                found[element] = place + group * (tile.rows * width // groups)

    cute.compile(cute.jit(lambda: trace()))
    assert len(found) == len({0, 37, 101, 128 * groups - 1}) * tile.rows * width // (128 * groups)
    order = positions(width)
    assert all(order[element] == place for element, place in found.items())


CASES = [
    Case("default", M=130, B=2, D=64, dtype=BF16),
    Case("columns", M=70, D=64, dtype=BF16, layout="columns"),
    Case("wide", M=70, D=128, Hq=4, Hkv=2, dtype=BF16),
    Case("one_group", M=100, D=96, dtype=BF16),
    Case("narrow", M=50, D=32, dtype=FP16, causal=False),
    Case("padded", M=70, D=56, dtype=BF16, layout="transposed"),
    Case("window", M=140, D=128, window=24, dtype=BF16, layout="slice"),
    Case("packed", D=64, lengths=(17, 0, 133, 1, 40), dtype=BF16),
    Case("heads", D=64, per_head=True, B=2, dtype=BF16),
    Case("packed_heads_window", D=128, per_head=True, lengths=(20, 90), window=12, dtype=FP16),
    Case("middle", M=300, D=128, plan="middle", dtype=BF16),
    *(Case(f"plan_{plan}", plan=plan, M=50, D=64, dtype=BF16) for plan in ("whole", "rows")),
]


class Package:
    """flash-attn 4's interface as far as the backward goes: the same arrays, the same calls, dense in float64."""

    def __init__(self, width):
        self.order = positions(width).long()
        self.rows, self.width = self.order.shape
        self.own = 0  # calls of its own preprocess
        self._bwd_preprocess = self.preprocess

    def preprocess(self, *arguments, **named):
        self.own += 1

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, softmax_scale, cu_seqlens_q, dlse, causal, **options):
        assert dlse is None
        heads, packed = q.shape[-2], cu_seqlens_q is not None
        if packed:
            N, total = cu_seqlens_q.shape[0] - 1, q.shape[0]
            padded = (total + (N + 1) * self.rows - 1) // self.rows * self.rows
            shape = (heads, padded)
        else:
            shape = (q.shape[0], heads, -(-q.shape[1] // self.rows) * self.rows)
        dpsum, lse_log2 = (torch.full(shape, math.nan) for _ in range(2))
        accum = torch.full((*shape[:-1], shape[-1] * self.width), math.nan)
        self._bwd_preprocess(
            out, dout, dpsum, lse, lse_log2, accum, cu_seqlens_q, None, dlse, None, q.shape[-1], q.shape[-1],
            self.rows, cu_total_m_blocks=None, fake_mode=False, hdim_multiple_of=32,
        )  # fmt: skip
        grads = [torch.zeros(t.shape, dtype=torch.float64) for t in (q, k, v)]
        for index, arrays, first in self.sequences(q, cu_seqlens_q):
            parts = [t[index].double().transpose(0, 1) for t in (q, k, v, dout)]
            M = parts[0].shape[1]
            rounded = -(-M // self.rows) * self.rows
            mine = [t[arrays][:, first : first + rounded] for t in (dpsum, lse_log2)]
            tiles = accum[arrays][:, first * self.width : (first + rounded) * self.width]
            start = tiles.unflatten(1, (-1, self.rows * self.width))[..., self.order].flatten(1, 2)
            assert (mine[0][:, M:] == 0).all() and (mine[1][:, M:] == math.inf).all() and (start[:, M:] == 0).all()
            assert (start[..., q.shape[-1] :] == 0).all()
            found = self.gradients(*parts, mine[0][:, :M], mine[1][:, :M], softmax_scale, causal, options)
            found[0] += softmax_scale * start[:, :M, : q.shape[-1]].double()
            for grad, value in zip(grads, found, strict=True):
                grad[index] = value.transpose(0, 1)
        return tuple(torch.empty_like(t).copy_(grad) for t, grad in zip((q, k, v), grads, strict=True))

    def sequences(self, q, cu):
        """Each sequence's rows of q, and its arrays and first row there."""
        if cu is None:
            yield from ((n, n, 0) for n in range(q.shape[0]))
            return
        bounds = cu.tolist()
        for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if a < b:
                yield slice(a, b), slice(None), (a + n * self.rows) // self.rows * self.rows

    def gradients(self, q, k, v, dout, dpsum, lse_log2, scale, causal, options):
        groups, M = q.shape[0] // k.shape[0], q.shape[1]
        k_all, v_all = (t.repeat_interleave(groups, 0) for t in (k, v))
        i, j = torch.arange(M)[:, None], torch.arange(M)
        left = options["window_size_left"]
        visible = (j <= i if causal else j >= 0) & (True if left is None else j >= i - left)
        p = torch.exp2(q @ k_all.mT * (scale * math.log2(math.e)) - lse_log2.double()[..., None]) * visible
        ds = p * (dout @ v_all.mT - dpsum.double()[..., None]) * scale
        dk, dv = (t.unflatten(0, (-1, groups)).sum(1) for t in (ds.mT @ q, p.mT @ dout))
        return [ds @ k_all, dk, dv]


@pytest.fixture
def package(monkeypatch):
    def install(width):
        found = Package(width)
        monkeypatch.setattr(flash_attn, "_interface", lambda version: found)
        monkeypatch.setattr(flash_attn, "version_of", lambda device: 4)
        monkeypatch.setattr(flash_attn, "_major", lambda device: 9)
        return found

    return install


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_backward_with_map(package, case):
    x = make(case)
    options, inputs = case.options(), x.attention_inputs()
    found = package(-(-case.D // 32) * 32)
    exact, eager = (oracle(case, x, dtype, "both") for dtype in (torch.float64, case.dtype))
    outputs = AttentionOutputs(exact["out"].to(case.dtype), exact["lse"].float())
    gradients = OutputGradients(x.dout, None, x.dmaps)
    grads = flash_attn.backward_with_map(gradients, inputs, outputs, options, x.plan_tensors())
    names = ("dq", "dk", "dv")
    assert found.own == 0
    check(
        f"fa4 {case.name}", {n: getattr(grads, n) for n in names}, *({n: e[n] for n in names} for e in (exact, eager))
    )


def test_through_the_operators(package, monkeypatch):
    """With the switch on, the public function's backward goes there, also where only the map has a gradient."""
    case = Case("default", M=70, D=64, dtype=BF16)
    x = make(case)
    package(64)
    exact = oracle(case, x, torch.float64, "both")
    outputs = AttentionOutputs(exact["out"].to(BF16), exact["lse"].float())
    call = x.attention_inputs(), outputs, case.options(), x.plan_tensors(), "flash_attn", "triton"
    served = []
    monkeypatch.setattr(flash_attn, "why_not_fused", lambda *arguments: served.append(1))
    for source, dout in (("both", x.dout), ("map", None)):
        grads = attention_ops._attention_gradients(OutputGradients(dout, None, x.dmaps), *call)
        found = {name: getattr(grads, name) for name in ("dq", "dk", "dv")}
        exact, eager = (oracle(case, x, dtype, source) for dtype in (torch.float64, BF16))
        check(f"fa4 {source}", found, *({name: e[name] for name in found} for e in (exact, eager)))
    assert len(served) == 2


def test_given_gradient_of_lse_is_subtracted(package):
    case = CASES[0]
    x = make(case)
    found = package(64)
    exact = oracle(case, x, torch.float64, "out")
    outputs = AttentionOutputs(exact["out"].to(case.dtype), exact["lse"].float())
    call = x.attention_inputs(), outputs, case.options(), x.plan_tensors()
    with_dlse = flash_attn.backward_with_map(OutputGradients(x.dout, x.dlse, x.dmaps), *call)
    without = flash_attn.backward_with_map(OutputGradients(x.dout, None, x.dmaps), *call)
    expected = oracle(case, x, torch.float64, "lse")["dq"]
    torch.testing.assert_close((with_dlse.dq - without.dq).double(), expected, rtol=0.05, atol=0.05)
    flash_attn._interface(4)._bwd_preprocess(1, 2, 3)  # outside of such a call the package's own is called
    assert found.own == 1


def test_an_unexpected_accumulator_is_refused(package):
    x = make(CASES[0])
    package(32)  # tiles of another width
    outputs = AttentionOutputs(x.dout, x.dlse)
    gradients = OutputGradients(x.dout, None, x.dmaps)
    with pytest.raises(RuntimeError, match="4.0.0b36: its accumulator of dq is not the expected one"):
        flash_attn.backward_with_map(gradients, x.attention_inputs(), outputs, CASES[0].options(), x.plan_tensors())
    assert flash_attn._preprocess.fill is None


def test_reasons(package, monkeypatch):
    case = CASES[0]
    x = make(case)
    call = x.attention_inputs(), case.options(), x.plan_tensors()
    assert "MOLSAKI_FA4_PREPROCESS" in flash_attn.why_not_fused(*call)
    monkeypatch.setattr(flash_attn, "FUSE", True)
    package(64)
    monkeypatch.setattr(flash_attn, "_installed", lambda: "4.0.0b37")
    assert "needs flash-attn-4 4.0.0b36, not 4.0.0b37" in flash_attn.why_not_fused(*call)
    monkeypatch.setattr(flash_attn, "_installed", lambda: "4.0.0b36")
    assert flash_attn.why_not_fused(*call) is None
    for name, change in (("sinks", torch.zeros(2)), ("v", torch.zeros(2, 1, 130, 96))):
        changed = dataclasses.replace(call[0], **{name: change})
        assert "no sinks, no softcap, no empty plan" in flash_attn.why_not_fused(changed, *call[1:])
    full = make(Case("full", D=128, causal=False, dtype=BF16))
    call = full.attention_inputs(), Case("full", D=128, causal=False).options(), full.plan_tensors()
    assert "of head_dim 128 has another layout" in flash_attn.why_not_fused(*call)
