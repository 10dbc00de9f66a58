"""The notebook examples/notebooks/attention_maps.ipynb runs, and its cells give what their text says."""

from __future__ import annotations

import base64
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/notebooks/attention_maps.ipynb"
CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def execute(folder, model, monkeypatch):
    """The executed notebook and its variables; its pictures are written into the folder."""
    monkeypatch.setenv("MOLSAKI_MODEL", str(model))
    copied = folder / NOTEBOOK.name
    copied.write_text(NOTEBOOK.read_text(encoding="utf-8"), encoding="utf-8")
    return runpy.run_path(str(ROOT / "examples/notebooks/execute.py"))["execute"](copied)


def check(notebook, variables):
    found, heads, reply = (variables[name] for name in ("found", "heads", "reply"))
    layers = variables["model"].config.num_hidden_layers
    assert found.columns == ["4", "16", "17", "16", "17", "272", "272", "4", "1088"] and len(found.rows) == 4
    assert found.values.shape == (layers, 4, 9)
    starts = np.array([tokens[0] for tokens in found.column_tokens])
    for s, (start, stop) in enumerate(found.row_tokens):  # "a sentence cannot look at a number that comes after it"
        assert (found.values[:, s, starts >= stop] == 0).all() and (found.values[:, s, starts < start] > 0).all()
        assert (found.values[:, s].sum(-1) < stop - start).all()
    table = variables["last"].loc[variables["strongest"]]
    assert table.shape == (min(layers, 5), 9)
    totals = found.values[:, -1].sum(-1)
    np.testing.assert_allclose(table.sum(axis=1), np.sort(totals)[::-1][:5], rtol=1e-5)
    layer, head, word = variables["layer"], variables["head"], variables["word"]
    assert layer == found.layers[totals.argmax()]
    tokens = np.array([[stop - start] for start, stop in found.row_tokens])
    np.testing.assert_allclose(heads.values[0].mean(0) * tokens, found.values[found.layers.index(layer)], atol=1e-5)
    assert heads.values[0, head, -1, word] == heads.values[:, :, -1].max()
    assert 1 <= len(reply.rows) <= 36 and reply.values.shape == (layers, len(reply.rows), len(reply.columns))
    assert reply.columns[:3] == ["4", "16", "17"]
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 5
    pictures = [
        output["data"]["image/png"] for cell in cells for output in cell["outputs"] if "image/png" in str(output)
    ]
    assert len(pictures) == 3 and all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "".join(cells[0]["outputs"][0]["text"]).split()[:3] == ["4", "16", "17"]
    assert "<table" in "".join(cells[2]["outputs"][0]["data"]["text/html"])


def test_the_notebook_with_a_tiny_model(tmp_path, monkeypatch):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    notebook, variables = execute(tmp_path, tiny.save(tmp_path / "model", 3, tokenizer), monkeypatch)
    check(notebook, variables)
    assert (tmp_path / "maps/reply.png").exists()


@pytest.mark.slow
def test_the_notebook_with_the_demos_model(smollm2, tmp_path, monkeypatch):
    """The outputs in the file are those of this model."""
    notebook, variables = execute(tmp_path, smollm2, monkeypatch)
    check(notebook, variables)
    committed = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell, before in zip(notebook["cells"], committed["cells"], strict=True):
        for output, other in zip(cell.get("outputs", []), before.get("outputs", []), strict=True):
            assert output.get("text") == other.get("text")
            assert output.get("data", {}).get("text/plain") == other.get("data", {}).get("text/plain")


def test_the_committed_notebook_has_its_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [1, 2, 3, 4, 5] and all(cell["outputs"] for cell in cells)
    assert NOTEBOOK.stat().st_size < 600_000
    assert str(Path.home()) not in json.dumps(notebook) and "/tmp/" not in json.dumps(notebook)


def test_an_error_in_a_cell_is_raised(tmp_path):
    cell = {"cell_type": "code", "source": ["1 / 0"], "metadata": {}, "outputs": [], "execution_count": None}
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": [cell]}))
    before = Path.cwd()
    with pytest.raises(ZeroDivisionError):
        runpy.run_path(str(ROOT / "examples/notebooks/execute.py"))["execute"](tmp_path / "x.ipynb")
    assert Path.cwd() == before
