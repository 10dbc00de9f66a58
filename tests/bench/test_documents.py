"""Tests that links and names of tests in the documentation exist, and that its figure is that of its script."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = ROOT / "studies/models"  # in an sdist; MANIFEST.in says why
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])


def test_the_figure_of_the_concepts_is_the_scripts(monkeypatch):
    figure = ROOT / "docs/concepts.svg"
    drawn = []
    monkeypatch.setattr(Path, "write_text", lambda path, text: drawn.append((path, text)))
    runpy.run_path(str(ROOT / "docs/draw_concepts.py"), run_name="__main__")
    assert drawn == [(figure, figure.read_text())]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = document.parent / name if name else document
        if file.resolve() == NOT_SHIPPED.resolve() and not (ROOT / ".git").exists():
            continue
        assert file.exists(), f"{document.name}: {target}"
        assert not heading or heading in headings(file), f"{document.name}: {target}"


def test_the_check_of_the_derivation():
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/derivation.md").read_text(), flags=re.DOTALL)
    exec(snippet, {})


def test_every_fault_names_a_test_that_exists():
    tests = {(path.name, name) for path in (ROOT / "tests").rglob("test_*.py") for name in defined_tests(path)}
    cited = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)(?=[`*\[])", (ROOT / "docs/faults.md").read_text())
    assert len(cited) > 35
    for file, name in cited:
        assert any(file in ("", where) and test.startswith(name) for where, test in tests), f"{file}::{name}"


def defined_tests(path: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)


def headings(file: Path) -> list[str]:
    """Return the anchors of a Markdown file; a repeated one gets a number, as on GitHub."""
    anchors: list[str] = []
    for title in re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        anchors.append(f"{anchor}-{anchors.count(anchor)}" if anchor in anchors else anchor)
    return anchors
