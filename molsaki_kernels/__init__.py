"""Stepwise attention on key information, without materialising attention (MoLSAKI, arXiv 2604.15701)."""

from molsaki_kernels import reference
from molsaki_kernels.api import engines, stepwise_attention, stepwise_map
from molsaki_kernels.plan import StepPlan
from molsaki_kernels.value_pooling.values import pool_values

__all__ = ["StepPlan", "engines", "pool_values", "reference", "stepwise_attention", "stepwise_map"]
