"""Shared by all tests: few threads, so that a suite on a small machine is not slowed by its own parallelism."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
