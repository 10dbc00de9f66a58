"""Reads the YAML file of a study, with its methods (arms), seeds and data sets, and checks every name and value."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig

from molsaki import presets
from molsaki.config import (
    OR_YOUR_OWN,
    DataOptions,
    EvaluateConfig,
    ExtractConfig,
    MixtureOptions,
    TextOptions,
)
from molsaki.flags import build, check_keys, read_yaml
from molsaki.functions import is_named, look_in, named, source
from molsaki.io import digest
from molsaki.method.objectives import objective_of
from molsaki.store.fingerprints import NOT_A_MODULE
from molsaki.training.config import DistillConfig

KEYS = (
    "output_dir", "student", "teacher", "live_teacher", "seeds", "data", "options", "evaluate", "extract", "arms",
    "baseline", "primary", "keep_students", "curve", "score",
)  # fmt: skip
NEEDED = ("output_dir", "student", "seeds", "data", "arms")
FILES = ("train_file", "eval_file", "store")  # options of DistillConfig that name a file or folder
# Keys of an arm that are no options of DistillConfig.
OVERRIDES = ("evaluate", "extract", "live_teacher", "baseline", "seeds")
# Options of DistillConfig that an arm must not set, with the reason.
OF_THE_STUDY = {
    "output_dir": "the study names the folder of each run",
    "seed": "it is the run's, one of seeds",
    "data_seed": "it is the run's, one of seeds",
    "streaming": "the arms share their examples, which are counted",
    "resume": "a run always continues where it stopped",
    "resume_from_checkpoint": "a run always continues where it stopped",
}
# Options that change the state of the whole process; a process runs several arms one after another.
OF_THE_PROCESS = ("tf32", "full_determinism", "deepspeed", "fsdp", "fsdp_config", "accelerator_config")
# Takes rows of a test's file and the replies to them; returns one number per example under each name, or None.
Scorer = Callable[[list[dict[str, Any]], list[str]], Mapping[str, Sequence[float | None]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One student: a data set, an arm and a seed.

    Attributes:
        folder: of its results.
        options: the options of `DistillConfig` except folders and seeds, from the YAML file with {seed} and {data}
            filled in; they include the student, and the teacher or store if the objective has a teacher.
        extract: options of `ExtractConfig` if its maps come from a store that the study extracts, else None.
        tests: the file of each test set.
        evaluate: options of `EvaluateConfig`.
        curve: the key of the YAML file, or None.
    """

    data: str
    arm: str
    seed: int
    folder: Path
    options: dict[str, Any]
    extract: dict[str, Any] | None
    tests: dict[str, str]
    evaluate: dict[str, Any]
    curve: dict[str, Any] | None

    def __str__(self) -> str:
        return f"{self.data}/{self.arm}/{self.seed}"


@dataclasses.dataclass(frozen=True)
class Primary:
    """The primary comparisons of a study with the baseline, all on one test."""

    test: str
    arms: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """A study that was read from a YAML file.

    Attributes:
        path: the YAML file; relative names in it are relative to its folder.
        baselines: for each arm, the arm that it is compared with, or None.
        runs: all runs in their order, seed by seed.
    """

    path: Path
    output_dir: Path
    seeds: list[int]
    data: list[str]
    arms: list[str]
    baselines: dict[str, str | None]
    primary: Primary | None
    keep_students: bool
    score: str | None
    runs: list[Run]

    def file(self, name: str) -> str:
        """The path of a file that the YAML file names."""
        return str(self.path.parent / Path(name).expanduser())

    def model(self, name: str) -> str:
        """The folder of a model that the YAML file names, or its hub name."""
        path = self.path.parent / Path(name).expanduser()
        return str(path) if path.is_dir() else name

    def identity(self, run: Run) -> dict[str, Any]:
        """Everything that the result of a run depends on, by dotted names: its options, the content of its data files
        and of its preset, and the source of user-defined modules.
        """
        found: dict[str, Any] = {"seed": run.seed}
        for section, values in (
            ("", run.options),
            ("extract.", run.extract or {}),
            ("tests.", run.tests),
            ("evaluate.", run.evaluate),
            ("curve.", run.curve or {}),
        ):
            found |= {section + name: value for name, value in values.items()}
        files = [run.options["train_file"], *run.tests.values(), *([run.curve["data_file"]] if run.curve else [])]
        found |= {f"content of {name}": _content(self.file(name)) for name in files}
        if preset := run.options.get("preset"):  # a later version may set other options
            found[f"content of preset {preset}"] = digest(presets.PRESETS[preset])
        for option in (*OR_YOUR_OWN, "key", "splitter"):
            value = str(run.options.get(option))
            if is_named(value) and not value.startswith(NOT_A_MODULE):
                found[f"source of {value}"] = digest(source(f"{self.path}: {option}", value, self.path.parent))
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]

    def distill_config(self, run: Run, **more: Any) -> DistillConfig:
        """The options of the run's training.

        Args:
            more: options that override the run's.
        """
        values: dict[str, Any] = {"save_strategy": "no", "disable_tqdm": True} | run.options
        values |= {name: self.file(values[name]) for name in FILES if values.get(name)}
        values |= {name: self.model(values[name]) for name in ("student", "teacher") if values.get(name)}
        values |= {"output_dir": str(run.folder / "student"), "seed": run.seed, "data_seed": run.seed, "resume": True}
        return build(DistillConfig, values | more, f"{self.path}: arms.{run.arm}")

    def evaluate_config(self, run: Run, **more: Any) -> EvaluateConfig:
        """The options of an evaluation of the run's student; ``more`` has those that are not in the YAML file."""
        return build(EvaluateConfig, run.evaluate | more, f"{self.path}: arms.{run.arm}: evaluate")

    def scorer(self) -> Scorer | None:
        """The function that ``score`` names, imported with the YAML file's folder on the path."""
        if self.score is None:
            return None
        return cast(Scorer, named(f"{self.path}: score", self.score, self.path.parent))


def read_study(path: str | Path, with_models: bool = True) -> Study:
    """Read a study and check all of it: keys, options of every arm, files and, ``with_models``, models.

    Raises:
        ValueError, TypeError: a key, option or value; the message names the file, the key and the value.
        FileNotFoundError: a file that is named does not exist.
    """
    path = Path(path)
    look_in(path.parent)  # for user-defined functions in the folder of the file
    values = read_yaml(path)
    check_keys(values, KEYS, path)
    for key in NEEDED:
        if not values.get(key):
            raise ValueError(f"{path}: {key}: required, got {values.get(key)!r}")
    arms = {name: _section(arm, path, f"arms.{name}") for name, arm in _section(values["arms"], path, "arms").items()}
    data = {name: _section(one, path, f"data.{name}") for name, one in _section(values["data"], path, "data").items()}
    for key, names in (("arms", arms), ("data", data)):
        _check_names(names, path, key)
    seeds = _seeds(values["seeds"], path, "seeds")
    for name, own in arms.items():
        if "seeds" in own and not set(_seeds(own["seeds"], path, f"arms.{name}.seeds")) <= set(seeds):
            raise ValueError(f"{path}: arms.{name}.seeds: expected some of {seeds}, got {own['seeds']}")
    for name, one in data.items():
        check_keys(one, ("train_file", "tests", "options", "evaluate"), f"{path}: data.{name}")
        _check_names(_section(one.get("tests"), path, f"data.{name}.tests"), path, f"data.{name}.tests")
    _check_types(values, arms, data, path)
    baselines = _baselines(values.get("baseline"), arms, path)
    study = Study(
        path=path,
        output_dir=path.parent / Path(values["output_dir"]).expanduser(),
        seeds=seeds,
        data=list(data),
        arms=list(arms),
        baselines=baselines,
        primary=_primary(values.get("primary"), baselines, data, path),
        keep_students=values.get("keep_students", True),
        score=values.get("score"),
        runs=[],
    )
    _check_options(values, arms, data, path)
    for seed in seeds:
        for data_name in data:
            for arm, own in arms.items():
                if seed in own.get("seeds", seeds):
                    study.runs.append(_run(study, values, data_name, arm, seed))
    for arm, baseline in study.baselines.items():
        if baseline is not None and not set.intersection(
            *({run.seed for run in study.runs if run.arm == one} for one in (arm, baseline))
        ):
            raise ValueError(f"{path}: arms.{arm}: shares no seed with {baseline}, the arm that it is compared with")
    _check_runs(study, with_models)
    study.scorer()
    return study


def _seeds(value: Any, path: Path, key: str) -> list[int]:
    if not (isinstance(value, list) and value and all(type(one) is int for one in value)) or len({*value}) < len(value):
        raise ValueError(f"{path}: {key}: expected a list of different whole numbers, got {value!r}")
    return value


def _run(study: Study, values: dict[str, Any], data: str, arm: str, seed: int) -> Run:
    def filled(value: Any) -> Any:
        return value.replace("{seed}", str(seed)).replace("{data}", data) if isinstance(value, str) else value

    one, own = values["data"][data], values["arms"][arm]
    options = {"student": values["student"], "teacher": values.get("teacher"), "train_file": one.get("train_file")}
    for section in (values.get("options"), one.get("options"), own):
        options |= {name: value for name, value in (section or {}).items() if name not in OVERRIDES}
    for name in ("student", "teacher", *FILES):
        if options.get(name) is not None:
            options[name] = filled(options[name])
    evaluate = (values.get("evaluate") or {}) | (one.get("evaluate") or {}) | (own.get("evaluate") or {})
    extract = (values.get("extract") or {}) | (own.get("extract") or {})
    curve = values.get("curve")
    run = Run(
        data=data,
        arm=arm,
        seed=seed,
        folder=study.output_dir / data / arm / str(seed),
        options=options,
        extract=None,
        tests={name: filled(file) for name, file in one["tests"].items()},
        evaluate=evaluate,
        curve=None if curve is None else {name: filled(value) for name, value in curve.items()},
    )
    preset = presets.PRESETS.get(str(options.get("preset")), {})
    name = options.get("objective") or preset.get("objective") or "molsaki"
    objective = objective_of(str(name), f"{study.path}: arms.{arm}: objective", study.path.parent)
    if not objective.has_teacher or options.get("store"):
        options.pop("teacher", None)
    elif not options.get("teacher"):
        raise ValueError(f"{study.path}: arms.{arm}: teacher: required by its objective, got none")
    elif objective.maps and not own.get("live_teacher", values.get("live_teacher", False)):
        return dataclasses.replace(run, extract=extract)
    return run


def extract_config(study: Study, run: Run, config: DistillConfig) -> ExtractConfig:
    """The options of the store that the run needs: its text options, and all layers unless the study disables them."""
    assert run.extract is not None
    values = {"all_layers": True} | run.extract
    shared = (DataOptions, TextOptions, *(() if values["all_layers"] else (MixtureOptions,)))
    for options in shared:
        values |= {field.name: getattr(config, field.name) for field in dataclasses.fields(options)}
    values["map_heads"] = config.map_heads
    if not values["all_layers"] or config.too_long == "cut":
        values["student"] = config.student
    values |= {"teacher": config.teacher, "data_files": config.train_file}
    return build(ExtractConfig, values, f"{study.path}: arms.{run.arm}: extract")


def _baselines(baseline: Any, arms: Mapping[str, Any], path: Path) -> dict[str, str | None]:
    """The baseline of each arm: its own, or the study's."""
    for where, name in (
        {"baseline": baseline} | {f"arms.{arm}.baseline": own.get("baseline") for arm, own in arms.items()}
    ).items():
        if name is not None and (not isinstance(name, str) or name not in arms):
            raise ValueError(f"{path}: {where}: expected one of the arms {', '.join(arms)}, got {name!r}")
    found = {arm: own.get("baseline") or baseline for arm, own in arms.items()}
    return {arm: None if name == arm else name for arm, name in found.items()}


def _primary(value: Any, baselines: Mapping[str, str | None], data: Mapping[str, Any], path: Path) -> Primary | None:
    if value is None:
        return None
    where = f"{path}: primary"
    section = _section(value, path, "primary")
    check_keys(section, ("test", "arms"), where)
    others = [arm for arm, baseline in baselines.items() if baseline is not None]
    if not others:
        raise ValueError(f"{where}: expected a baseline as well, got none")
    tests = [test for test in next(iter(data.values()))["tests"] if all(test in one["tests"] for one in data.values())]
    if section.get("test") not in tests:
        listed = ", ".join(tests)
        raise ValueError(f"{where}: test: expected one that all data sets have ({listed}), got {section.get('test')!r}")
    named = section.get("arms")
    if not isinstance(named, list) or not named or len(set(map(str, named))) < len(named):
        raise ValueError(f"{where}: arms: expected a list of different arms, got {named!r}")
    for arm in named:
        if arm not in others:
            raise ValueError(f"{where}: arms: expected some of {', '.join(others)}, got {arm!r}")
    return Primary(section["test"], named)


def _check_types(values: dict[str, Any], arms: dict[str, Any], data: dict[str, Any], path: Path) -> None:
    """Refuse a value that is not a text where a name is expected, or not a bool where one is expected."""
    named = {key: values.get(key) for key in ("output_dir", "student", "teacher", "score")}
    for name, one in data.items():
        named[f"data.{name}.train_file"] = one.get("train_file")
        named |= {f"data.{name}.tests.{test}": file or "" for test, file in one["tests"].items()}
    flags = {key: values.get(key, False) for key in ("keep_students", "live_teacher")}
    for name, one in {
        "options": values,
        **{f"data.{name}.options": one for name, one in values["data"].items()},
    }.items():
        given = one.get("options")
        named |= {f"{name}.{key}": given.get(key) for key in FILES} if isinstance(given, dict) else {}
    for name, own in arms.items():
        named |= {f"arms.{name}.{key}": own.get(key) for key in ("student", "teacher", *FILES)}
        flags[f"arms.{name}.live_teacher"] = own.get("live_teacher", False)
    for key, value in named.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{path}: {key}: expected a name, got {value!r}")
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {key}: expected true or false, got {value!r}")


def _section(value: Any, path: Path, key: str) -> dict[Any, Any]:
    if value is None and key.startswith("arms."):
        return {}
    if not isinstance(value, dict) or (not value and not key.startswith("arms.")):
        raise ValueError(f"{path}: {key}: expected `name: value` lines, got {value!r}")
    return value


def _check_names(names: Mapping[Any, Any], path: Path, key: str) -> None:
    """Refuse a name that cannot be the name of a folder."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"{path}: {key}: expected names of letters, digits and . _ + -, got {name!r}")
        if key == "data" and name == "stores":
            raise ValueError(f"{path}: data: expected a name other than stores, which is the folder of the maps")


def _check_options(values: dict[str, Any], arms: dict[str, Any], data: dict[str, Any], path: Path) -> None:
    """Refuse unknown options, and options that an arm must not set."""
    sections = {"options": values.get("options"), "curve": values.get("curve")}
    sections |= {key: values.get(key) for key in ("evaluate", "extract")}
    for kind, entries in (("data", data), ("arms", arms)):
        for name, one in entries.items():
            sections |= {f"{kind}.{name}.{key}": one[key] for key in ("options", *OVERRIDES[:2]) if key in one}
            if kind == "arms":
                sections[f"arms.{name}"] = one
    known = {
        one: {f.name for f in dataclasses.fields(one) if f.init}
        for one in (DistillConfig, ExtractConfig, EvaluateConfig)
    }
    of_texts = {field.name for options in (DataOptions, TextOptions) for field in dataclasses.fields(options)}
    of_mixtures = {field.name for field in dataclasses.fields(MixtureOptions)}
    for key, section in sections.items():
        if section is None:
            continue
        section, where = _section(section, path, key), f"{path}: {key}"
        if key.endswith("evaluate"):
            names = known[EvaluateConfig] - {"model", "data_file", "output_dir", "compare"}
        elif key.endswith("extract"):
            names = known[ExtractConfig] - {"teacher", "student", "data_files", "store"} - of_texts - of_mixtures
        elif key == "curve":
            names = {"every", "data_file", "limit"}
        else:
            names = known[DistillConfig] | {"preset"} | (set(OVERRIDES) if key.startswith("arms.") else set())
            for name in section:
                if name in OF_THE_STUDY:
                    raise ValueError(f"{where}: {name}: must not be set: {OF_THE_STUDY[name]}")
                if name in OF_THE_PROCESS and key != "options":
                    raise ValueError(f"{where}: {name}: must be in options, for all runs: it changes the process")
                if name in ("student", "teacher", "train_file") and not key.startswith("arms."):
                    raise ValueError(f"{where}: {name}: must be in an arm or outside of options")
        check_keys(section, sorted(names), where)


def _check_runs(study: Study, with_models: bool) -> None:
    """Build the options of every arm, and look for every file and model."""
    checked: set[Any] = set()
    for run in study.runs:
        where = f"{study.path}: {run}"
        if run.options.get("train_file") is None:
            raise ValueError(f"{where}: train_file: required, got none")
        for name, file in {**{name: run.options.get(name) for name in FILES[:2]}, **run.tests}.items():
            if file is not None and not Path(study.file(file)).is_file():
                raise FileNotFoundError(f"{where}: {name}: no such file: {study.file(file)}")
        if run.options.get("store") and not Path(study.file(run.options["store"])).is_dir():
            raise FileNotFoundError(f"{where}: store: no such folder: {study.file(run.options['store'])}")
        for name in ("student", "teacher"):
            model = run.options.get(name)
            if with_models and model is not None and model not in checked:
                try:
                    AutoConfig.from_pretrained(study.model(model))
                except (OSError, ValueError) as error:
                    reason = str(error).strip().splitlines()[0]
                    raise ValueError(f"{where}: {name}: no model folder or hub name: {model!r}: {reason}") from error
                checked.add(model)
        if (run.data, run.arm) not in checked:
            config = study.distill_config(run)
            study.evaluate_config(run)
            if run.extract is not None:
                extract_config(study, run, config)
            checked.add((run.data, run.arm))
        if run.curve is not None:
            every, limit = run.curve.get("every"), run.curve.get("limit")
            if type(every) is not int or every < 1:
                raise ValueError(f"{study.path}: curve.every: expected a number of steps of at least 1, got {every!r}")
            if limit is not None and (type(limit) is not int or limit < 1):
                raise ValueError(f"{study.path}: curve.limit: expected a number of at least 1, got {limit!r}")
            if not Path(study.file(str(run.curve.get("data_file")))).is_file():
                raise FileNotFoundError(f"{study.path}: curve.data_file: no such file: {run.curve.get('data_file')}")


def _content(path: str) -> str:
    """A digest of a file."""
    found = os.stat(path)
    return _digest(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _digest(path: str, size: int, time: int) -> str:
    """The digest of a file with this size and modification time; each file is read once per process."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
