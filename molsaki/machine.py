"""The names of the hardware of this machine, for records."""

from __future__ import annotations

import platform


def processor() -> str:
    """The name of the processor, or of its architecture if the system does not report it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
