"""Small models of real architectures, a batch for them, and the maps of their own eager attention."""

from __future__ import annotations

import pytest
import torch
import transformers

from molsaki_kernels import StepPlan
from molsaki_kernels.reference import reduce_weights

TRANSFORMERS = int(transformers.__version__.split(".")[0])

SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
five = pytest.mark.skipif(TRANSFORMERS < 5, reason="transformers 4 has other caches and models")
HALF = ["sliding_attention", "full_attention"] * 2
NO_KV = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}

ARCHITECTURES = {
    "Llama": SMALL,
    "Mistral": SMALL | dict(sliding_window=9),
    "Qwen2": {k: v for k, v in SMALL.items() if k != "head_dim"}
    | dict(use_sliding_window=True, sliding_window=9, max_window_layers=2, layer_types=HALF),
    "Qwen3": SMALL,
    "Gemma2": SMALL | dict(sliding_window=9, attn_logit_softcapping=5.0, query_pre_attn_scalar=16, layer_types=HALF),
    "Gemma3Text": SMALL | dict(sliding_window=9, query_pre_attn_scalar=16, layer_types=HALF),
    "Phi3": {k: v for k, v in SMALL.items() if k != "head_dim"} | dict(sliding_window=9),
    "GPT2": dict(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=128, attn_pdrop=0.0, resid_pdrop=0.0,
                 embd_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "GPTNeoX": NO_KV,
    "Olmo2": {k: v for k, v in SMALL.items() if k != "head_dim"},
    "SmolLM3": {k: v for k, v in SMALL.items() if k != "head_dim"} | dict(no_rope_layers=[1, 1, 0, 1]),
    "Granite": {k: v for k, v in SMALL.items() if k != "head_dim"} | dict(attention_multiplier=0.3),
    "Cohere2": SMALL | dict(sliding_window=9, layer_types=HALF),
    "GptOss": SMALL | dict(sliding_window=9, num_local_experts=2, num_experts_per_tok=1, layer_types=HALF),
}  # fmt: skip


# For shared prefixes: windows of 9 tokens, softcap, sinks, no rotation.
SHARING = ["Llama", "Mistral", "Gemma2", "GptOss", "GPT2", "Cohere2"]


def make(name: str, dtype: torch.dtype = torch.float64, **overrides):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(ARCHITECTURES[name] | overrides))
    suffix = {"GPT2": "LMHeadModel", "Gemma3Text": "ForCausalLM"}.get(name, "ForCausalLM")
    model = getattr(transformers, {"Gemma3Text": "Gemma3"}.get(name, name) + suffix)
    model = model(config).to(dtype)
    for parameter in model.parameters():  # norms and sinks away from their trivial initial values
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    if name == "GptOss" and dtype == torch.float64 and TRANSFORMERS > 4:
        model.set_experts_implementation("eager")  # the grouped product takes no float64
    return model.eval()


def random_model(name: str, config: dict, config_class: str | None = None):
    """A causal language model in float64 with random weights large enough for uneven maps."""
    torch.manual_seed(0)
    made = getattr(transformers, config_class or f"{name}Config")(**config)
    model = getattr(transformers, f"{name}ForCausalLM")(made).double()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model.eval()


@pytest.fixture(autouse=True)
def skip_gpt2_before_transformers_5(request):
    if TRANSFORMERS < 5 and "GPT2" in request.node.name and "generate" not in request.node.name:
        pytest.skip("transformers 4's GPT-2 hands no extra keywords to its attention")


def batch(lengths=(40, 29), seed=1):
    torch.manual_seed(seed)
    M = max(lengths)
    ids = torch.randint(3, 61, (len(lengths), M))
    mask = torch.zeros_like(ids)
    for n, length in enumerate(lengths):
        mask[n, :length] = 1
    plan = StepPlan.from_spans(
        [[(1, 13), (13, 20), (22, 40)], [(0, 12), (12, 29)]],
        [[[3], [15, 16], [0], [31]], [[25], [4, 5, 6]]],
    )
    return dict(input_ids=ids, attention_mask=mask), plan


def objective(maps: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(maps.shape, generator=g, dtype=torch.float64)
    logit_weight = torch.randn(logits.shape, generator=g, dtype=torch.float64)
    return (maps * weight).sum() + (logits * logit_weight * mask[..., None]).sum()


def softmax_in_float64(x, dim=None, _stacklevel=3, dtype=None):
    return x.softmax(dim)


def eager(model, inputs, plan):
    """Maps reduced from the attention weights of the model's eager attention, and the logits.

    The model's softmax, float32 by default, is kept in the model's dtype: in float32 the lowest float64 number of the
    mask would become -inf, and the output of padding NaN.
    """
    model.set_attn_implementation("eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax_in_float64)
        out = model(**inputs, output_attentions=True)
    return torch.stack([reduce_weights(weights.double(), plan) for weights in out.attentions], 1), out.logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


HEADED = dict(
    vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip
HEADS = {
    "Llama": dict(tie_word_embeddings=True),
    "Qwen2": dict(tie_word_embeddings=False),
    "Gemma2": dict(final_logit_softcapping=3.0),
    "Cohere2": dict(logit_scale=0.25),
    "Granite": dict(logits_scaling=4.0),
    "Phi": dict(),  # a head with a bias
}


def make_headed(name: str, dtype: torch.dtype = torch.float32, **more) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**HEADED | HEADS.get(name, {}) | more)
    model = getattr(transformers, name + "ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(10)  # logits large enough for a softcap to bend them
    if model.get_output_embeddings().bias is not None:
        model.get_output_embeddings().bias.data.normal_()
    return model.to(dtype).eval()
