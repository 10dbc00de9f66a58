"""The table of training objectives: the requirements and the loss of each.

Your own objective is an `Objective` in your module, given as ``--objective module:name``; it needs no entry in the
table. The command line reads the table too, so only the losses import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from molsaki.functions import is_named, named

if TYPE_CHECKING:
    from torch import Tensor

    from molsaki.batches.batch import Batch
    from molsaki.training.config import DistillConfig


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The student's predictions of one kind of text, explain or predict, for N examples.

    Attributes:
        cross_entropy: ``(N,)``, the mean over each example's labels.
        logits: ``(n, V)`` for the n labels, if the objective needs ``student_logits``.
        labels: ``(N, P)``, padded with -100.
    """

    cross_entropy: Tensor
    logits: Tensor | None
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class StudentMaps:
    """The student's side of Eq. 5 and 6: maps ``(N, K, S, W)`` mixed by the router and by uniform weights, and the
    router's weights ``(N, K, Ls)``."""

    mixed: Tensor
    uniform: Tensor
    weights: Tensor


@dataclasses.dataclass(frozen=True)
class StudentOutput:
    """The student's output for a batch; ``explain`` and ``maps`` are None if the objective does not need them.

    ``beta`` is the weight of the attention loss at this step of the training.
    """

    predict: Prediction
    explain: Prediction | None
    maps: StudentMaps | None
    beta: float = 0.0


Loss: TypeAlias = "Callable[[StudentOutput, Batch, DistillConfig], dict[str, Tensor]]"


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        loss: takes the student's output, the batch with the teacher's part, and the options; returns ``loss (N,)``,
            which is minimised, and other values to log per example.
        explain_texts: the student runs the explain texts as well as the predict texts.
        rationale_first: the predict texts have the rationale before the answer (``cot_template``).
        student_logits: the loss reads the student's logits, not only its cross-entropies.
        maps: the loss compares the maps of both sides; the teacher's are stored or come from a live teacher.
        teacher_logits: the loss compares the logits of both sides; needs a live teacher with the student's vocabulary.
        attention_loss: ``student.beta`` is the weight of `molsaki.losses.attention` in the loss (Eq. 6 and 7): beta may
            be held as a share of the gradient, and there is a warning where that loss hardly distinguishes maps.
        help: what the loss is of, for the help text of ``--objective``.
    """

    loss: Loss
    explain_texts: bool = True
    rationale_first: bool = False
    student_logits: bool = False
    maps: bool = False
    teacher_logits: bool = False
    attention_loss: bool = False
    help: str = ""

    def __post_init__(self) -> None:
        if self.attention_loss and not self.maps:
            raise ValueError("maps: expected True with attention_loss, got False")
        if self.maps and not self.explain_texts:
            raise ValueError("explain_texts: expected True with maps, which are of the explain texts, got False")

    @property
    def has_teacher(self) -> bool:
        return self.maps or self.teacher_logits


def vanilla(student: StudentOutput, batch: Batch, options: DistillConfig) -> dict[str, Tensor]:
    """The cross-entropy of the predict texts: of answers, or of rationales with answers (Fine-tune-CoT)."""
    return {"loss": student.predict.cross_entropy, "loss_pre": student.predict.cross_entropy}


def dss(student: StudentOutput, batch: Batch, options: DistillConfig) -> dict[str, Tensor]:
    """Distilling step by step (Hsieh et al. 2023, arXiv 2305.02301): ``alpha L_pre + (1 - alpha) L_exp`` (Eq. 7)."""
    assert student.explain is not None
    loss_pre, loss_exp = student.predict.cross_entropy, student.explain.cross_entropy
    loss = options.alpha * loss_pre + (1 - options.alpha) * loss_exp
    return {"loss": loss, "loss_pre": loss_pre, "loss_exp": loss_exp}


def mmi(student: StudentOutput, batch: Batch, options: DistillConfig) -> dict[str, Tensor]:
    """DSS and the cross-entropy between the predictions of both texts (Chen et al. 2024, arXiv 2403.03348)."""
    from molsaki.method import losses

    predict, explain = student.predict, student.explain
    assert explain is not None and predict.logits is not None and explain.logits is not None
    terms = dss(student, batch, options)
    term = losses.mutual_information(predict.logits, predict.labels, explain.logits, explain.labels)
    return terms | {"loss": terms["loss"] + options.beta_mmi * term, "loss_mmi": term}


def logits(student: StudentOutput, batch: Batch, options: DistillConfig) -> dict[str, Tensor]:
    """DSS and the divergence from the teacher's softened logits (Mentor-KD, Lee et al. 2024, arXiv 2410.09037).

    Both softmaxes are over the tokens of the tokenizer, without the rows that pad an embedding.
    """
    from molsaki.method import losses

    explain = student.explain
    assert explain is not None and explain.logits is not None and batch.teacher_logits is not None
    terms = dss(student, batch, options)
    shared = min(explain.logits.shape[-1], batch.teacher_logits.shape[-1])  # rows after the last token are padding
    found, wanted = explain.logits[:, :shared], batch.teacher_logits[:, :shared]
    term = losses.logits(found, wanted, explain.labels, options.temperature)
    return terms | {"loss": terms["loss"] + options.beta_logits * term, "loss_logits": term}


def molsaki(student: StudentOutput, batch: Batch, options: DistillConfig) -> dict[str, Tensor]:
    """DSS and the divergence from the teacher's mixed map (MoLSAKI, arXiv 2604.15701, Eq. 6 and 7)."""
    import torch

    from molsaki.method import losses

    maps, teacher_map, teacher_weights = student.maps, batch.teacher_map, batch.teacher_weights
    assert maps is not None and teacher_map is not None and teacher_weights is not None
    terms = dss(student, batch, options)
    entries = counted_entries(batch, options)
    how = (options.normalise, options.causal_words, options.teacher_temperature, entries)
    with torch.autocast(batch.plan.device.type, enabled=False):  # maps are float32
        term = losses.attention(maps.mixed, teacher_map, batch.plan, *how)
        with torch.no_grad():
            uniform = losses.attention(maps.uniform, teacher_map, batch.plan, *how)
            overlap = losses.overlap(maps.mixed, teacher_map, batch.plan, options.causal_words, entries)
    terms |= {"loss": terms["loss"] + student.beta * term, "loss_att": term, "loss_att_uniform": uniform}
    terms["map_overlap"] = overlap
    for side, weights in (("teacher", teacher_weights), ("student", maps.weights.detach())):
        terms[f"entropy_{side}"] = torch.special.entr(weights).sum(-1).mean(1)
        terms[f"{side}_weights"] = weights.mean(1)
    return terms


def counted_entries(batch: Batch, options: DistillConfig) -> Tensor | None:
    """The entries of the maps that the attention loss compares, as in `losses.attention`; all if None."""
    if options.map_steps == "all":
        return batch.teacher_entries
    assert batch.rationale_steps is not None
    steps = batch.rationale_steps[:, :, None]
    return steps if batch.teacher_entries is None else batch.teacher_entries & steps


OBJECTIVES = {
    "vanilla": Objective(vanilla, explain_texts=False, help="answers only"),
    "cot": Objective(
        vanilla, explain_texts=False, rationale_first=True, help="one text with rationale and answer, Fine-tune-CoT"
    ),
    "dss": Objective(dss, help="answers and rationales as two texts"),
    "mmi": Objective(mmi, student_logits=True, help="dss, and the mutual information of the two texts"),
    "logits": Objective(logits, student_logits=True, teacher_logits=True, help="dss, and the teacher's logits"),
    "molsaki": Objective(molsaki, maps=True, attention_loss=True, help="dss, and the teacher's attention"),
}


def objective_of(name: str, option: str = "objective", folder: Path | None = None) -> Objective:
    """The objective with a name in `OBJECTIVES`, or the one that ``module:name`` names, see `molsaki.functions.named`.

    Raises:
        ValueError, TypeError: there is no such objective; the message begins with ``option``.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if not is_named(name):
        raise ValueError(f"{option}: expected one of {', '.join(OBJECTIVES)}, or module:name, got {name!r}")
    found = named(option, name, folder)
    if not isinstance(found, Objective):
        raise TypeError(f"{option}: expected {name} to be an Objective, got {type(found).__name__}")
    return found
