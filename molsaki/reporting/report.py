"""The command ``molsaki report``: gathers a run's logs, maps and predictions, and writes one HTML file."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from molsaki.batches.tokenized import LeftOut, check_traces, left_out_if_refused, predict_task, spans_of
from molsaki.config import PREDICT_TEMPLATE, PlotConfig, ReportConfig, require
from molsaki.io import atomic_write
from molsaki.reporting.maps import Maps, MapSource, chosen_examples
from molsaki.reporting.packed import TOO_LARGE, Budget, fitting_view
from molsaki.reporting.page import render
from molsaki.reporting.predictions import Predictions, read_all
from molsaki.reporting.run_logs import RunLogs
from molsaki.run_files import checkpoints
from molsaki.text.examples import Example, read_examples

logger = logging.getLogger(__name__)

REPORT = "report.html"
LARGEST_FILE = 5_000_000  # bytes
MAP_BYTES, REPLY_MAP_BYTES, REPLY_BYTES = 2_200_000, 900_000, 900_000  # the largest part of each in the file
NAMED = 3  # examples without maps that a note names
Value = TypeVar("Value")


def report(config: ReportConfig) -> list[Path]:
    """Write the report of ``config.run``, and return its file.

    What is not given is taken from the run's options, if it still exists. A section without data says which flag would
    add it.

    Raises:
        FileNotFoundError: there is no run in the folder, or no file of those that were given.
        ValueError: a model, a store or a file that was given cannot be used.
    """
    run = Path(require(config, "run"))
    logs = RunLogs.read(run)
    gathered = _Gathered(config, logs)
    data = gathered.examples() | {"replies": gathered.replies()}
    path = Path(config.output_file or run / REPORT)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render(logs, data, gathered.predictions, gathered.sources, gathered.notes)
    written = page.encode("utf-8", "xmlcharrefreplace")
    if len(written) > LARGEST_FILE:
        logger.warning("%s: %.1f MB; fewer --examples make it smaller", path, len(written) / 1e6)
    with atomic_write(path, binary=True) as file:
        file.write(written)
    return [path]


class _Gathered:
    """The content of the report besides the logs, from the flags and from the run's options.

    Attributes:
        notes: sentences per section: what was left out, and which flag would add it.
        sources: the sources of the maps and predictions, by name.
        predictions: the student's, and others to compare it with.
    """

    def __init__(self, config: ReportConfig, logs: RunLogs):
        self.config, self.logs = config, logs
        self.notes: dict[str, list[str]] = {"maps": [], "predictions": []}
        self.sources: dict[str, str] = {}
        self._not_here: list[str] = []
        self.predictions: list[Predictions] = self._read_predictions()
        self._is_given = any((config.teacher, config.store, config.student, config.data_file, config.ids))
        teacher = self._named("teacher", config.teacher)
        store = self._named("store", config.store)
        if teacher is None and store is None:
            self.notes["maps"] += self._not_here
        student = config.student or _exported(logs.folder)
        self.source: MapSource | None = None
        if not config.examples and not config.ids:
            self.notes["maps"].append("No maps were asked for: --examples 0.")
        elif teacher is None and store is None and student is None:
            self.notes["maps"].append("There are no maps: add --teacher, --store or --student.")
        else:
            self.plot_config = PlotConfig(
                run=str(logs.folder), teacher=teacher, store=store, student=student, data_format=config.data_format,
                examples=config.examples, ids=config.ids,
            )  # fmt: skip
            self.source = self._tried("maps", lambda: MapSource(self.plot_config, every_layer=True))
        if self.source is not None:
            stored = self.source.store
            found = {"teacher": teacher, "student": student}
            if stored is not None and (teacher is None or stored.all_layers):
                found["store"] = store
            self.sources |= {name: value for name, value in found.items() if value is not None}
            if teacher is None and self.source.store is not None and not self.source.store.all_layers:
                self.notes["maps"].append("The store holds the teacher's mixed maps only: --teacher adds each layer.")
            if teacher is None and store is None:
                self.notes["maps"].append("There is no map of the teacher: add --teacher or --store.")
            if student is None:
                self.notes["maps"].append("There is no map of the student: add --student.")
            elif not self.source.has_router:
                self.notes["maps"].append(
                    "No router.safetensors was found, so the student's mixture weighs all of its layers alike."
                )

    def _tried(self, section: str, compute: Callable[[], Value]) -> Value | None:
        """The value. If it fails with something that only the run's options name: None, and a note with the reason."""
        try:
            return compute()
        except (ValueError, OSError, ImportError) as error:
            if self._is_given:
                raise
            logger.warning(
                "report: %s are left out, since the run's options name something unusable: %s", section, error
            )
            self.notes[section].append(f"The run's options name something that cannot be used: {error}")
            return None

    def _named(self, option: str, given: str | None) -> str | None:
        """The given value of an option, or the folder that the run's option names, if it exists."""
        if given is not None:
            return given
        named = self.logs.options.get(option)
        found = self._existing(named) if isinstance(named, str) else None
        if found is not None:
            return found if Path(found).is_dir() else None
        if isinstance(named, str):
            self._not_here.append(f"The run's {option} {named} is no folder here: add --{option}.")
        return None

    def _existing(self, name: str) -> str | None:
        """A path of the run's options that exists, from here or from the folder in which the run was started."""
        folders = [Path(), *(Path(str(one.get("folder"))) for one in reversed(self.logs.attempts) if one.get("folder"))]
        return next((str(path) for folder in folders if (path := folder / name).exists()), None)

    def _data_files(self) -> list[str]:
        if self.config.data_file is not None:
            return [self.config.data_file]
        for option in ("eval_file", "train_file"):
            named = self.logs.options.get(option) or []
            found = [self._existing(str(name)) for name in ([named] if isinstance(named, str) else named)]
            existing = [path for path in found if path is not None]
            if existing and len(existing) == len(found):
                return existing
        return []

    def examples(self) -> dict[str, Any]:
        """The views of the examples, ``maps``."""
        source, files = self.source, self._data_files()
        if source is None:
            return {"maps": []}
        if not files:
            self.notes["maps"].append("There are no texts to show maps of: add --data_file.")
            return {"maps": []}
        chosen = self._tried("maps", lambda: chosen_examples(self.plot_config, files)) or []
        if chosen:
            self.sources["data_file"] = ", ".join(files)
        budget, views = Budget(MAP_BYTES), []
        refused: list[str] = []
        for number, example in enumerate(chosen):
            view, note = self._view(source, example, budget, budget.left / (len(chosen) - number))
            if view is not None:
                views.append({"id": example.id, "answer": example.answer, "note": note} | view)
            else:
                refused.append(f"{example.id}: {note}")
        if refused:
            more = f" And {len(refused) - NAMED} more." if len(refused) > NAMED else ""
            hint = " Choose fewer with --examples, or others with --ids." if any(map(_is_large, refused)) else ""
            reasons = " ".join(refused[:NAMED]) + more + hint
            logger.warning("report: %d of %d examples have maps here. %s", len(views), len(chosen), reasons)
            self.notes["maps"].append(f"{len(views)} of {len(chosen)} examples have maps here. {reasons}")
        return {"maps": views}

    def _view(
        self, source: MapSource, example: Example, budget: Budget, share: float
    ) -> tuple[dict[str, Any] | None, str]:
        """The view of one example, or None and why there is none."""
        sides: dict[str, Maps] = {}
        notes: list[str] = []
        try:
            check_traces(example.rationale)
            spans = spans_of(example, source.options)
        except ValueError as error:
            return None, str(error)
        if source.store is not None or source.teacher.name is not None:
            try:
                sides["teacher"] = source.of_teacher(example, spans)
            except ValueError as error:
                notes.append(f"No map of the teacher: {error}. --teacher adds it." if source.teacher.name is None
                             else f"No map of the teacher: {error}.")  # fmt: skip
        if source.student.name is not None:
            try:
                with left_out_if_refused():
                    sides[source.student_name] = source.of_student(spans)
            except LeftOut as error:
                notes.append(f"No map of the student: {error.__cause__ or error}.")
        if not sides:
            return None, " ".join(notes)
        view, note = fitting_view(spans, sides, budget, share)
        return view, " ".join([*notes, note]).strip() if view is not None else note

    def _read_predictions(self) -> list[Predictions]:
        paths = self.config.predictions
        if not paths and (self.logs.folder / "predictions.jsonl").is_file():
            paths = [str(self.logs.folder)]
        if not paths:
            self.notes["predictions"].append(
                "There are no predictions: add --predictions with the output of molsaki evaluate."
            )
        return read_all(paths)

    def replies(self) -> list[dict[str, Any]]:
        """The student's predictions with those of other models and, for the first ones, the student's map."""
        if not self.predictions:
            return []
        first, others, source = self.predictions[0], self.predictions[1:], self.source
        known = self._known_examples()
        shown = first.shown(REPLY_BYTES, others)
        if len(shown) < len(first.records):
            self.notes["predictions"].append(
                f"{len(shown)} of {len(first.records)} predictions are shown, the first right and wrong ones: more "
                "would make the file too large."
            )
        with_map = self._with_map(shown) if source is not None and source.student.name is not None else set()
        if source is None or source.student.name is None:
            self.notes["predictions"].append("Where the student looked is not shown: add --student.")
        elif not first.is_of(source.student.name):
            self.notes["predictions"].append(
                f"The predictions are those of {first.model}, but the maps are those of {source.student.name}: give "
                "its predictions, or --student."
            )
        budget, replies = Budget(REPLY_MAP_BYTES), []
        for record in shown:
            entry = {name: record.get(name) for name in ("id", "question", "gold", "reply", "prediction", "right")}
            entry["left_out"] = record.get("left_out")
            entry["others"] = [other.beside(record) for other in others]
            if source is not None and record["id"] in with_map:
                share = budget.left / max(len(with_map), 1)
                entry["view"], entry["note"] = self._reply_view(source, record, known.get(record["id"]), budget, share)
            replies.append(entry)
        return replies

    def _known_examples(self) -> dict[str, Example]:
        """The examples of the data that was evaluated, whose key words and earlier turns a prediction does not have."""
        files = [self.predictions[0].data_file, self.config.data_file]
        for name in files:
            path = self._existing(name) if name else None
            if path is not None:
                read = functools.partial(read_examples, path, rationale=False, data_format=self.config.data_format)
                try:
                    return {example.id: example for example in read()}
                except (ValueError, OSError) as error:
                    logger.warning("report: without the key words and earlier turns of the evaluated data: %s", error)
                    self.notes["predictions"].append(f"Without the key words and earlier turns of the data: {error}")
        return {}

    def _with_map(self, shown: list[dict[str, Any]]) -> set[str]:
        """The ids whose map is shown: those given by --ids, or the first right and the first wrong ones."""
        answered = [record for record in shown if record.get("reply")]  # a question that was left out has no reply
        if {record["id"] for record in shown} & set(self.config.ids):
            return {record["id"] for record in answered} & set(self.config.ids)
        groups = [[record["id"] for record in answered if record["right"] is right] for right in (True, False)]
        return {id for group in groups for id in group[: self.config.examples]}

    def _reply_view(
        self, source: MapSource, record: dict[str, Any], known: Example | None, budget: Budget, share: float
    ) -> tuple[dict[str, Any] | None, str]:
        """The student's map of the question and its own reply."""
        first, options = self.predictions[0], source.options
        example = Example(record["id"], record["question"], record["reply"], record["gold"])
        if known is not None and known.question == example.question:
            spans = None if known.key_spans is None else (known.key_spans[0], ())
            example = dataclasses.replace(
                example, keywords=known.keywords, context=known.context, choices=known.choices, key_spans=spans
            )
        template = first.template or options.student_template
        try:
            check_traces(example.rationale)
            if first.mode == "answer":
                predict = first.predict_template or self.logs.options.get("predict_template", PREDICT_TEMPLATE)
                question, template = predict_task(example, template, predict)
                example = dataclasses.replace(example, question=question)
            spans_found = spans_of(example, options)
            with left_out_if_refused():
                maps = source.of_student(spans_found, template)
        except ValueError as error:
            return None, f"No map: {error}."
        return fitting_view(spans_found, {source.student_name: maps}, budget, share)


def _is_large(note: str) -> bool:
    return note.endswith(TOO_LARGE)


def _exported(run: Path) -> str | None:
    """The student of a run: the exported model, or else that of the last checkpoint."""
    for folder in (run, *checkpoints(run)):
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            return str(folder)
    return None
