"""Runs one attention layer with its stepwise map and trains the queries to look at a key word."""

from __future__ import annotations

import torch

from molsaki_kernels import StepPlan, engines, stepwise_attention


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, heads, key_heads, tokens, head_dim = 1, 8, 2, 40, 64
    q = torch.randn(batch, heads, tokens, head_dim, device=device, requires_grad=True)
    k, v = (torch.randn(batch, key_heads, tokens, head_dim, device=device) for _ in range(2))
    # Per sequence: two steps, tokens 0 to 11 and 12 to 39; two key words, token 3 and tokens 17 and 18.
    plan = StepPlan.from_spans(steps=[[(0, 12), (12, 40)]], words=[[[3], [17, 18]]], device=device)

    print(engines())
    optimizer = torch.optim.Adam([q], lr=0.1)
    for iteration in range(31):
        out, maps = stepwise_attention(q, k, v, plan)  # (1, 8, 40, 64) and (1, 2, 2)
        loss = -maps[0, 1, 1].log()  # the second step should attend to the second word
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 10 == 0:
            step = [f"{mass:.2f}" for mass in maps[0, 1].tolist()]
            print(f"iteration {iteration:2d}: attention of step 2 on the two words, summed over its 28 queries: {step}")


if __name__ == "__main__":
    main()
