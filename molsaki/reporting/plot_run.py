"""The command ``molsaki plot``: gathers a run's logs and the maps of texts, from models or a store, and draws them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from molsaki.batches.tokenized import spans_of
from molsaki.config import PlotConfig
from molsaki.io import hash64, read_json_lines
from molsaki.plotting.curves import CURVES, plot_layer_weights, plot_losses
from molsaki.plotting.map_pictures import plot_attention_by_step, plot_map
from molsaki.reporting.maps import Maps, MapSource, chosen_examples
from molsaki.run_files import WEIGHTS_LOG, last_state
from molsaki.text.alignment import encode


def plot(config: PlotConfig) -> list[Path]:
    """Draw everything that can be drawn from the config's run, models, store and data, and return the files.

    From a run: ``losses`` and ``layer_weights``. From a data set with a teacher, a store or a student: for each of its
    first examples ``map_ID``, and ``attention_ID`` for the sides whose tokenizer is given.
    """
    if config.run is None and config.data_file is not None and config.output_dir is None:
        raise ValueError("--output_dir: required without --run: the folder of the pictures")
    folder = Path(config.output_dir or Path(config.run or ".", "plots"))
    drawn = [] if config.run is None else draw_run(Path(config.run), folder, config.format)
    if config.data_file is not None:
        drawn += _draw_examples(config, config.data_file, folder)
    if not drawn:
        if config.run is None and config.data_file is None:
            raise ValueError(
                "--run, --data_file: expected at least one of them, got neither; --data_file also needs --teacher, "
                "--store or --student"
            )
        if config.data_file is None:
            raise ValueError(
                f"--run: {config.run} holds nothing to draw: expected trainer_state.json, a checkpoint or "
                f"{WEIGHTS_LOG}, which molsaki distill writes"
            )
        raise ValueError(
            f"--data_file: {config.data_file} holds no example to draw: expected at least one with a rationale, and "
            f"--examples of at least 1, got {config.examples}"
        )
    return drawn


def draw_run(run: Path, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Draw the logs of a run of ``molsaki distill``: ``losses`` and, if it has any, ``layer_weights``."""
    if not run.is_dir():
        raise FileNotFoundError(f"--run: no such folder: {run}")
    drawn = []
    state = last_state(run)
    if state is not None:
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        logged = dict.fromkeys(name for entry in history for name in entry)
        curves = {
            panel: [*names, *(x for x in logged if x.startswith("eval_") and x.endswith(tuple(f"_{n}" for n in names)))]
            for panel, names in CURVES.items()
        }
        drawn.append(plot_losses(history, curves, folder / f"losses.{formats[0]}", formats=formats))
    if (run / WEIGHTS_LOG).is_file():
        records = read_json_lines(run / WEIGHTS_LOG)
        if records:
            drawn.append(plot_layer_weights(records, folder / f"layer_weights.{formats[0]}", formats=formats))
    return _written(drawn, formats)


def _draw_examples(config: PlotConfig, data_file: str, folder: Path) -> list[Path]:
    if config.teacher is None and config.student is None and config.store is None:
        raise ValueError("--data_file: needs --teacher, --store or --student to draw maps of it")
    source = MapSource(config)
    sides = {"teacher": source.teacher, source.student_name: source.student}
    drawn = []
    for example in chosen_examples(config, data_file):
        spans = spans_of(example, source.options)
        steps, words = ([spans.text[a:b] for a, b in ranges] for ranges in (spans.steps, spans.words))
        maps: dict[str, Maps] = {}
        if config.store is not None or config.teacher is not None:
            maps["teacher"] = source.of_teacher(example, spans)
        if config.student is not None:
            maps[source.student_name] = source.of_student(spans)
        values = {side: found.mixed.cpu().numpy() for side, found in maps.items()}
        tokens = {
            name: [stop - start for start, stop in encode(spans, side.tokenizer, template=side.template).steps]
            for name, side in sides.items()
            if name in maps and side.tokenizer is not None
        }
        name, formats = _file_name(example.id), config.format
        path = folder / f"map_{name}.{formats[0]}"
        drawn.append(plot_map(values, steps, words, path, example.id, formats=formats))
        if tokens:
            shown = {side: values[side] for side in tokens}
            path = folder / f"attention_{name}.{formats[0]}"
            drawn.append(plot_attention_by_step(shown, tokens, steps, path, example.id, formats=formats))
    return _written(drawn, config.format)


def _written(pictures: Iterable[Path], formats: Sequence[str]) -> list[Path]:
    """The files of the pictures, one for each format."""
    return [picture.with_suffix(f".{suffix}") for picture in pictures for suffix in dict.fromkeys(formats)]


def _file_name(id: str) -> str:
    """A file name for an example, unique even if the file system ignores case: a digest distinguishes similar ids."""
    name = re.sub(r"[^a-z0-9._-]", "_", id.lower())[:100]
    return name if name == id else f"{name}-{hash64(id) % (1 << 32):08x}"
