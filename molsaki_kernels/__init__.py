"""Stepwise attention on key information, without materialising attention (MoLSAKI, arXiv 2604.15701)."""

from .plan import StepPlan

__all__ = ["StepPlan"]
