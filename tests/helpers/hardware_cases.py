"""Cases of the hardware tests: features, dtypes, and long sequences with a blockwise oracle.

The blockwise oracle computes all results of the oracle in ``kernel_cases`` without the full matrix of weights. Run in
the working dtype, the same computation gives the error of eager attention.
"""

from __future__ import annotations

import torch

from molsaki_kernels import StepPlan
from tests.helpers.kernel_cases import Case, Inputs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FEATURES = [
    Case("default", M=1000, B=2, Hq=4, Hkv=2, D=64),
    Case("full", M=511, D=64, causal=False),
    Case("window", M=1000, D=64, window=200),
    Case("full_window", M=511, D=64, causal=False, window=65),
    Case("softcap", M=511, D=64, softcap=5.0),
    Case("sinks", M=511, D=64, sinks=True),
    Case("packed", D=64, lengths=(300, 0, 1, 700, 63)),
    Case("everything", D=128, lengths=(130, 500), window=100, softcap=5.0, sinks=True, Hq=8, Hkv=2),
    Case("heads", M=511, D=64, per_head=True, B=2),
    Case("group_of_seven", M=255, D=64, Hq=7),
    Case("transposed", M=511, D=128, Hq=4, Hkv=4, layout="transposed"),
    Case("slice", M=511, D=128, layout="slice"),
    # A single row: its lse is one score. The kernel adds its products one after the other, cuBLAS in 32 parts, so eager
    # is more exact here: 2.66e-7 and 8.5e-8 in float32 with 128 dimensions on an H200, 1.004 of the budget; a sum on a
    # CPU in either order gives the same digits. With 16 dimensions both are near one rounding.
    Case("rows_1", M=1, B=4, D=16, Hq=6, Hkv=3),
    *(Case(f"rows_{M}", M=M, D=128) for M in (17, 63, 111, 130)),
    *(Case(f"d{D}", M=300, D=D) for D in (16, 32, 80, 96, 112, 128, 256)),
    *(Case(f"plan_{plan}", M=300, D=64, plan=plan) for plan in ("whole", "rows", "no_steps", "no_words")),
]


def long_inputs(M: int, Hq: int, Hkv: int, D: int, dtype: torch.dtype, words: int, device: str = "cuda") -> Inputs:
    """One sequence of steps of 10 to 50 rows, with ``words`` words of one or two tokens."""
    generator = torch.Generator(device=device).manual_seed(3)
    host = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    bounds = torch.randint(10, 50, (M // 10,), generator=host).cumsum(0)
    bounds = [0, *bounds[bounds < M].tolist(), M]
    picked = torch.randperm(M - 1, generator=host)[:words].sort().values.tolist()
    groups = [[t, t + 1] if i % 3 == 0 and t + 1 not in picked else [t] for i, t in enumerate(picked)]
    plan = StepPlan.from_spans([list(zip(bounds[:-1], bounds[1:], strict=True))], [groups], device=device)
    q, dout = normal(1, Hq, M, D).to(dtype), normal(1, Hq, M, D).to(dtype)
    k, v = normal(1, Hkv, M, D).to(dtype), normal(1, Hkv, M, D).to(dtype)
    dmaps = normal(1, plan.num_steps, plan.num_words)
    return Inputs(q, k, v, None, None, plan, dout, dmaps, normal(1, Hq, M))


def walk(x: Inputs, dtype: torch.dtype, rows: int = 1024) -> dict[str, torch.Tensor]:
    """The results of ``oracle`` for a causal call with both gradients, in ``dtype``, per head and block of rows."""
    q, k, v, dout = (t.to(dtype)[0] for t in (x.q, x.k, x.v, x.dout))
    Hq, M, D = q.shape
    group, scale = Hq // k.shape[0], D**-0.5
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch.full((M,), -1, device=q.device)
    for s, (start, stop) in enumerate(x.plan.steps[0].tolist()):
        steps[start:stop] = s
    tokens, words = x.plan.tokens[0], x.plan.word_of_token[0]
    weight = x.dmaps[0].to(wide) / Hq
    found = {
        "out": torch.empty_like(q),
        "lse": q.new_empty((Hq, M), dtype=wide),
        "maps": torch.zeros_like(weight),
        "dq": torch.empty_like(q),
        "dk": torch.zeros_like(k, dtype=wide),
        "dv": torch.zeros_like(v, dtype=wide),
    }
    for h in range(Hq):
        for m0 in range(0, M, rows):
            at = torch.arange(m0, min(m0 + rows, M), device=q.device)
            n = int(at[-1]) + 1
            k_n, v_n = k[h // group, :n], v[h // group, :n]
            scores = ((q[h, at] @ k_n.T) * scale).to(wide)
            scores.masked_fill_(torch.arange(n, device=q.device) > at[:, None], float("-inf"))
            lse = scores.logsumexp(-1)
            p = (scores - lse[:, None]).exp()
            c = tokens < n
            found["out"][h, at] = p.to(dtype) @ v_n
            found["lse"][h, at] = lse
            found["maps"].view(-1).index_add_(
                0, (steps[at][:, None] * weight.shape[1] + words[c]).flatten(), p[:, tokens[c]].flatten() / Hq
            )
            dp = (dout[h, at] @ v_n.T).to(wide)
            dp[:, tokens[c]] += weight[steps[at][:, None], words[c]]
            ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).to(dtype) * scale
            found["dq"][h, at] = ds @ k_n
            found["dk"][h // group, :n] += ds.T @ q[h, at]
            found["dv"][h // group, :n] += p.to(dtype).T @ dout[h, at]
    return {key: value[None] for key, value in found.items()}
