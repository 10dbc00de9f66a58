"""Order of the hardware tests: those that need most of the memory come last."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("memory") is not None)
