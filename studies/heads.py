"""Where the heads of a teacher of the study's world look, which decides what the study's arms teach.

Two scores per head, over texts of the training data:

- G of Eq. 4, the mean difference between neighbouring words: how sharp a head's maps are. It needs no knowledge of the
  world; ``heads`` are the four sharpest.
- The share of the right operand: of a step's attention on the numbers up to it, how much is on the number of the
  question that its sum needs. ``pointer`` is the head with the largest where a step is a whole sum; ``decider`` is the
  head with the largest where a step ends before each number, so that what counts is the attention before the number is
  written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki import capture, plan, segment
from molsaki.method.losses import NO_MASS
from molsaki.method.mixture import layer_scores
from molsaki.text.spans import Spans
from molsaki_kernels import StepPlan
from studies.world import Problem


def choose(teacher: PreTrainedModel, tokens: PreTrainedTokenizerBase, rows: Sequence[Problem]) -> dict[str, Any]:
    """The choices, and the scores of all heads, layer by layer, that they follow from."""
    sharpness, shares, before = [], [], []
    for row in rows:
        maps, one = maps_of(teacher, tokens, row)
        sharpness.append(layer_scores(maps[None], one)[0])
        shares.append(shares_of_operands(maps, row))
        before.append(shares_of_operands(maps_of(teacher, tokens, row, "numbers")[0], row, "numbers"))
    sharp, share, decided = torch.stack(sharpness).mean(0), torch.cat(shares, 1).mean(1), torch.cat(before, 1).mean(1)
    return {
        "heads": sharp.topk(4).indices.tolist(),
        "pointer": int(share.argmax()),
        "decider": int(decided.argmax()),
        "sharpness": [round(x, 4) for x in sharp.tolist()],
        "share_of_the_operand": [round(x, 4) for x in share.tolist()],
        "share_of_the_operand_before_it": [round(x, 4) for x in decided.tolist()],
    }


@torch.no_grad()
def maps_of(
    model: PreTrainedModel, tokens: PreTrainedTokenizerBase, row: Problem, splitter: str = "rules"
) -> tuple[Tensor, StepPlan]:
    """The maps of all heads ``(L * H, S, W)`` for one text, and its plan."""
    spans = segment(row["question"], row["rationale"], splitter=splitter)
    one = plan(spans, tokens)
    with capture(model, one, map_heads="each") as record:
        model(**tokens(spans.text, return_tensors="pt", return_token_type_ids=False))
    return record.maps[0], one


def shares_of_operands(maps: Tensor, row: Problem, splitter: str = "rules") -> Tensor:
    """Per head and sum ``(L * H, sums)``: of the mass on the numbers up to it, how much is on the one that it needs."""
    spans = segment(row["question"], row["rationale"], splitter=splitter)
    found = []
    for step, word in operands(spans):
        seen = torch.tensor([start < spans.steps[step][1] for start, _ in spans.words])
        found.append(maps[:, step, word] / maps[:, step, seen].sum(-1).clamp_min(NO_MASS))
    return torch.stack(found, 1)


def operands(spans: Spans) -> list[tuple[int, int]]:
    """Pairs (step, word): the step with the sign of each sum, and the number of the question that it adds or takes."""
    facts: dict[str, int] = {}  # name: where the number of its fact is
    for fact in re.finditer(r"[^.?]+[.?]", spans.question):
        words = [word for word in re.findall(r"[A-Za-z]+", fact[0]) if word not in ("Facts", "now", "has")]
        numbers = list(re.finditer(r"\d", fact[0]))
        if numbers:
            facts[words[0]] = fact.start() + numbers[-1].start()
    found = []
    begin = len(spans.text) - len(spans.rationale)
    for one in re.finditer(r"(\w+) \d+ ([+-]) \d+ =", spans.rationale):
        sign, number = begin + one.start(2), facts[one[1]]
        (step,) = [s for s, (start, stop) in enumerate(spans.steps) if start <= sign < stop]
        (word,) = [w for w, (start, stop) in enumerate(spans.words) if start <= number < stop]
        found.append((step, word))
    return found
