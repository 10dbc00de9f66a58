"""`capture` on a third of transformers' causal models, every kind of attention among them; docs/models.md has all."""

from __future__ import annotations

import pytest
import transformers

from tests.helpers.causal_models import MODEL_TYPES, NOT_BUILT, TABLE, VARIANTS, check

KINDS = {
    "plain": ["gpt2", "gpt_neox", "opt", "bert", "bart", "whisper", "musicgen", "ctrl"],
    "grouped queries": ["llama", "cohere", "olmo2", "smollm3", "phi3", "gpt_bigcode"],
    "windows": ["mistral", "qwen2", "qwen2_moe", "phimoe", "gemma3_text", "exaone4", "modernbert-decoder"],
    "sinks": ["gpt_oss", "granite_swa", "mimo_v2_flash"],
    "softcap": ["gemma2", "vaultgemma"],
    "values of another width than keys": ["deepseek_v2", "deepseek_v3", "minicpm3", "longcat_flash"],
    "hybrids": ["jamba", "qwen3_next", "falcon_h1", "nemotron_h", "recurrent_gemma", "lfm2", "minimax", "zaya"],
    "keywords that layers drop": ["stablelm", "nemotron", "moshi"],
    "chunks": ["llama4_text"],
    "two calls per layer, shared layers": ["diffllama", "zamba", "zamba2"],
    "keys of other layers": ["gemma3n_text", "gemma4_text"],
    "text of image models": ["gemma3", "mllama", "fuyu", "qwen3_5", "gemma4_unified", "git"],
    "experts": ["mixtral", "qwen3_moe"],
    "sparse and compressed keys": ["deepseek_v32", "hy_v4", "qwen4_exp_text", "minimax_m3_vl_text", "deepseek_v4"],
    "added to the scores": ["inkling_text", "doge"],
    "repeated under no_grad": ["hrm_text"],
    "patches": ["blt"],
    "not on the interface": ["bloom", "falcon", "mpt", "xlnet", "reformer"],
    "no attention": ["mamba", "rwkv", "xlstm"],
}
CHECKED = [name for names in KINDS.values() for name in names] + VARIANTS
CHECKED = [name for name in CHECKED if name.split(":")[0] in MODEL_TYPES]  # an older transformers has fewer


def cells(row: str) -> list[str]:
    """All but the error, which depends on the machine."""
    return [cell.strip() for column, cell in enumerate(row.strip().strip("|").split(" | ")) if column != 5]


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    text = TABLE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip(f"docs/models.md is not of transformers {transformers.__version__}")
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row for row in rows}


@pytest.mark.parametrize("name", CHECKED)
def test_a_model_is_right_or_refused(name, request):
    outcome = check(name)
    assert outcome.kind in ("right", "refused", "not built"), outcome
    assert cells(outcome.row) == request.getfixturevalue("table")[name]


def test_the_table_has_every_model(table):
    assert {*MODEL_TYPES, *VARIANTS} <= set(table)
    kinds = [table[name][1] for name in MODEL_TYPES]
    assert set(kinds) == {"right", "refused", "not built"}
    assert kinds.count("right") >= 135
    assert {name for name in MODEL_TYPES if table[name][1] == "not built"} == set(NOT_BUILT)


def test_a_third_is_checked():
    assert 3 * len([name for name in CHECKED if ":" not in name]) >= len(MODEL_TYPES)
