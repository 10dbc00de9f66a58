"""Draws docs/concepts.svg, the figure of the computation: python docs/draw_concepts.py."""

from __future__ import annotations

from pathlib import Path

CELL = 22
STEPS = [(0, 4), (4, 9), (9, 12)]  # token ranges
WORDS = [[1], [3], [6, 7]]  # token indices of each key word
STEP_COLOURS = ("#d1672c", "#7b3294", "#1b7f5f")
TOKENS = STEPS[-1][1]
KEY_TOKENS = [token for word in WORDS for token in word]


def main() -> None:
    parts = [*queries(20, 70), *weights(190, 70), *key_columns(540, 70), *stepwise_map(792, 136)]
    parts += [arrow(130, 202, 180), arrow(464, 202, 530), arrow(638, 202, 778)]
    parts += [
        text(497, 192, "only", 11),
        text(706, 178, "sum over the rows", 11),
        text(706, 192, "of each step and the", 11),
    ]
    parts += [text(706, 220, "tokens of each word,", 11), text(706, 234, "mean over heads", 11)]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 400" font-family="sans-serif">'
    lines = [head, '<rect width="940" height="400" fill="#ffffff"/>', *parts, "</svg>"]
    Path(__file__).with_name("concepts.svg").write_text("\n".join(lines) + "\n")


def queries(x: int, y: int) -> list[str]:
    parts = [text(x + 55, y - 34, "queries q", 13), text(x + 55, y - 16, "M tokens x D", 11)]
    for (start, stop), colour in zip(STEPS, STEP_COLOURS, strict=True):
        parts.append(box(x + 10, y + start * CELL, 90, (stop - start) * CELL, colour, 0.35))
    for number, (start, stop) in enumerate(STEPS, 1):
        parts.append(text(x + 55, y + (start + stop) / 2 * CELL + 4, f"step {number}", 12))
    return parts


def weights(x: int, y: int) -> list[str]:
    parts = [
        text(x + 132, y - 34, "attention weights P", 13),
        text(x + 132, y - 16, "M x M per head, computed tile by tile, never stored", 11),
    ]
    for row in range(TOKENS):
        for column in range(TOKENS):
            visible, key = column <= row, column in KEY_TOKENS
            colour = (step_colour(row) if key else "#b8b8b8") if visible else "#ffffff"
            parts.append(box(x + column * CELL, y + row * CELL, CELL, CELL, colour, 0.75 if key else 0.3))
    for number, word in enumerate(WORDS, 1):
        parts.append(text(x + (sum(word) / len(word) + 0.5) * CELL, y + TOKENS * CELL + 16, f"word {number}", 11))
    parts.append(text(x + 132, y + TOKENS * CELL + 36, "log-sum-exp (lse) of each row comes from flash attention", 11))
    return parts


def key_columns(x: int, y: int) -> list[str]:
    parts = [text(x + 44, y - 34, "key columns", 13), text(x + 44, y - 16, "exp(s - lse), M x C, tile by tile", 11)]
    for row in range(TOKENS):
        for column, token in enumerate(KEY_TOKENS):
            colour = step_colour(row) if token <= row else "#ffffff"
            parts.append(box(x + column * CELL, y + row * CELL, CELL, CELL, colour, 0.75))
    column = 0
    for number, word in enumerate(WORDS, 1):
        parts.append(text(x + (column + len(word) / 2) * CELL, y + TOKENS * CELL + 16, f"w{number}", 11))
        column += len(word)
    return parts


def stepwise_map(x: int, y: int) -> list[str]:
    size = 2 * CELL
    parts = [
        text(x + 1.5 * size - 10, y - 34, "stepwise map", 13),
        text(x + 1.5 * size - 10, y - 16, "S x W per layer", 11),
    ]
    for row, colour in enumerate(STEP_COLOURS):
        for column, word in enumerate(WORDS):
            visible = word[0] < STEPS[row][1]
            parts.append(
                box(x + column * size - 10, y + row * size, size, size, colour if visible else "#ffffff", 0.75)
            )
    for column in range(len(WORDS)):
        parts.append(text(x + (column + 0.5) * size - 10, y + 3 * size + 16, f"w{column + 1}", 11))
    return parts


def step_colour(row: int) -> str:
    return next(colour for (start, stop), colour in zip(STEPS, STEP_COLOURS, strict=True) if start <= row < stop)


def box(x: float, y: float, width: float, height: float, colour: str, opacity: float) -> str:
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'{shape} fill="{colour}" fill-opacity="{opacity}" stroke="#888888" stroke-width="0.5"/>'


def text(x: float, y: float, words: str, size: int) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="middle" fill="#444444">{words}</text>'


def arrow(x: float, y: float, to: float) -> str:
    head = f"M{to - 8} {y - 5} L{to} {y} L{to - 8} {y + 5}"
    return f'<path d="M{x} {y} L{to} {y} {head}" stroke="#444444" fill="none" stroke-width="1.5"/>'


if __name__ == "__main__":
    main()
