"""Other ways to call: torch.func, forward mode, second derivatives, threads, export and unaligned memory.

Each gives the right value or an error that names what is not supported.
"""

from __future__ import annotations

import concurrent.futures

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import molsaki_kernels as mk
from molsaki_kernels import StepPlan, reference
from molsaki_kernels._native import build
from molsaki_kernels.attention import flash_attn, sdpa
from molsaki_kernels.spec import AttentionInputs
from molsaki_kernels.strides import aligned
from tests.helpers.tiny import one_thread  # noqa: F401
from tests.kernels.test_attention import ENGINES, inputs, run

(Q, K, V), PLAN, _ = inputs("some empty", torch.float32)
LSE = torch.rand(Q.shape[:3]) + 3
FUNCTIONS = {
    "out": lambda q: mk.stepwise_attention(q, K, V, PLAN)[0].square().sum(),
    "map": lambda q: mk.stepwise_attention(q, K, V, PLAN)[1].square().sum(),
    "widened": lambda q: mk.stepwise_attention(q, K, V, PLAN, map_engine="widened", engine="eager")[1].square().sum(),
    "map alone": lambda q: mk.stepwise_map(q, K, LSE, PLAN).square().sum(),
    "pooled values": lambda q: mk.pool_values(q).square().sum(),
}


class PassingThrough(TorchDispatchMode):
    """An observer, for which the operators are called."""

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        return operator(*arguments, **(keywords or {}))


over_functions = pytest.mark.parametrize("name", FUNCTIONS)


@over_functions
@pytest.mark.parametrize("transform", [
    torch.func.grad,
    torch.func.jacrev,
    torch.func.jacfwd,
    lambda f: lambda q: torch.func.jvp(f, (q,), (q,)),
    lambda f: lambda q: torch.func.vjp(f, q),
    lambda f: lambda q: torch.vmap(torch.func.grad(f))(q[None]),
    lambda f: lambda q: torch.func.jvp(torch.vmap(f), (q[None],), (q[None],)),
    torch.func.hessian,
], ids=["grad", "jacrev", "jacfwd", "jvp", "vjp", "vmap of grad", "jvp of vmap", "hessian"])  # fmt: skip
def test_derivatives_of_torch_func_are_refused(name, transform):
    with pytest.raises(NotImplementedError, match="no transform of torch.func but vmap, got (grad|jvp)"):
        transform(FUNCTIONS[name])(Q)


@over_functions
@pytest.mark.parametrize("dispatched", [False, True])
def test_forward_mode_is_refused(name, dispatched):
    with forward_ad.dual_level(), PassingThrough() if dispatched else torch.enable_grad():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            FUNCTIONS[name](forward_ad.make_dual(Q, torch.ones_like(Q)))


@over_functions
def test_compiled_forward_mode_is_refused(name):
    torch.compiler.reset()

    @torch.compile(backend="aot_eager")
    def tangent(q):
        return torch.func.jvp(FUNCTIONS[name], (q,), (q,))[1]

    with pytest.raises(NotImplementedError, match="forward-mode|got jvp"):
        tangent(Q)


@over_functions
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(name):
    batch = torch.stack([Q, Q + 1])
    expected = torch.stack([FUNCTIONS[name](q) for q in batch])
    torch.testing.assert_close(torch.vmap(FUNCTIONS[name])(batch), expected)


@over_functions
def test_second_derivatives_are_refused(name):
    q = Q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(FUNCTIONS[name](q), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"molsaki\.\w+_backward.* no autograd formula"):
        torch.autograd.grad(dq.square().sum(), q)


@over_functions
def test_inference_mode(name):
    expected = FUNCTIONS[name](Q)
    with torch.inference_mode():
        torch.testing.assert_close(FUNCTIONS[name](Q), expected)
        torch.testing.assert_close(FUNCTIONS[name](Q.clone()), expected)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return mk.stepwise_attention(q, k, v, PLAN)

    found = torch.export.export(Layer(), (Q, K, V)).module()(Q, K, V)
    torch.testing.assert_close(found, Layer()(Q, K, V))


@pytest.mark.parametrize("map_engine", ["auto", "widened"])
@pytest.mark.parametrize("engine", ENGINES)
def test_threads_with_autograd(engine, map_engine):
    """Threads that share a plan, as the replicas of DataParallel do, get the results of one thread."""
    if engine == "native" and build.why_not():
        pytest.skip(build.why_not())
    tensors, _, _ = inputs("ragged", torch.float32)

    def call(_=None):
        return run(mk.stepwise_attention, tensors, plan, None, {}, torch.float32, engine=engine, map_engine=map_engine)

    plan = inputs("ragged", torch.float32)[1]  # of which nothing is cached
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(12)))
    expected = call()
    assert all(torch.equal(x[name], expected[name]) for x in found for name in expected if expected[name] is not None)


def test_plans_changed_unseen_by_their_version():
    """Through ``.data``, through numpy, and cu_seqlens likewise."""
    (q, k, v), _, _ = inputs("ragged", torch.float32, packed=True)
    q, k, v = q[:, :, :12], k[:, :, :12], v[:, :, :12]
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    for options in (
        {},
        dict(engine="sdpa"),
        dict(engine="eager", map_engine="widened"),
        dict(engine="sdpa", softcap=None),
    ):
        plan = StepPlan.from_spans([[(0, 3)], [(1, 4)]], [[[0], [1]], [[0], [2]]])
        for change in (
            lambda p, cu: None,
            lambda p, cu: p.tokens.data.copy_(torch.tensor([[1, 2], [0, 1]])),
            lambda p, cu: setattr(p.steps, "data", torch.tensor([[[1, 4]], [[0, 3]]])),
            lambda p, cu: p.word_of_token.numpy().__setitem__((0, slice(None)), [1, 0]),
            lambda p, cu: cu.numpy().__setitem__(1, 6),
        ):
            change(plan, cu)
            found = mk.stepwise_attention(q, k, v, plan, cu_seqlens=cu, **options)
            expected = reference.stepwise_attention(q, k, v, plan, cu_seqlens=cu)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        cu[1] = 5


def test_unaligned_inputs_are_copied():
    """CUDA's flash attention reads 16 bytes at a time; of what is aligned nothing is copied."""
    memory = torch.randn(2 * 8 * 4 * 40 + 8, dtype=torch.bfloat16)
    whole = memory[: 2 * 8 * 4 * 40].view(2, 8, 4, 40).transpose(1, 2)
    for x in (whole, whole[..., :32], whole[..., 8:24], whole[:, 1:, 2:], whole[:1, :1, :1]):
        assert aligned(x) is x
    for x in (whole[..., 1:33], memory[1 : 1 + 8 * 8].view(1, 1, 8, 8), memory[: 4 * 12].view(1, 1, 4, 12)[..., :8],
              whole.transpose(2, 3)):  # fmt: skip
        copy = aligned(x)
        assert torch.equal(copy, x) and aligned(copy) is copy and copy.data_ptr() != x.data_ptr()
    assert aligned(whole[:1, :1, :1, :31].float()).shape == (1, 1, 1, 31)
    odd = whole[..., 1:33]
    call = sdpa._cuda_inputs(AttentionInputs(odd, whole[..., :32], odd))
    assert call.q.is_contiguous() and call.v.is_contiguous() and call.k.stride() == whole.stride()
    assert flash_attn._flash_layout(odd, False).storage_offset() == 0
