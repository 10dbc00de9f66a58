"""The Mixture of Layers (Eq. 4 and 5), which weights the layers of both sides, and its controls, which pair them.

Every kind has K pairs of weights over layers, ``p_t (N, K, Lt)`` and ``p_s (N, K, Ls)``, and the mixed maps are
``A_k = sum_l p_kl A_l``. The paper's mixture has K = 1 and weights that depend on the example. The kind ``matched`` has
one-hot weights of the teacher and learns the student's, which do not depend on the example. The controls pair single
layers: their weights are one-hot and are not trained.

With ``map_heads="each"`` every head counts as a layer: the maps of the heads of layer 0 come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from molsaki.method.layer_pairs import MIXTURE_NAMES, Pairing, layer_at, layer_pairs
from molsaki.method.losses import at_least_float32
from molsaki_kernels import StepPlan

SCORED_AT_ONCE = 1 << 26  # entries of maps (256 MiB) whose differences are in memory at a time


class MixtureOfLayers(nn.Module):
    """Layer weights and mixed maps of both sides (MoLSAKI, arXiv 2604.15701, Eq. 4 and 5).

    The teacher's weights have no parameters and get no gradient: ``G_l = mean_{s, w} |A_l[s, w+1] - A_l[s, w]|``,
    ``p_t = softmax(G / tau_t)``. The student's are learnt from its pooled values: ``p_s = softmax((W H + b) / tau_s)``;
    W and b start at zero, so ``p_s`` starts uniform.

    Args:
        num_teacher_layers, num_student_layers: Lt and Ls, the numbers of maps.
        value_width: d, the width of a layer's pooled values; only the kind ``mixture`` uses it.
        value_layers: Lv, the number of layers with pooled values; Ls if None. The two differ if each head has a map.
        kind: ``mixture`` (the paper's); ``matched``, each of ``teacher_layers`` with its own learnt weights of all
            student layers; ``single``, any one pair; ``last``, the last layers of both (MiniLM);
            ``uniform``, student layer m with teacher layer m Lt / Ls, rounded, counting from 1 (TinyBERT);
            ``one_to_one``, equal depths (MobileBERT); ``reverse``, uniform's teacher layers in reverse order;
            ``random``, teacher layers sampled once. Or a function of Lt and Ls that returns pairs (teacher layer,
            student layer), counting from 0 or, negative, from the end.
        router: ``joint``, one linear map from all layers' values ``(Lv d -> Ls)``; ``shared``, one ``(d -> 1)`` for
            all layers and a bias per layer, which needs Lv = Ls.
        tau_t, tau_s: temperatures.
        teacher_scale: ``std`` divides G by its standard deviation over layers, so that tau_t means the same for
            every teacher.
        value_heads, pooling: how the values are pooled (``pool_values``); recorded because a trained router works with
            one choice only.
        teacher_layer, student_layer: the layers of ``single``; negative numbers count from the end.
        teacher_layers: the K layers of ``matched``, all if empty; negative numbers count from the end.
        seed: the seed of ``random``.

    Raises:
        ValueError: an argument is out of range, the depths differ under ``one_to_one``, or there is a map per head
            under the shared router.
    """

    def __init__(
        self,
        num_teacher_layers: int,
        num_student_layers: int,
        value_width: int,
        *,
        value_layers: int | None = None,
        kind: str | Pairing = "mixture",
        router: Literal["joint", "shared"] = "joint",
        tau_t: float = 0.1,
        tau_s: float = 0.5,
        teacher_scale: Literal["none", "std"] = "none",
        value_heads: Literal["concat", "mean"] = "concat",
        pooling: Literal["sum", "mean"] = "sum",
        teacher_layer: int = -1,
        student_layer: int = -1,
        teacher_layers: Sequence[int] = (),
        seed: int = 0,
    ):
        super().__init__()
        for name, value, choices in (
            ("kind", "last" if callable(kind) else kind, MIXTURE_NAMES),
            ("router", router, ("joint", "shared")),
            ("teacher_scale", teacher_scale, ("none", "std")),
            ("value_heads", value_heads, ("concat", "mean")),
            ("pooling", pooling, ("sum", "mean")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name, number in (
            ("num_teacher_layers", num_teacher_layers),
            ("num_student_layers", num_student_layers),
            ("value_width", value_width),
            ("tau_t", tau_t),
            ("tau_s", tau_s),
        ):
            if not number > 0 and not (name == "value_width" and kind != "mixture"):
                raise ValueError(f"{name}: expected a positive number, got {number}")
        self.value_layers = num_student_layers if value_layers is None else value_layers
        self.kind, self.tau_t, self.tau_s = kind, tau_t, tau_s
        self.num_teacher_layers, self.num_student_layers = num_teacher_layers, num_student_layers
        self.value_width, self.teacher_scale = value_width, teacher_scale
        self.value_heads, self.pooling = value_heads, pooling
        self.router: nn.Module | None = None
        if kind == "mixture":
            if router == "joint":
                self.router = _JointRouter(num_student_layers, self.value_layers * value_width)
            elif self.value_layers != num_student_layers:
                raise ValueError(
                    f"router: shared needs one map per layer; expected {self.value_layers} maps of the student, got "
                    f"{num_student_layers} (map_heads=each?); use router joint"
                )
            else:
                self.router = _SharedRouter(num_student_layers, value_width)
            return
        if kind == "matched":
            layers = [layer_at("teacher_layers", layer, num_teacher_layers) for layer in teacher_layers]
            chosen = torch.tensor(layers or range(num_teacher_layers))
            teachers = nn.functional.one_hot(chosen, num_teacher_layers).float()
            self.register_buffer("_teacher_pairs", teachers)  # saved, because the learnt weights belong to these layers
            self.matching = nn.Parameter(torch.zeros(len(chosen), num_student_layers))
            return
        if callable(kind):
            self.kind = "pairs"
        single = {"teacher_layer": teacher_layer, "student_layer": student_layer}
        pairs = torch.tensor(layer_pairs(kind, num_teacher_layers, num_student_layers, **single, seed=seed))
        teachers, students = (
            nn.functional.one_hot(pairs[:, side], layers).float()
            for side, layers in enumerate((num_teacher_layers, num_student_layers))
        )
        self.register_buffer("_teacher_pairs", teachers, persistent=False)
        self.register_buffer("_student_pairs", students, persistent=False)

    _teacher_pairs: Tensor  # (K, Lt)
    _student_pairs: Tensor  # (K, Ls)

    @torch.no_grad()
    def teacher(self, maps: Tensor, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Weights ``(N, K, Lt)`` and mixed maps ``(N, K, S, W)`` of the teacher, without gradient (Eq. 4 and 6).

        Args:
            maps: ``(N, Lt, S, W)``.
            plan: of the teacher's tokens. An example with fewer than two words has uniform weights.
        """
        maps = self._checked(maps, self.num_teacher_layers, plan)
        if self.kind != "mixture":
            weights = self._teacher_pairs.to(maps).expand(maps.shape[0], -1, -1)
        else:
            scores = layer_scores(maps, plan)
            if self.teacher_scale == "std":
                scores = scores / scores.std(-1, correction=0, keepdim=True).clamp_min(1e-6)  # equal: uniform weights
            weights = (scores / self.tau_t).softmax(-1)[:, None]
        return weights, _mix(weights, maps)

    def student(self, maps: Tensor, values: Tensor | None, plan: StepPlan) -> tuple[Tensor, Tensor]:
        """Weights ``(N, K, Ls)`` and mixed maps ``(N, K, S, W)`` of the student, differentiable (Eq. 5 and 6).

        Args:
            maps: ``(N, Ls, S, W)``.
            values: ``(N, Lv, d)`` pooled values; the kind ``mixture`` alone reads them.
        """
        maps = self._checked(maps, self.num_student_layers, plan)
        if self.kind == "matched":
            matched = (at_least_float32(self.matching) / self.tau_s).softmax(-1)
            weights = matched.to(maps.dtype).expand(maps.shape[0], -1, -1)
        elif self.router is None:
            weights = self._student_pairs.to(maps).expand(maps.shape[0], -1, -1)
        else:
            expected = (maps.shape[0], self.value_layers, self.value_width)
            if values is None or values.shape != expected:
                got = None if values is None else tuple(values.shape)
                raise ValueError(f"values: expected (N, Lv, d) = {expected}, got {got}")
            with torch.autocast(values.device.type, enabled=False):
                logits: Tensor = self.router(values.to(next(self.router.parameters()).dtype))
            weights = (logits / self.tau_s).softmax(-1)[:, None]
        return weights, _mix(weights, maps)

    @property
    def pairs(self) -> int:
        """K, the mixed maps of an example."""
        return 1 if self.router is not None else len(self._teacher_pairs)

    def uniform(self, maps: Tensor) -> Tensor:
        """The student's maps ``(N, Ls, S, W)`` mixed with uniform weights, ``(N, K, S, W)``, as an untrained router."""
        return at_least_float32(maps).mean(1, keepdim=True).expand(-1, self.pairs, -1, -1)

    def _checked(self, maps: Tensor, layers: int, plan: StepPlan) -> Tensor:
        expected = (len(plan), layers, plan.num_steps, plan.num_words)
        if maps.shape != expected:
            raise ValueError(f"maps: expected (N, L, S, W) = {expected}, got {tuple(maps.shape)}")
        return at_least_float32(maps)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, teacher={self.num_teacher_layers} layers, student={self.num_student_layers} layers"


class _JointRouter(nn.Module):
    """``logits = W concat(h_1 .. h_L) + b``, W ``(layers, width)``."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, width))
        self.bias = nn.Parameter(torch.zeros(layers))

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values.flatten(1), self.weight, self.bias)


class _SharedRouter(nn.Module):
    """``logits_l = w . h_l + b_l``, one w ``(d,)`` for all layers."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(layers))

    def forward(self, values: Tensor) -> Tensor:
        return values @ self.weight + self.bias


def layer_scores(maps: Tensor, plan: StepPlan) -> Tensor:
    """Eq. 4's G, ``(N, L)``: the mean of ``|A[s, w+1] - A[s, w]|`` over steps and words; 0 for fewer than two words.

    Args:
        maps: ``(N, L, S, W)``; only the plan's valid steps and words count.
    """
    if maps.shape[-1] < 2:
        return maps.new_zeros(maps.shape[:2])
    counts = plan.step_mask[:, :, None] & plan.word_mask[:, None, 1:]  # (N, S, W - 1): valid words come first
    layers = max(SCORED_AT_ONCE // max(maps[:, 0].numel(), 1), 1)
    total = torch.cat(
        [torch.where(counts[:, None], some.diff(dim=-1).abs(), 0).sum((2, 3)) for some in maps.split(layers, dim=1)], 1
    )
    return total / counts.sum((1, 2)).clamp_min(1)[:, None]


def _mix(weights: Tensor, maps: Tensor) -> Tensor:
    with torch.autocast(maps.device.type, enabled=False):
        return torch.einsum("nkl,nlsw->nksw", weights.to(maps.dtype), maps)
