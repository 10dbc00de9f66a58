"""Writes what a study found: CSV files of all runs, a report with tables, and pictures."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molsaki.extras import require
from molsaki.io import atomic_write
from molsaki.locks import locked
from molsaki.study.comparisons import comparisons
from molsaki.study.config import Study, read_study
from molsaki.study.results import Result, curves_table, read_results, results_table, write_csv
from molsaki.study.run import FAILED, LOCKS, RESULT, check_finished

LEVEL = 0.05  # of the adjusted p-values that the first lines of the report name
CONSTANT = 0.9  # a larger share of one answer is reported
NOTES = """\
Accuracies are in per cent, differences in percentage points, and brackets hold 95 % intervals, which take both seeds
and problems as random samples (`molsaki.evaluation.statistics`). A difference is paired by seed and problem; *pairs* is
the number of seeds that both arms have. *p* is two-sided; *p (Holm)* is corrected for all comparisons of the table.
Intervals and p of one seed alone, marked \\*, are over the problems only and say nothing about other seeds.
"""


def write_report(path: str | Path) -> list[Path]:
    """Write all finished runs of a study to its ``output_dir``.

    Returns:
        The files: ``results.csv`` (a row per run and test), ``curves.csv`` (per run and logged step),
        ``comparisons.csv`` (per arm and test), ``report.md``, and pictures if matplotlib is installed.
    """
    study = read_study(path, with_models=False)
    check_finished(study)
    folder = study.output_dir
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCKS / "report.lock"):
        results = read_results(study)
        compared, curves = comparisons(study, results), curves_table(results)
        write_csv(folder / "results.csv", results_table(results))
        write_csv(folder / "curves.csv", curves)
        write_csv(folder / "comparisons.csv", compared)
        pictures, note = _draw(study, compared, curves)
        with atomic_write(folder / "report.md") as file:
            file.write(_report(study, results, compared, pictures, note))
    return [folder / name for name in ("results.csv", "curves.csv", "comparisons.csv", "report.md")] + pictures


def _report(
    study: Study, results: Sequence[Result], compared: Sequence[dict[str, Any]], pictures: Sequence[Path], note: str
) -> str:
    tests = dict.fromkeys((row["data"], row["test"]) for row in compared)
    scores = {name: None for result in results for one in result.scores.values() for name in one}
    lines = [f"# {study.path.name}: {len(results)} of {len(study.runs)} runs are finished", ""]
    lines += _primary_findings(study, compared)
    lines += [_finding(study, data, test, compared) for data, test in tests]
    lines += ["", NOTES]
    lines += _primary_tables(study, compared)
    for data, test in tests:
        lines += [f"## {data}: {test}", ""] + _table(study, data, test, compared) + [""]
        if scores:
            lines += _scores_table(data, test, results, list(scores)) + [""]
        lines += _constant_replies(data, test, results)
    lines += [f"![{path.stem}]({path.name})" for path in pictures] + [note, ""]
    lines += ["## Runs that are not finished", ""] + (_unfinished(study) or ["None."]) + [""]
    lines += ["## Where the runs were done", ""] + _origins(results) + [""]
    others = _others(study)
    if others:
        lines += ["## Results that the study does not name", "", "They are in no table:", ""]
        lines += [f"- {path}" for path in others] + [""]
    return "\n".join(lines)


def _primary_findings(study: Study, compared: Sequence[dict[str, Any]]) -> list[str]:
    """One line per data set, in bold: which primary arms differ from the baseline."""
    if study.primary is None:
        return []
    lines = []
    for data in study.data:
        rows = [row for row in compared if row["data"] == data and "p_holm_primary" in row]
        arms, test = study.primary.arms, study.primary.test
        made = [row for row in compared if (row["data"], row["test"]) == (data, test) and "pairs" in row]
        missing = [arm for arm in arms if arm not in [row["arm"] for row in made]]
        clear = [f"{row['arm']} {100 * row['difference']:+.1f}" for row in rows if row["p_holm_primary"] < LEVEL]
        which = f" ({', '.join(clear)} points)" if clear else ""
        not_yet = f" No pair yet: {', '.join(missing)}." if missing else ""
        lines.append(
            f"- **{data}, {test}: {len(clear) or 'none'} of {len(arms)} primary comparisons with p (Holm) below "
            f"{LEVEL}{which}.{not_yet}**"
        )
    return lines


def _primary_tables(study: Study, compared: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for data in study.data if study.primary is not None else ():
        rows = [row for row in compared if row["data"] == data and "p_holm_primary" in row]
        if rows:
            lines += [f"## {data}: primary comparisons on {rows[0]['test']}", ""]
            lines += ["p (Holm) is corrected for these comparisons alone.", ""]
            lines += ["| arm | difference | pairs | p | p (Holm) |", "| --- | --- | --- | --- | --- |"]
            for row in rows:
                cells = [f"{row['arm']} - {row['baseline']}", _interval(row, "difference_", "+.1f")]
                cells += [row["pairs"], _p(row["p"])]
                lines.append("| " + " | ".join(map(str, [*cells, _p(row["p_holm_primary"])])) + " |")
            lines.append("")
    return lines


def _finding(study: Study, data: str, test: str, compared: Sequence[dict[str, Any]]) -> str:
    """One line: which arms differ from the baseline."""
    rows = [row for row in compared if (row["data"], row["test"]) == (data, test) and "p" in row]
    if not rows:
        return f"- {data}, {test}: nothing to compare yet."
    clear = [f"{row['arm']} {100 * row['difference']:+.1f}" for row in rows if row["p_holm"] < LEVEL]
    many = str(len(clear)) if clear else "none"
    which = f" ({', '.join(clear)} points)" if clear else ""
    if any(row["difference_over"] == "problems" for row in rows):
        which += "; one seed only, so for these seeds"
    return f"- {data}, {test}: {many} of {len(rows)} comparisons with p (Holm) below {LEVEL}{which}."


def _table(study: Study, data: str, test: str, compared: Sequence[dict[str, Any]]) -> list[str]:
    rows = [row for row in compared if (row["data"], row["test"]) == (data, test)]
    lines = [f"{rows[0]['problems']} problems.", ""]
    columns = ["arm", "seeds", "accuracy"]
    if any(study.baselines.values()):
        columns += ["difference", "to", "pairs", "p", "p (Holm)"]
    lines += ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for row in rows:
        cells = [row["arm"], row["seeds"], _interval(row, "", ".1f")]
        if "difference" in row and "p" not in row:
            cells += [f"{100 * row['difference']:+.1f} (no answer differs)", row["baseline"], row["pairs"]]
        elif "p" in row:
            cells += [_interval(row, "difference_", "+.1f"), row["baseline"], row["pairs"]]
            cells += [_p(row["p"]), _p(row["p_holm"])]
        lines.append("| " + " | ".join(map(str, cells)) + " |" + " |" * (len(columns) - len(cells)))
    return lines


def _constant_replies(data: str, test: str, results: Sequence[Result]) -> list[str]:
    """Lines about students that give nearly always the same answer: their accuracy says nothing about a method."""
    found = [
        f"- {result.run}: {100 * result.most_common[test]:.0f} % of the replies give the same answer."
        for result in results
        if result.run.data == data and result.most_common[test] > CONSTANT
    ]
    return [*found, ""] if found else []


def _scores_table(data: str, test: str, results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """The means of the study's own scores over seeds."""
    lines = ["| arm | " + " | ".join(name.removeprefix("score.") for name in names) + " |"]
    lines += ["| --- |" + " --- |" * len(names)]
    by_arm: dict[str, list[dict[str, float]]] = {}
    for result in results:
        if result.run.data == data:
            by_arm.setdefault(result.run.arm, []).append(result.scores[test])
    for arm, found in by_arm.items():
        means = [[one[name] for one in found if name in one] for name in names]
        lines.append(f"| {arm} | " + " | ".join(f"{sum(one) / len(one):.4g}" if one else "" for one in means) + " |")
    return lines


def _interval(row: dict[str, Any], prefix: str, form: str) -> str:
    """An accuracy (no prefix) or a difference in per cent with its interval, marked if it is over problems only."""
    mean, low, high = (100 * row[name] for name in (prefix.rstrip("_") or "accuracy", f"{prefix}low", f"{prefix}high"))
    mark = " \\*" if row[f"{prefix}over"] == "problems" else ""
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]{mark}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _unfinished(study: Study) -> list[str]:
    lines = []
    for run in study.runs:
        if not (run.folder / RESULT).is_file():
            failed = run.folder / FAILED
            state = f"failed: {json.loads(failed.read_text())['error']}" if failed.is_file() else "missing"
            lines.append(f"- {run}: {state}")
    return lines


def _origins(results: Sequence[Result]) -> list[str]:
    """The versions, commits and machines of the runs, and how many runs each has."""
    found = collections.Counter(
        ", ".join(
            [*(f"{name} {version}" for name, version in result.record["versions"].items())]
            + [f"{n} {v}" for n, v in ({"commit": result.record["commit"]} | result.record["machine"]).items() if v]
        )
        for result in results
    )
    return [f"- {count} runs: {origin}" for origin, count in found.items()]


def _others(study: Study) -> list[str]:
    known = {run.folder for run in study.runs}
    found = [path.parent for path in study.output_dir.glob(f"*/*/*/{RESULT}") if path.parent not in known]
    return sorted(path.relative_to(study.output_dir).as_posix() for path in found)


def _draw(study: Study, compared: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]]) -> tuple[list[Path], str]:
    """The pictures, and a line of the report in place of them if matplotlib is not installed."""
    try:
        require("plot")
    except ImportError as error:
        return [], f"No pictures: {error}."
    from molsaki.plotting.plots import plot_accuracy, plot_differences

    drawn = []
    for data in study.data:
        differences: dict[str, dict[str, tuple[float, float, float]]] = {}
        for row in compared:
            if row["data"] == data and "p" in row:
                mean, low, high = (100 * row[f"difference{name}"] for name in ("", "_low", "_high"))
                differences.setdefault(row["test"], {})[f"{row['arm']} - {row['baseline']}"] = (mean, low, high)
        if differences:
            path = study.output_dir / f"differences-{data}.png"
            drawn.append(plot_differences(differences, path, data))
        points: dict[str, dict[int, list[float]]] = {}
        for row in curves:
            if row["data"] == data and "accuracy" in row:
                points.setdefault(row["arm"], {}).setdefault(row["step"], []).append(100 * row["accuracy"])
        if points:
            baseline = next(filter(None, study.baselines.values()), None)
            drawn.append(plot_accuracy(points, baseline, study.output_dir / f"accuracy-{data}.png", data))
    return drawn, ""
