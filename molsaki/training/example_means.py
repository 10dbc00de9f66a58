"""`ExampleMeans`: what a training logs, as means over examples, however these are spread over batches and processes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, ones_like

OVERLAP = "map_overlap"
COUNTS = ("count", f"{OVERLAP}_count")


class ExampleMeans:
    """Sums the values of examples until their means are taken. Each example counts once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def clear(self) -> None:
        """Forget everything that was added."""
        self._sums = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of a batch: ``loss`` and others, each ``(N,)``, and layer weights ``(N, L)``."""
        values = values | {"count": ones_like(values["loss"])}
        if OVERLAP in values:  # NaN for examples without a step to compare
            overlap = values[OVERLAP]
            values |= {OVERLAP: overlap.nan_to_num(), f"{OVERLAP}_count": 1 - overlap.isnan().float()}
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double().sum(0)

    def take(
        self, reduce: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda sums: sums
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Metrics as means over examples (``without_words``: their number), and the layer weights of both sides.

        Args:
            reduce: adds the sums of all processes.
        """
        sums = reduce(self._sums)
        self.clear()
        means = {name: value / sums["count"] for name, value in sums.items() if name not in COUNTS}
        compared = sums.get(f"{OVERLAP}_count")
        if compared is not None:
            means.pop(OVERLAP)
            if compared > 0:
                means[OVERLAP] = sums[OVERLAP] / compared
        weights = {name.removesuffix("_weights"): value.tolist() for name, value in means.items() if value.ndim == 1}
        metrics = {name: value.item() for name, value in means.items() if value.ndim == 0}
        return metrics | {"without_words": int(sums["without_words"])}, weights
