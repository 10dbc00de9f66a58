"""Prints the ratios that the benchmarks report, after the run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_LINES: list[str] = []


@pytest.fixture
def report() -> Callable[[str], None]:
    """Return a function that takes a line to print after the run, also where pytest captures output."""
    return _LINES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LINES:
        terminalreporter.section("against plain attention, in one run")
        for line in _LINES:
            terminalreporter.write_line(line)
