"""`ByLengthSampler`: batches of examples of similar length."""

from __future__ import annotations

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ByLengthSampler(LengthGroupedSampler):
    """Examples of similar length together, in an order that an epoch's number and the seed determine."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator().manual_seed(seed))
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)
