"""The dry run of ``study``: the runs that are left."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Sequence

from molsaki.dry_run.counts import Found
from molsaki.study.config import read_study
from molsaki.study.run import FAILED, RESULT, check_finished


def dry_run_study(path: str, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> Found:
    """What ``molsaki study`` would run."""
    found = read_study(path)
    check_finished(found)
    runs = [run for run in found.runs if (not arms or run.arm in arms) and (not seeds or run.seed in seeds)]
    if not runs:
        raise ValueError(f"--arms, --seeds: no run of {path} has one of these arms and one of these seeds")
    seconds: dict[str, list[float]] = {}
    for run in runs:
        with contextlib.suppress(FileNotFoundError):
            result = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
            seconds.setdefault(f"{run.data}/{run.arm}", []).append(
                result["step_ms"] / 1000 * result["steps"] + result["evaluate_seconds"]
            )
    missing = [run for run in runs if not (run.folder / RESULT).is_file()]
    known = [run for run in missing if f"{run.data}/{run.arm}" in seconds]
    configs = {f"{run.data}/{run.arm}": found.distill_config(run) for run in runs}
    time_left = sum(statistics.fmean(seconds[f"{run.data}/{run.arm}"]) for run in known)
    stores = {(run.data, str(run.options.get("teacher"))) for run in missing if run.extract is not None}
    return {
        "work": {
            "runs": len(runs),
            "finished": len(runs) - len(missing),
            "failed_before": sum((run.folder / FAILED).is_file() for run in missing),
            "left": len(missing),
            "stores_of_maps": len(stores),
        },
        "runs_left": {
            name: sum(f"{run.data}/{run.arm}" == name for run in missing)
            for name in configs
            if any(f"{run.data}/{run.arm}" == name for run in missing)
        },
        "max_steps": {
            name: one.max_steps if one.max_steps > 0 else f"{one.num_train_epochs:g} epochs"
            for name, one in configs.items()
        },
        "time": {
            "seconds": time_left if len(known) == len(missing) else None,
            "seconds_of_known": time_left,
            "measured": "the mean of finished runs of the same arm and data, in one process; "
            f"{len(missing) - len(known)} runs have none yet: `molsaki distill --dry_run` measures one",
        },
    }
