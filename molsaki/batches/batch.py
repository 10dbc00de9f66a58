"""The batches that the collator builds and the distiller reads: texts for a forward, examples for a training step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from molsaki.batches.movable import Movable
from molsaki.batches.shared_prefix import SharedPrefix
from molsaki_kernels import StepPlan


@dataclasses.dataclass(frozen=True, eq=False)
class TextBatch(Movable):
    """R texts for one forward of a model, padded to one length, or packed one after another without padding.

    Attributes:
        input_ids, attention_mask: ``(R, M)`` int64, right-padded; packed ``(1, total)``, where the mask is all ones.
        labels: ``(R, P)`` int64, the labels of each text in order, padded with `IGNORE`.
        counts: R numbers of labels.
        targets: ``(n,)`` int64, the labels, text after text.
        index: ``(n,)`` int64, the position in the flattened ``input_ids`` that predicts each label. With a shared
            prefix the position may be in another text.
        plan: steps and key words of the texts; None if no map is needed. With ``shared_prefix`` it has the whole texts
            only.
        position_ids: ``(1, total)`` int64 if packed; they start at 0 in each text, after the prefix in a suffix.
        cu_seq_lens_q: ``(R + 1,)`` int32 if packed, the bounds of the texts.
        shared_prefix: where the suffixes are, if the last texts are packed without the prefix that they share.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    counts: list[int]
    targets: Tensor
    index: Tensor
    plan: StepPlan | None = None
    position_ids: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    shared_prefix: SharedPrefix | None = None

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of a model's or decoder's forward."""
        names = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "shared_prefix")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None} | {"use_cache": False}


@dataclasses.dataclass(frozen=True, eq=False)
class Batch(Movable):
    """N examples. Each is two texts for the student, see :mod:`molsaki.batches.tokenized`: explain and predict.

    Attributes:
        ids: the examples' names.
        plan: steps and key words of the N explain texts, in the student's tokens.
        student: the texts of each forward of the student. Packed, one forward of the N explain texts and then the N
            predict texts; padded, one forward of each; of predict alone for an objective without explain texts.
        rationale_steps: ``(N, S)`` bool, the steps of the rationale, not of the question, padding excluded.
        teacher: the explain texts in the teacher's tokens, for a live teacher.
        teacher_map: ``(N, K, S, W)`` mixed maps of the teacher (Eq. 6), with ``teacher_weights``.
        teacher_weights: ``(N, K, Lt)`` layer weights of the teacher (Eq. 4).
        teacher_entries: ``(N, S, W)`` bool, the entries of ``teacher_map`` that are compared; all if None.
        teacher_layers: ``(N, Lt, S, W)`` maps of every layer, from a store that has these instead.
        teacher_logits: ``(n, V)`` logits of the teacher for the n labels of the explain texts and the V tokens of the
            tokenizer, without the rows that pad an embedding.
    """

    ids: list[str]
    plan: StepPlan
    student: list[TextBatch]
    rationale_steps: Tensor | None = None
    teacher: TextBatch | None = None
    teacher_map: Tensor | None = None
    teacher_weights: Tensor | None = None
    teacher_entries: Tensor | None = None
    teacher_layers: Tensor | None = None
    teacher_logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.plan)

    def with_other_maps(self) -> Batch:
        """The control with wrong maps: each example gets the teacher's map of the next example that has key words.

        Only the steps and words that both examples have are compared; none if no other example has key words.
        """
        assert self.teacher_map is not None and self.teacher_weights is not None
        has_words = self.plan.word_mask.any(1).tolist()
        count, donors, alone = len(self), [], []
        for n in range(count):
            found = [m % count for m in range(n + 1, n + count) if has_words[m % count]]
            donors.append(found[0] if found else n)
            alone.append(not found)
        entries = self.plan.step_mask[donors][:, :, None] & self.plan.word_mask[donors][:, None, :]
        entries = entries & ~torch.tensor(alone, device=entries.device)[:, None, None]
        maps, weights = self.teacher_map[donors], self.teacher_weights[donors]
        return dataclasses.replace(self, teacher_map=maps, teacher_weights=weights, teacher_entries=entries)

    def __contains__(self, name: str) -> bool:
        return name in ("input_ids", "attention_mask")

    def __getitem__(self, name: str) -> Tensor:
        """``input_ids`` or ``attention_mask`` of all the student's texts, from which ``Trainer`` counts tokens."""
        return torch.cat([getattr(texts, name).flatten() for texts in self.student])
