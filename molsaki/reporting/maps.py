"""Computes the maps of single examples for pictures and reports, from a teacher or its store and from a student."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.config import MixtureOptions, PlotConfig, TextOptions
from molsaki.modeling.capture import capture
from molsaki.modeling.loading import load_model, load_tokenizer
from molsaki.run_files import CONFIG, ROUTER, checkpoints
from molsaki.store.map_store import Store, check_text
from molsaki.teacher.teacher_maps import mixture_of, probe, probe_student, teacher_record
from molsaki.text.alignment import encode
from molsaki.text.examples import Example, read_examples
from molsaki.text.spans import Spans
from molsaki_kernels import StepPlan


@dataclasses.dataclass(frozen=True)
class Maps:
    """The maps of one text by one model.

    Attributes:
        mixed: ``(S, W)`` float32, averaged over the pairs of layers.
        layers: ``(L, S, W)``, None where only the mixed map is stored.
        names: of the L maps; empty without ``layers``.
        weights: ``(L,)`` in the mixed map, averaged over the pairs of layers, where they are known.
    """

    mixed: Tensor
    layers: Tensor | None = None
    names: tuple[str, ...] = ()
    weights: Tensor | None = None


class Side:
    """The teacher or the student: its tokenizer (None if it is not given) and its model, loaded when needed."""

    def __init__(self, name: str | None, flag: str, template: str):
        self.name, self.flag, self.template = name, flag, template
        self.tokenizer: PreTrainedTokenizerBase | None = None if name is None else load_tokenizer(name, flag)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        assert self.name is not None
        return load_model(self.name, self.flag)

    def tokens(self, spans: Spans, template: str | None = None) -> tuple[dict[str, Tensor], StepPlan]:
        """The model's inputs for one text, and their plan."""
        assert self.tokenizer is not None
        encoded = encode(spans, self.tokenizer, template=template or self.template)
        ids = torch.tensor([encoded.input_ids], device=self.model.device)
        plan = StepPlan.from_spans([encoded.steps], [encoded.words], device=self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, plan


class MapSource:
    """The maps of examples under the options of a run.

    The teacher's maps come from the store if it is given. Otherwise they come from the live teacher, if that is given;
    with ``every_layer`` also for examples of which the store does not hold every layer.

    Args:
        config: names the models, the store and the run, whose last checkpoint has the router.
        every_layer: prefer a source that has the map of every layer over one that has the mixed map only.

    Raises:
        ValueError, OSError: a model or the store cannot be used, or they do not fit each other.
    """

    def __init__(self, config: PlotConfig, every_layer: bool = False):
        self.options = options = run_options(config)
        self.store = None if config.store is None else Store(config.store)
        if self.store is not None:
            self.store.check({"map_heads": options.map_heads})
        self.teacher = Side(config.teacher, "--teacher", options.teacher_template)
        self.student = Side(config.student, "--student", options.student_template)
        self._every_layer = every_layer
        own, layers, width = (1, 1, 1) if config.student is None else probe_student(self.student.model, options)
        if self.store is not None:
            other = self.store.num_layers
        else:
            other = own if config.teacher is None else probe(self.teacher.model, map_heads=options.map_heads)[0]
        self.mixture = mixture_of(options, other, own, layers, width)
        self.has_router = self._load_router(config)

    @property
    def student_name(self) -> str:
        """A description of the student's map."""
        return "student" if self.has_router else "student, layers weighted alike"

    def _load_router(self, config: PlotConfig) -> bool:
        """Load the router from the student's folder or the run's last checkpoint; True if found or not needed."""
        if not self.mixture.state_dict():
            return True
        folders = [Path(config.student or "."), *(checkpoints(config.run)[:1] if config.run else [])]
        router = next((folder / ROUTER for folder in folders if (folder / ROUTER).is_file()), None)
        if router is not None:
            self.mixture.load_state_dict(load_file(router))
        return router is not None

    def of_teacher(self, example: Example, spans: Spans) -> Maps:
        """Raises a ValueError if there is no teacher and the store lacks the example or has another text for it."""
        use_store = self.teacher.name is None or not self._every_layer or self._holds(example, spans)
        if self.store is not None and use_store:
            return self._stored(self.store, example, spans)
        inputs, plan = self.teacher.tokens(spans)
        record = teacher_record(self.teacher.model, **inputs, plan=plan, map_heads=self.options.map_heads)
        if record.maps.shape[1] != self.mixture.num_teacher_layers:
            raise ValueError(
                f"--teacher: {self.teacher.name} has {record.maps.shape[1]} maps, but the store is of a teacher with "
                f"{self.mixture.num_teacher_layers}"
            )
        return self._mixed(record.maps, plan, names_of(record.layers, record.maps_per_layer))

    @torch.no_grad()
    def of_student(self, spans: Spans, template: str | None = None) -> Maps:
        """The student's maps; ``template`` instead of the run's."""
        inputs, plan = self.student.tokens(spans, template)
        options = self.options
        how = {"value_heads": options.value_heads, "pooling": options.pooling, "map_heads": options.map_heads}
        values = self.mixture.router is not None
        with capture(self.student.model, plan, values, **how) as record:
            self.student.model(**inputs, logits_to_keep=1, use_cache=False)
        weights, mixed = self.mixture.student(record.maps, record.values if values else None, plan)
        names = names_of(record.layers, record.maps_per_layer)
        return Maps(mixed[0].mean(0).float(), record.maps[0].float(), names, weights[0].mean(0).float())

    def _holds(self, example: Example, spans: Spans) -> bool:
        """Whether the store has every layer's map of this example."""
        if self.store is None or not self.store.all_layers or example.id not in self.store:
            return False
        entry = self.store[example.id]
        check_text(self.store.folder, entry, spans)
        return entry.maps is not None

    def _stored(self, store: Store, example: Example, spans: Spans) -> Maps:
        if example.id not in store:
            raise ValueError(f"--store: {store.folder} holds no example {example.id!r}")
        entry = store[example.id]
        check_text(store.folder, entry, spans)
        if entry.maps is None:
            raise ValueError(f"--store: {store.folder}: example {example.id!r} was left out: {entry.reason}")
        if not store.all_layers:
            weights = None if entry.weights is None else entry.weights.mean(0)
            return Maps(entry.maps.mean(0).float(), weights=weights)
        maps = entry.maps[None].float()
        plan = StepPlan.from_spans([[(s, s + 1) for s in range(maps.shape[2])]], [[[w] for w in range(maps.shape[3])]])
        return self._mixed(maps, plan, tuple(f"map {number}" for number in range(maps.shape[1])))

    def _mixed(self, maps: Tensor, plan: StepPlan, names: tuple[str, ...]) -> Maps:
        weights, mixed = self.mixture.teacher(maps, plan)
        return Maps(mixed[0].mean(0).float(), maps[0].float(), names, weights[0].mean(0).float())


def names_of(layers: Iterable[int], maps_per_layer: Iterable[int]) -> tuple[str, ...]:
    """A name for each map of a record: of its layer, and of its head where each head has a map."""
    return tuple(
        f"layer {layer}" if heads == 1 else f"layer {layer}, head {head}"
        for layer, heads in zip(layers, maps_per_layer, strict=True)
        for head in range(heads)
    )


def saved_options(run: str | Path) -> dict[str, Any]:
    """The options of a run of ``molsaki distill``, from its folder or its last checkpoint; empty if it has none."""
    files = [folder / CONFIG for folder in (Path(run), *checkpoints(run))]
    saved = next((file for file in files if file.is_file()), None)
    options: dict[str, Any] = {} if saved is None else json.loads(saved.read_text(encoding="utf-8"))
    return options


def run_options(config: PlotConfig) -> PlotConfig:
    """The config, with the text and mixture options of the run, where there is one."""
    saved = {} if config.run is None else saved_options(config.run)
    names = [field.name for options in (TextOptions, MixtureOptions) for field in dataclasses.fields(options)]
    return dataclasses.replace(config, **{name: saved[name] for name in names if name in saved})


def chosen_examples(config: PlotConfig, data_file: str | list[str]) -> list[Example]:
    """The examples that ``config.ids`` names, else the first ones; all have a rationale."""
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
