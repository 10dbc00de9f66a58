"""Where the students of a finished study look, on held-out problems with the right rationale, against the teacher.

Writes ``looks.csv`` beside the study's results: per student, and per base before its training,

- ``whole``, ``before``: of a step's attention on the numbers up to it, the share on the number that its sum needs, by
  the student's best head. ``whole``: a step is a sum, as in the maps; ``before``: it ends before that number is
  written, so that looking back at a number that is written already does not count.
- ``whole_taught``, ``before_taught``: the same by the head that the arms ``pointer`` and ``decider`` teach.
- ``before_right``, ``before_wrong``: ``before`` over problems whose rationale the student itself wrote exactly, or not.
- ``divergence``: of the student's map from the teacher's, both averaged over layers (Eq. 6 with ``normalise=sum`` and
  ``causal_words``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from molsaki.io import read_json_lines
from molsaki.method import losses
from molsaki.study.results import write_csv
from studies.heads import maps_of, shares_of_operands
from studies.mistakes import first_mistake
from studies.world import Problem, problems

COUNT = 200
TAUGHT = 4  # student_layer of these arms in evidence.yaml: the first head of the second layer


def look(
    model: PreTrainedModel,
    tokens: PreTrainedTokenizerBase,
    rows: Sequence[Problem],
    teacher: Sequence[Tensor],
    right: Sequence[bool] | None,
) -> dict[str, float]:
    """The numbers of one model; ``right``: which of the rows it solved, None if it was not asked."""
    shares: dict[str, list[Tensor]] = {"whole": [], "before": []}
    divergences = []
    for row, wanted in zip(rows, teacher, strict=True):
        maps, one = maps_of(model, tokens, row)
        shares["whole"].append(shares_of_operands(maps, row).mean(1))
        shares["before"].append(shares_of_operands(maps_of(model, tokens, row, "numbers")[0], row, "numbers").mean(1))
        mean, other = (m.mean(0)[None, None] for m in (maps, wanted))
        divergences.append(losses.attention(mean, other, one, "sum", causal_words=True))
    found: dict[str, float] = {}
    for name, per_row in shares.items():
        table = torch.stack(per_row)  # (rows, heads)
        best = table[:, table.mean(0).argmax()]
        found[name] = best.mean().item()
        if right is not None:
            found[f"{name}_taught"] = table[:, TAUGHT].mean().item()
            if name == "before":
                solved = torch.tensor(list(right))
                found |= {"before_right": best[solved].mean().item(), "before_wrong": best[~solved].mean().item()}
    return found | {"divergence": torch.cat(divergences).mean().item()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of studies.prepare, with the study's results")
    parser.add_argument("--results", default="results", help="its folder of results: results-third for the third set")
    args = parser.parse_args(argv)
    folder: Path = args.folder
    rows = problems("test", COUNT)
    tokens = AutoTokenizer.from_pretrained(folder / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    wanted = [maps_of(teacher, tokens, row)[0] for row in rows]
    found = [{"arm": "teacher", "seed": ""} | look(teacher, tokens, rows, wanted, None)]
    for result in sorted(folder.glob(f"{args.results}/world/*/*/result.json")):
        arm, seed = result.parts[-3:-1]
        predictions = result.parent / "tests" / "test" / "predictions.jsonl"
        replies = [one["reply"] for one in read_json_lines(predictions)[:COUNT]]
        right = [first_mistake(reply, row["rationale"]) is None for reply, row in zip(replies, rows, strict=True)]
        model = AutoModelForCausalLM.from_pretrained(result.parent / "student").eval()
        found.append({"arm": arm, "seed": seed} | look(model, tokens, rows, wanted, right))
    for seed in sorted({str(row["seed"]) for row in found[1:]}, key=int):  # not those of other seeds
        base = folder / "bases" / seed
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        found.append({"arm": "base", "seed": base.name} | look(model, tokens, rows, wanted, None))
    write_csv(folder / args.results / "looks.csv", found)


if __name__ == "__main__":
    main()
