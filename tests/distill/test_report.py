"""The command report: one HTML file about a run, with what is there, escaped, and without any way to the network."""

from __future__ import annotations

import base64
import json
import logging
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from molsaki.cli import main
from molsaki.config import PlotConfig, ReportConfig
from molsaki.reporting import report as report_module
from molsaki.reporting.maps import Maps, MapSource
from molsaki.reporting.packed import Budget, fitting_view, packed_map, packed_view
from molsaki.reporting.page import as_script, duration, render, resource
from molsaki.reporting.predictions import read_all
from molsaki.reporting.report import report
from molsaki.reporting.run_logs import MOST_POINTS, PANELS, RunLogs, base_name, curves_of, weights_of
from molsaki.text.segment import segment
from molsaki.text.spans import Spans
from molsaki.training.run_record import RECORD, read_attempts
from tests.helpers import tiny, training
from tests.helpers.tiny import one_thread  # noqa: F401

EVIL = "</script><img src=x onerror=alert(1)>\u2028\"'&amp;"
ELSEWHERE = re.compile(
    r"https?:|//[a-z]|\burl\(|@import|\bfetch\b|XMLHttpRequest|WebSocket|sendBeacon|innerHTML|\beval\b"
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A run with live teacher and evaluation, the predictions of its student and of the student before."""
    folder = tmp_path_factory.mktemp("report")
    tiny.save(folder / "teacher", 3, training.OTHER, seed=1)
    tiny.save(folder / "student", 2)
    tiny.write_jsonl(folder / "train.jsonl", tiny.problems(8))
    tiny.write_jsonl(folder / "test.jsonl", [{**row, "id": f"t/{row['id']}"} for row in tiny.problems(4)])
    files = ["--student", folder / "student", "--teacher", folder / "teacher", "--train_file", folder / "train.jsonl"]
    more = ["--eval_file", folder / "test.jsonl", "--eval_strategy", "steps", "--eval_steps", 2, "--eval_accuracy", 2]
    train = ["--max_steps", 4, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--save_steps", 2, "--use_cpu"]
    train += ["--disable_tqdm", "true", "--share_steps", 2, "--learning_rate", "3e-3", "--output_dir", folder / "run"]
    assert run("distill", *files, *more, *train) == 0
    for name, is_right in (("before", lambda n: n == 2), ("after", lambda n: n in (0, 1))):
        (folder / name).mkdir()
        rows = [
            {"id": f"t/{row['id']}", "question": row["question"], "gold": row["answer"], "reply": row["rationale"],
             "prediction": row["answer"] if is_right(n) else None, "right": is_right(n)}
            for n, row in enumerate(tiny.problems(4))
        ]  # fmt: skip
        tiny.write_jsonl(folder / name / "predictions.jsonl", rows)
        model = folder / ("run" if name == "after" else "student")
        summary = {"model": str(model), "mode": "rationale", "template": "plain", "data_file": f"{folder}/test.jsonl"}
        (folder / name / "summary.json").write_text(json.dumps(summary))
    return folder


def run(*argv) -> int:
    return main([str(word) for word in argv])


def data_in(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def write(folder: Path, target: Path, **options) -> str:
    config = ReportConfig(run=str(folder), output_file=str(target / "report.html"), **options)
    assert report(config) == [target / "report.html"]
    return (target / "report.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """The elements of a page with their attributes, and those that are not closed."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_command_writes_a_page_with_every_section(work, capsys):
    """All that is not given comes from the run's own options."""
    assert run("report", work / "run", "--predictions", work / "after", work / "before", "--examples", 3) == 0
    path = work / "run" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    page = path.read_text(encoding="utf-8")
    data = data_in(page)
    titles = {panel["title"] for panel in data["curves"]}
    assert titles == set(PANELS) - {"Between tasks, or with the teacher's logits", "Examples without key words"}
    names = {series["name"] for panel in data["curves"] for series in panel["series"]}
    assert {"loss", "eval_loss", "attention_share", "eval_accuracy", "eval_map_overlap", "learning_rate"} <= names
    assert [(side["name"], side["layers"]) for side in data["weights"]["sides"]] == [("teacher", 3), ("student", 2)]
    assert data["weights"]["steps"] == [1, 2, 3, 4]
    assert [view["id"] for view in data["maps"]] == ["t/p0", "t/p1", "t/p2"]  # the run's eval_file
    for view in data["maps"]:
        layers = {side["name"]: [one["name"] for one in side["maps"]] for side in view["sides"]}
        assert layers == {
            "teacher": ["mixture of layers", "layer 0", "layer 1", "layer 2"],
            "student": ["mixture of layers", "layer 0", "layer 1"],
        }
        for side in view["sides"]:
            assert sum(one["weight"] for one in side["maps"][1:]) == pytest.approx(1, abs=1e-3)
    assert data["models"] == ["after", "before"]
    assert [entry["right"] for entry in data["replies"]] == [True, True, False, False]
    assert [entry["others"][0]["right"] for entry in data["replies"]] == [False, False, True, False]
    assert all(entry["view"]["sides"][0]["name"] == "student" for entry in data["replies"])
    assert "50.0 %" in page and "right by after only: 2, by before only: 1; p = 1" in page
    assert not re.search(r'class="note">[^<]*(add|cannot)', page)
    assert f"Maps by teacher <code>{work / 'teacher'}</code>, student <code>{work / 'run'}</code>, texts" in page
    assert "version: torch" in page and torch.__version__ in page and "machine: device" in page


def test_maps_are_those_of_the_models(work, tmp_path):
    """Each layer and the mixture, up to the rounding to 8 bits; also of a prediction."""
    run_folder = str(work / "run")
    page = write(work / "run", tmp_path, predictions=[str(work / "after")], ids=["t/p1"])
    data = data_in(page)
    (view,) = data["maps"]
    example = tiny.problems(4)[1]
    spans = segment(example["question"], example["rationale"])
    config = PlotConfig(run=run_folder, teacher=str(work / "teacher"), student=run_folder)
    source = MapSource(config, every_layer=True)
    expected = {"teacher": source.of_teacher(None, spans), "student": source.of_student(spans)}
    for side in view["sides"]:
        maps = expected[side["name"]]
        for packed, values in zip(side["maps"], [maps.mixed, *maps.layers], strict=True):
            np.testing.assert_allclose(unpacked(packed, spans), values.numpy(), atol=0.005 * float(values.max()))
    weights = np.asarray([one["weight"] for one in view["sides"][0]["maps"][1:]])
    np.testing.assert_allclose(weights, expected["teacher"].weights.numpy(), atol=1e-4)
    np.testing.assert_allclose(
        np.einsum("l,lsw->sw", expected["student"].weights.numpy(), expected["student"].layers.numpy()),
        expected["student"].mixed.numpy(), atol=1e-5,
    )  # fmt: skip
    assert "".join(text for step in view["steps"] for text, _ in step) == spans.text
    assert [w for step in view["steps"] for _, w in step if w >= 0] == list(range(len(spans.words)))
    assert view["words"] == [spans.text[a:b] for a, b in spans.words] and view["rationale"] == 3
    (reply,) = [entry for entry in data["replies"] if "view" in entry]
    assert reply["id"] == "t/p1" and reply["view"]["steps"] == view["steps"]  # the reply is the rationale here
    assert reply["view"]["sides"][0]["maps"] == view["sides"][1]["maps"]


def unpacked(packed: dict, spans: Spans) -> np.ndarray:
    rows, columns = -(-len(spans.steps) // packed["rb"]), -(-len(spans.words) // packed["cb"])
    found = np.frombuffer(base64.b64decode(packed["data"]), np.uint8).reshape(rows, columns).astype(float)
    return np.where(found == 255, np.nan, (found / 254) ** 2 * packed["top"])


def test_an_answer_is_shown_under_its_own_template(work, tmp_path):
    folder = tmp_path / "answers"
    shutil.copytree(work / "after", folder)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"mode": "answer"}))
    entries = data_in(write(work / "run", tmp_path, predictions=[str(folder)], examples=1))["replies"]
    other = data_in(write(work / "run", tmp_path, predictions=[str(work / "after")], examples=1))["replies"]
    assert [e["id"] for e in entries if e.get("view")] == [e["id"] for e in other if e.get("view")] == ["t/p0", "t/p2"]
    assert entries[0]["view"]["sides"][0]["maps"][0] != other[0]["view"]["sides"][0]["maps"][0]


def test_the_page_cannot_reach_the_network(work, tmp_path):
    page = write(work / "run", tmp_path, predictions=[str(work / "after")])
    elements = Elements(page).found
    policies = [a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a]
    assert len(policies) == 1 and policies[0].startswith(POLICY)
    order = [tag for tag, _ in elements]
    assert order.index("meta") < min(order.index(tag) for tag in ("style", "script", "link"))
    assert {tag for tag, _ in elements} <= {
        "html", "head", "meta", "link", "title", "style", "body", "a", "header", "h1", "p", "b", "nav", "main",
        "section",
        "h2", "h3", "dl", "div", "dt", "dd", "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "code",
        "small", "i", "noscript", "footer", "script",
    }  # fmt: skip
    for tag, attributes in elements:
        banned = {name for name in attributes if name.startswith("on") or name in ("src", "style", "srcdoc")}
        assert not banned, (tag, attributes)
        assert attributes.get("href", "#").startswith("#") or attributes == {"rel": "icon", "href": "data:,"}
    for name in ("report.js", "report.css"):
        assert not ELSEWHERE.search(resource(name).replace("http://www.w3.org/2000/svg", "")), name


def test_texts_are_escaped_wherever_they_come_from(work, tmp_path):
    """A question, a rationale, an id, a reply, an option and the names of files and models."""
    rows = [
        {
            "id": f"a{EVIL}",
            "question": f"Ann has 3 {EVIL} nuts?",
            "rationale": f"So 3 {EVIL} are 4.",
            "answer": f"4 {EVIL}",
        }
    ]
    data_file = tiny.write_jsonl(tmp_path / "a<img src=x onerror=alert(2)>.jsonl", rows)
    run_folder = tmp_path / "run<b>"
    shutil.copytree(work / "run", run_folder)
    options = json.loads((run_folder / "distill.json").read_text())
    changed = {"student": EVIL, "train_file": [EVIL], "run_name": EVIL, EVIL: EVIL}
    (run_folder / "distill.json").write_text(json.dumps(options | changed))
    (run_folder / "left_out.json").write_text(json.dumps({EVIL: ["a"]}))
    state = json.loads((run_folder / "trainer_state.json").read_text())
    state["log_history"].append({"step": 4, f"loss_{EVIL}": 1.0})
    (run_folder / "trainer_state.json").write_text(json.dumps(state))
    record = json.loads((run_folder / RECORD).read_text())
    record["attempts"][0]["versions"][EVIL] = EVIL
    (run_folder / RECORD).write_text(json.dumps(record))
    predictions = tmp_path / "p<i>"
    predictions.mkdir()
    reply = {
        "id": f"a{EVIL}",
        "question": rows[0]["question"],
        "gold": EVIL,
        "reply": EVIL,
        "prediction": EVIL,
        "right": False,
    }
    tiny.write_jsonl(predictions / "predictions.jsonl", [reply])
    (predictions / "summary.json").write_text(json.dumps({"model": EVIL, "mode": "rationale"}))
    page = write(run_folder, tmp_path, data_file=str(data_file), predictions=[str(predictions)])
    elements = Elements(page).found
    assert "img" not in {tag for tag, _ in elements}
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert [tag for tag, _ in elements].count("script") == 2 == page.count("</script>")
    data = data_in(page)
    (view,) = data["maps"]
    assert view["id"] == rows[0]["id"] and EVIL in "".join(text for step in view["steps"] for text, _ in step)
    assert data["replies"][0]["reply"] == EVIL
    assert f"loss_{EVIL}" in {series["name"] for panel in data["curves"] for series in panel["series"]}


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "\u2028\u2029", "\ud800", "&lt;", "\0"])
def test_json_in_a_script_element(text):
    written = as_script({"a": text, "b": [math.nan, math.inf, 1.5]})
    assert written.isascii() and not set("<>&") & set(written)
    assert json.loads(written) == {"a": text, "b": [None, None, 1.5]}


def test_numbers_that_are_not_finite(tmp_path):
    values = np.array([[0.0, 1.0, math.nan], [math.inf, 0.01, 0.25]])
    packed = packed_map(values)
    found = np.frombuffer(base64.b64decode(packed["data"]), np.uint8)
    assert packed["top"] == 1 and found.tolist() == [0, 254, 255, 255, 25, 127]
    assert packed_map(np.full((2, 2), math.nan))["top"] == 0
    history = [{"step": s, "loss": math.nan if s == 2 else 1.0 / s, "grad_norm": math.inf} for s in (1, 2, 3)]
    state = {"global_step": 3, "max_steps": 3, "log_history": history}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    lines = [{"step": s, "student": [math.nan, 0.5]} for s in (1, 2)]
    (tmp_path / "layer_weights.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = data_in(write(tmp_path, tmp_path))
    loss, norm = (panel["series"][0] for panel in data["curves"])
    assert loss["y"] == [1.0, None, 0.333333] and loss["bad"] == 1 and norm["y"] == [None] * 3
    weights = base64.b64decode(data["weights"]["sides"][0]["data"])
    assert list(weights) == [255, 180] * 2


def test_an_old_and_an_unfinished_run(work, tmp_path):
    """What was not recorded is said, a line that is being written is passed over, and the last checkpoint counts."""
    folder = tmp_path / "run"
    shutil.copytree(work / "run", folder)
    for path in folder.iterdir():
        if path.is_file() and path.name != "layer_weights.jsonl":
            path.unlink()
    with (folder / "layer_weights.jsonl").open("a") as file:
        file.write('{"step": 5, "teach')
    page = write(folder, tmp_path, examples=1)
    data = data_in(page)
    assert data["weights"]["steps"] == [1, 2, 3, 4] and data["maps"][0]["sides"][1]["name"] == "student"
    assert "not finished: the state of the last checkpoint" in page and "not recorded" in page
    assert f"student <code>{folder / 'checkpoint-4'}</code>" in page


def test_what_is_missing_is_said_with_its_flag(tmp_path, caplog):
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match="--run: no such folder"):
        report(ReportConfig(run=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match="expected the output_dir of molsaki distill"):
        report(ReportConfig(run=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="--run: required"):
        report(ReportConfig())
    assert run("report", tmp_path / "none") == run("report") == 2
    options = {"objective": "dss", "student": "/no/model", "teacher": "/no/teacher", "store": None}
    (tmp_path / "run/distill.json").write_text(json.dumps(options))
    page = write(tmp_path / "run", tmp_path)
    for hint in ("--teacher", "--store", "--student", "--predictions"):
        assert f"<code>{hint}</code>" in page
    assert "objective dss did not log them" in page and "nothing was logged in it" in page
    data = data_in(page)
    assert (data["curves"], data["weights"], data["maps"], data["replies"]) == ([], None, [], [])
    with pytest.raises(ValueError, match="--student: no such folder"):  # given, so it is an error
        report(ReportConfig(run=str(tmp_path / "run"), student="/no/model"))
    with pytest.raises(FileNotFoundError, match="--predictions: no such file"):
        report(ReportConfig(run=str(tmp_path / "run"), predictions=["/no/predictions"]))
    with pytest.raises(ValueError, match="examples: expected at least 0"):
        ReportConfig(examples=-1)


def test_a_default_that_cannot_be_used_is_a_note(work, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(work / "run", folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    page = write(folder, tmp_path)
    assert "The run&#x27;s options name something that cannot be used: " in page and data_in(page)["maps"] == []


def test_a_store_of_mixed_maps_and_one_of_another_text(work, tmp_path):
    store = tmp_path / "store"
    assert run("extract", "--teacher", work / "teacher", "--data_files", work / "train.jsonl", "--store", store) == 0
    folder = tmp_path / "run"
    shutil.copytree(work / "run", folder)
    options = json.loads((folder / "distill.json").read_text())
    options |= {"teacher": None, "store": str(store), "eval_file": []}
    (folder / "distill.json").write_text(json.dumps(options))
    page = write(folder, tmp_path, examples=2)
    assert "<code>--teacher</code> adds each layer" in page
    assert [[len(side["maps"]) for side in view["sides"]] for view in data_in(page)["maps"]] == [[1, 3]] * 2
    rows = tiny.problems(2)
    rows[0]["rationale"] = "Another text, of 5 nuts."
    changed = tiny.write_jsonl(tmp_path / "changed.jsonl", [*rows, {**rows[1], "id": "new"}])
    views = data_in(write(folder, tmp_path, data_file=str(changed)))["maps"]
    assert [[side["name"] for side in view["sides"]] for view in views] == [
        ["student"], ["teacher", "student"], ["student"],
    ]  # fmt: skip
    assert "has another text" in views[0]["note"] and "holds no example 'new'" in views[2]["note"]


def long_text(S: int, W: int) -> tuple[Spans, Maps]:
    rationale = " ".join(
        f"Step {'of' * 3} " + "and ".join(str(10 + w) + " " for w in range(W // S + 1)) + "." for _ in range(S)
    )
    spans = segment("Why?", rationale)
    shape = len(spans.steps), len(spans.words)
    generator = torch.Generator().manual_seed(0)
    layers = torch.rand(30, *shape, generator=generator)
    return spans, Maps(layers.mean(0), layers, tuple(f"layer {i}" for i in range(30)), torch.full((30,), 1 / 30))


def test_long_texts_stay_below_five_megabytes(work, tmp_path, monkeypatch, caplog):
    """Eight texts of 200 x 500: maps of layers with fewer cells; more examples than fit are counted."""
    spans, maps = long_text(200, 500)
    assert len(spans.steps) > 200 and len(spans.words) > 500
    view = packed_view(spans, {"teacher": maps, "student": maps})
    mixed, layer = view["sides"][0]["maps"][:2]
    assert (mixed["rb"], mixed["cb"]) == (1, 1) and layer["rb"] > 1 and layer["cb"] > 1
    rb, cb = layer["rb"], layer["cb"]
    assert unpacked(layer, spans)[1, 2] == pytest.approx(
        float(maps.layers[0][rb : 2 * rb, 2 * cb : 3 * cb].max()), abs=0.01
    )
    monkeypatch.setattr(report_module, "spans_of", lambda example, options: spans)
    monkeypatch.setattr(MapSource, "of_teacher", lambda *args: maps)
    monkeypatch.setattr(MapSource, "of_student", lambda *args: maps)
    with caplog.at_level(logging.WARNING):
        page = write(work / "run", tmp_path, data_file=str(work / "train.jsonl"), predictions=[str(work / "after")])
    views = data_in(page)["maps"]
    assert len(page.encode()) < 5_000_000 and 3 <= len(views) < 8
    assert f"{len(views)} of 8 examples have maps here" in page and "<code>--ids</code>" in page
    assert any("of 8 examples have maps here" in message for message in caplog.messages)


def test_a_budget_leaves_out_layers_first():
    spans, maps = long_text(20, 100)
    size = len(json.dumps(packed_view(spans, {"teacher": maps})))
    budget = Budget(2 * size)
    assert fitting_view(spans, {"teacher": maps}, budget, size)[1] == "" and budget.left == size
    view, note = fitting_view(spans, {"teacher": maps}, budget, size / 2)
    assert view is not None and len(view["sides"][0]["maps"]) == 1 and "single layers were left out" in note
    assert fitting_view(spans, {"teacher": maps}, Budget(100), 100) == (None, report_module.TOO_LARGE)


def test_many_predictions_are_shown_half_and_half(tmp_path):
    rows = [
        {"id": str(n), "question": "q" * 50, "gold": "1", "reply": "r" * 300, "prediction": "1", "right": n >= 990}
        for n in range(1000)
    ]
    tiny.write_jsonl(tmp_path / "predictions.jsonl", rows)
    (predictions,) = read_all([str(tmp_path)])
    shown = predictions.shown(20_000, [])
    assert len(json.dumps(shown)) <= 20_200 and sum(one["right"] for one in shown) == 10
    assert [one["id"] for one in shown] == sorted((one["id"] for one in shown), key=int)
    assert predictions.counts == (10, 1000)


def test_predictions_of_other_questions_are_refused(work, tmp_path):
    other = tmp_path / "predictions.jsonl"
    tiny.write_jsonl(other, [{"id": "x", "question": "q", "gold": "1", "reply": "1", "prediction": "1", "right": True}])
    with pytest.raises(ValueError, match="has no question of"):
        read_all([str(work / "after"), str(other)])


def test_long_logs_are_thinned_without_losing_their_peaks():
    points = [(step, 1.0) for step in range(10_000)]
    points[1234], points[-1] = (1234, 99.0), (9999, 0.5)
    (panel,) = curves_of({"loss": points})
    series = panel["series"][0]
    assert len(series["x"]) <= MOST_POINTS + 2 and series["of"] == 10_000
    assert (99.0, 1234) in zip(series["y"], series["x"], strict=True) and series["x"] == sorted(series["x"])
    assert (series["x"][-1], series["y"][-1]) == (9999, 0.5)
    weights = weights_of([{"step": s, "teacher": [1 / 900] * 900} for s in range(5000)])
    assert weights["of"] == 5000 and weights["steps"][0] == 0 and weights["steps"][-1] == 4999
    assert len(weights["sides"][0]["data"]) < 250_000


def test_logged_names_of_evaluations():
    assert base_name("eval_loss_att_uniform") == "loss_att_uniform" and base_name("loss_att") == "loss_att"
    assert base_name("eval_gsm_8k_loss_pre") == "loss_pre" and base_name("eval_mine") == "mine"


def test_the_record_of_a_run_and_of_its_continuation(tmp_path):
    first = training.trainer(tmp_path, max_steps=6)
    first.add_callback(training.StopAt(4))
    first.train()
    (attempt,) = read_attempts(tmp_path / RECORD)
    assert (attempt["from_step"], attempt["to_step"], attempt["finished"]) == (0, 4, True)
    assert attempt["examples"] == 8 and attempt["versions"]["torch"] == torch.__version__
    assert attempt["seconds"] > 0 and attempt["machine"]["device"].startswith("cpu: ")
    training.trainer(tmp_path, max_steps=6).train(resume_from_checkpoint=True)
    attempts = read_attempts(tmp_path / RECORD)
    assert attempts[0] == attempt and (attempts[1]["from_step"], attempts[1]["to_step"]) == (3, 6)
    logs = RunLogs.read(tmp_path)
    assert logs.seconds == pytest.approx(sum(one["seconds"] for one in attempts))
    page = render(logs, {"maps": [], "replies": []}, [], {}, {"maps": [], "predictions": []})
    assert "<h3>Attempts</h3>" in page
    (tmp_path / RECORD).write_text("{broken")
    assert read_attempts(tmp_path / RECORD) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "not recorded"), (9.96, "10.0 s"), (150, "2 min 30 s"), (7260, "2 h 1 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_question_that_was_left_out_is_shown_without_a_map(work, tmp_path):
    """Also if its id is asked for; the summary beside the predictions may be of another program."""
    rows = [json.loads(line) for line in (work / "after" / "predictions.jsonl").read_text().splitlines()]
    rows[1] |= {"reply": None, "prediction": None, "right": False, "left_out": "too long"}
    tiny.write_jsonl(tmp_path / "predictions.jsonl", rows)
    (tmp_path / "summary.json").write_text("[1]")
    page = write(work / "run", tmp_path, predictions=[str(tmp_path)], ids=["t/p1", "t/p2"])
    replies = {entry["id"]: entry for entry in data_in(page)["replies"]}
    assert replies["t/p1"]["left_out"] == "too long" and "view" not in replies["t/p1"]
    assert replies["t/p2"]["view"]["sides"][0]["name"] == "student"
