"""The command plot: a run's logs are found and drawn."""

from __future__ import annotations

import json

import pytest

from molsaki.config import PlotConfig
from molsaki.plotting.plot_run import plot
from molsaki.plotting.plots import CURVES


def test_run_draws_what_is_there(tmp_path):
    run, out = tmp_path / "run", tmp_path / "run" / "plots"
    with pytest.raises(FileNotFoundError, match="--run: no such folder"):
        plot(PlotConfig(run=str(run)))
    run.mkdir()
    with pytest.raises(ValueError, match="nothing to draw: give --run, or --data_file"):
        plot(PlotConfig(run=str(run)))
    history = [{"step": s, "loss": 3 / s, "loss_pre": 1 / s, "loss_exp": 2 / s, "loss_att": 0.1 / s} for s in (2, 4)]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert plot(PlotConfig(run=str(run))) == [out / "losses.png"]
    records = [{"step": s, "teacher": [0.2, 0.3, 0.5], "student": [0.4, 0.6]} for s in (2, 4)]
    (run / "layer_weights.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert plot(PlotConfig(run=str(run))) == [out / "losses.png", out / "layer_weights.png"]
    assert all(path.stat().st_size for path in out.iterdir())


def test_every_logged_loss_has_a_panel():
    drawn = [name for names in CURVES.values() for name in names]
    logged = ["loss", "loss_pre", "loss_exp", "loss_att", "loss_att_uniform", "loss_mmi", "loss_logits"]
    logged += ["entropy_teacher", "entropy_student", "eval_loss", "eval_loss_att"]
    assert sorted(drawn) == sorted(logged)
