"""Collates tokenized examples into a :class:`~molsaki.batches.batch.Batch`, padded or packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from molsaki.batches.batch import Batch, TextBatch
from molsaki.batches.dataset import Item
from molsaki.batches.shared_prefix import SharedPrefix
from molsaki.batches.tokenized import TokenizedExample, TokenizedText
from molsaki.method.losses import IGNORE
from molsaki.store.map_store import pad_maps
from molsaki_kernels import StepPlan

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclasses.dataclass(frozen=True)
class Collator:
    """Builds a batch from items of a :class:`~molsaki.batches.dataset.DistillDataset`.

    Args:
        student_pad, teacher_pad: ids of the padding tokens.
        packing, teacher_packing: pack the texts of a forward into one sequence instead of padding them.
        explain: the student runs the explain texts, too.
        share_question: when packing, leave out of each predict text the prefix that it shares with its explain text, in
            batches where these prefixes are at least half of the predict texts' tokens.
    """

    student_pad: int
    teacher_pad: int = 0
    packing: bool = False
    teacher_packing: bool = False
    explain: bool = True
    share_question: bool = False

    def __call__(self, items: Sequence[Item]) -> Batch:
        explain, predict = [example.explain for example, _ in items], [example.predict for example, _ in items]
        plan = _plan(explain)
        prefixes = [_common_prefix(*pair) for pair in zip(explain, predict, strict=True)]
        if not self.explain:
            student = [_packed(predict) if self.packing else _padded(predict, self.student_pad)]
        elif self.packing and self.share_question and 2 * sum(prefixes) >= sum(len(t.input_ids) for t in predict):
            student = [_packed_with_shared_prefixes(explain, predict, prefixes, plan)]
        elif self.packing:
            no_maps = StepPlan.from_spans([[]] * len(predict), [[]] * len(predict))
            student = [_packed(explain + predict, StepPlan.cat([plan, no_maps]))]
        else:
            student = [_padded(explain, self.student_pad, plan), _padded(predict, self.student_pad)]

        teacher = [example.teacher for example, _ in items if example.teacher is not None]
        maps = [entry.maps for _, entry in items if entry is not None and entry.maps is not None]
        weights = [entry.weights for _, entry in items if entry is not None and entry.weights is not None]
        return Batch(
            ids=[example.id for example, _ in items],
            plan=plan,
            student=student,
            rationale_steps=_rationale_steps([example for example, _ in items], plan),
            teacher=text_batch(teacher, self.teacher_pad, self.teacher_packing) if teacher and not maps else None,
            teacher_map=pad_maps(maps) if weights else None,
            teacher_weights=torch.stack(weights) if weights else None,
            teacher_layers=pad_maps(maps) if maps and not weights else None,
        )


def text_batch(texts: Sequence[TokenizedText], pad_id: int, packing: bool) -> TextBatch:
    """Texts for one forward, with their plan."""
    return _packed(texts, _plan(texts)) if packing else _padded(texts, pad_id, _plan(texts))


def _plan(texts: Sequence[TokenizedText]) -> StepPlan:
    return StepPlan.from_spans([text.steps for text in texts], [text.words for text in texts])


def _rationale_steps(examples: Sequence[TokenizedExample], plan: StepPlan) -> Tensor:
    """``(N, S)`` bool, the steps of the rationale."""
    found = plan.step_mask.clone()
    for row, example in zip(found, examples, strict=True):
        start = example.spans.rationale_start
        row[: sum(first < start for first, _ in example.spans.steps)] = False
    return found


def _padded(texts: Sequence[TokenizedText], pad_id: int, plan: StepPlan | None = None) -> TextBatch:
    lengths = np.array([len(text.input_ids) for text in texts])
    input_ids = _rows([text.input_ids for text in texts], pad_id)
    attention_mask = torch.from_numpy((np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64))
    positions = np.arange(input_ids.numel()).reshape(input_ids.shape)
    return TextBatch(input_ids, attention_mask, *_labels(texts, list(positions)), plan=plan)


def _packed(texts: Sequence[TokenizedText], plan: StepPlan | None = None) -> TextBatch:
    return _packed_suffixes(texts, [0] * len(texts), _positions(texts), plan)


def _packed_with_shared_prefixes(
    explain: Sequence[TokenizedText], predict: Sequence[TokenizedText], prefixes: Sequence[int], plan: StepPlan
) -> TextBatch:
    """All explain texts, and then each predict text without its first ``prefixes[n]`` tokens, which are shared."""
    wholes, lengths = (torch.tensor([len(text.input_ids) for text in texts]) for texts in (explain, predict))
    shared = SharedPrefix.from_lengths(wholes, torch.tensor(prefixes), lengths - torch.tensor(prefixes))
    positions = [*_positions(explain), *shared.keys.numpy()]
    packed = _packed_suffixes([*explain, *predict], [0] * len(explain) + list(prefixes), positions, plan)
    return dataclasses.replace(packed, shared_prefix=shared)


def _common_prefix(a: TokenizedText, b: TokenizedText) -> int:
    """The number of tokens with which both texts begin, at most all but the last of ``b``."""
    length = min(len(a.input_ids), len(b.input_ids) - 1)
    differ = np.flatnonzero(a.input_ids[:length] != b.input_ids[:length])
    return int(differ[0]) if len(differ) else length


def _packed_suffixes(
    texts: Sequence[TokenizedText], prefixes: Sequence[int], positions: Sequence[Array], plan: StepPlan | None
) -> TextBatch:
    """Each text without its first ``prefixes[r]`` tokens; ``positions``: where each text's tokens are in the result."""
    ids = [text.input_ids[prefix:] for text, prefix in zip(texts, prefixes, strict=True)]
    lengths = np.array([len(text) for text in ids])
    bounds = np.concatenate([[0], lengths.cumsum()])
    position_ids = np.arange(bounds[-1]) + np.repeat(np.array(prefixes) - bounds[:-1], lengths)
    input_ids = _joined(ids)[None]
    return TextBatch(
        input_ids,
        torch.ones_like(input_ids),  # without a mask transformers builds one of size M x M
        *_labels(texts, positions),
        plan=plan,
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seq_lens_q=torch.from_numpy(bounds.astype(np.int32)),
    )


def _positions(texts: Sequence[TokenizedText]) -> list[Array]:
    """The position of each token of texts that are packed whole."""
    ends = np.cumsum([len(text.input_ids) for text in texts])
    return np.split(np.arange(ends[-1]), ends[:-1])


def _labels(texts: Sequence[TokenizedText], positions: Sequence[Array]) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """``labels``, ``counts``, ``targets`` and ``index`` of a `TextBatch`; ``positions``: where in the flattened
    ``input_ids`` each text's tokens are."""
    firsts = [max(text.target_start, 1) for text in texts]  # no position predicts a text's first token
    targets = [text.input_ids[first:] for text, first in zip(texts, firsts, strict=True)]
    index = [at[first - 1 :][: len(target)] for at, first, target in zip(positions, firsts, targets, strict=True)]
    return _rows(targets, IGNORE), [len(target) for target in targets], _joined(targets), _joined(index)


# In NumPy, because a tensor operation takes as long as ten NumPy operations on these short arrays.
def _joined(arrays: Sequence[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))


def _rows(arrays: Sequence[Array], fill: int) -> Tensor:
    """``(N, longest)`` int64, padded with ``fill``."""
    rows = np.full((len(arrays), max(map(len, arrays))), fill, np.int64)
    for row, values in zip(rows, arrays, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(rows)
