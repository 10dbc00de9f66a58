"""Checks an installed wheel: python .ci/check_wheel.py native|pure. The first has the C engine, the second has not.

Runs one layer with its map, forward and backward, and compares with the reference. Run it outside of the checkout.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["MOLSAKI_CACHE"] = tempfile.mkdtemp()  # nothing that was compiled before

import torch

import molsaki
import molsaki_kernels as mk


def main(kind: str) -> None:
    package = Path(mk.__file__).parent
    if kind not in ("native", "pure"):
        sys.exit(f"expected native or pure, got {kind}")
    if (Path(__file__).parents[1] / "molsaki_kernels").resolve() == package.resolve():
        sys.exit(f"{package} is the checkout, not an installed wheel")
    libraries = sorted(path.name for path in package.glob("_native/*.so"))
    expected = [f"molsaki-x86-64-{name}.so" for name in ("v3", "v4-bf16", "v4")] if kind == "native" else []
    if libraries != expected:
        sys.exit(f"a {kind} wheel, but its libraries are {libraries}")
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 48, 32, requires_grad=True) for heads in (4, 2, 2)]
    plan = mk.StepPlan.from_spans([[(0, 20), (20, 48)]], [[[3], [7, 30]]])
    engine = "native" if kind == "native" and str(mk.engines()["native"]) == "ready" else "auto"
    found = []
    for attention, options in ((mk.stepwise_attention, {"engine": engine}), (mk.reference.stepwise_attention, {})):
        out, maps = attention(*inputs, plan, **options)
        found.append([out, maps, *torch.autograd.grad(out.square().sum() + maps.square().sum(), inputs)])
    difference = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
    words = len(molsaki.segment("Why 4?", "So 5.").words)
    print(f"{mk.__version__} in {package}: engine native {mk.engines()['native']}, largest difference {difference:.1e}")
    compiled = [*Path(os.environ["MOLSAKI_CACHE"]).iterdir()]
    if not difference < 1e-5 or words != 2 or (kind == "native" and compiled):
        sys.exit(f"expected a difference below 1e-5, 2 words and nothing compiled; got {words} words, {compiled}")


if __name__ == "__main__":
    main(*sys.argv[1:])
