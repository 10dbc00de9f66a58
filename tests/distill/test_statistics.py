"""Intervals and tests of several seeds on the same problems.

Coverage in % of nominal 95% intervals, with the mean half-width in points, in 1,000 simulated studies per line of a
method and an equally good baseline (`simulated`). "Over seeds" is the paired t test over seeds.
At an accuracy of 30 %, a seed effect of 0.1 gives the seeds' differences a standard deviation of about 3.6 points.

| problems | level | problem effect | seed effect | seeds | accuracy | bootstrap | difference | over seeds | bootstrap |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 1000 | 30 % | 0.2 | 0 | 3 | 96 (2.6) | 97 (2.6) | 100 (4.5) | 94 (3.7) | 99 (2.9) |
| 1000 | 30 % | 0.2 | 0 | 5 | 96 (2.1) | 97 (2.3) | 99 (2.3) | 95 (2.0) | 100 (2.4) |
| 1000 | 30 % | 0.2 | 0 | 8 | 96 (1.9) | 97 (2.1) | 98 (1.6) | 92 (1.3) | 100 (2.0) |
| 1000 | 30 % | 0.2 | 0.1 | 3 | 93 (5.4) | 88 (3.4) | 98 (8.3) | 95 (8.2) | 89 (4.0) |
| 1000 | 30 % | 0.2 | 0.1 | 5 | 94 (3.4) | 93 (3.0) | 95 (4.4) | 94 (4.4) | 94 (3.5) |
| 1000 | 30 % | 0.2 | 0.1 | 8 | 96 (2.8) | 96 (2.7) | 96 (3.1) | 95 (3.1) | 95 (2.9) |
| 1000 | 30 % | 0.2 | 0.2 | 3 | 92 (10.5) | 80 (5.1) | 95 (15.1) | 94 (15.1) | 79 (6.1) |
| 1000 | 30 % | 0.2 | 0.2 | 5 | 94 (6.1) | 88 (4.5) | 95 (8.0) | 95 (8.0) | 89 (5.4) |
| 1000 | 30 % | 0.2 | 0.2 | 8 | 95 (4.6) | 93 (3.9) | 96 (5.7) | 96 (5.7) | 91 (4.6) |
| 500 | 30 % | 0.7 | 0 | 3 | 97 (3.7) | 98 (3.7) | 100 (4.9) | 92 (5.0) | 99 (4.4) |
| 500 | 30 % | 0.7 | 0 | 5 | 96 (3.1) | 98 (3.3) | 97 (3.4) | 85 (2.7) | 99 (3.8) |
| 500 | 30 % | 0.7 | 0 | 8 | 95 (2.8) | 97 (3.1) | 96 (2.8) | 80 (1.8) | 98 (3.3) |
| 200 | 3 % | 0 | 0.1 | 3 | 98 (2.9) | 98 (2.1) | 100 (4.3) | 96 (3.8) | 99 (2.7) |
| 200 | 3 % | 0 | 0.1 | 5 | 97 (1.8) | 97 (1.8) | 99 (2.2) | 96 (2.0) | 99 (2.2) |
| 200 | 3 % | 0 | 0.1 | 8 | 95 (1.4) | 98 (1.6) | 98 (1.5) | 94 (1.3) | 100 (1.8) |
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from molsaki.evaluation.statistics import accuracy, difference, holm, paired_test, wilson


def simulated(generator, seeds, problems, level, *, problem_effect=0.0, seed_effect=0.0):
    """Answers of a method and its baseline with the same expected accuracy, ``level``.

    An answer is right if a normal variable is positive: the sum of the problem's difficulty (standard deviation 1), its
    difficulty for the method (``problem_effect``), an effect of the seed (``seed_effect / 2``), one of the seed for the
    method (``seed_effect``), and noise (1).
    """
    variance = 2 + problem_effect**2 + 1.25 * seed_effect**2
    shared = stats.norm.ppf(level) * variance**0.5 + generator.normal(0, 1, (1, problems))
    shared = shared + generator.normal(0, seed_effect / 2, (seeds, 1))
    answers = []
    for _ in range(2):
        own = generator.normal(0, problem_effect, (1, problems)) + generator.normal(0, seed_effect, (seeds, 1))
        answers.append(shared + own + generator.normal(0, 1, (seeds, problems)) > 0)
    return answers


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize(
    ("problems", "level", "effects"),
    [
        (500, 0.3, dict(problem_effect=0.2, seed_effect=0.2)),
        (300, 0.3, dict(problem_effect=0.7)),
        (200, 0.03, dict(seed_effect=0.1)),
    ],
)
def test_the_intervals_to_report_cover_the_truth(seeds, problems, level, effects):
    """With seed effects the bootstrap of three seeds does not; with problem effects the t test over seeds does not."""
    generator = np.random.default_rng(0)
    covered = []
    for trial in range(200):
        right, baseline = simulated(generator, seeds, problems, level, **effects)
        a, d = accuracy(right, resamples=1), difference(right, baseline, resamples=200, seed=trial)
        assert (d.p_value < 0.05) == (not d.low <= 0 <= d.high)
        covered.append(
            (a.low <= level <= a.high, d.low <= 0 <= d.high, d.bootstrap_low <= 0 <= d.bootstrap_high,
             d.seeds_low is not None and d.seeds_low <= 0 <= d.seeds_high)
        )  # fmt: skip
    of_accuracy, of_difference, bootstrap, over_seeds = np.mean(covered, axis=0)
    assert of_accuracy > 0.9 and of_difference > 0.9  # 0.95 less three standard errors
    if seeds == 3 and effects.get("seed_effect") == 0.2:
        assert bootstrap < 0.88
    if seeds == 8 and effects.get("problem_effect") == 0.7:
        assert over_seeds < 0.88


def test_the_crossed_bootstrap_is_that_of_a_loop():
    generator = np.random.default_rng(3)
    right, baseline = simulated(generator, 4, 60, 0.4, problem_effect=0.5, seed_effect=0.3)
    for values, found in (
        (right.astype(int), accuracy(right)),
        (right.astype(int) - baseline, difference(right, baseline)),
    ):
        means = [
            values[np.ix_(generator.integers(4, size=4), generator.integers(60, size=60))].mean() for _ in range(10_000)
        ]
        assert (found.bootstrap_low, found.bootstrap_high) == pytest.approx(
            np.quantile(means, [0.025, 0.975]), abs=0.01
        )
    assert accuracy(right) == accuracy(right)
    assert accuracy(right, seed=1).bootstrap_low == pytest.approx(accuracy(right).bootstrap_low, abs=0.01)


def test_the_test_over_seeds_is_that_of_scipy():
    right, baseline = simulated(np.random.default_rng(4), 5, 200, 0.4, seed_effect=0.2)
    found, expected = difference(right, baseline), stats.ttest_rel(right.mean(1), baseline.mean(1))
    interval = expected.confidence_interval(0.95)
    assert (found.seeds_low, found.seeds_high) == pytest.approx((interval.low, interval.high))
    assert found.seeds_p_value == pytest.approx(expected.pvalue)
    assert found.mean == pytest.approx(right.mean() - baseline.mean())
    reverse = difference(baseline, right)
    assert (reverse.low, reverse.p_value) == pytest.approx((-found.high, found.p_value))


def test_one_seed_is_over_problems_only():
    right, baseline = simulated(np.random.default_rng(5), 1, 300, 0.4, problem_effect=0.5)
    found, of_accuracy = difference(right, baseline), accuracy(right)
    expected = stats.ttest_rel(right[0].astype(int), baseline[0].astype(int))
    interval = expected.confidence_interval(0.95)
    assert found.over == of_accuracy.over == "problems"
    assert (found.low, found.high, found.p_value) == pytest.approx((interval.low, interval.high, expected.pvalue))
    assert (found.seeds_low, found.seeds_high, found.seeds_p_value) == (None, None, None)
    wilson = stats.binomtest(int(right.sum()), 300).proportion_ci(method="wilson")
    assert (of_accuracy.low, of_accuracy.high) == pytest.approx((wilson.low, wilson.high), abs=1e-3)
    assert accuracy(np.repeat(right, 2, 0)).over == "seeds and problems"


def test_extreme_answers():
    """All right is not known to be right always; the same answers differ by 0; equal differences allow no t test."""
    ones = np.ones((3, 20), bool)
    of_all = accuracy(ones)
    assert (of_all.mean, of_all.high) == (1, 1) and 0.7 < of_all.low < 0.9
    assert accuracy(~ones).high == pytest.approx(1 - of_all.low)
    right, baseline = simulated(np.random.default_rng(6), 3, 50, 0.4)
    same = difference(right, right)
    assert (same.mean, same.low, same.high, same.p_value, same.seeds_p_value) == (0, 0, 0, 1, None)
    assert difference(ones, ~ones).p_value == 0
    equal = difference(right[[0, 0, 0]], baseline[[0, 0, 0]])
    assert equal.seeds_p_value is None
    assert equal[:4] == pytest.approx(difference(right[:1], baseline[:1])[:4])


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # p.adjust of R
    assert holm([0.9, 0.6]) == [1, 1]
    assert holm([]) == []
    for p_values in ([0.1, float("nan")], [1.1], [-0.1]):
        with pytest.raises(ValueError, match="p_values: expected numbers from 0 to 1"):
            holm(p_values)


def test_bad_arrays():
    right = np.ones((2, 5), bool)
    for bad in (right.astype(float), right[0], right[:, :1], right[:0]):
        with pytest.raises(ValueError, match="right: expected booleans of shape"):
            accuracy(bad)
    with pytest.raises(ValueError, match="baseline: expected booleans of shape"):
        difference(right, right.astype(int))
    with pytest.raises(ValueError, match=r"baseline: expected the shape of right, \(2, 5\), got \(1, 5\)"):
        difference(right, right[:1])


def test_wilson_interval_by_hand():
    n, p, z = 40, 0.25, 1.959963985
    center, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5,
    )
    assert wilson(10, 40) == pytest.approx((center - half, center + half), abs=1e-9)


def test_paired_test_by_hand():
    a = [True] * 6 + [False] * 1 + [True] * 5
    b = [False] * 6 + [True] * 1 + [True] * 5
    assert paired_test(a, b) == {"only_this": 6, "only_other": 1, "p_value": pytest.approx(2 * (1 + 7) / 2**7)}
    assert paired_test(a, a)["p_value"] == 1.0
    with pytest.raises(ValueError, match="expected 12 results"):
        paired_test(a, b[1:])
