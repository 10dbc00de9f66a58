"""Uninitialised memory is NaN in these tests, so that an element that no kernel writes is detected."""

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_memory():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with np.errstate(divide="ignore", invalid="ignore"):  # the interpreter's NumPy, on rows past the end
        yield
    torch.use_deterministic_algorithms(False)
