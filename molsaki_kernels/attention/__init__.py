"""Attention engines, one complete file each.

To add one: write a module that follows :class:`~molsaki_kernels.attention.protocol.RequiredNames`, add it to
:data:`ENGINES`, and add its name to ``ENGINES`` in ``tests/kernels/test_attention.py``. Engines never import each
other.
"""

from __future__ import annotations

from molsaki_kernels.attention import eager, flash_attn, flex, native, sdpa, triton
from molsaki_kernels.attention.defaults import with_defaults
from molsaki_kernels.attention.protocol import Engine, RequiredNames

_MODULES: tuple[RequiredNames, ...] = (triton, native, flash_attn, flex, sdpa, eager)
ENGINES: dict[str, Engine] = {engine.NAME: with_defaults(engine) for engine in _MODULES}
