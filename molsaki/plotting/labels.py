"""Texts as labels of pictures: how wide they are, where they break, and what cannot be drawn."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from molsaki.extras import regex


def shorten(text: str, width: int, lines: int = 1) -> str:
    """A text on at most ``lines`` lines of ``width`` columns, with an ellipsis where something is left out.

    A wide character, such as a Chinese one, takes two columns. Lines break between words, within words that are longer
    than a line, and between wide characters.
    """
    pieces: list[tuple[str, str]] = []  # what stands before a piece that is not broken, and the piece
    for word in clean(text).split():
        clusters = regex.findall(r"\X", word)
        is_whole = width_of(word) <= width and all(map(_is_narrow, clusters))
        parts = [word] if is_whole else clusters
        pieces += [(" " if i == 0 else "", part) for i, part in enumerate(parts)]
    wrapped: list[list[tuple[str, str]]] = [[]]
    for piece in pieces:
        if wrapped[-1] and width_of(_joined([*wrapped[-1], piece])) > width:
            wrapped.append([])
        wrapped[-1].append(piece)
    if len(wrapped) > lines:
        left_out = wrapped[lines]
        wrapped = wrapped[:lines]
        while width_of(_joined(wrapped[-1]) + left_out[0][0] + "…") > width and len(wrapped[-1]) > 1:
            left_out = [wrapped[-1].pop()]
        wrapped[-1].append((left_out[0][0], "…"))
    return "\n".join(map(_joined, wrapped))


def _joined(pieces: Sequence[tuple[str, str]]) -> str:
    return "".join(before + piece for before, piece in pieces).strip()


def width_of(text: str) -> int:
    """The columns that a text takes in a font of one width: two per wide character, none per combining one."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1 if unicodedata.east_asian_width(c) not in "WF" else 2
        for c in text
    )


def _is_narrow(cluster: str) -> bool:
    return unicodedata.east_asian_width(cluster[0]) not in "WF"


def clean(text: str) -> str:
    """A text without the control characters that a file in XML cannot hold."""
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cs", "Cn") and c not in "\t\n\r" else c for c in text)


def visible(text: str) -> str:
    """Make spaces and line ends of a key word or token visible."""
    return text if text.strip() or not text else text.replace("\r", "").replace("\n", "↵").replace(" ", "␣")
