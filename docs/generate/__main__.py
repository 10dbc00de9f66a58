"""Writes the generated parts of the documentation: configuration, engines, measured tables.

    python -m docs.generate [--check]

They are committed, so that a repository viewer shows them and a change of an option, an engine or a record is visible
in the diff of the documentation. A test and ``make docs`` fail if one is not current. The parts are those between
``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``; a page may have text of its own around them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from docs.generate import configuration, engines, performance
from docs.generate.marked import filled

ROOT = Path(__file__).parents[2]
PARTS = configuration.PARTS | engines.PARTS | performance.PARTS


def pages() -> dict[Path, str]:
    """Every page with generated parts, as it should be."""
    found = {}
    for path in sorted((ROOT / "docs").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if "<!-- generated:" in text:
            found[path] = filled(text, PARTS, path.relative_to(ROOT))
    return found


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or with ``--check`` name those that are not current; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is not current")
    check = parser.parse_args(argv).check
    stale = [(path, text) for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    for path, text in stale:
        print(f"{path.relative_to(ROOT)}: {'not current; run python -m docs.generate' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
