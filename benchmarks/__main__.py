"""Runs ``python -m benchmarks``: measure this machine, or compare two runs."""

from __future__ import annotations

import sys

from . import bench, compare

if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        sys.exit(compare.main(sys.argv[2:]))
    sys.exit(bench.main(sys.argv[1:]))
