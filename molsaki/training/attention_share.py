"""`AttentionShare` measures the attention loss's share of the student's gradient, and can hold it by changing beta."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerState

from molsaki.training.config import DistillConfig
from molsaki.training.distiller import Distiller

LARGEST_CHANGE = 10.0  # of beta per measurement


class AttentionShare:
    """The weight of the attention loss over a training, and its share of the gradient.

    The share is ``beta |g_att| / |g_rest|``, where g_att and g_rest are the gradients of the attention loss and of the
    other losses with respect to the student's trained weights. A measurement takes an extra forward and two extra
    backwards. With ``attention_share`` each measurement replaces beta by the geometric mean of beta and the value that
    gives this share; the first measurement sets beta to that value.
    """

    def __init__(self, config: DistillConfig):
        self.config = config
        self.beta = self._used = config.beta
        self.share: float | None = None
        self._measured_step: int | None = None

    def start(self, state: TrainerState) -> None:
        """Begin a run, or continue one with the last logged beta and share; they are logged at every checkpoint."""
        self.beta, self.share, self._measured_step = self.config.beta, None, None
        for entry in state.log_history:
            if "attention_share" in entry and entry["step"] <= state.global_step:
                self.beta, self.share = entry["beta"], entry["attention_share"]

    def beta_at(self, state: TrainerState) -> float:
        """The weight of the attention loss at this step."""
        self._used = 0.0 if self._is_over(state) else self.beta
        return self._used

    def is_due(self, state: TrainerState) -> bool:
        """Whether to measure before this forward, if it is the first of its step."""
        every = self.config.share_steps
        if not every or state.global_step % every or state.global_step == self._measured_step or self._is_over(state):
            return False
        self._measured_step = state.global_step
        return True

    def _is_over(self, state: TrainerState) -> bool:
        return self.config.beta_until < 1 and state.global_step >= self.config.beta_until * state.max_steps

    def measure(self, forward: Callable[[], dict[str, Tensor]], model: Distiller, accelerator: Accelerator) -> None:
        """Measure the share in one ``forward`` of the distiller; random number generators are not advanced."""
        model.beta, model.keeps_graph = 0.0, True
        try:
            with torch.random.fork_rng(), accelerator.autocast():
                out = forward()
        finally:
            model.keeps_graph = False
        weights = [p for p in model.student.parameters() if p.requires_grad]
        # The attention loss first: the cross-entropy's backward overwrites its logits.
        norms = [_gradient_norm(out[name].mean(), weights, accelerator) for name in ("loss_att", "loss")]
        mean_loss = accelerator.reduce(out["loss_att"].detach().mean().float(), "mean")
        attention, rest, loss = torch.stack([*norms, mean_loss]).tolist()
        if loss < torch.finfo(torch.float32).eps or not (attention > 0 and rest > 0):
            return  # no step has two key words to compare, so the gradient consists of rounding errors
        if self.config.attention_share is not None:
            wanted = self.config.attention_share * rest / attention
            if self.share is not None:
                wanted = min(max((self.beta * wanted) ** 0.5, self.beta / LARGEST_CHANGE), self.beta * LARGEST_CHANGE)
            self.beta = wanted
        self.share = self.beta * attention / rest

    def logs(self) -> dict[str, float]:
        """Values to log with the losses: beta of the last step, and the last share if there is one."""
        if not self.config.share_steps:
            return {}
        is_over = self._used == 0.0 and self.beta > 0
        return {"beta": self._used} | ({} if self.share is None or is_over else {"attention_share": self.share})


def _gradient_norm(loss: Tensor, weights: Sequence[nn.Parameter], accelerator: Accelerator) -> Tensor:
    """The norm of the gradient of the loss averaged over all processes, which have the same number of examples."""
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    total = torch.zeros((), dtype=torch.float32, device=loss.device)
    for weight, gradient in zip(weights, found, strict=True):
        if accelerator.num_processes > 1:  # a weight that one process does not use may be used by another
            gradient = accelerator.reduce(torch.zeros_like(weight) if gradient is None else gradient, "mean")
        if gradient is not None:
            total += gradient.float().pow(2).sum().to(total.device)
    return total.sqrt()
