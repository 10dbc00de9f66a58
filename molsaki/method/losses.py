"""The losses, as pure functions of tensors that return one number per example, ``(N,)``.

A loss is the mean over the example's own positions or steps, and the caller averages over examples. So every example
counts once, no matter how examples are divided into batches, accumulation steps and processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from molsaki_kernels import StepPlan

IGNORE = -100  # the label of a position without a label, as in `torch.nn.functional.cross_entropy`

NO_MASS = 1e-8  # normalise="sum": smaller shares are clamped to this


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, the mean over an example's labels; 0 for an example without any (L_pre, L_exp of Eq. 7).

    Args:
        logits: ``(N, P, V)``, any floating dtype; position p predicts ``labels[:, p]``, so the caller shifts. Or only
            those of the n labelled positions, in order, ``(n, V)``.
        labels: ``(N, P)``, -100 at positions without a label.
    """
    labelled = at_least_float32(_labelled("logits", logits, labels))
    return per_example(F.cross_entropy(labelled, labels[labels != IGNORE], reduction="none"), labels)


def per_example(values: Tensor, labels: Tensor) -> Tensor:
    """The mean over each example's labels, ``(N,)``; 0 for an example without any.

    Args:
        values: ``(n,)``, one per label that is not -100, in order.
        labels: ``(N, P)``.
    """
    mask = labels != IGNORE
    spread = values.new_zeros(labels.shape).masked_scatter(mask, values)
    return spread.sum(1) / mask.sum(1).clamp_min(1)


def attention(
    student: Tensor,
    teacher: Tensor,
    plan: StepPlan,
    normalise: str = "softmax",
    causal_words: bool = False,
    teacher_temperature: float = 1.0,
    entries: Tensor | None = None,
) -> Tensor:
    """Eq. 6: KL(teacher || student) of each step's distribution over words, the mean over steps and pairs K.

    Args:
        student, teacher: ``(N, K, S, W)`` mixed maps; the teacher gets no gradient.
        plan: of the student's tokens; its masks exclude padding. An example without words has loss 0.
        normalise: how a step's masses become a distribution: "softmax" over the words (the paper's), or "sum", which
            divides by their sum and excludes steps for which the teacher's sum is 0.
        causal_words: exclude from each step the words that begin after its last token, and steps with no other word.
            Both sides have the words in the same order.
        teacher_temperature: T: the teacher's distribution is proportional to ``p ** (1 / T)``; values below 1 sharpen
            it.
        entries: broadcasts to ``(N, S, W)``, bool: the steps and words that count; all if None.
    """
    if not teacher_temperature > 0:
        raise ValueError(f"teacher_temperature: expected a positive number, got {teacher_temperature}")
    if normalise not in ("softmax", "sum"):
        raise ValueError(f'normalise: expected "softmax" or "sum", got {normalise!r}')
    words = counted_words(student, teacher, plan, causal_words, entries)
    teacher = teacher.detach().to(student.dtype)
    if normalise == "softmax":
        divergence = _softmax_divergence(student, teacher / teacher_temperature, words)
        counts = words.any(-1).expand(divergence.shape)  # (N, K, S)
    else:
        divergence, counts = _share_divergence(student, teacher, words, 1 / teacher_temperature)
    total = torch.where(counts, divergence, 0).sum(2)
    return (total / counts.sum(2).clamp_min(1)).mean(1)


def overlap(
    student: Tensor, teacher: Tensor, plan: StepPlan, causal_words: bool = False, entries: Tensor | None = None
) -> Tensor:
    """The similarity of two maps, ``(N,)`` from 0 to 1: the part of each step's shares of mass that both have in
    common.

    It is ``sum_w min(p_w, q_w)``, where p and q are the teacher's and the student's row divided by their sums: 1 minus
    the total variation distance. The mean over pairs K and the steps for which the teacher's sum is not 0; NaN for an
    example without any. Arguments as in `attention`.
    """
    words = counted_words(student, teacher, plan, causal_words, entries)
    shares = []
    for maps in (student, teacher.to(student.dtype)):
        mass = torch.where(words, maps, 0)
        total = mass.sum(-1, keepdim=True)
        shares.append(mass / total.clamp_min(NO_MASS))
    counts = total[..., 0] > NO_MASS  # (N, K, S), the teacher's
    common = torch.where(counts, torch.minimum(*shares).sum(-1), 0)
    return common.sum((1, 2)) / counts.sum((1, 2))


def counted_words(
    student: Tensor, teacher: Tensor, plan: StepPlan, causal_words: bool, entries: Tensor | None
) -> Tensor:
    """``(N, 1, S, W)``: the entries of both maps that count; their shapes are checked."""
    if student.shape != teacher.shape or student.dim() != 4:
        raise ValueError(
            f"student, teacher: expected (N, K, S, W) both, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if (student.shape[0], *student.shape[2:]) != (len(plan), plan.num_steps, plan.num_words):
        raise ValueError(
            f"plan: expected one of the maps' N, S, W {(student.shape[0], *student.shape[2:])}, "
            f"got {(len(plan), plan.num_steps, plan.num_words)}"
        )
    words = plan.step_mask[:, :, None] & plan.word_mask[:, None, :]
    if entries is not None:
        words = words & entries
    if causal_words:
        words = words & (first_tokens(plan)[:, None, :] < plan.steps[:, :, 1:])
    return words[:, None]


def _softmax_divergence(student: Tensor, teacher: Tensor, words: Tensor) -> Tensor:
    """``(N, K, S)``. The lowest number instead of -inf keeps steps without words, and their gradient, finite."""
    lowest = torch.finfo(student.dtype).min
    log_student, log_teacher = (x.masked_fill(~words, lowest).log_softmax(-1) for x in (student, teacher))
    return torch.where(words, log_teacher.exp() * (log_teacher - log_student), 0).sum(-1)


def _share_divergence(student: Tensor, teacher: Tensor, words: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """``(N, K, S)``, and a mask of the steps that count."""
    student, teacher = (torch.where(words, x, 0) for x in (student, teacher))
    mass = teacher.sum(-1, keepdim=True)
    p = teacher / mass.clamp_min(NO_MASS)
    if power != 1:
        p = (p / p.amax(-1, keepdim=True).clamp_min(NO_MASS)) ** power
        p = p / p.sum(-1, keepdim=True).clamp_min(NO_MASS)
    q = student / student.sum(-1, keepdim=True).clamp_min(NO_MASS)
    return (torch.special.xlogy(p, p) - p * q.clamp_min(NO_MASS).log()).sum(-1), mass[..., 0] > NO_MASS


def first_tokens(plan: StepPlan) -> Tensor:
    """``(N, W)``: the position of each word's first token; beyond every position for a word without tokens."""
    never = torch.iinfo(torch.int64).max
    first = torch.full(plan.word_mask.shape, never, device=plan.device)
    is_token = plan.word_of_token >= 0
    position = plan.tokens.masked_fill(~is_token, never)
    if first.numel() == 0 or position.numel() == 0:
        return first
    return first.scatter_reduce(1, plan.word_of_token.clamp_min(0), position, "amin")


def mutual_information(
    predict_logits: Tensor, predict_labels: Tensor, explain_logits: Tensor, explain_labels: Tensor
) -> Tensor:
    """Cross-entropy in nats between the predictions of both tasks (Chen et al. 2024, arXiv 2403.03348).

    The paper maximises the mutual information of the answer task and the rationale task by a cross-entropy between
    their predictions. Here it is ``- sum_v p_predict[v] log p_explain[v]``, where each p is a task's distribution over
    the vocabulary, averaged over its labelled positions.

    Args:
        predict_logits, explain_logits: ``(N, P, V)`` and ``(N, P', V)``, or of the labelled positions alone, ``(n, V)``
            and ``(n', V)``.
        predict_labels, explain_labels: ``(N, P)`` and ``(N, P')``, -100 at positions without a label.
    """
    if predict_logits.shape[-1] != explain_logits.shape[-1]:
        raise ValueError(
            f"predict_logits, explain_logits: expected one vocabulary, got {predict_logits.shape[-1]} and "
            f"{explain_logits.shape[-1]} tokens"
        )
    log_means = []
    for name, logits, labels in (
        ("predict_logits", predict_logits, predict_labels),
        ("explain_logits", explain_logits, explain_labels),
    ):
        mask = labels != IGNORE
        log_p = at_least_float32(_labelled(name, logits, labels)).log_softmax(-1)
        spread = log_p.new_full((*labels.shape, log_p.shape[-1]), torch.finfo(log_p.dtype).min)
        spread = spread.masked_scatter(mask[..., None], log_p)
        log_means.append(spread.logsumexp(1) - mask.sum(1, keepdim=True).clamp_min(1).log())  # (N, V)
    labelled = (predict_labels != IGNORE).any(1) & (explain_labels != IGNORE).any(1)
    return torch.where(labelled, -(log_means[0].exp() * log_means[1]).sum(-1), 0)


def logits(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """KL(teacher || student) of softened predictions times T^2, the mean over labels (Mentor-KD, arXiv 2410.09037).

    Args:
        student, teacher: ``(N, P, V)`` over one vocabulary, or of the labelled positions alone, ``(n, V)``; the teacher
            gets no gradient.
        labels: ``(N, P)``, -100 at positions that are not compared.
        temperature: T, which divides both logits.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student, teacher: expected logits over one vocabulary, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    student, teacher = (
        at_least_float32(_labelled(name, x, labels)) / temperature
        for name, x in (("student", student), ("teacher", teacher.detach()))
    )
    divergence = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return per_example(divergence, labels) * temperature**2


def _labelled(name: str, x: Tensor, labels: Tensor) -> Tensor:
    """The logits of labelled positions, ``(n, V)``: selected first, since V is large and most positions have none."""
    if x.dim() == 3 and x.shape[:2] == labels.shape:
        return x[labels != IGNORE]
    if x.dim() == 2 and labels.dim() == 2:
        return x
    shapes = f"{tuple(x.shape)} and {tuple(labels.shape)}"
    raise ValueError(f"{name}: expected (N, P, V) or (n, V) for the n labels, and labels (N, P); got {shapes}")


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
