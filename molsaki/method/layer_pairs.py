"""The fixed pairings of layers: `PAIRINGS` has one entry per pairing of a teacher's layers with a student's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias

Pairs: TypeAlias = "list[tuple[int, int]]"
Pairing: TypeAlias = "Callable[[int, int], Sequence[tuple[int, int]]]"


def _single(teacher: int, student: int, **options: int) -> Pairs:
    sides = {"teacher_layer": teacher, "student_layer": student}
    first, second = (layer_at(name, options[name], layers) for name, layers in sides.items())
    return [(first, second)]


def _last(teacher: int, student: int, **options: int) -> Pairs:
    return [(teacher - 1, student - 1)]


def _uniform(teacher: int, student: int, **options: int) -> Pairs:
    return list(zip(_spread(teacher, student), range(student), strict=True))


def _one_to_one(teacher: int, student: int, **options: int) -> Pairs:
    if teacher != student:
        raise ValueError(
            f"kind: one_to_one needs equal depths; the teacher has {teacher} layers, the student {student}"
        )
    return [(m, m) for m in range(student)]


def _reverse(teacher: int, student: int, **options: int) -> Pairs:
    return list(zip(_spread(teacher, student)[::-1], range(student), strict=True))


def _random(teacher: int, student: int, **options: int) -> Pairs:
    import torch

    generator = torch.Generator().manual_seed(options["seed"])
    sampled = torch.randperm(max(teacher, student), generator=generator)[:student] % teacher
    return list(zip(sampled.tolist(), range(student), strict=True))


PAIRINGS: dict[str, Callable[..., Pairs]] = {
    "single": _single,
    "last": _last,
    "uniform": _uniform,
    "one_to_one": _one_to_one,
    "reverse": _reverse,
    "random": _random,
}
MIXTURE_NAMES = ("mixture", "matched", *PAIRINGS)
# The mixtures whose teacher's map is the same for every student, and the options that it depends on.
TEACHER_OPTIONS: dict[str, tuple[str, ...]] = {
    "mixture": ("tau_t", "teacher_scale"),
    "matched": ("teacher_layers",),
    "single": ("teacher_layer",),
    "last": (),
}


def layer_pairs(
    kind: str | Pairing, teacher: int, student: int, *, teacher_layer: int = -1, student_layer: int = -1, seed: int = 0
) -> Pairs:
    """The pairs (teacher layer, student layer), counting from 0, of a kind with fixed pairs.

    Args:
        kind: a name of `PAIRINGS`, or a function of the numbers of layers of teacher and student.
        teacher, student: the numbers of layers.
        teacher_layer, student_layer: the layers of ``single``; negative numbers count from the end.
        seed: the seed of ``random``.
    """
    if not callable(kind):
        if kind not in PAIRINGS:
            raise ValueError(f"kind: expected one of {', '.join(PAIRINGS)}, or a function, got {kind!r}")
        options = {"teacher_layer": teacher_layer, "student_layer": student_layer, "seed": seed}
        return PAIRINGS[kind](teacher, student, **options)
    found = kind(teacher, student)
    try:
        pairs = [(operator.index(t), operator.index(s)) for t, s in found]
    except (TypeError, ValueError):
        pairs = []
    if not pairs:
        name = getattr(kind, "__name__", repr(kind))
        raise ValueError(f"mixture: expected pairs (teacher layer, student layer) from {name}, got {found!r}")
    return [(layer_at("mixture", t, teacher), layer_at("mixture", s, student)) for t, s in pairs]


def layer_at(name: str, index: int, layers: int) -> int:
    """The layer of an index, which counts from the end if it is negative; an error calls it ``name``."""
    if not -layers <= index < layers:
        raise ValueError(f"{name}: expected one of {layers} layers ({-layers} to {layers - 1}), got {index}")
    return index % layers


def _spread(teacher: int, student: int) -> list[int]:
    """For each layer m of the student, counting from 1, the teacher's layer m Lt / Ls, rounded, counting from 0."""
    return [max((2 * m * teacher + student) // (2 * student), 1) - 1 for m in range(1, student + 1)]
