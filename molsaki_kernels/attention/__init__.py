"""Attention engines, one complete file each.

To add one: write a module that follows :class:`~molsaki_kernels.attention.protocol.Engine`, add it to :data:`ENGINES`,
and add its name to ``ENGINES`` in ``tests/kernels/test_attention.py``. Engines never import each other.
"""

from __future__ import annotations

from molsaki_kernels.attention import eager, flash_attn, flex, native, sdpa, triton
from molsaki_kernels.attention.protocol import Engine

ENGINES: dict[str, Engine] = {engine.NAME: engine for engine in (triton, native, flash_attn, flex, sdpa, eager)}
