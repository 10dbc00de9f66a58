"""The command plot: a run's logs are found and drawn."""

from __future__ import annotations

import json
import re

import pytest

from molsaki.config import PlotConfig
from molsaki.plotting import style
from molsaki.plotting.curves import CURVES
from molsaki.reporting.plot_run import _file_name, plot


def test_run_draws_what_is_there(tmp_path):
    run, out = tmp_path / "run", tmp_path / "run" / "plots"
    with pytest.raises(FileNotFoundError, match="--run: no such folder"):
        plot(PlotConfig(run=str(run)))
    run.mkdir()
    with pytest.raises(ValueError, match="^--run: .*run holds nothing to draw: expected trainer_state.json"):
        plot(PlotConfig(run=str(run)))
    with pytest.raises(ValueError, match="^--run, --data_file: expected at least one of them, got neither"):
        plot(PlotConfig())
    history = [{"step": s, "loss": 3 / s, "loss_pre": 1 / s, "loss_exp": 2 / s, "loss_att": 0.1 / s} for s in (2, 4)]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert plot(PlotConfig(run=str(run))) == [out / "losses.png", out / "losses.svg"]
    records = [{"step": s, "teacher": [0.2, 0.3, 0.5], "student": [0.4, 0.6]} for s in (2, 4)]
    (run / "layer_weights.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert plot(PlotConfig(run=str(run), format=["svg", "pdf"])) == [
        out / f"{name}.{suffix}" for name in ("losses", "layer_weights") for suffix in ("svg", "pdf")
    ]
    assert all(path.stat().st_size for path in out.iterdir())


def test_every_logged_loss_has_a_panel(tmp_path, monkeypatch):
    """Those of evaluations too, of one set or of several by name."""
    drawn = [name for names in CURVES.values() for name in names]
    logged = ["loss", "loss_pre", "loss_exp", "loss_att", "loss_att_uniform", "loss_mmi", "loss_logits"]
    logged += ["entropy_teacher", "entropy_student", "map_overlap"]
    assert sorted(drawn) == sorted(logged)
    logged += ["eval_loss", "eval_loss_mmi", "eval_a_loss", "eval_a_loss_logits", "eval_b_loss_pre"]
    history = [{"step": step} | dict.fromkeys(logged, 1.0 / step) for step in (1, 2)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    shown = []
    monkeypatch.setattr(style, "save", lambda figure, path, *_: shown.extend(figure.axes) or path)
    plot(PlotConfig(run=str(tmp_path)))
    assert sorted(re.sub(r".*\((.*)\)", r"\1", line.get_label()) for ax in shown for line in ax.get_lines()) == sorted(
        logged
    )


@pytest.mark.parametrize("formats", ["png", [], ["png", "gif"]])
def test_other_formats_are_refused(formats):
    with pytest.raises(ValueError, match="format: expected some of png, svg and pdf"):
        PlotConfig(run="run", format=formats)


def test_ids_have_files_of_their_own():
    """Also where a file system ignores case, and where ids are longer than a name may be."""
    ids = ["p0", "a/1", "a_1", "A_1", "a 1", "ä1", "x" * 300, "x" * 301, "..", "c:1"]
    names = [_file_name(id).casefold() for id in ids]
    assert len(set(names)) == len(ids) and names[0] == "p0" and names[2] == "a_1"
    assert all(len(name) < 150 and "/" not in name and ":" not in name for name in names)
