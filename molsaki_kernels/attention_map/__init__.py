"""The stepwise map from q, k and lse (MoLSAKI, arXiv 2604.15701, Eq. 2 and 3): Triton, C and PyTorch.

Each file follows :class:`~molsaki_kernels.attention_map.protocol.MapEngine`.
"""

from __future__ import annotations

from molsaki_kernels.attention_map import native, torch, triton
from molsaki_kernels.attention_map.protocol import MapEngine

SERVES_EVERY_CALL = torch.NAME
MAP_ENGINES: dict[str, MapEngine] = {engine.NAME: engine for engine in (triton, native, torch)}
