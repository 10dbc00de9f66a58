"""docs/troubleshooting.md has every message of the source, and no other; its flags exist.

A new message needs an entry in the page's section of that place: a line of the table with cause and cure, or a line of
the list if the message itself says what to change. `..` stands for values; one entry may describe several messages.
"""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.messages import ROOT, Message, collect, matches, normalised

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (?:`([^`]+)`|`` (.+?) ``) \| (.+) \|$", re.MULTILINE)  # two backticks around a text that has one
LIST = re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEAD = "| message | cause, and what to do |"


def entries(page: str) -> list[str]:
    """The messages of a page: the first cells of its tables, and the lines of its lists."""
    rows = [row[1] or row[2] for row in ROW.finditer(page)]
    return rows + [line for block in LIST.findall(page) for line in block.splitlines()]


def missing(page: str, messages: list[Message]) -> str:
    """The messages without an entry, as lines for the page, below the place where each is written."""
    patterns = entries(page)
    exact = {normalised(pattern) for pattern in patterns}
    found = [m for m in messages if m.text not in exact and not any(matches(p, m.text) for p in patterns)]
    cells = (f"`` {m.text} ``" if "`" in m.text else f"`{m.text}`" for m in found)
    lines = [f"{m.place}\n    | {cell} | cause, and what to do |" for m, cell in zip(found, cells, strict=True)]
    return "\n".join(lines)


def stale(page: str, messages: list[Message]) -> list[str]:
    """The entries that describe no message."""
    texts = {message.text for message in messages}
    return [p for p in entries(page) if normalised(p) not in texts and not any(matches(p, text) for text in texts)]


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    return collect()


def test_every_message_is_documented(messages):
    assert len(messages) > 500
    lines = missing(PAGE, messages)
    assert not lines, (
        "docs/troubleshooting.md has no entry for these messages. Paste each line into a table of the section of its "
        "place and write cause and cure, or, if the message says what to change, its text alone into the list below "
        f"that table:\n{lines}"
    )


def test_no_entry_is_stale(messages):
    lines = "\n".join(stale(PAGE, messages))
    assert not lines, f"docs/troubleshooting.md: no message of the source is of this form; remove or correct:\n{lines}"


def test_the_page_is_well_formed():
    """No entry is there twice, every row has a cause, and every table is one of messages."""
    found = entries(PAGE)
    assert len(found) > 500
    assert [entry for entry in found if found.count(entry) > 1] == []
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert [row for row in rows if row != HEAD and not ROW.match(row)] == []
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[2:]
    assert all(HEAD in section for section in sections), [s.splitlines()[0] for s in sections if HEAD not in s]


def test_the_flags_of_the_page_exist():
    """Without an import of the configs, which takes seconds: inherited options are those of training-options.md."""
    files = [*(ROOT / "molsaki/config").glob("*.py"), ROOT / "molsaki/training/config.py"]
    sources = [file.read_text(encoding="utf-8") for file in files]
    classes = [node for source in sources for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    known = {ast.unparse(field.target) for one in classes for field in one.body if isinstance(field, ast.AnnAssign)}
    known |= set(re.findall(r"`(\w+)`", (ROOT / "docs/training-options.md").read_text(encoding="utf-8")))
    others = {"nproc_per_node", "pid", "processes", "arms", "seeds", "config", "help"}  # torchrun, py-spy, study
    others |= {"dry_run", "log_format", "name"}  # of several commands, and a flag of any name in a message
    flags = set(re.findall(r"--([a-z]\w+)", PAGE))
    assert len(flags) > 40 and flags - known - others == set()


SOURCE = """
import logging, warnings
logger = logging.getLogger(__name__)
REMEDY = "run it again"

class TooLong(ValueError):
    pass

def f(path, n):
    if n == 1:
        raise ValueError(f"{path}: damaged; {REMEDY}")
    if n == 2:
        raise TooLong("a: " + ("one of two" if path else f"expected {n:.2f}"))
    if n == 3:
        raise _other(n)
    if n == 4:
        text = "held in a name"
        raise TypeError(text)
    if n == 5:
        raise OSError(f"{path}: {error}")
    if n == 6:
        raise ValueError(f"{path}: {_why(n)}")
    warnings.warn("old name", FutureWarning)
    logger.warning("%s of %d left out", path, n)
    logger.info("not a message")

def _other(n):
    return KeyError(f"{n}: no such key")

def _why(n):
    return f"all {n} examples were left out"

def why_not(n):
    if n:
        return f"it takes {n}"
    return None
"""


def test_what_is_collected(tmp_path):
    """Every way in which the source writes a message, and none that only passes one on."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/module.py").write_text(SOURCE)
    found = collect(tmp_path, ("package",))
    assert sorted(message.text for message in found) == sorted(
        [
            "..: damaged; run it again",
            "a: one of two",
            "a: expected ..",
            "..: no such key",
            "held in a name",
            "..: all .. examples were left out",
            "old name",
            ".. of .. left out",
            "it takes ..",
        ]
    )
    places = {message.text: message.place for message in found}
    assert places["held in a name"] == "package/module.py:18"


def test_what_is_missing_and_stale(tmp_path):
    """A new message is reported with its place, ready to paste; an entry whose message is gone is reported, too."""
    page = f"{HEAD}\n| --- | --- |\n| `..: ..; run it again` | Cause. |\n\n```text\nq: expected a tensor, got ..\n```\n"
    written = [Message("..: damaged; run it again", "m.py:1"), Message("q: expected a tensor, got ..", "m.py:2")]
    assert missing(page, written) == ""
    new = Message("k: expected a tensor of q's shape, got ..", "m.py:3")
    assert missing(page, [*written, new]).splitlines() == [
        "m.py:3",
        "    | `k: expected a tensor of q's shape, got ..` | cause, and what to do |",
    ]
    assert stale(page, written) == []
    assert stale(page, written[:1]) == ["q: expected a tensor, got .."]


@pytest.mark.parametrize(
    ("pattern", "message", "expected"),
    [
        ("q: expected a tensor of shape ..", "q: expected a tensor of shape .. and .., got ..", True),
        ("q: expected a tensor of shape ..", "k: expected a tensor of shape .., got ..", False),
        ("q: expected a tensor of shape ..", "q: expected a tensor", False),
        ("..: expected one of .., got ..", "a: expected one of the shapes, got ..", False),
        ("..: expected one of .., got ..", "..: expected one of .., got ..", True),
        ("head (..., heads=1) is right here", "head (.., heads=1) is right here", True),
    ],
)
def test_patterns(pattern, message, expected):
    assert matches(pattern, message) is expected


def test_a_pattern_describes_few_messages(messages):
    """A pattern that describes many messages explains none of them."""
    texts = {message.text for message in messages}
    broad = {p: n for p in entries(PAGE) if (n := sum(matches(p, text) for text in texts)) > 6}
    assert broad == {}


def test_the_table_of_contents_names_every_section():
    titles = re.findall(r"^##+ (.*)$", PAGE, re.MULTILINE)  # symptoms have their own headings
    contents = PAGE[: PAGE.index("\n## ")]
    anchors = [re.sub(r"[^a-z0-9_ ]", "", title.lower()).replace(" ", "-") for title in titles]
    assert re.findall(r"\(#([a-z0-9_-]+)\)", contents) == anchors
