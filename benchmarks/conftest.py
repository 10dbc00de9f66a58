from __future__ import annotations

import pytest

_LINES: list[str] = []


@pytest.fixture
def report():
    """Lines that are printed after the run, whatever pytest captures."""
    return _LINES.append


def pytest_terminal_summary(terminalreporter):
    if _LINES:
        terminalreporter.section("against plain attention, in one run")
        for line in _LINES:
            terminalreporter.write_line(line)
