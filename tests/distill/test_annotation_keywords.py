"""The key words that a teacher lists."""

from __future__ import annotations

from molsaki.annotation.keywords import split_keywords


def test_split_keywords():
    assert split_keywords("Keywords: bags, Nuts , NUTS;\n- two  days\n1. left.\n...") == [
        "bags", "Nuts", "two  days", "left"
    ]  # fmt: skip
