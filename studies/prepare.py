"""Writes what the study needs into a folder: data, teacher, an untrained teacher, a base per seed, the choice of heads
and layers, and the YAML files of the second and the third set.

What is there already is left as it is, so an interrupted preparation is continued by the same command. The teacher, the
bases and the choices of the committed results are those of ``studies/models``; ``--train`` trains and chooses anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from molsaki.io import write_json, write_json_lines
from studies import single
from studies.heads import choose
from studies.pretrain import pretrain
from studies.world import SEEDS, decoder, problems, tokenizer

STUDY = Path(__file__).with_name("evidence.yaml")
MODELS = Path(__file__).with_name("models")
TRAIN, TEST = 10_000, 2_000
SEEDS_OF_SETS = {"evidence": list(range(11, 19)), "third": list(range(19, 27))}
TEACHER = {"layers": 4, "width": 144, "heads": 6}
STUDENT = {"layers": 2, "width": 48, "heads": 4}


def train_teacher(folder: Path) -> None:
    drills = ((0.3, 0.9), (0.6, 0.4), (1.0, 0.0))
    options = {"applied": 0.7, "size": 16, "target": 0.97, "check": 500}
    pretrain(folder / "teacher", **TEACHER, seed=0, steps=6000, drills=drills, **options)


def train_base(folder: Path, seed: int) -> None:
    pretrain(folder / "bases" / str(seed), **STUDENT, seed=seed, steps=8000, drills=((1.0, 1.0),), enough=0.8)


def write_data(folder: Path) -> None:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name in SEEDS:
        write_json_lines(folder / "data" / f"{name}.jsonl", problems(name, TRAIN if name == "train" else TEST))


def copy_models(folder: Path) -> None:
    """Copy the committed models and choices that the folder does not have."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*MODELS.glob("*.json"), MODELS / "teacher", *MODELS.glob("bases/*")):
        target = folder / source.relative_to(MODELS)
        if source.is_dir() and not target.exists():
            part = target.with_name(f"{target.name}.part")  # an interrupted copy must not be trained on
            shutil.copytree(source, part, dirs_exist_ok=True)
            part.rename(target)
        elif source.is_file() and not target.exists():
            shutil.copy(source, target)


def write_choices(folder: Path, processes: int) -> None:
    """The untrained teacher, and what the arms teach: heads (``heads.json``) and two layers (``single.json``)."""
    untrained = folder / "untrained"
    if not (untrained / "model.safetensors").exists():
        decoder(TEACHER["layers"], TEACHER["width"], TEACHER["heads"], seed=2).save_pretrained(untrained)
        tokenizer().save_pretrained(untrained)
    if not (folder / "heads.json").exists():
        teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
        tokens = AutoTokenizer.from_pretrained(folder / "teacher")
        write_json(folder / "heads.json", choose(teacher, tokens, problems("train", 500)), indent=1)
    if not (folder / "single.json").exists():
        study = STUDY.read_text(encoding="utf-8")
        single.run(single.write_grid(study, folder, TEACHER["layers"], STUDENT["layers"]), processes)
        single.choose(folder)


def write_study(folder: Path) -> None:
    """The YAML file of the second set, with the choices filled in, and from it ``third.yaml``, of the third."""
    heads, layers = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("heads.json", "single.json"))
    values = {name: heads[name] for name in ("heads", "pointer", "decider")}
    values |= {"single_teacher": layers["teacher_layer"], "single_student": layers["student_layer"]}
    text = string.Template(STUDY.read_text(encoding="utf-8")).substitute(values)
    (folder / STUDY.name).write_text(text, encoding="utf-8")
    third: dict[str, Any] = yaml.safe_load(text)
    arms = {name: own for name, own in third["arms"].items() if name in ("dss", "decider-early-30")}
    arms["decider-early-other-30"] = arms["decider-early-30"] | {"control": "other_example"}
    third |= {"output_dir": "results-third", "seeds": SEEDS_OF_SETS["third"], "arms": arms}
    third["primary"] = {"test": "test", "arms": ["decider-early-30"]}
    (folder / "third.yaml").write_text(yaml.safe_dump(third, sort_keys=False), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=sum(SEEDS_OF_SETS.values(), []), help="of both sets")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument("--train", action="store_true", help="models of your own instead of the committed ones")
    args = parser.parse_args(argv)
    write_data(args.folder)
    if not args.train:
        copy_models(args.folder)
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes, torch.set_num_threads, (1,)) as pool:
        jobs = [pool.apply_async(train_teacher, (args.folder,))]
        jobs += [pool.apply_async(train_base, (args.folder, seed)) for seed in sorted({*args.seeds, *single.SEEDS})]
        for job in jobs:
            job.get()
    write_choices(args.folder, args.processes)
    write_study(args.folder)


if __name__ == "__main__":
    main()
