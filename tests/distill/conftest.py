"""Fixtures that several test modules of training share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """The trainer of a run of six steps without interruption."""
    from tests.helpers import training  # seconds, which other tests here need not spend

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the modules that compare with it: the number of threads changes roundings
    t = training.trainer(tmp_path_factory.mktemp("straight"))
    t.train()
    t.save_model()
    torch.set_num_threads(threads)
    return t
