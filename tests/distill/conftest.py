"""Fixtures of several test modules of training."""

from __future__ import annotations

import pytest

from molsaki.training.trainer import DistillTrainer
from tests.helpers import training


@pytest.fixture(scope="session")
def straight(tmp_path_factory) -> DistillTrainer:
    """Six steps without interruption."""
    t = training.trainer(tmp_path_factory.mktemp("straight"))
    t.train()
    t.save_model()
    return t
