"""The custom operators: schemas, fakes and autograd, one file per operation.

Operators take tensors and numbers, so the dataclasses of ``spec.py`` are flattened and rebuilt in this folder, and only
here. An operator gets the names of the engines, so that its backward uses the same ones. Every output is a fresh
tensor.

``run_attention``, ``run_map`` and ``run_pooling`` call an operator or, where nothing observes operators
(``direct_call.py``), an autograd function that calls them too. The public functions check all arguments first.
"""

from molsaki_kernels.ops.attention import run_attention as run_attention
from molsaki_kernels.ops.attention_map import run_map as run_map
from molsaki_kernels.ops.value_pooling import run_pooling as run_pooling
