"""Shared by all tests. Without a GPU the Triton kernels are interpreted; Triton wants to know before its import."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
