"""Writes what a study found: CSV files of all runs, tables with intervals, and pictures."""

from __future__ import annotations

from pathlib import Path

from molsaki.locks import locked
from molsaki.study.config import read_study
from molsaki.study.results import curves_table, read_results, results_table, write_csv
from molsaki.study.run import LOCKS, check_finished


def write_report(path: str | Path) -> list[Path]:
    """Write ``results.csv`` and ``curves.csv`` of all finished runs of a study to its ``output_dir``; the files."""
    study = read_study(path)
    check_finished(study)
    (study.output_dir / LOCKS).mkdir(parents=True, exist_ok=True)
    with locked(study.output_dir / LOCKS / "report.lock"):
        results = read_results(study)
        write_csv(study.output_dir / "results.csv", results_table(study, results))
        write_csv(study.output_dir / "curves.csv", curves_table(results))
    return [study.output_dir / name for name in ("results.csv", "curves.csv")]
