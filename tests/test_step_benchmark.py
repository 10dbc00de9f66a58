"""The contenders of benchmarks/step.py compute the same losses and gradients, or their times say nothing."""

from __future__ import annotations

import pytest
import torch
from tiny import one_thread  # noqa: F401

from benchmarks.step import BATCHES, CONTENDERS, Setup, measured


@pytest.mark.parametrize("batch", BATCHES[1:], ids=lambda b: b.name)
def test_contenders_agree(batch):
    losses = {}
    for name in CONTENDERS:
        step = Setup("tiny-teacher", "tiny", batch, False, "cpu").step(name)
        losses[name] = [step() for _ in range(2)]  # the second one is of updated weights
    for a, b in (
        ("molsaki, live teacher", "eager"),
        ("dss", "dss, padded"),
        ("dss", "dss, packed"),
        ("molsaki, stored maps", "molsaki, padded"),
        ("molsaki, stored maps", "molsaki, packed"),
    ):
        torch.testing.assert_close(losses[a][0], losses[b][0], rtol=2e-6, atol=0)
        # Adam makes whole steps of gradients that are rounding alone: the second loss is off by more.
        torch.testing.assert_close(losses[a][1], losses[b][1], rtol=2e-5, atol=0)
    assert losses["eager"][0] > losses["dss"][0] + 1e-3  # L_att is seen in it


def test_rows(capsys):
    setup = Setup("tiny-teacher", "tiny", BATCHES[0], False, "cpu")
    rows = measured("time", setup, ["dss", "molsaki, stored maps"], 0.0, {"device": "here"})
    rows += measured("profile", setup, ["dss"], 0.0, {"device": "here"})
    found = {(row["contender"], row["quantity"]): row for row in rows}
    assert found["molsaki, stored maps", "time over dss"]["target"] == 1.1
    parts = sum(row["value"] for row in rows if row["quantity"].startswith("seconds, "))
    assert 0 < parts < 60
    assert "time over dss" in capsys.readouterr().out
