"""Renders a report as one HTML page. Tables are built here; ``report.js`` draws curves and maps from data in the page.

Every text from a run is escaped here or set as text by the script. The page's Content-Security-Policy allows no
connection, so even a mistake in the escaping could not load or send anything.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import importlib.resources
import json
import logging
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molsaki.config import DistillOptions
from molsaki.exits import is_user_error
from molsaki.method.objectives import OBJECTIVES
from molsaki.reporting.predictions import Predictions
from molsaki.reporting.run_logs import RunLogs, base_name, curves_of, meaning_of, weights_of

logger = logging.getLogger(__name__)

NO_SCRIPT = "<noscript><p>This part needs JavaScript.</p></noscript>"
FLAG = re.compile(r"(?<![\w-])--[a-z]\w*")
NOT_RECORDED = "not recorded"


def render(
    logs: RunLogs,
    data: Mapping[str, Any],
    predictions: Sequence[Predictions],
    sources: Mapping[str, str],
    notes: Mapping[str, Sequence[str]],
) -> str:
    """The page.

    Args:
        logs: of the run.
        data: ``maps`` and ``replies``, as ``report.js`` reads them.
        predictions: the student's first.
        sources: the sources of the maps: ``teacher``, ``store``, ``student``, ``data_file``.
        notes: sentences for the sections ``maps`` and ``predictions``.
    """
    curves, weights = curves_of(logs.values), weights_of(logs.weights)
    sections = {
        "Summary": summary(logs, predictions),
        "Curves": _drawn("curves", bool(curves), _curve_notes(logs, bool(curves))),
        "Layer weights": _drawn("weights", weights is not None, _weight_notes(logs, weights)),
        "Maps": _drawn("maps", bool(data["maps"]), notes["maps"], _source_line(sources)),
        "Predictions": _drawn("predictions", bool(data["replies"]), notes["predictions"], accuracies(predictions)),
        "Configuration": configuration(logs.options),
        "Versions and timings": attempts(logs),
    }
    ids = {title: title.lower().replace(" ", "-") for title in sections}
    name = logs.folder.resolve().name
    values = {
        "title": escaped(f"Report of {name}"),
        "lead": lead(logs),
        "style": resource("report.css"),
        "script": resource("report.js"),
        "navigation": " ".join(f'<a href="#{ids[title]}">{title}</a>' for title in sections),
        "sections": "\n".join(
            f'<section id="{ids[title]}" aria-labelledby="{ids[title]}-title">\n'
            f'<h2 id="{ids[title]}-title">{title}</h2>\n{content}\n</section>'
            for title, content in sections.items()
        ),
        "footer": f"Written by <code>molsaki report</code> from {escaped(logs.folder)}. The file needs no network.",
        "data": as_script({"curves": curves, "weights": weights, "models": [one.name for one in predictions], **data}),
    }
    return string.Template(resource("page.html")).substitute(values)


def escaped(value: object) -> str:
    """A value as text of HTML, also within an attribute's double quotes."""
    return html.escape(str(value), quote=True)


def as_script(value: object) -> str:
    """JSON that is safe in a script element: no character of it ends the element or a line of JavaScript."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))  # ASCII only, so U+2028 is escaped too
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def finite(value: Any) -> Any:
    """The value, with None instead of numbers that JSON cannot represent."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return value


@functools.cache
def resource(name: str) -> str:
    """The text of a file of this package."""
    return importlib.resources.files("molsaki.reporting").joinpath(name).read_text(encoding="utf-8").strip()


def lead(logs: RunLogs) -> str:
    """One sentence that says what was trained on which data."""
    options = logs.options
    student, objective = options.get("student"), options.get("objective")
    parts = [f"Student <b>{escaped(student)}</b>" if student else "A student"]
    parts.append(f"trained with objective <b>{escaped(objective)}</b>" if objective else "trained")
    files = options.get("train_file") or []
    files = [files] if isinstance(files, str) else files
    counts = [one["examples"] for one in logs.attempts if one.get("examples") is not None]
    if files:
        size = f" ({counts[-1]:,} examples)" if counts else ""
        parts.append(f"on <b>{escaped(', '.join(map(str, files)))}</b>{size}")
    taught = [f"{name} <b>{escaped(options[name])}</b>" for name in ("teacher", "store") if options.get(name)]
    if taught:
        parts.append("with " + " and ".join(taught))
    return " ".join(parts) + "."


def number(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return "not finite" if value is not None else NOT_RECORDED
    return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOT_RECORDED
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = divmod(round(seconds), 60)[0], round(seconds) // 3600
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {round(seconds) % 60} s"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def summary(logs: RunLogs, predictions: Sequence[Predictions]) -> str:
    """The tiles and the table of logged values."""
    values = logs.values
    tiles: list[tuple[str, str, str]] = []
    if predictions and predictions[0].interval is not None:
        right, total = predictions[0].counts
        low, high = predictions[0].interval
        where = f"{right} of {total} right, 95 % interval {percent(low)} to {percent(high)}"
        where += f", model {predictions[0].model}"
        tiles.append(("accuracy", percent(right / total), where))
        for other in predictions[1:]:
            if other.interval is not None:
                share = percent(other.counts[0] / other.counts[1])
                tiles.append((f"accuracy of {other.name}", share, f"of model {other.model}"))
    elif "eval_accuracy" in values:
        step, last = values["eval_accuracy"][-1]
        tiles.append(("accuracy", percent(last), f"during training, at step {step:,}"))
    for name, label in (("loss", "loss"), ("loss_att", "attention loss"), ("map_overlap", "overlap of the maps")):
        shown = next((n for n in (f"eval_{name}", name) if n in values), None)
        if shown is not None:
            kind = "evaluation" if shown.startswith("eval_") else "training"
            first, last = values[shown][0][1], values[shown][-1][1]
            tiles.append((label, number(last, 3), f"{kind}; {number(first, 3)} at step {values[shown][0][0]:,}"))
    if "attention_share" in values:
        tiles.append(("gradient share", percent(values["attention_share"][-1][1]), "of the attention loss, at the end"))
    done, planned = logs.state.get("global_step"), logs.state.get("max_steps")
    if done is not None:
        state = "finished" if logs.is_finished else "not finished: the state of the last checkpoint"
        tiles.append(("steps", f"{done:,}", f"of {planned:,}, {state}" if planned else state))
    speed = f"{logs.seconds / done:.2f} s per step" if logs.seconds is not None and done else "of the training"
    tiles.append(("time", duration(logs.seconds), speed))
    shown_tiles = "\n".join(
        f'<div class="tile"><dt>{escaped(label)}</dt><dd>{escaped(value)}</dd>'
        f'<dd class="small">{escaped(detail)}</dd></div>'
        for label, value, detail in tiles
    )
    found = f'<dl class="tiles">\n{shown_tiles}\n</dl>'
    if not values:
        return found + _notes(["No losses were logged: the folder has no trainer_state.json."])
    lines = []
    for name, points in values.items():
        if base_name(name) == "without_words" and not any(value for _, value in points):
            continue
        good = [point for point in points if math.isfinite(point[1])]
        least, most = (min(good, key=lambda p: p[1]), max(good, key=lambda p: p[1])) if good else (None, None)
        ends = [f"{number(end[1])} <small>({end[0]:,})</small>" if end else "" for end in (least, most)]
        lines.append(
            [f'<code title="{escaped(meaning_of(name))}">{escaped(name)}</code>', escaped(meaning_of(name)),
             number(points[0][1]), number(points[-1][1]), *ends]
        )  # fmt: skip
    head = ["logged value", "meaning", "first", "last", "smallest (step)", "largest (step)"]
    return found + "\n<details><summary>All logged values</summary>" + table(head, lines, "numbers") + "</details>"


def accuracies(predictions: Sequence[Predictions]) -> str:
    """The table of the accuracies of all models whose predictions were given."""
    if not predictions:
        return ""
    first, lines = predictions[0], []
    for one in predictions:
        right, total = one.counts
        interval = "" if one.interval is None else "{} to {}".format(*map(percent, one.interval))
        test = None if one is first else first.paired(one)
        paired = (
            "" if test is None else
            f"right by {escaped(first.name)} only: {test['only_this']}, by {escaped(one.name)} only: "
            f"{test['only_other']}; p = {number(test['p_value'], 2)}"
        )  # fmt: skip
        accuracy = percent(right / total) if total else ""
        lines.append([escaped(one.name), escaped(one.model), escaped(one.mode), accuracy, interval,
                      f"{right} of {total}", paired])  # fmt: skip
    head = [
        "predictions",
        "model",
        "asked for",
        "accuracy",
        "95 % interval",
        "right",
        "paired with the first (McNemar)",
    ]
    shown = len(head) - (len(lines) == 1)
    return table(head[:shown], [line[:shown] for line in lines], "numbers")


def configuration(options: Mapping[str, Any]) -> str:
    """All options of the run, those that differ from their default first."""
    if not options:
        return _notes(["The folder has no distill.json, so the options are not recorded."])
    defaults, help_texts = default_options(), help_of_options()
    order = [name for name in help_texts if name in options]
    order += sorted(name for name in options if name not in help_texts)
    changed: list[list[str]] = []
    same: list[list[str]] = []
    for name in order:
        value = options[name]
        known = defaults.get(name, [])
        line = [
            f"<code>{escaped(name)}</code>", _option_value(value),
            " or ".join(dict.fromkeys(_option_value(one) for one in known)), escaped(help_texts.get(name, "")),
        ]  # fmt: skip
        (same if any(one == value for one in known) else changed).append(line)
    head = ["option", "value", "default", "what it does"]
    return (
        f"<details open><summary>{len(changed)} options that differ from their default</summary>"
        f"{table(head, changed)}</details>\n<details><summary>{len(same)} options with their default</summary>"
        f"{table([head[0], head[1], head[3]], [[line[0], line[1], line[3]] for line in same])}</details>"
    )


def _option_value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"<code>{escaped(text)}</code>" if text else "<i>empty</i>"


@functools.cache
def help_of_options() -> dict[str, str]:
    """The help texts of this package's options, in their order."""
    return {field.name: str(field.metadata.get("help", "")) for field in dataclasses.fields(DistillOptions)}


@functools.cache
def default_options() -> dict[str, list[Any]]:
    """The default of each option as JSON and, if the config completes it, also its value on this machine."""
    from molsaki.training.config import DistillConfig

    found: dict[str, list[Any]] = {}
    for field in dataclasses.fields(DistillConfig):
        default: Any = None if field.default is dataclasses.MISSING else field.default
        if callable(field.default_factory):
            default = field.default_factory()
        found[field.name] = [json.loads(json.dumps(default, default=str))]
    try:
        completed = json.loads(DistillConfig(output_dir="run").to_json_string())  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, ImportError) and not is_user_error(error):
            raise
        logger.warning("report: the default options cannot be completed here: %s", error)
        completed = {}
    for name, value in completed.items():
        if name != "output_dir" and value not in found.setdefault(name, []):
            found[name].append(value)
    return found


def attempts(logs: RunLogs) -> str:
    """When, where and with which versions the run was trained."""
    lines: list[list[str]] = []
    last = logs.attempts[-1] if logs.attempts else {}
    speeds = [entry for entry in logs.history if "train_samples_per_second" in entry]
    of_speed = {"train_samples_per_second": "examples per second", "train_steps_per_second": "steps per second"}
    facts = {
        "training": duration(logs.seconds),
        **{label: number(speeds[-1].get(name)) if speeds else NOT_RECORDED for name, label in of_speed.items()},
        "evaluations during training": _evaluation_time(logs),
        "epochs": number(logs.state.get("epoch")),
        "peak GPU memory": f"{last['peak_gpu_bytes'] / 2**30:.2f} GiB" if "peak_gpu_bytes" in last else "",
        "examples left out": _left_out(logs.left_out),
    }
    lines += [[escaped(name), escaped(value)] for name, value in facts.items() if value]
    for group, label in (("machine", "machine"), ("versions", "version")):
        known = last.get(group)
        if not isinstance(known, Mapping) or not known:
            lines.append([label + ("s" if label == "version" else ""), NOT_RECORDED])
            continue
        lines += [[f"{label}: {escaped(name)}", escaped(value)] for name, value in known.items()]
    found = table(["", ""], lines)
    if not logs.attempts:
        found += _notes(["The folder has no run.json: the run was trained before versions and machine were recorded."])
    if len(logs.attempts) > 1:
        rows = [
            [escaped(str(one.get(name, NOT_RECORDED))) for name in ("started", "from_step", "to_step")]
            + [duration(one.get("seconds")), "ended" if one.get("finished") else "interrupted"]
            for one in logs.attempts
        ]
        found += "<h3>Attempts</h3>" + table(["started", "from step", "to step", "time", ""], rows, "numbers")
    return found


def _evaluation_time(logs: RunLogs) -> str:
    times = [v for entry in logs.history for name, v in entry.items() if name.endswith("_runtime") and "eval" in name]
    return f"{len(times)}, {duration(sum(times))}" if times else "none"


def _left_out(left_out: Mapping[str, int] | None) -> str:
    if left_out is None:
        return NOT_RECORDED
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"


def _curve_notes(logs: RunLogs, has_curves: bool) -> list[str]:
    if not has_curves:
        return ["There are no curves: the folder has no trainer_state.json yet, or nothing was logged in it."]
    found, values = [], logs.values
    objective = OBJECTIVES.get(str(logs.options.get("objective")))
    has_attention = (objective is not None and objective.attention_loss) or "loss_att" in values
    if has_attention and "attention_share" not in values:
        found.append(
            "The attention loss's share of the gradient was not measured: molsaki distill --share_steps 20 does so "
            "once per 20 steps, each time with one forward and two backwards more."
        )
    if not any(name.startswith("eval_") for name in values):
        found.append("There was no evaluation: add --eval_file with --eval_strategy steps to molsaki distill.")
    if "eval_accuracy" not in values and any(name.startswith("eval_") for name in values):
        found.append("No accuracy was computed during training: --eval_accuracy N decodes N examples.")
    return found


def _weight_notes(logs: RunLogs, weights: Mapping[str, Any] | None) -> list[str]:
    if weights is None:
        return [f"There are no layer weights: objective {logs.options.get('objective') or 'unknown'} did not log them."]
    shown, total = len(weights["steps"]), weights["of"]
    return [f"{shown} of {total} logged points in time are shown."] if shown < total else []


def _source_line(sources: Mapping[str, str]) -> str:
    labels = {"teacher": "teacher", "store": "stored maps", "student": "student", "data_file": "texts"}
    found = [f"{labels[name]} <code>{escaped(value)}</code>" for name, value in sources.items() if name in labels]
    return f'<p class="small">Maps by {", ".join(found)}.</p>' if found else ""


def _drawn(id: str, has_data: bool, notes: Iterable[str], before: str = "") -> str:
    """A section that the script fills."""
    drawn = f'{NO_SCRIPT}<div id="{id}-view"></div>' if has_data else ""
    return f"{before}\n{drawn}{_notes(notes)}"


def _notes(notes: Iterable[str]) -> str:
    return "".join(f'<p class="note">{FLAG.sub(as_code, escaped(note))}</p>' for note in notes)


def as_code(match: re.Match[str]) -> str:
    return f"<code>{match[0]}</code>"


def table(head: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are escaped already."""
    titles = "".join(f"<th scope=col>{title}</th>" for title in head)
    top = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    body = "".join(
        "<tr>" + f"<th scope=row>{line[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in line[1:]) + "</tr>"
        for line in lines
    )
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'
