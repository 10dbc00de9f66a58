"""Fills the tables of docs/evidence.md from the CSV files, between ``<!-- table NAME -->`` and ``<!-- end -->``.

python -m studies.tables studies/results docs/evidence.md
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from scipy import stats

Rows = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Listed:
    """The arms of one set of the study, in the order of its tables.

    Attributes:
        groups: tables of differences by name, and their arms.
    """

    primary: tuple[str, ...]
    controls: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]

    @property
    def main(self) -> tuple[str, ...]:
        return ("dss", *self.primary, *self.controls)


METHODS = ("paper", "vanilla", "cot", "mmi", "logits")
SETS = {
    "first": Listed(
        primary=("paper-10", "sum-10", "heads-10", "pointer-10"),
        controls=("random-10", "other-10", "untrained-10"),
        groups={
            "methods": METHODS,
            "decider": ("decider-10", "decider-30", "decider-other-10", "sum-numbers-10"),
        },
    ),
    "second": Listed(
        primary=("pointer-30", "decider-30", "decider-early-30"),
        controls=("pointer-other-30", "decider-other-30"),
        groups={
            "methods": METHODS,
            "layers": ("last-10", "uniform-10", "reverse-10", "random-layers-10", "single-10"),
            "changes": (
                *("paper-mean-10", "paper-flat-10", "sum-sharp-10", "sum-rationale-10", "sum-early-10"),
                *("pointer-early-30", "pointer-matched-10", "sum-numbers-10"),
            ),
            "few": ("dss-500", "sum-10-500", "pointer-30-500"),
            "others": ("random-10", "other-10", "untrained-10"),
        },
    ),
    "third": Listed(primary=("decider-early-30",), controls=("decider-early-other-30",), groups={}),
}
DOSES = ("paper", "sum", "heads", "pointer", "decider")
LOOKS = ["whole", "whole_taught", "before", "before_taught", "before_right", "before_wrong", "divergence"]
TESTS = ["test", "distractors", "hops", "templates"]
REAL = ("real", "real-gpu")  # the check with a real model: its small and its large form


def tables(folder: Path) -> dict[str, str]:
    """Each table in Markdown by name, the set's first; arms without a finished run are left out.

    Args:
        folder: of the sets' folders.
    """
    found = {}
    for name, listed in SETS.items():
        found |= {f"{name}-{table}": text for table, text in _of_set(folder / name, listed).items()}
    found |= {name: _real(folder / name) for name in REAL}
    return found | {"all": _all_sets([_read(folder / name / "results.csv") for name in SETS])}


def _of_set(folder: Path, listed: Listed) -> dict[str, str]:
    compared, results, curves = (_read(folder / f"{name}.csv") for name in ("comparisons", "results", "curves"))
    looks = _read(folder / "looks.csv")
    by_test = {test: {row["arm"]: row for row in compared if row["test"] == test} for test in TESTS}
    found = {"main": _main(by_test["test"], listed), "tests": _tests(by_test, listed), "dose": _doses(by_test["test"])}
    found |= {name: _differences(by_test["test"], arms) for name, arms in listed.groups.items()}
    found["mistakes"] = _mistakes([row for row in results if row["test"] == "test"], listed)
    found["curves"] = _curves(curves, listed)
    found["shares"] = _shares(curves)
    found["looks"] = _looks(looks, listed)
    return found


def fill(text: str, found: dict[str, str]) -> str:
    """The text with its tables replaced.

    Raises:
        ValueError: the text has a table that does not exist, or one without an end.
    """
    parts = re.split(r"<!-- table (\S+) -->\n", text)
    filled = parts[0]
    for name, part in zip(parts[1::2], parts[2::2], strict=True):
        if name not in found:
            raise ValueError(f"table {name}: expected one of {', '.join(found)}")
        _, end, rest = part.partition("<!-- end -->")
        if not end:
            raise ValueError(f"table {name}: expected <!-- end --> after it")
        filled += f"<!-- table {name} -->\n{found[name]}\n{end}{rest}"
    return filled


def _main(rows: dict[str, dict[str, str]], listed: Listed) -> str:
    lines = []
    for arm in listed.main:
        if arm in rows:
            row = rows[arm]
            lines.append([f"`{arm}`", row["seeds"], _interval(row), _difference(row), _p(row.get("p_holm_primary"))])
    p = {1: "p", 3: "p (Holm, of three)", 4: "p (Holm, of four)"}[len(listed.primary)]
    columns = ["arm", "seeds", "accuracy on `test`, %", "difference to `dss`, points", p]
    return _markdown(columns, lines)


def _tests(by_test: dict[str, dict[str, dict[str, str]]], listed: Listed) -> str:
    lines = []
    for arm in listed.main:
        if arm in by_test[TESTS[1]]:
            rows = [by_test[test][arm] for test in TESTS[1:]]
            cells = [_interval(row) if arm == "dss" else _difference(row) for row in rows]
            lines.append([f"`{arm}`", *cells])
    return _markdown(["arm", *(f"`{test}`" for test in TESTS[1:])], lines)


def _doses(rows: dict[str, dict[str, str]]) -> str:
    """With the number of pairs of seeds behind each difference."""
    lines = []
    for form in DOSES:
        found = [rows.get(f"{form}-{share}", {}) for share in (1, 10, 30)]
        if any(found):
            lines.append([f"`{form}`", *(f"{_difference(row)} ({row['pairs']})" if row else "" for row in found)])
    return _markdown(["form", "1 % of the gradient", "10 %", "30 %"], lines)


def _differences(rows: dict[str, dict[str, str]], arms: Sequence[str]) -> str:
    lines = []
    for arm in arms:
        if arm in rows:
            row = rows[arm]
            against = f"`{row['baseline']}`" if row.get("baseline") else ""
            cells = [_interval(row), _difference(row), against, row.get("pairs", ""), _p(row.get("p_holm"))]
            lines.append([f"`{arm}`", *cells])
    columns = ["arm", "accuracy on `test`, %", "difference, points", "to", "pairs", "p (Holm, of all arms)"]
    return _markdown(columns, lines)


def _mistakes(rows: Rows, listed: Listed) -> str:
    kinds = ["exact", "first_mistake_plan", "first_mistake_base", "first_mistake_carry", "first_mistake_operand"]
    kinds += ["first_mistake_sum", "first_mistake_form"]
    lines = []
    for arm in listed.main:
        of_arm = [row for row in rows if row["arm"] == arm]
        if of_arm:
            means = [_mean(of_arm, f"score.{kind}") for kind in kinds]
            lines.append([f"`{arm}`", *(f"{100 * mean:.1f}" for mean in means)])
    return _markdown(["arm", *(kind.removeprefix("first_mistake_") for kind in kinds)], lines)


def _curves(rows: Rows, listed: Listed) -> str:
    measured = [row for row in rows if row.get("accuracy")]
    steps = sorted({int(row["step"]) for row in measured})
    lines = []
    for arm in listed.main:
        of_arm = [row for row in measured if row["arm"] == arm]
        if of_arm:
            at = [[row for row in of_arm if int(row["step"]) == step] for step in steps]
            lines.append([f"`{arm}`", *(f"{100 * _mean(one, 'accuracy'):.1f}" if one else "" for one in at)])
    return _markdown(["arm", *(f"{step} steps" for step in steps)], lines)


SHARES = ["share of the gradient, %: median (least to largest)", "`beta`"]


def _shares(rows: Rows) -> str:
    return _markdown(["arm", *SHARES], [[f"`{arm}`", *cells] for arm, cells in _shares_of_arms(rows).items()])


def _shares_of_arms(rows: Rows) -> dict[str, list[str]]:
    """The measured share of the gradient and beta, of the logged steps after the first 50."""
    found = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm and row.get("attention_share") and int(row["step"]) > 50]
        if of_arm:
            shares = [100 * float(row["attention_share"]) for row in of_arm]
            betas = [float(row["beta"]) for row in of_arm]
            found[arm] = [_range(shares), _range(betas)]
    return found


def _range(values: Sequence[float]) -> str:
    median, least, most = (f"{one:.3g}" for one in (statistics.median(values), min(values), max(values)))
    return median if least == most else f"{median} ({least} to {most})"


def _real(folder: Path) -> str:
    """Every arm of a check with a real model; the first test is the primary one."""
    compared, shares = _read(folder / "comparisons.csv"), _shares_of_arms(_read(folder / "curves.csv"))
    tests = list(dict.fromkeys(row["test"] for row in compared))
    accuracies = {(row["test"], row["arm"]): f"{100 * float(row['accuracy']):.1f}" for row in compared}
    corrected = "p_holm_primary" if any(row.get("p_holm_primary") for row in compared) else "p_holm"
    lines = []
    for row in compared:
        if row["test"] == tests[0]:
            arm, p = row["arm"], row.get(corrected)
            others = [accuracies.get((test, arm), "") for test in tests[1:]]
            cells = [f"`{arm}`", row["seeds"], _interval(row), _difference(row), _p(p), *others]
            lines.append([*cells, *shares.get(arm, ["", ""])])
    columns = ["arm", "seeds", "accuracy, %", "difference to `dss`, points", "p (Holm)"]
    return _markdown([*columns, *(f"`{test}`, %" for test in tests[1:]), *SHARES], lines)


def _all_sets(sets: Sequence[Rows]) -> str:
    """Of the arms of two sets or more: the mean difference to ``dss`` on ``test`` over all pairs of seeds.

    The interval is Student's t over the pairs, since the answers of the first set to single problems are lost.
    """
    differences: dict[str, list[list[float]]] = {}
    for number, rows in enumerate(sets):
        accuracies = {(row["arm"], row["seed"]): float(row["accuracy"]) for row in rows if row["test"] == "test"}
        for (arm, seed), accuracy in accuracies.items():
            if arm != "dss" and ("dss", seed) in accuracies:
                pairs = differences.setdefault(arm, [[] for _ in sets])
                pairs[number].append(100 * (accuracy - accuracies["dss", seed]))
    joined = {arm: sum(pairs, []) for arm, pairs in differences.items()}
    lines = []
    for arm in sorted(differences, key=lambda arm: -statistics.mean(joined[arm])):
        pairs, every = differences[arm], joined[arm]
        if sum(map(bool, pairs)) > 1:
            low, high = stats.ttest_1samp(every, 0).confidence_interval(0.95)
            means = [f"{statistics.mean(one):+.1f} ({len(one)})" if one else "" for one in pairs]
            whole = f"{statistics.mean(every):+.1f} [{low:+.1f}, {high:+.1f}]"
            lines.append([f"`{arm}`", *means, whole, f"{sum(one > 0 for one in every)} of {len(every)}"])
    columns = ["arm", *(f"{name} set" for name in SETS), "all, points", "seeds better than `dss`"]
    return _markdown(columns, lines)


def _looks(rows: Rows, listed: Listed) -> str:
    lines = []
    for arm in dict.fromkeys(["teacher", "base", *listed.main, *(row["arm"] for row in rows)]):
        of_arm = [row for row in rows if row["arm"] == arm]
        if of_arm:
            cells = [_mean([row for row in of_arm if row[name] not in ("", "nan")], name) for name in LOOKS]
            lines.append([f"`{arm}`", *("" if cell != cell else f"{round(cell, 2) + 0.0:.2f}" for cell in cells)])
    return _markdown(["model", *(name.replace("_", ", ") for name in LOOKS)], lines)


def _read(path: Path) -> Rows:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _mean(rows: Rows, name: str) -> float:
    # Not sum(): since Python 3.12 it rounds otherwise, and a table would depend on the version.
    return math.fsum(float(row[name]) for row in rows) / len(rows) if rows else float("nan")


def _interval(row: dict[str, str], prefix: str = "", form: str = ".1f") -> str:
    """A number in per cent with its interval; * if that is over problems only, of one seed."""
    names = (prefix.rstrip("_") or "accuracy", f"{prefix}low", f"{prefix}high")
    mean, low, high = (round(100 * float(row[name]), 1) + 0.0 for name in names)  # + 0.0: no negative zero
    mark = " \\*" if row.get(f"{prefix}over") == "problems" else ""
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]{mark}"


def _difference(row: dict[str, str]) -> str:
    if not row.get("pairs"):
        return ""
    if not row.get("p"):
        return f"{100 * float(row['difference']):+.1f} (no interval)"
    return _interval(row, "difference_", "+.1f")


def _p(value: str | None) -> str:
    if not value:
        return ""
    return "< 0.001" if float(value) < 0.001 else f"{float(value):.3f}"


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(columns), ["---"] * len(columns), *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of the CSV files")
    parser.add_argument("document", type=Path)
    args = parser.parse_args(argv)
    text = args.document.read_text(encoding="utf-8")
    args.document.write_text(fill(text, tables(args.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
