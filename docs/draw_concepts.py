"""Draws docs/concepts.svg, the figure of the computation: python docs/draw_concepts.py.

The weights are those of invented scores, and every number of the map is the sum of the weights that are drawn.
The picture has its own white background, for dark pages, and no letter smaller than 13 of its 720 units.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

TEXT = ["Ann", "has", "3", "bags.", "Each", "holds", "1", "2", "nuts.", "So", "36", "nuts."]  # tokens
STEPS = [(0, 4), (4, 9), (9, 12)]  # token ranges
WORDS = {"3": [2], "12": [6, 7], "36": [10]}  # the tokens of each key word
COLOURS = ("#1f5a99", "#c4581c", "#17796a")  # of the steps
INK, SOFT = "#24292f", "#57606a"
WIDTH, HEIGHT = 720, 466
CELL = (17, 20)
KEY_TOKENS = [token for tokens in WORDS.values() for token in tokens]
TITLE = "The computation of a stepwise map"
DESCRIPTION = (
    "Queries of twelve tokens in three steps; their attention weights, twelve by twelve, of which only the four "
    "columns of the tokens of three key words are computed; and the map of three steps by three key words, each value "
    "the sum of the weights of the step's rows and the word's columns."
)
NOTES = (
    "Flash attention gives the log-sum-exp (lse) of each row. P is never stored.",
    "Only the columns of key words are computed: P = exp(q·k − lse), tile by tile.",
    "Sum over the rows of each step and the tokens of each word; mean over heads.",
)


def main() -> None:
    top = 78
    middle = top + len(TEXT) * CELL[1] / 2
    parts = [*queries(8, top), *weights(190, top), *key_columns(456, top), *stepwise_map(608, middle)]
    parts += [*arrow(138, 184, middle, 1), *arrow(400, 450, middle, 2), *arrow(529, 553, middle, 3)]
    for number, note in enumerate(NOTES, 1):
        y = 380 + 30 * (number - 1)
        parts += [*badge(24, y, number), text(46, y + 6, note, 18, anchor="start")]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="Helvetica, Arial, \'Liberation Sans\', sans-serif">'
    )
    ground = f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="8" fill="#ffffff" stroke="#d0d7de"/>'
    lines = [head, f"<title>{TITLE}</title>", f"<desc>{DESCRIPTION}</desc>", ground, *parts, "</svg>"]
    Path(__file__).with_name("concepts.svg").write_text("\n".join(lines) + "\n")


def attention() -> list[list[float]]:
    """P: the softmax of invented scores, each token over itself and those before it."""
    rows = []
    for i in range(len(TEXT)):
        scores = [math.exp(0.9 * math.cos(2 * i + 3 * j) + 1.5 * (j in KEY_TOKENS)) for j in range(i + 1)]
        rows.append([score / sum(scores) for score in scores] + [0.0] * (len(TEXT) - 1 - i))
    return rows


def queries(x: int, y: int) -> list[str]:
    parts = title(x + 86, "queries q", "M tokens")
    for number, (start, stop) in enumerate(STEPS, 1):
        parts.append(
            text(x + 26, y + (start + stop) / 2 * CELL[1] + 5, f"step {number}", 15, COLOURS[number - 1], "bold")
        )
        for token in range(start, stop):
            parts += [
                box(x + 58, y + token * CELL[1], 64, CELL[1], COLOURS[number - 1], 0.12),
                text(
                    x + 90,
                    y + (token + 0.5) * CELL[1] + 5,
                    TEXT[token],
                    14,
                    weight="bold" if token in KEY_TOKENS else "",
                ),
            ]
    return parts


def weights(x: int, y: int) -> list[str]:
    parts = title(x + CELL[0] * len(TEXT) / 2, "attention weights P", "M x M, for each head")
    for i, row in enumerate(attention()):
        for j, weight in enumerate(row):
            colour = (step_colour(i) if j in KEY_TOKENS else "#8c959f") if j <= i else "#ffffff"
            parts.append(box(x + j * CELL[0], y + i * CELL[1], *CELL, colour, shade(weight)))
    below = y + len(TEXT) * CELL[1] + 18
    for word, tokens in WORDS.items():
        parts.append(text(x + (sum(tokens) / len(tokens) + 0.5) * CELL[0], below, word, 15, weight="bold"))
    return parts


def key_columns(x: int, y: int) -> list[str]:
    parts = title(x + CELL[0] * len(KEY_TOKENS) / 2, "key columns", "M x C")
    for i, row in enumerate(attention()):
        for column, token in enumerate(KEY_TOKENS):
            colour = step_colour(i) if token <= i else "#ffffff"
            parts.append(box(x + column * CELL[0], y + i * CELL[1], *CELL, colour, shade(row[token])))
    column, below = 0, y + len(TEXT) * CELL[1] + 18
    for word, tokens in WORDS.items():
        parts.append(text(x + (column + len(tokens) / 2) * CELL[0], below, word, 15, weight="bold"))
        column += len(tokens)
    return parts


def stepwise_map(x: int, middle: float) -> list[str]:
    width, height = 34, 44
    top = middle - height * len(STEPS) / 2
    parts = title(x + width * len(WORDS) / 2 - 12, "map", "S steps x W words")
    found = attention()
    for number, (start, stop) in enumerate(STEPS):
        y = top + number * height
        parts.append(text(x - 24, y + height / 2 + 5, f"step {number + 1}", 14, COLOURS[number], "bold"))
        for column, tokens in enumerate(WORDS.values()):
            mass = sum(found[i][j] for i in range(start, stop) for j in tokens)
            colour = COLOURS[number] if mass else "#ffffff"
            parts.append(box(x + column * width, y, width, height, colour, shade(mass / (stop - start))))
            dark = shade(mass / (stop - start)) > 0.6
            number_text = f"{mass:.1f}" if mass else "0"
            colour = "#ffffff" if dark else INK
            parts.append(text(x + (column + 0.5) * width, y + height / 2 + 5, number_text, 15, colour))
    for column, word in enumerate(WORDS):
        parts.append(text(x + (column + 0.5) * width, top + height * len(STEPS) + 18, word, 15, weight="bold"))
    return parts


def step_colour(row: int) -> str:
    return next(colour for (start, stop), colour in zip(STEPS, COLOURS, strict=True) if start <= row < stop)


def shade(weight: float) -> float:
    """The opacity of a weight from 0 to 1."""
    return round(0.08 + 0.92 * min(1.0, 1.5 * weight), 2)


def title(x: float, name: str, size: str) -> list[str]:
    return [text(x, 34, name, 16, weight="bold"), text(x, 56, size, 14, SOFT)]


def box(x: float, y: float, width: float, height: float, colour: str, opacity: float) -> str:
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'{shape} fill="{colour}" fill-opacity="{opacity:g}" stroke="#afb8c1" stroke-width="0.7"/>'


def text(x: float, y: float, words: str, size: int, colour: str = INK, weight: str = "", anchor: str = "middle") -> str:
    bold = ' font-weight="bold"' if weight else ""
    look = f'font-size="{size}"{bold} text-anchor="{anchor}" fill="{colour}"'
    return f'<text x="{x:g}" y="{y:g}" {look}>{escape(words)}</text>'


def arrow(x: float, to: float, y: float, number: int) -> list[str]:
    head = f"M{to - 7:g} {y - 5:g} L{to:g} {y:g} L{to - 7:g} {y + 5:g}"
    line = f'<path d="M{x:g} {y:g} L{to:g} {y:g} {head}" stroke="{INK}" fill="none" stroke-width="1.8"/>'
    return [line, *badge((x + to) / 2, y - 20, number)]


def badge(x: float, y: float, number: int) -> list[str]:
    return [f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="{INK}"/>', text(x, y + 5, str(number), 14, "#ffffff", "bold")]


if __name__ == "__main__":
    main()
