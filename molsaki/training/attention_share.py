"""`AttentionShare` measures the attention loss's share of the student's gradient, and can hold it by changing beta."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerState

from molsaki.training.config import DistillConfig
from molsaki.training.distiller import Distiller


class AttentionShare:
    """The weight of the attention loss over a training, and its share of the gradient.

    The share is ``beta |g_att| / |g_rest|``, by the norms of the gradients of the attention loss and of the other
    losses in the student's trained weights, of one forward and two backwards of their own per measurement. With
    ``attention_share`` each measurement replaces beta by the geometric mean of beta and of the value that gives this
    share; the first one by that value.
    """

    def __init__(self, config: DistillConfig):
        self.config = config
        self.beta = config.beta
        self.share: float | None = None
        self._is_set = False  # beta follows a measurement
        self._measured_step: int | None = None

    def start(self, state: TrainerState) -> None:
        """Begin a run, or continue one: beta is the last that was logged, and checkpoints are logged."""
        self.beta, self.share, self._measured_step = self.config.beta, None, None
        logged = [
            entry["beta"] for entry in state.log_history if "beta" in entry and entry["step"] <= state.global_step
        ]
        self._is_set = bool(logged)
        if logged:
            self.beta = logged[-1]

    def beta_at(self, state: TrainerState) -> float:
        """The weight of the attention loss at this step."""
        is_over = self.config.beta_until < 1 and state.global_step >= self.config.beta_until * state.max_steps
        return 0.0 if is_over else self.beta

    def is_due(self, state: TrainerState) -> bool:
        """Whether to measure before this forward, the first of its step."""
        every = self.config.share_steps
        if not every or state.global_step % every or state.global_step == self._measured_step:
            return False
        self._measured_step = state.global_step
        return True

    def measure(self, forward: Callable[[], dict[str, Tensor]], model: Distiller, accelerator: Accelerator) -> None:
        """Measure the share in one ``forward`` of the distiller; the generators of random numbers are not advanced."""
        model.beta, model.keeps_graph = 0.0, True
        try:
            with torch.random.fork_rng(), accelerator.autocast():
                out = forward()
        finally:
            model.keeps_graph = False
        weights = [p for p in model.student.parameters() if p.requires_grad]
        # The attention loss first: the cross-entropy's backward overwrites its logits.
        norms = torch.stack([_gradient_norm(out[name].mean(), weights) for name in ("loss_att", "loss")])
        attention, rest = accelerator.reduce(norms, "mean").tolist()
        if not (attention > 0 and rest > 0):
            return  # no key word in the batch
        if self.config.attention_share is not None:
            wanted = self.config.attention_share * rest / attention
            self.beta = (self.beta * wanted) ** 0.5 if self._is_set else wanted
            self._is_set = True
        self.share = self.beta * attention / rest

    def logs(self) -> dict[str, float]:
        """What is logged beside the losses."""
        if not self.config.share_steps:
            return {}
        return {"beta": self.beta} | ({} if self.share is None else {"attention_share": self.share})


def _gradient_norm(loss: Tensor, weights: Sequence[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    squares = [g.float().pow(2).sum() for g in found if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else loss.new_zeros((), dtype=torch.float32)
