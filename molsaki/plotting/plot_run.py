"""The command ``molsaki plot``: gathers a run's logs and the maps of texts, from models or a store, and draws them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.batches.tokenized import spans_of
from molsaki.config import MixtureOptions, PlotConfig, TextOptions
from molsaki.io import hash64, read_json_lines
from molsaki.modeling.capture import capture
from molsaki.modeling.loading import load_model, load_tokenizer
from molsaki.plotting import plots
from molsaki.teacher.map_store import Store
from molsaki.teacher.teacher_maps import mixture_of, probe, probe_student, teacher_maps
from molsaki.text.alignment import encode
from molsaki.text.examples import Example, read_examples
from molsaki.text.spans import Spans
from molsaki.training.checkpoints import CONFIG, ROUTER, WEIGHTS_LOG, checkpoints
from molsaki.training.mixture import MixtureOfLayers
from molsaki_kernels import StepPlan


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
        raise ValueError("nothing to draw: give --run, or --data_file with --teacher, --store or --student")
    return drawn


def draw_run(run: Path, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Draw the logs of a run of ``molsaki distill``: ``losses`` and, if it has any, ``layer_weights``."""
    if not run.is_dir():
        raise FileNotFoundError(f"--run: no such folder: {run}")
    drawn = []
    states = [path / "trainer_state.json" for path in (run, *checkpoints(run))]
    state = next((path for path in states if path.is_file()), None)
    if state is not None:
        history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
        logged = dict.fromkeys(name for entry in history for name in entry)
        curves = {
            panel: [*names, *(x for x in logged if x.startswith("eval_") and x.endswith(tuple(f"_{n}" for n in names)))]
            for panel, names in plots.CURVES.items()
        }
        drawn.append(plots.plot_losses(history, curves, folder / f"losses.{formats[0]}", formats=formats))
    if (run / WEIGHTS_LOG).is_file():
        records = read_json_lines(run / WEIGHTS_LOG)
        if records:
            drawn.append(plots.plot_layer_weights(records, folder / f"layer_weights.{formats[0]}", formats=formats))
    return _written(drawn, formats)


@dataclasses.dataclass
class _Side:
    """The teacher or the student: its model and its tokenizer, None where they are not needed or not given."""

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    template: str

    @classmethod
    def load(cls, name: str | None, flag: str, template: str, needs_model: bool = True) -> _Side:
        if name is None:
            return cls(None, None, template)
        return cls(load_model(name, flag) if needs_model else None, load_tokenizer(name, flag), template)

    def tokens(self, spans: Spans) -> tuple[dict[str, Tensor], StepPlan]:
        """The model's inputs for one text, and their plan."""
        assert self.model is not None and self.tokenizer is not None
        encoded = encode(spans, self.tokenizer, template=self.template)
        ids = torch.tensor([encoded.input_ids], device=self.model.device)
        plan = StepPlan.from_spans([encoded.steps], [encoded.words], device=self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, plan


def _draw_examples(config: PlotConfig, data_file: str, folder: Path) -> list[Path]:
    options = _options(config)
    store = None if config.store is None else Store(config.store)
    if store is not None:
        store.check({"map_heads": options.map_heads})
    teacher = _Side.load(config.teacher, "--teacher", options.teacher_template, needs_model=store is None)
    student = _Side.load(config.student, "--student", options.student_template)
    if teacher.model is None and student.model is None and store is None:
        raise ValueError("--data_file: needs --teacher, --store or --student to draw maps of it")

    heads = options.map_heads
    own, layers, width = (1, 1, 1) if student.model is None else probe_student(student.model, options)
    other = own if teacher.model is None else probe(teacher.model, map_heads=heads)[0]
    mixture = mixture_of(options, other if store is None else store.num_layers, own, layers, width)
    student_name = "student" if _load_router(mixture, config) else "student, layers weighted alike"

    drawn = []
    for example in _chosen(config, data_file):
        spans = spans_of(example, options)
        steps, words = ([spans.text[a:b] for a, b in ranges] for ranges in (spans.steps, spans.words))
        maps: dict[str, Tensor] = {}
        if store is not None or teacher.model is not None:
            maps["teacher"] = _teacher_map(example, spans, store, teacher, mixture, heads)
        if student.model is not None:
            maps[student_name] = _student_map(spans, student, mixture, options)
        values = {side: value.float().cpu().numpy() for side, value in maps.items()}
        tokens = {
            name: [stop - start for start, stop in encode(spans, side.tokenizer, template=side.template).steps]
            for name, side in (("teacher", teacher), (student_name, student))
            if name in maps and side.tokenizer is not None
        }
        name, formats = _file_name(example.id), config.format
        path = folder / f"map_{name}.{formats[0]}"
        drawn.append(plots.plot_map(values, steps, words, path, example.id, formats=formats))
        if tokens:
            shown = {side: values[side] for side in tokens}
            path = folder / f"attention_{name}.{formats[0]}"
            drawn.append(plots.plot_attention_by_step(shown, tokens, steps, path, example.id, formats=formats))
    return _written(drawn, config.format)


def _written(pictures: Iterable[Path], formats: Sequence[str]) -> list[Path]:
    """The files of the pictures, one for each format."""
    return [picture.with_suffix(f".{suffix}") for picture in pictures for suffix in dict.fromkeys(formats)]


def _file_name(id: str) -> str:
    """A file name of an example, its own also where a file system ignores case: a digest tells ids apart."""
    name = re.sub(r"[^a-z0-9._-]", "_", id.lower())[:100]
    return name if name == id else f"{name}-{hash64(id) % (1 << 32):08x}"


def _options(config: PlotConfig) -> PlotConfig:
    """The config, with the text and mixture options of the run, where there is one."""
    if config.run is None or not Path(config.run, CONFIG).is_file():
        return config
    saved = json.loads(Path(config.run, CONFIG).read_text(encoding="utf-8"))
    names = [field.name for options in (TextOptions, MixtureOptions) for field in dataclasses.fields(options)]
    return dataclasses.replace(config, **{name: saved[name] for name in names if name in saved})


def _load_router(mixture: MixtureOfLayers, config: PlotConfig) -> bool:
    """Load the router from the student's folder or the run's last checkpoint; True if it was found or is not needed."""
    if not mixture.state_dict():
        return True
    folders = [Path(config.student or "."), *(checkpoints(config.run)[:1] if config.run else [])]
    router = next((folder / ROUTER for folder in folders if (folder / ROUTER).is_file()), None)
    if router is not None:
        mixture.load_state_dict(load_file(router))
    return router is not None


def _chosen(config: PlotConfig, data_file: str) -> list[Example]:
    examples = [
        example for example in read_examples(data_file, data_format=config.data_format) if example.rationale.strip()
    ]
    if not config.ids:
        return examples[: config.examples]
    known = {example.id: example for example in examples}
    missing = [id for id in config.ids if id not in known]
    if missing:
        raise ValueError(f"--ids: {data_file} holds no example {missing[0]!r} with a rationale")
    return [known[id] for id in config.ids]


def _teacher_map(
    example: Example, spans: Spans, store: Store | None, side: _Side, mixture: MixtureOfLayers, map_heads: str
) -> Tensor:
    """``(S, W)``, averaged over the pairs of layers."""
    if store is None:
        assert side.model is not None
        inputs, plan = side.tokens(spans)
        maps = teacher_maps(side.model, **inputs, plan=plan, map_heads=map_heads)
    else:
        entry = store[example.id]
        if entry.maps is None:
            raise ValueError(f"--store: {store.folder}: example {example.id!r} was left out: {entry.reason}")
        if not store.all_layers:
            return entry.maps.mean(0)
        maps = entry.maps[None].float()
        plan = StepPlan.from_spans([[(s, s + 1) for s in range(maps.shape[2])]], [[[w] for w in range(maps.shape[3])]])
    return mixture.teacher(maps, plan)[1][0].mean(0)


@torch.no_grad()
def _student_map(spans: Spans, side: _Side, mixture: MixtureOfLayers, options: PlotConfig) -> Tensor:
    """``(S, W)``, averaged over the pairs of layers."""
    assert side.model is not None
    inputs, plan = side.tokens(spans)
    how = {"value_heads": options.value_heads, "pooling": options.pooling, "map_heads": options.map_heads}
    with capture(side.model, plan, True, **how) as record:
        side.model(**inputs, logits_to_keep=1, use_cache=False)
    return mixture.student(record.maps, record.values, plan)[1][0].mean(0)
