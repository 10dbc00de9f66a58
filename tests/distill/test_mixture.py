"""Eq. 4 and 5 and the layer-to-layer controls, against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from molsaki.method.layer_pairs import layer_pairs
from molsaki.method.mixture import MixtureOfLayers, layer_scores
from tests.helpers.tiny import plan_of


def test_teacher_weights_by_hand():
    plan = plan_of((2, 3), (1, 1))
    maps = torch.full((2, 2, 2, 3), 9.0)  # padding holds anything
    maps[0, 0] = torch.tensor([[0.1, 0.4, 0.2], [0.0, 0.0, 0.6]])  # |.3| + |.2| + 0 + |.6| = 1.1, mean 0.275
    maps[0, 1] = torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.3, 0.3]])  # 0 + 0 + .1 + 0 = 0.1, mean 0.025
    torch.testing.assert_close(layer_scores(maps, plan)[0], torch.tensor([0.275, 0.025]))
    weights, mixed = MixtureOfLayers(2, 3, 4).teacher(maps, plan)
    p = math.exp(2.75) / (math.exp(2.75) + math.exp(0.25))  # tau_t = 0.1
    torch.testing.assert_close(weights[0, 0], torch.tensor([p, 1 - p]))
    torch.testing.assert_close(mixed[0, 0], p * maps[0, 0] + (1 - p) * maps[0, 1])
    torch.testing.assert_close(weights[1, 0], torch.tensor([0.5, 0.5]))  # one word: G is undefined

    weights, _ = MixtureOfLayers(2, 3, 4, teacher_scale="std").teacher(maps, plan)
    # the standard deviation over the two layers is half their difference, 0.125: G = 2.2 and 0.2
    p = math.exp(22) / (math.exp(22) + math.exp(2))
    torch.testing.assert_close(weights[0, 0], torch.tensor([p, 1 - p]))


def test_scaled_scores_that_are_all_alike():
    mixture, plan = MixtureOfLayers(2, 3, 4, teacher_scale="std"), plan_of((2, 3))
    weights, _ = mixture.teacher(torch.ones(1, 2, 2, 3), plan)
    torch.testing.assert_close(weights, torch.full((1, 1, 2), 0.5))


def test_teacher_gets_no_gradient():
    maps = torch.rand(1, 2, 2, 3, requires_grad=True)
    weights, mixed = MixtureOfLayers(2, 3, 4).teacher(maps, plan_of((2, 3)))
    assert not weights.requires_grad and not mixed.requires_grad


@pytest.mark.parametrize("router", ["joint", "shared"])
def test_router_starts_uniform_and_learns(router):
    mixture = MixtureOfLayers(2, 3, 4, router=router)
    maps, values, plan = torch.rand(2, 3, 2, 3), 50 * torch.randn(2, 3, 4), plan_of((2, 3), (2, 3))
    weights, mixed = mixture.student(maps, values, plan)
    torch.testing.assert_close(weights, torch.full((2, 1, 3), 1 / 3))
    torch.testing.assert_close(mixed, maps.mean(1, keepdim=True))
    torch.testing.assert_close(mixture.uniform(maps), mixed)
    (mixed * torch.randn(mixed.shape)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in mixture.parameters())


def test_student_weights_by_hand():
    maps, values, plan = torch.rand(1, 2, 1, 2), torch.tensor([[[1.0, 2.0], [3.0, -1.0]]]), plan_of((1, 2))
    joint = MixtureOfLayers(5, 2, 2)
    joint.router.weight.data = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.5, -0.1, 0.2]])
    joint.router.bias.data = torch.tensor([0.05, -0.1])
    # row 1: .1 + .4 + .9 - .4 + .05 = 1.05; row 2: 1.0 - .3 - .2 - .1 = 0.4; over tau_s = 0.5: 2.1 and 0.8
    p = 1 / (1 + math.exp(0.8 - 2.1))
    torch.testing.assert_close(joint.student(maps, values, plan)[0], torch.tensor([[[p, 1 - p]]]))
    shared = MixtureOfLayers(5, 2, 2, router="shared")
    shared.router.weight.data = torch.tensor([0.1, 0.2])
    shared.router.bias.data = torch.tensor([0.0, 0.3])
    # .1 + .4 = 0.5 and .3 - .2 + .3 = 0.4
    p = 1 / (1 + math.exp((0.4 - 0.5) / 0.5))
    torch.testing.assert_close(shared.student(maps, values, plan)[0], torch.tensor([[[p, 1 - p]]]))


def test_gradcheck():
    mixture = MixtureOfLayers(2, 3, 4).double()
    mixture.router.weight.data.normal_()
    plan = plan_of((2, 3))
    inputs = (torch.rand(1, 3, 2, 3, dtype=torch.float64), torch.randn(1, 3, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda m, v: mixture.student(m, v, plan), [t.requires_grad_() for t in inputs])


def test_under_autocast_and_with_half_precision_maps():
    mixture, plan = MixtureOfLayers(2, 3, 4), plan_of((2, 3))
    mixture.router.weight.data.normal_()
    maps, values = torch.rand(1, 3, 2, 3), torch.randn(1, 3, 4)
    expected = mixture.student(maps, values, plan)
    with torch.autocast("cpu", torch.bfloat16):
        got = mixture.student(maps, values, plan)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(got, expected, strict=True))
    weights, mixed = mixture.teacher(torch.rand(1, 2, 2, 3).half(), plan)
    assert weights.dtype == mixed.dtype == torch.float32


@pytest.mark.parametrize(
    "kind, teacher, student, pairs",
    [
        ("last", 6, 3, [(5, 2)]),
        ("single", 6, 3, [(5, 2)]),
        ("uniform", 12, 4, [(2, 0), (5, 1), (8, 2), (11, 3)]),  # TinyBERT: 3, 6, 9, 12
        ("uniform", 30, 10, [(3 * m + 2, m) for m in range(10)]),
        ("uniform", 5, 3, [(1, 0), (2, 1), (4, 2)]),  # 1.67, 3.33, 5 rounded, counting from 1
        ("uniform", 2, 6, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (1, 5)]),
        ("reverse", 12, 4, [(11, 0), (8, 1), (5, 2), (2, 3)]),
        ("one_to_one", 3, 3, [(0, 0), (1, 1), (2, 2)]),
    ],
)
def test_pairs(kind, teacher, student, pairs):
    assert layer_pairs(kind, teacher, student) == pairs
    mixture = MixtureOfLayers(teacher, student, 4, kind=kind)
    teacher_maps, student_maps = torch.rand(1, teacher, 2, 3), torch.rand(1, student, 2, 3)
    plan = plan_of((2, 3))
    weights, mixed = mixture.teacher(teacher_maps, plan)
    assert weights.shape == (1, len(pairs), teacher)
    assert torch.equal(mixed, teacher_maps[:, [t for t, _ in pairs]])
    weights, mixed = mixture.student(student_maps, torch.empty(0), plan)
    assert weights.shape == (1, len(pairs), student)
    assert torch.equal(mixed, student_maps[:, [s for _, s in pairs]])
    assert mixture.uniform(student_maps).shape == mixed.shape
    assert not mixture.state_dict()


def test_random_pairs_are_fixed_by_the_seed():
    drawn = [layer_pairs("random", 12, 4, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({t for t, _ in drawn[0]}) == 4 and [s for _, s in drawn[0]] == [0, 1, 2, 3]
    assert {t for t, _ in layer_pairs("random", 2, 5)} == {0, 1}
    assert layer_pairs("single", 6, 3, teacher_layer=1, student_layer=-3) == [(1, 0)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="best"), "kind: expected one of mixture, matched, single"),
        (dict(kind="one_to_one"), "the teacher has 4 layers, the student 3"),
        (dict(kind="single", teacher_layer=4), "teacher_layer: expected one of 4 layers"),
        (dict(kind="single", student_layer=-4), "student_layer: expected one of 3 layers"),
        (dict(tau_t=0), "tau_t: expected a positive"),
        (dict(router="deep"), "router: expected one of joint, shared"),
        (dict(pooling="max"), "pooling"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfLayers(4, 3, 2, **arguments)


def test_bad_shapes():
    mixture, plan = MixtureOfLayers(4, 3, 2), plan_of((2, 3))
    with pytest.raises(ValueError, match=r"maps: expected \(N, L, S, W\) = \(1, 4, 2, 3\), got \(1, 3, 2, 3\)"):
        mixture.teacher(torch.zeros(1, 3, 2, 3), plan)
    with pytest.raises(ValueError, match=r"values: expected \(N, Lv, d\) = \(1, 3, 2\)"):
        mixture.student(torch.zeros(1, 3, 2, 3), torch.zeros(1, 3, 5), plan)


def test_matched_pairs_start_uniform_and_learn_one_layer_each():
    mixture, plan = MixtureOfLayers(5, 3, 4, kind="matched", teacher_layers=[4, -5]), plan_of((2, 3))
    maps = torch.rand(1, 5, 2, 3)
    weights, mixed = mixture.teacher(maps, plan)
    assert weights[0].argmax(-1).tolist() == [4, 0]
    torch.testing.assert_close(mixed[0], maps[0, [4, 0]])
    own, values = torch.rand(1, 3, 2, 3), torch.rand(1, 3, 4)
    weights, mixed = mixture.student(own, values, plan)
    torch.testing.assert_close(weights, torch.full((1, 2, 3), 1 / 3))
    torch.testing.assert_close(mixed, mixture.uniform(own))
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.1)
    for _ in range(300):  # the wanted maps are those of layers 2 and 0
        _, mixed = mixture.student(own, values, plan)
        optimizer.zero_grad()
        (mixed[0] - own[0, [2, 0]]).square().sum().backward()
        optimizer.step()
    assert mixture.student(own, values, plan)[0][0].argmax(-1).tolist() == [2, 0]
    assert len(MixtureOfLayers(5, 3, 4, kind="matched").teacher(maps, plan)[1][0]) == 5
    with pytest.raises(ValueError, match="teacher_layers: expected one of 5 layers"):
        MixtureOfLayers(5, 3, 4, kind="matched", teacher_layers=[5])


def test_a_router_of_heads_reads_the_values_of_layers():
    mixture, plan = MixtureOfLayers(8, 6, 4, value_layers=3), plan_of((2, 3))
    maps, values = torch.rand(2, 6, 2, 3)[:1], torch.rand(1, 3, 4)
    weights, _ = mixture.student(maps, values, plan)
    torch.testing.assert_close(weights, torch.full((1, 1, 6), 1 / 6))
    with pytest.raises(ValueError, match=r"values: expected \(N, Lv, d\) = \(1, 3, 4\)"):
        mixture.student(maps, torch.rand(1, 6, 4), plan)
    with pytest.raises(ValueError, match="router: shared needs one map per layer"):
        MixtureOfLayers(8, 6, 4, value_layers=3, router="shared")
