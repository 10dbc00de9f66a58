"""Packs texts and maps for a page within a budget of bytes: steps as pieces with their key words, maps in 8 bits."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from molsaki.reporting.maps import Maps
from molsaki.text.spans import Spans

Array = np.ndarray[Any, Any]

LARGEST_VALUE, NOT_FINITE = 254, 255  # bytes of a packed map
MIXED_SHAPE = (400, 600)  # most rows and columns of a mixed map; with more, neighbours share a cell
LAYER_SHAPE, LAYER_CELLS = (50, 80), 4096  # the same for each layer's map, if it has more cells than that
TOO_LARGE = "The maps were left out: they would make the file too large."


class Budget:
    """The number of bytes that may still be added to a page."""

    def __init__(self, size: int):
        self.left = size

    def take(self, value: object, most: float | None = None) -> bool:
        """Whether the JSON of this value fits into the budget and into ``most``; if so, the budget is reduced."""
        size = len(json.dumps(value))
        if size > self.left or (most is not None and size > most):
            return False
        self.left -= size
        return True


def packed_map(values: Array, shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """A map ``(S, W)`` as bytes in base64: 254 is the largest value, 255 one that is not finite.

    A byte is ``254 sqrt(value / top)``, so that small values keep two digits: the relative error of a value that is a
    hundredth of the largest is at most 4 %.

    Args:
        values: the map; negative values count as 0.
        shape: the most rows and columns. With more, ``rb x cb`` neighbours share a cell with the largest of their
            values.
    """
    S, W = values.shape
    rows, columns = shape or (max(S, 1), max(W, 1))
    rb, cb = max(-(-S // rows), 1), max(-(-W // columns), 1)
    values = np.asarray(values, dtype=np.float64)
    if values.size and (rb > 1 or cb > 1):
        values = np.maximum.reduceat(np.maximum.reduceat(values, range(0, S, rb)), range(0, W, cb), axis=1)
    is_finite = np.isfinite(values)
    clean = np.where(is_finite, values, 0).clip(min=0)
    top = float(clean.max(initial=0.0))
    scaled = np.rint(LARGEST_VALUE * np.sqrt(clean / (top or 1.0)))
    data = np.where(is_finite, scaled, NOT_FINITE).astype(np.uint8)
    return {"rb": rb, "cb": cb, "top": top, "data": base64.b64encode(data.tobytes()).decode()}


def pieces_of(spans: Spans) -> list[list[tuple[str, int]]]:
    """The text of each step in pieces: characters of one key word with its number, and others with -1."""
    found = []
    for start, stop in spans.steps:
        pieces, at = [], start
        for number, (a, b) in enumerate(spans.words):
            a, b = max(a, start), min(b, stop)
            if a >= b:
                continue
            if at < a:
                pieces.append((spans.text[at:a], -1))
            pieces.append((spans.text[a:b], number))
            at = b
        if at < stop:
            pieces.append((spans.text[at:stop], -1))
        found.append(pieces)
    return found


def packed_view(spans: Spans, sides: Mapping[str, Maps], every_layer: bool = True) -> dict[str, Any]:
    """One text with its maps by the name of each side; with ``every_layer`` False, the mixed maps only."""
    rationale = next(
        (s for s, (start, _) in enumerate(spans.steps) if start >= spans.rationale_start), len(spans.steps)
    )
    packed = []
    for name, maps in sides.items():
        entries = [{"name": "mixture of layers"} | packed_map(maps.mixed.cpu().numpy(), MIXED_SHAPE)]
        if maps.layers is not None and every_layer:
            shape = LAYER_SHAPE if len(spans.steps) * len(spans.words) > LAYER_CELLS else None
            weights = [None] * len(maps.names) if maps.weights is None else maps.weights.tolist()
            for label, layer, weight in zip(maps.names, maps.layers.cpu().numpy(), weights, strict=True):
                known = {} if weight is None else {"weight": round(weight, 4)}
                entries.append({"name": label} | known | packed_map(layer, shape))
        packed.append({"name": name, "maps": entries})
    return {
        "steps": pieces_of(spans),
        "words": [spans.text[a:b] for a, b in spans.words],
        "rationale": rationale,
        "sides": packed,
    }


def fitting_view(
    spans: Spans, sides: Mapping[str, Maps], budget: Budget, share: float
) -> tuple[dict[str, Any] | None, str]:
    """The view of a text that fits into the budget, and a note about what was left out.

    With every layer it may have at most ``share`` bytes, and without them the rest of the budget; None and `TOO_LARGE`
    if even that is too little.
    """
    view = packed_view(spans, sides)
    if budget.take(view, share):
        return view, ""
    view = packed_view(spans, sides, every_layer=False)
    if budget.take(view):
        return view, "The maps of single layers were left out: they would make the file too large."
    return None, TOO_LARGE
