"""Writes the results of a study: CSV files of all runs, a report with tables, and pictures."""

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
CONSTANT = 0.9  # a student that gives one answer more often than this is reported
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
    """One line per data set, in bold: which primary arms differ from the baseline, and which runs are missing."""
    if study.primary is None:
        return []
    lines = []
    for data in study.data:
        arms, test = study.primary.arms, study.primary.test
        rows = {row["arm"]: row for row in compared if (row["data"], row["test"]) == (data, test)}
        clear = [arm for arm in arms if rows.get(arm, {}).get("p_holm_primary", 1) < LEVEL]
        named = ", ".join(f"{arm} {100 * rows[arm]['difference']:+.1f}" for arm in clear)
        which = f" ({named} points{_caveat([rows[arm] for arm in clear])})" if clear else ""
        lacking = [f"{arm} {pairs}" for arm in arms if (pairs := _pairs_of(study, data, arm, rows)) is not None]
        not_yet = f" Not finished, pairs of seeds: {', '.join(lacking)}." if lacking else ""
        lines.append(
            f"- **{data}, {test}: {len(clear) or 'none'} of {len(arms)} primary comparisons with p (Holm) below "
            f"{LEVEL}{which}.{not_yet}**"
        )
    return lines


def _pairs_of(study: Study, data: str, arm: str, rows: dict[str, dict[str, Any]]) -> str | None:
    """``n of m`` pairs of seeds of an arm and its baseline if some are not finished."""
    seeds = [
        {run.seed for run in study.runs if (run.data, run.arm) == (data, one)} for one in (arm, study.baselines[arm])
    ]
    planned, pairs = len(set.intersection(*seeds)), rows.get(arm, {}).get("pairs", 0)
    return None if pairs == planned else f"{pairs} of {planned}"


def _primary_tables(study: Study, compared: Sequence[dict[str, Any]]) -> list[str]:
    if study.primary is None:
        return []
    lines = []
    for data in study.data:
        rows = {row["arm"]: row for row in compared if (row["data"], row["test"]) == (data, study.primary.test)}
        lines += [f"## {data}: primary comparisons on {study.primary.test}", ""]
        lines += [
            f"p (Holm) is corrected for these {len(study.primary.arms)}; those that cannot be made yet count as 1."
        ]
        lines += ["", "| arm | difference | pairs | p | p (Holm) |", "| --- | --- | --- | --- | --- |"]
        for arm in study.primary.arms:
            cells = [f"{arm} - {study.baselines[arm]}", *(_cells(rows[arm]) if "pairs" in rows.get(arm, {}) else [])]
            if "p_holm_primary" in rows.get(arm, {}):
                cells += [_p(rows[arm]["p"]), _p(rows[arm]["p_holm_primary"])]
            lines.append("| " + " | ".join(map(str, cells)) + " |" + " |" * (5 - len(cells)))
        lines.append("")
    return lines


def _caveat(rows: Sequence[dict[str, Any]]) -> str:
    return "; one seed only, so for these seeds" if any(row["difference_over"] == "problems" for row in rows) else ""


def _cells(row: dict[str, Any]) -> list[Any]:
    """The difference and the number of pairs."""
    if "p" in row:
        return [_interval(row, "difference_", "+.1f"), row["pairs"]]
    why = "every answer differs" if row["difference"] else "no answer differs"
    return [f"{100 * row['difference']:+.1f} ({why})", row["pairs"]]


def _finding(study: Study, data: str, test: str, compared: Sequence[dict[str, Any]]) -> str:
    """One line: which arms differ from the baseline."""
    rows = [row for row in compared if (row["data"], row["test"]) == (data, test) and "p" in row]
    if not rows:
        return f"- {data}, {test}: nothing to compare yet."
    clear = [f"{row['arm']} {100 * row['difference']:+.1f}" for row in rows if row["p_holm"] < LEVEL]
    many = str(len(clear)) if clear else "none"
    which = (f" ({', '.join(clear)} points)" if clear else "") + _caveat(rows)
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
        if "pairs" in row:
            difference, pairs = _cells(row)
            cells += [difference, row["baseline"], pairs, *((_p(row["p"]), _p(row["p_holm"])) if "p" in row else ())]
        lines.append("| " + " | ".join(map(str, cells)) + " |" + " |" * (len(columns) - len(cells)))
    return lines


def _constant_replies(data: str, test: str, results: Sequence[Result]) -> list[str]:
    """Lines about students that nearly always give the same answer: their accuracy says nothing about a method."""
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
    """The pictures, or a line of the report if matplotlib is not installed."""
    try:
        require("plot")
    except ImportError as error:
        return [], f"No pictures: {error}."
    from molsaki.plotting.study_pictures import plot_accuracy, plot_differences

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
            counts = collections.Counter(filter(None, study.baselines.values()))
            baseline = counts.most_common(1)[0][0] if counts else None
            drawn.append(plot_accuracy(points, baseline, study.output_dir / f"accuracy-{data}.png", data))
    return drawn, ""
