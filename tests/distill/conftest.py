"""Fixtures that several test modules of training share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """The trainer of a run of six steps without interruption."""
    from tests.helpers import training  # seconds, which other tests here need not spend

    t = training.trainer(tmp_path_factory.mktemp("straight"))
    t.train()
    t.save_model()
    return t
