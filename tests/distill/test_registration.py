"""The attention implementation is known to transformers after ``import molsaki``, whichever is imported first."""

from __future__ import annotations

import pytest

from tests.helpers import processes

BUILD = """
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = AutoModelForCausalLM.from_config(config, attn_implementation="molsaki")
assert model.config._attn_implementation == "molsaki"
"""
SET = BUILD.replace(', attn_implementation="molsaki")', ')\nmodel.set_attn_implementation("molsaki")')


@pytest.mark.parametrize(
    "code",
    [
        "import sys, molsaki\nassert 'transformers' not in sys.modules and 'torch' not in sys.modules" + BUILD,
        "import molsaki" + SET,
        "import transformers, molsaki" + BUILD,
        "import transformers.modeling_utils, molsaki" + SET,
        "import molsaki\nmolsaki.capture" + SET,
        "from molsaki.modeling.attention_hook import register\nregister()" + BUILD,
    ],
    ids=["molsaki alone", "molsaki first", "transformers first", "models first", "capture first", "by hand"],
)
def test_registered(code):
    process = processes.python("-c", code)
    assert process.returncode == 0, process.stderr
