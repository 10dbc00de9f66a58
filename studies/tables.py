"""Fills the tables of docs/evidence.md from the CSV files, between ``<!-- table NAME -->`` and ``<!-- end -->``.

python -m studies.tables studies/results docs/evidence.md
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Sequence
from pathlib import Path

Rows = list[dict[str, str]]

PRIMARY = ["paper-10", "sum-10", "heads-10", "pointer-10"]
CONTROLS = ["random-10", "other-10", "untrained-10"]
GROUPS = {
    "methods": ["paper", "vanilla", "cot", "mmi", "logits"],
    "layers": ["last-10", "uniform-10", "reverse-10", "random-layers-10", "single-10"],
    "changes": [
        *("paper-mean-10", "paper-flat-10", "sum-sharp-10", "sum-rationale-10", "sum-early-10"),
        *("pointer-early-30", "pointer-matched-10"),
    ],
    "few": ["dss-500", "sum-10-500", "pointer-10-500"],
}
DOSES = ["paper", "sum", "heads", "pointer"]
TESTS = ["test", "distractors", "hops", "templates"]


def tables(folder: Path) -> dict[str, str]:
    """Each table by name, in Markdown; arms without a finished run are left out."""
    compared, results, curves = (_read(folder / f"{name}.csv") for name in ("comparisons", "results", "curves"))
    looks = _read(folder / "looks.csv")
    by_test = {test: {row["arm"]: row for row in compared if row["test"] == test} for test in TESTS}
    found = {"main": _main(by_test["test"]), "tests": _tests(by_test), "dose": _doses(by_test["test"])}
    found |= {name: _differences(by_test["test"], arms) for name, arms in GROUPS.items()}
    found["mistakes"] = _mistakes([row for row in results if row["test"] == "test"])
    found["curves"] = _curves(curves)
    found["shares"] = _shares(curves)
    found["looks"] = _looks(looks)
    return found


def fill(text: str, found: dict[str, str]) -> str:
    """The text with its tables replaced.

    Raises:
        ValueError: the text has a table that does not exist.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name not in found:
            raise ValueError(f"table {name}: expected one of {', '.join(found)}")
        return f"<!-- table {name} -->\n{found[name]}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def _main(rows: dict[str, dict[str, str]]) -> str:
    lines = []
    for arm in ["dss", *PRIMARY, *CONTROLS]:
        if arm in rows:
            row = rows[arm]
            lines.append([f"`{arm}`", _interval(row, ""), _difference(row), _p(row.get("p_holm_primary"))])
    return _markdown(["arm", "accuracy on `test`, %", "difference to `dss`, points", "p (Holm, of four)"], lines)


def _tests(by_test: dict[str, dict[str, dict[str, str]]]) -> str:
    lines = []
    for arm in ["dss", *PRIMARY, *CONTROLS]:
        if arm in by_test[TESTS[1]]:
            rows = [by_test[test][arm] for test in TESTS[1:]]
            cells = [_interval(row, "") if arm == "dss" else _difference(row) for row in rows]
            lines.append([f"`{arm}`", *cells])
    return _markdown(["arm", *(f"`{test}`" for test in TESTS[1:])], lines)


def _doses(rows: dict[str, dict[str, str]]) -> str:
    lines = []
    for form in DOSES:
        cells = [_difference(rows.get(f"{form}-{share}", {})) for share in (1, 10, 30)]
        if any(cells):
            lines.append([f"`{form}`", *cells])
    return _markdown(["form", "1 % of the gradient", "10 %", "30 %"], lines)


def _differences(rows: dict[str, dict[str, str]], arms: Sequence[str]) -> str:
    lines = []
    for arm in arms:
        if arm in rows:
            row = rows[arm]
            against = f"`{row['baseline']}`" if row.get("baseline") else ""
            lines.append([f"`{arm}`", _interval(row, ""), _difference(row), against, _p(row.get("p_holm"))])
    return _markdown(["arm", "accuracy on `test`, %", "difference, points", "to", "p (Holm, of all arms)"], lines)


def _mistakes(rows: Rows) -> str:
    kinds = ["exact", "first_mistake_plan", "first_mistake_base", "first_mistake_carry", "first_mistake_operand"]
    kinds += ["first_mistake_sum", "first_mistake_form"]
    lines = []
    for arm in ["dss", *PRIMARY, *CONTROLS]:
        of_arm = [row for row in rows if row["arm"] == arm]
        if of_arm:
            means = [_mean(of_arm, f"score.{kind}") for kind in kinds]
            lines.append([f"`{arm}`", *(f"{100 * mean:.1f}" for mean in means)])
    return _markdown(["arm", *(kind.removeprefix("first_mistake_") for kind in kinds)], lines)


def _curves(rows: Rows) -> str:
    measured = [row for row in rows if row.get("accuracy")]
    steps = sorted({int(row["step"]) for row in measured})
    lines = []
    for arm in ["dss", *PRIMARY, *CONTROLS]:
        of_arm = [row for row in measured if row["arm"] == arm]
        if of_arm:
            at = [[row for row in of_arm if int(row["step"]) == step] for step in steps]
            lines.append([f"`{arm}`", *(f"{100 * _mean(one, 'accuracy'):.1f}" for one in at)])
    return _markdown(["arm", *(f"{step} steps" for step in steps)], lines)


def _shares(rows: Rows) -> str:
    """Beta and the measured share of the gradient, from the second measurement on."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm and row.get("attention_share") and int(row["step"]) > 50]
        if of_arm:
            betas = sorted(float(row["beta"]) for row in of_arm)
            share = sorted(100 * float(row["attention_share"]) for row in of_arm)
            middle = [f"{one[len(one) // 2]:.3g} ({one[0]:.3g} to {one[-1]:.3g})" for one in (share, betas)]
            lines.append([f"`{arm}`", *middle])
    return _markdown(["arm", "share of the gradient, %: median (least to largest)", "`beta`"], lines)


def _looks(rows: Rows) -> str:
    lines = []
    for arm in ["teacher", "base", "dss", *PRIMARY, *CONTROLS]:
        of_arm = [row for row in rows if row["arm"] == arm]
        if of_arm:
            names = ("operand_right", "operand_wrong", "divergence")
            cells = [_mean([row for row in of_arm if row[name] not in ("", "nan")], name) for name in names]
            lines.append([f"`{arm}`", *("" if cell != cell else f"{cell:.2f}" for cell in cells)])
    return _markdown(["model", "operand, right", "operand, wrong", "divergence"], lines)


def _read(path: Path) -> Rows:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _mean(rows: Rows, name: str) -> float:
    return sum(float(row[name]) for row in rows) / len(rows) if rows else float("nan")


def _interval(row: dict[str, str], prefix: str, form: str = ".1f") -> str:
    mean, low, high = (
        100 * float(row[f"{name}"]) for name in (prefix[:-1] or "accuracy", f"{prefix}low", f"{prefix}high")
    )
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _difference(row: dict[str, str]) -> str:
    return _interval(row, "difference_", "+.1f") if row.get("p") else ""


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
