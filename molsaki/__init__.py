"""Distil where a teacher looks while it reasons (MoLSAKI, arXiv 2604.15701).

Importing the package registers the attention implementation "molsaki" with transformers.
"""

from .hooks import capture

__all__ = ["capture"]
