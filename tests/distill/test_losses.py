"""Each loss against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from molsaki.method import losses
from molsaki_kernels import StepPlan
from tests.helpers.tiny import plan_of


def log_softmax(*x: float) -> list[float]:
    total = math.log(sum(map(math.exp, x)))
    return [v - total for v in x]


def kl(p: list[float], q: list[float]) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def test_cross_entropy_counts_every_example_once():
    logits = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]], [[0.0, 3.0], [1.0, 1.0], [0.0, 0.0]]])
    labels = torch.tensor([[0, 1, -100], [0, -100, -100]])
    first = -(log_softmax(1, 0)[0] + log_softmax(0, 2)[1]) / 2
    torch.testing.assert_close(losses.cross_entropy(logits, labels), torch.tensor([first, -log_softmax(0, 3)[0]]))
    none = torch.full_like(labels, -100)
    assert losses.cross_entropy(logits, none).tolist() == [0, 0]
    half = losses.cross_entropy(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match=r"logits: expected \(N, P, V\)"):
        losses.cross_entropy(logits[:, :2], labels)


def test_rows_with_labels_stand_for_all():
    x, y = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    labels = torch.tensor([[0, -100, 2], [-100, -100, 4]])
    rows, others = x[labels != -100], y[labels != -100]
    for function, whole, part in (
        (losses.cross_entropy, (x, labels), (rows, labels)),
        (losses.logits, (x, y, labels), (rows, others, labels)),
        (losses.mutual_information, (x, labels, y, labels), (rows, labels, others, labels)),
    ):
        torch.testing.assert_close(function(*part), function(*whole))
    torch.testing.assert_close(losses.per_example(torch.tensor([1.0, 3.0, 5.0]), labels), torch.tensor([2.0, 5.0]))


def test_attention_by_hand():
    plan = plan_of((2, 3), (1, 2))
    student, teacher = torch.full((2, 1, 2, 3), 7.0), torch.full((2, 1, 2, 3), -7.0)  # padding holds anything
    student[0, 0] = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.0, 0.4]])
    teacher[0, 0] = torch.tensor([[0.5, 0.1, 0.2], [0.3, 0.3, 0.3]])
    student[1, 0, 0, :2] = torch.tensor([0.2, 0.6])
    teacher[1, 0, 0, :2] = torch.tensor([0.8, 0.1])
    first = kl(log_softmax(0.5, 0.1, 0.2), log_softmax(0.1, 0.2, 0.3))
    second = kl(log_softmax(0.3, 0.3, 0.3), log_softmax(0.9, 0.0, 0.4))
    third = kl(log_softmax(0.8, 0.1), log_softmax(0.2, 0.6))
    torch.testing.assert_close(losses.attention(student, teacher, plan), torch.tensor([(first + second) / 2, third]))

    shares = [[math.log(v) for v in row] for row in ((0.25, 0.75), (8 / 9, 1 / 9))]
    got = losses.attention(student, teacher, plan, normalise="sum")
    torch.testing.assert_close(got[1], torch.tensor(kl(shares[1], shares[0])))


def test_attention_is_the_mean_over_pairs():
    plan = plan_of((2, 3))
    student, teacher = torch.rand(1, 4, 2, 3), torch.rand(1, 4, 2, 3)
    each = [losses.attention(student[:, k : k + 1], teacher[:, k : k + 1], plan) for k in range(4)]
    torch.testing.assert_close(losses.attention(student, teacher, plan), torch.stack(each).mean(0))


def test_causal_words():
    # steps are tokens 0-1 and 2-3; the words are tokens 0, 2 (with 1 later in the list) and 3
    plan = StepPlan.from_spans([[(0, 2), (2, 4)]], [[[0], [3], [2]]])
    assert losses.first_tokens(plan).tolist() == [[0, 3, 2]]
    student = torch.tensor([[[[0.4, 0.0, 0.0], [0.1, 0.5, 0.3]]]])
    teacher = torch.tensor([[[[0.7, 0.0, 0.0], [0.2, 0.2, 0.4]]]])
    # the first step sees one word: a distribution over one word, no divergence
    second = kl(log_softmax(0.2, 0.2, 0.4), log_softmax(0.1, 0.5, 0.3))
    got = losses.attention(student, teacher, plan, causal_words=True)
    torch.testing.assert_close(got, torch.tensor([(0 + second) / 2]))
    assert losses.attention(student, teacher, plan) > got
    none = StepPlan.from_spans([[(0, 2), (2, 4)]], [[[2], [3], []]])
    assert losses.first_tokens(none)[0, 2] == torch.iinfo(torch.int64).max
    first_left_out = losses.attention(student, teacher, none, causal_words=True)
    two_words = kl(log_softmax(0.2, 0.2), log_softmax(0.1, 0.5))
    torch.testing.assert_close(first_left_out, torch.tensor([two_words]))


@pytest.mark.parametrize("normalise", ["softmax", "sum"])
@pytest.mark.parametrize("causal_words", [False, True])
def test_attention_is_finite_and_right_without_words(normalise, causal_words):
    plan = StepPlan.cat([plan_of((2, 3)), plan_of((2, 0)), plan_of((0, 2)), plan_of((0, 0))])
    student = torch.rand(4, 1, 2, 3, dtype=torch.float64).requires_grad_()
    teacher = torch.rand(4, 1, 2, 3, dtype=torch.float64)
    teacher[0, 0, 1] = 0  # a step that puts no mass on any word
    loss = losses.attention(student, teacher, plan, normalise, causal_words)
    assert loss[0] > 0 and loss[1:].tolist() == [0, 0, 0]
    loss.sum().backward()
    assert student.grad.isfinite().all() and not student.grad[1:].any()
    assert torch.autograd.gradcheck(
        lambda s: losses.attention(s, teacher, plan, normalise, causal_words), student, atol=1e-6
    )
    empty = plan_of((0, 0))
    assert losses.attention(torch.zeros(1, 1, 0, 0), torch.zeros(1, 1, 0, 0), empty, normalise, causal_words) == 0


def test_teacher_gets_no_gradient_from_attention():
    plan = plan_of((2, 3))
    teacher = torch.rand(1, 1, 2, 3, requires_grad=True)
    student = torch.rand(1, 1, 2, 3, requires_grad=True)
    losses.attention(student, teacher, plan).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_mutual_information_by_hand():
    a, b = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]), torch.tensor([[[0.0, 2.0]]])
    p = [(math.exp(x) + math.exp(y)) / 2 for x, y in zip(log_softmax(1, 0), log_softmax(0, 3), strict=True)]
    expected = -sum(u * v for u, v in zip(p, log_softmax(0, 2), strict=True))
    labels = torch.tensor([[0, 1]]), torch.tensor([[1]])
    torch.testing.assert_close(losses.mutual_information(a, labels[0], b, labels[1]), torch.tensor([expected]))
    one = losses.mutual_information(a, torch.tensor([[0, -100]]), b, labels[1])
    only = -sum(math.exp(u) * v for u, v in zip(log_softmax(1, 0), log_softmax(0, 2), strict=True))
    torch.testing.assert_close(one, torch.tensor([only]))
    nothing = losses.mutual_information(a.requires_grad_(), torch.tensor([[-100, -100]]), b, labels[1])
    nothing.sum().backward()
    assert nothing.item() == 0 and a.grad.isfinite().all()
    with pytest.raises(ValueError, match="one vocabulary, got 2 and 3"):
        losses.mutual_information(a, labels[0], torch.zeros(1, 1, 3), labels[1])


def test_logits_by_hand():
    student, teacher = torch.tensor([[[1.0, 0.0], [9.0, 9.0]]]), torch.tensor([[[0.0, 4.0], [0.0, 0.0]]])
    labels = torch.tensor([[1, -100]])
    expected = 4 * kl(log_softmax(0, 2), log_softmax(0.5, 0))  # T = 2
    torch.testing.assert_close(losses.logits(student, teacher, labels), torch.tensor([expected]))
    torch.testing.assert_close(losses.logits(teacher, teacher, labels), torch.zeros(1))
    with pytest.raises(ValueError, match="one vocabulary"):
        losses.logits(student, torch.zeros(1, 2, 5), labels)
    with pytest.raises(ValueError, match="temperature"):
        losses.logits(student, teacher, labels, 0.0)


@pytest.mark.parametrize("name", ["cross_entropy", "mutual_information", "logits"])
def test_gradients(name):
    x, y = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([[0, 1, -100], [3, -100, -100]])
    functions = {
        "cross_entropy": lambda x: losses.cross_entropy(x, labels),
        "mutual_information": lambda x: (
            losses.mutual_information(x, labels, y, labels) + losses.mutual_information(y, labels, x, labels)
        ),
        "logits": lambda x: losses.logits(x, y, labels, 1.5),
    }
    assert torch.autograd.gradcheck(functions[name], x.requires_grad_())


def test_bad_input():
    plan, x = plan_of((2, 3)), torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match="student, teacher: expected"):
        losses.attention(x, x[:, :, :1], plan)
    with pytest.raises(ValueError, match="plan: expected one of the maps' N, S, W"):
        losses.attention(x, x, plan_of((1, 3)))
    with pytest.raises(ValueError, match='normalise: expected "softmax" or "sum"'):
        losses.attention(x, x, plan, "max")


def test_attention_of_some_steps_and_of_sharper_teachers():
    plan = plan_of((3, 3))
    student, teacher = torch.rand(1, 2, 3, 3) + 0.1, torch.rand(1, 2, 3, 3) + 0.1
    for normalise in ("softmax", "sum"):
        each = [
            losses.attention(student[:, :, s : s + 1], teacher[:, :, s : s + 1], plan_of((1, 3)), normalise)
            for s in range(3)
        ]
        some = torch.tensor([[False, True, True]])[:, :, None]
        got = losses.attention(student, teacher, plan, normalise, entries=some)
        torch.testing.assert_close(got, (each[1] + each[2]) / 2)
        none = losses.attention(student, teacher, plan, normalise, entries=torch.zeros(1, 1, 1, dtype=torch.bool))
        assert none.tolist() == [0]
    p, q = teacher / teacher.sum(-1, keepdim=True), student / student.sum(-1, keepdim=True)
    sharp = p**4 / (p**4).sum(-1, keepdim=True)  # T = 1 / 4
    expected = (sharp * (sharp / q).log()).sum(-1).mean((1, 2))
    got = losses.attention(student, teacher, plan, "sum", teacher_temperature=0.25)
    torch.testing.assert_close(got, expected)
    sharp, q = (4 * teacher).softmax(-1), student.softmax(-1)
    expected = (sharp * (sharp / q).log()).sum(-1).mean((1, 2))
    torch.testing.assert_close(losses.attention(student, teacher, plan, teacher_temperature=0.25), expected)
    with pytest.raises(ValueError, match="teacher_temperature: expected a positive number, got 0"):
        losses.attention(student, teacher, plan, teacher_temperature=0)


def test_sharp_rows_that_underflow_stay_finite():
    plan = plan_of((1, 3))
    student = torch.tensor([[[[0.2, 0.3, 0.5]]]], requires_grad=True)
    teacher = torch.tensor([[[[1e-30, 1.0, 1e-3]]]])
    loss = losses.attention(student, teacher, plan, "sum", teacher_temperature=0.01)
    torch.testing.assert_close(loss, -torch.tensor([0.3]).log())  # all on the second word
    loss.sum().backward()
    assert student.grad.isfinite().all()
