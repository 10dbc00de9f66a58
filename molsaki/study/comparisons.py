"""Compares the arms of a study: accuracies, differences to the baseline, intervals and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molsaki.evaluation.statistics import accuracy, difference, holm
from molsaki.study.config import Study
from molsaki.study.results import Result

RESAMPLES = 1  # the bootstrap's interval is not reported


def comparisons(study: Study, results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per data set, test and arm that has a finished run.

    Only problems that every finished run of the data set was asked count; a difference uses only the seeds that both
    arms have (``pairs``). ``p_holm`` is corrected for all comparisons of the test, ``p_holm_primary`` for the study's
    primary ones, including those that cannot be made yet. Accuracies and differences are from 0 to 1. A difference has
    neither interval nor p if its variance cannot be estimated, for example if no answer differs. ``over`` is
    ``problems`` if there is only one seed; the interval then says nothing about other seeds.
    """
    rows = []
    for data in study.data:
        of_data = [result for result in results if result.run.data == data]
        for test in of_data[0].run.tests if of_data else ():
            asked = set.intersection(*(set(result.right[test]) for result in of_data))
            ids = [id for id in of_data[0].right[test] if id in asked]
            arms: dict[str, dict[int, NDArray[np.bool_]]] = {}
            for result in of_data:
                right = np.array([result.right[test][id] for id in ids], dtype=bool)
                arms.setdefault(result.run.arm, {})[result.run.seed] = right
            of_test = []
            for arm, seeds in arms.items():
                row: dict[str, Any] = {"data": data, "test": test, "arm": arm}
                row |= {"seeds": len(seeds), "problems": len(ids)}
                found = accuracy(np.stack(list(seeds.values())), resamples=RESAMPLES)
                row |= {"accuracy": found.mean, "low": found.low, "high": found.high, "over": found.over}
                baseline = study.baselines[arm]
                base = arms.get(baseline or "", {})
                pairs = [seed for seed in seeds if seed in base]
                if pairs:
                    both = (np.stack([one[seed] for seed in pairs]) for one in (seeds, base))
                    change = difference(*both, resamples=RESAMPLES)
                    row |= {"baseline": baseline, "pairs": len(pairs), "difference": change.mean}
                    if change.low < change.high:
                        row |= {"difference_low": change.low, "difference_high": change.high}
                        row |= {"difference_over": change.over, "p": change.p_value}
                of_test.append(row)
            compared = [row for row in of_test if "p" in row]
            for row, adjusted in zip(compared, holm([row["p"] for row in compared]), strict=True):
                row["p_holm"] = adjusted
            primary = study.primary
            if primary is not None and primary.test == test:
                named = [row for row in compared if row["arm"] in primary.arms]
                missing = [1.0] * (len(primary.arms) - len(named))
                for row, adjusted in zip(named, holm([row["p"] for row in named] + missing), strict=False):
                    row["p_holm_primary"] = adjusted
            rows += of_test
    return rows
