"""Where the heads of a teacher of the study's world look, which decides what the study's arms teach.

Two scores per head, over texts of the training data:

- G of Eq. 4, the mean difference between neighbouring words: how sharp a head's maps are. It needs no knowledge of the
  world; ``heads`` are the four sharpest.
- The share of the right operand: of a sum's attention on the numbers up to it, how much is on the number of the
  question that it needs. ``pointer`` is the head with the largest, ``layer`` the layer by the mean over its heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki import capture, plan, segment
from molsaki.text.spans import Spans
from molsaki.training.losses import NO_MASS
from molsaki.training.mixture import layer_scores
from molsaki_kernels import StepPlan
from studies.world import Problem


def choose(teacher: PreTrainedModel, tokens: PreTrainedTokenizerBase, rows: Sequence[Problem]) -> dict[str, Any]:
    """``heads``, ``pointer`` and ``layer``, and the scores of all heads, layer by layer, that they follow from."""
    count = teacher.config.num_attention_heads
    sharpness, shares = [], []
    for row in rows:
        maps, one = maps_of(teacher, tokens, row)
        sharpness.append(layer_scores(maps[None], one)[0])
        shares.append(shares_of_operands(maps, row))
    sharp, share = torch.stack(sharpness).mean(0), torch.cat(shares, 1).mean(1)
    return {
        "heads": sharp.topk(4).indices.tolist(),
        "pointer": int(share.argmax()),
        "layer": int(share.view(-1, count).mean(1).argmax()),
        "sharpness": [round(x, 4) for x in sharp.tolist()],
        "share_of_the_operand": [round(x, 4) for x in share.tolist()],
    }


@torch.no_grad()
def maps_of(model: PreTrainedModel, tokens: PreTrainedTokenizerBase, row: Problem) -> tuple[Tensor, StepPlan]:
    """The maps of all heads ``(L * H, S, W)`` for one text, and its plan."""
    spans = segment(row["question"], row["rationale"])
    one = plan(spans, tokens)
    with capture(model, one, map_heads="each") as record:
        model(**tokens(spans.text, return_tensors="pt", return_token_type_ids=False))
    return record.maps[0], one


def shares_of_operands(maps: Tensor, row: Problem) -> Tensor:
    """Per head and sum ``(L * H, sums)``: of the mass on the numbers up to it, how much is on the one that it needs."""
    spans = segment(row["question"], row["rationale"])
    found = []
    for step, word in operands(spans):
        seen = torch.tensor([start < spans.steps[step][1] for start, _ in spans.words])
        found.append(maps[:, step, word] / maps[:, step, seen].sum(-1).clamp_min(NO_MASS))
    return torch.stack(found, 1)


def operands(spans: Spans) -> list[tuple[int, int]]:
    """Pairs (step, word): each sum of the rationale with the number of the question that it adds or takes away."""
    texts = [spans.text[start:stop].strip().rstrip(".") for start, stop in spans.steps]
    facts: dict[str, int] = {}  # name: the step of its fact
    for s, ((_, stop), text) in enumerate(zip(spans.steps, texts, strict=True)):
        if stop <= spans.question_end + 1 and not text.endswith("?"):
            words = [word for word in text.removeprefix("Facts:").split() if word not in ("now", "has")]
            facts[words[0]] = s
    found = []
    for s, text in enumerate(texts):
        if "=" in text:
            first, last = spans.steps[facts[text.split()[0]]]
            (word,) = [w for w, (start, _) in enumerate(spans.words) if first <= start < last]
            found.append((s, word))
    return found
