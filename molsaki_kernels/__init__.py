"""Stepwise attention on key information, without materialising attention (MoLSAKI, arXiv 2604.15701)."""

from . import reference
from .attention import engines, stepwise_attention, stepwise_map
from .plan import StepPlan
from .values import pool_values

__all__ = ["StepPlan", "engines", "pool_values", "reference", "stepwise_attention", "stepwise_map"]
