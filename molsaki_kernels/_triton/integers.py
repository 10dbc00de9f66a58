"""Integer functions for the launchers; Triton's own, which kernels can call too, take the host ten times as long."""

from __future__ import annotations


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0
