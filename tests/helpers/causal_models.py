"""Compares `capture` with eager attention for a tiny random model of each class in transformers' causal mapping.

``python -m tests.helpers.causal_models`` checks every class and writes docs/models.md. With model types as arguments it
prints their outcomes and writes nothing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from molsaki.modeling.capture import capture
from molsaki_kernels.reference import reduce_weights
from tests.helpers.architectures import batch, objective, relative, softmax_in_float64

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
MODEL_TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Relative. The largest error in float64, 6e-7, is of granite_swa, whose eager attention has a float32 sink factor.
TOLERANCE = {torch.float64: 2e-6, torch.float32: 1e-3}
WINDOW = 11  # of 40 tokens

# The size of every field of this name that a config has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "encoder_hash_byte_group_vocab",
                     "pronunciation_vocab_size", "shape_vocab_size"], 61),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "emb_dim", "dim_model", "embedding_dim", "embedding_size",
                     "word_embed_proj_dim", "lru_width", "input_embedding_size", "output_embedding_size",
                     "ffn_dim", "intermediate_size", "d_ff", "n_inner", "dim_ff", "dff",
                     "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "d_inner", "feed_forward_size",
                     "dense_intermediate_size", "mamba_d_ssm"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_encoder_layers", "num_decoder_layers"], 4),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
                     "swa_num_attention_heads", "linear_num_heads", "linear_num_value_heads", "mamba_num_heads"], 4),
    **dict.fromkeys(["kv_n_heads", "swa_num_key_value_heads", "linear_num_key_heads", "index_n_heads", "n_groups"], 2),
    **dict.fromkeys(["attention_head_size", "d_head", "dim_head", "swa_head_dim", "linear_head_dim", "index_head_dim",
                     "linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "v_head_dim",
                     "qk_nope_head_dim"], 16),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions", "n_ctx",
                     "context_length"], 128),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_experts_per_token"], 2),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
                     "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp"], 32),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank"], 24),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "qk_rope_head_dim", "index_topk"], 8),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 16),
}  # fmt: skip
WINDOWS = ["sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size", "local_attention"]

# What the config of a model type, or of a variant "type:variant", needs beyond that.
HALF = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "hybrid"] * 2
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"num_hidden_layers": 4, "encoder_config": {"hidden_size_global": 64},
            "decoder_config": {"hidden_size_global": 64}},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"layer_types": HALF, "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]} for kind in HALF[:2]}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3:equal widths": {"v_head_dim": 24},
    "deepseek_v3:wide values": {"v_head_dim": 32},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_n_heads": 8},
    "gemma3n_text": {"intermediate_size": 64, "layer_types": HALF, "num_kv_shared_layers": 2, "laurel_rank": 8,
                     "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "gemma3_text:bidirectional": {"use_bidirectional_attention": True},
    "gpt2:scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": LINEAR},
    "hrm_text": {"num_layers_per_stack": 1, "L_cycles": 2, "num_hidden_layers": 6},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": LINEAR},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama:bidirectional": {"is_causal": False},
    "llama4_text:one chunk": {"attention_chunk_size": 64},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 24},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mimo_v2_flash": {"v_head_dim": 8},
    "minimax_m3_vl_text:sparse": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_block_size": 4,
                                  "index_topk_blocks": 2},
    "mistral:no window": {"sliding_window": None},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "nemotron_h": {"mamba_num_heads": 8},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
                       "indexer_compress_ratio": 2, "layer_types": ["linear_attention", "qwen_sparse_attention"] * 2},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32], "local_attn_chunk_length": 8,
                 "lsh_attn_chunk_length": 8, "attn_layers": ["local", "lsh"] * 2},
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {"num_blocks": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": HYBRID, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": HYBRID},
    "zamba2:two blocks": {"num_mem_blocks": 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2},
}  # fmt: skip
VARIANTS = [name for name in OVERRIDES if ":" in name]
NOT_BUILT = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "it attends to the keys and values of another model",
    "gemma4_unified_assistant": "it attends to the keys and values of another model",
}


@dataclasses.dataclass
class Outcome:
    """What `check` found for a model type or a variant of one.

    Attributes:
        kind: "right", "refused" (with a plan; ``reason`` says why) or "not built"; anything else is a fault: "wrong",
            "crash", "late" (refused only after a forward), "partly" (a map is right, but running without a plan is
            refused).
        layers: the index of the decoder layer of each map.
        packed: "right", "refused" or "" where capture refuses the model anyway.
        without_plan: "right", "refused", or "as sdpa" where sdpa and eager attention differ.
        errors: relative errors by what was compared.
    """

    name: str
    kind: str = "not built"
    reason: str = ""
    layers: tuple[int, ...] = ()
    packed: str = ""
    without_plan: str = ""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def row(self) -> str:
        """The row of the table."""
        layers = " ".join(map(str, self.layers))
        worst = f"{max(self.errors.values()):.0e}" if self.errors else ""
        reason = "; ".join([self.reason, *self.notes] if self.reason else self.notes).replace("|", "\\|")
        cells = [self.name, self.kind, layers, self.packed, self.without_plan, worst, reason]
        return f"| {' | '.join(cells)} |"


class Mismatch(Exception):
    """Two results that should be equal are not."""


class Late(Exception):
    """A refusal after the model's forward."""


@dataclasses.dataclass
class Call:
    """One call of a model's eager attention: the weights ``(B, H, M, n)`` that it applies, and those it returns."""

    module: nn.Module
    running: int  # the number of the running decoder layer
    weights: Tensor
    returned: Tensor | None


def model_class(name: str) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name.split(":")[0]])
    return found


def tiny_config(name: str) -> transformers.PretrainedConfig:
    """The config of the causal model ``name``, shrunk."""
    config_class = model_class(name).config_class
    small = _shrunk(config_class().to_dict())
    for key in dict.fromkeys([config_class.model_type, name.split(":")[0], name]):
        small = _merged(small, OVERRIDES.get(key, {}))
    return config_class(**small)


def _shrunk(default: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for field, value in default.items():
        if isinstance(value, dict) and "model_type" in value:
            small[field] = _shrunk(value)
        elif field in WINDOWS:
            small[field] = WINDOW
        elif isinstance(value, float) and any(part in field for part in ("dropout", "pdrop", "layerdrop", "jitter")):
            small[field] = 0.0
        elif field in SIZES and value is not None:
            small[field] = SIZES[field]
    latent = "kv_lora_rank" in default  # every head has keys of its own, whose size follows from other fields
    if "num_key_value_heads" in default:
        small["num_key_value_heads"] = 4 if latent else 2
    if "head_dim" in default and not latent:
        small["head_dim"] = 16
    if "use_sliding_window" in default:
        small["use_sliding_window"] = True
        if "max_window_layers" in default:
            small["max_window_layers"] = 2
    if "is_decoder" in default:
        small["is_decoder"] = True
    for field, token in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        if field in default:
            small[field] = token
    return small


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _merged(base.get(k, {}), v) for k, v in more.items() if isinstance(v, dict) and k.endswith("config")}
    return base | more | nested


def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A random model in eval mode, with weights far enough from their initial values that every part matters."""
    torch.manual_seed(0)
    model = model_class(name)._from_config(tiny_config(name), attn_implementation="eager").to(dtype)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError):  # a model without experts
            model.set_experts_implementation("eager")  # the grouped product takes no float64
    return model.eval()


@contextlib.contextmanager
def eager_calls(model: PreTrainedModel) -> Iterator[list[Call]]:
    """Record the weights that the model's eager attention applies: its output where the values are the identity."""
    calls: list[Call] = []
    running = 0

    def enter(index: int) -> None:
        nonlocal running
        running = index

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = original(module, query, key, value, *args, **kwargs)
            # In blocks of the values' width, from which some functions take their scale.
            n, width = key.shape[2], value.shape[-1]
            padded = nn.functional.pad(torch.eye(n, dtype=key.dtype), (0, -n % width))
            blocks = [block.expand(*value.shape[:2], -1, -1) for block in padded.split(width, -1)]
            outs = [original(module, query, key, block, *args, **kwargs)[0] for block in blocks]
            weights = torch.cat(outs, -1)[..., :n].transpose(1, 2)
            calls.append(Call(module, running, weights, out[1]))
            return out

        return attention

    with pytest.MonkeyPatch.context() as patch:
        for module in {sys.modules[type(m).__module__] for m in model.modules()}:
            if hasattr(module, "eager_attention_forward"):
                patch.setattr(module, "eager_attention_forward", recording(module.eager_attention_forward))
        handles = []
        for path, layer in model.named_modules():
            *parents, last = path.split(".")
            if last.isdigit() and not any(part.isdigit() for part in parents):  # in the outermost list
                handles.append(layer.register_forward_pre_hook(lambda *_, index=int(last): enter(index)))
        yield calls
        for handle in handles:
            handle.remove()


def layers_of(calls: list[Call]) -> tuple[int, ...]:
    """The layer of each call: the ``layer_idx`` of its module, or the running layer where layers share it."""
    known = [getattr(call.module, "layer_idx", None) or 0 for call in calls]
    shared = len({(index, call.running) for index, call in zip(known, calls, strict=True)}) > len(set(known))
    return tuple(call.running for call in calls) if shared else tuple(known)


def is_refusal(error: Exception) -> bool:
    """Whether a statement of this library raised ``error``."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = any(f"/{package}/" in last.filename for package in ("molsaki", "molsaki_kernels"))
    return ours and (last.line or "").startswith("raise") and isinstance(error, (ValueError, TypeError))


def _message(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip().splitlines() or [""])[0]
    if is_refusal(error):
        return text
    return f"{type(error).__name__}: {text} ({'/'.join(Path(last.filename).parts[-2:])})"


def check(name: str) -> Outcome:
    """Compare a tiny model under "molsaki" with its own eager attention, with a plan and without, padded and packed.

    The model is in float64 where its eager attention can run in float64.
    """
    outcome = Outcome(name, reason=NOT_BUILT.get(name, ""))
    if outcome.reason:
        return outcome
    start = time.process_time()
    with contextlib.suppress(Exception):
        model_class(name)  # imported before the patch: some modules compile their softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", softmax_in_float64)
        for dtype in TOLERANCE:
            try:
                comparison = Comparison(outcome, build(name, dtype), TOLERANCE[dtype])
            except Exception as error:
                why = str(error) if isinstance(error, Mismatch) else _message(error)
                outcome.notes = [f"float32, because eager attention fails in float64: {why}"]
            else:
                comparison.run()
                break
        else:
            outcome.notes, outcome.reason = [], why
    outcome.seconds = time.process_time() - start
    return outcome


class Comparison:
    """The comparison of one model with its eager attention, whose results go into an outcome."""

    def __init__(self, outcome: Outcome, model: PreTrainedModel, tolerance: float):
        self.outcome, self.model, self.tolerance = outcome, model, tolerance
        self.inputs, self.plan = batch()
        self.inputs["input_ids"] *= self.inputs["attention_mask"]
        self.mask = self.inputs["attention_mask"]
        self.lengths = self.mask.sum(-1).tolist()
        with eager_calls(model) as self.calls:
            self.logits = model(**self.inputs).logits
        if self.logits[self.mask.bool()].isnan().any():
            raise Mismatch("its logits are NaN")

    def run(self) -> None:
        shift = [self.mask.shape[1] - n for n in self.lengths]
        left = {k: torch.stack([row.roll(n) for row, n in zip(t, shift, strict=True)]) for k, t in self.inputs.items()}
        prompts = {k: t[:, -16:].clone() for k, t in left.items()}
        for t in prompts.values():
            t[1, :5] = 0

        def generated() -> Tensor:
            out = self.model.generate(**prompts, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                                      return_dict_in_generate=True, output_logits=True)  # fmt: skip
            return torch.stack(out.logits)

        def logits_of(inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
            return lambda: self.model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]

        stages: dict[str, Callable[[], None]] = {
            "capture": self.captured,
            "padding": self.plan_outside_the_texts,
            "packed": lambda: self.packed(by_positions=False),
            "packed by positions": lambda: self.packed(by_positions=True),
            "right-padded": lambda: self.without_plan("right-padded", logits_of(self.inputs)),
            "left-padded": lambda: self.without_plan("left-padded", logits_of(left)),
            "generate": lambda: self.without_plan("generate", generated),
        }
        found: dict[str, tuple[str, str]] = {}
        for stage, run in stages.items():
            if stage.startswith(("padding", "packed")) and found["capture"][0] != "right":
                continue
            found[stage] = self.status(run)
        plain = {kind for stage, (kind, _) in found.items() if stage in ("right-padded", "left-padded", "generate")}
        self.outcome.packed = found["packed"][0] if "packed" in found else ""
        self.outcome.without_plan = self.outcome.without_plan or ("right" if plain == {"right"} else "refused")
        faults = {s: (k, why) for s, (k, why) in found.items() if k in ("wrong", "crash", "late")}
        if faults:
            self.outcome.kind = next(iter(faults.values()))[0]
            self.outcome.reason = "; ".join(f"{stage}: {why}" for stage, (_, why) in faults.items())
        else:
            self.outcome.kind, self.outcome.reason = found["capture"]
            if self.outcome.kind == "right" and "refused" in plain:
                self.outcome.kind = "partly"
                self.outcome.reason = next(why for kind, why in found.values() if kind == "refused" and why)

    def status(self, run: Callable[[], None]) -> tuple[str, str]:
        """The kind and the reason of one stage."""
        try:
            run()
        except Mismatch as error:
            return "wrong", str(error)
        except Late as error:
            return "late", str(error)
        except Exception as error:
            if not is_refusal(error):
                return "crash", _message(error)
            return "refused", _message(error)
        else:
            return "right", ""
        finally:
            self.model.set_attn_implementation("eager")

    def compare(self, what: str, found: Tensor, expected: Tensor) -> None:
        if found.shape != expected.shape:
            raise Mismatch(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        if expected.isnan().any() and (expected.isnan() == found.isnan()).all():
            self.outcome.notes.append(f"{what}: eager attention gives NaN")
            found, expected = found.nan_to_num(), expected.nan_to_num()
        error = relative(found.detach(), expected.detach())
        self.outcome.errors[what] = error
        if not error <= self.tolerance:
            raise Mismatch(f"{what}: relative error {error:.1e}")

    def captured(self) -> None:
        finished: list[bool] = []
        handle = self.model.register_forward_hook(lambda *_: finished.append(True), prepend=True)
        try:
            with capture(self.model, self.plan) as record:
                found = self.model(**self.inputs).logits
                maps = record.maps
        except Exception as error:
            if finished and is_refusal(error):
                raise Late(str(error)) from None
            raise
        finally:
            handle.remove()
        self.outcome.layers = record.layers
        called = layers_of(self.calls)
        if record.layers != called:
            raise Mismatch(f"layers: {record.layers}, expected {called}")
        short = min(self.lengths)
        if any(
            call.returned is not None and relative(call.returned[:, :, :short], call.weights[:, :, :short]) > 1e-6
            for call in self.calls
        ):
            self.outcome.notes.append("eager attention returns other weights than it applies, which are the reference")
        expected = torch.stack([reduce_weights(call.weights.double(), self.plan) for call in self.calls], 1)
        self.compare("maps", maps, expected)
        real = self.mask.bool()
        self.compare("logits", found[real], self.logits[real])
        wanted = self.gradients(objective(expected, self.logits, self.mask))
        total = torch.stack([g.norm() for g in wanted]).norm()
        scales = [g.norm().clamp_min(1e-4 * total) for g in wanted]  # each parameter counts alike

        def scaled(gradients: list[Tensor]) -> Tensor:
            return torch.cat([(g / scale).flatten() for g, scale in zip(gradients, scales, strict=True)])

        self.compare("gradients", scaled(self.gradients(objective(maps, found, self.mask))), scaled(wanted))

    def gradients(self, loss: Tensor) -> list[Tensor]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def plan_outside_the_texts(self) -> None:
        """A plan that reaches into the padding, on the right or the left, has to be refused."""
        for what, inputs in (
            ("of the other sequence", {k: t.flip(0) for k, t in self.inputs.items()}),
            ("with left padding", {k: t.flip(1) for k, t in self.inputs.items()}),
        ):
            try:
                with torch.no_grad(), capture(self.model, self.plan) as record:
                    self.model(**inputs, use_cache=False)
                    record.maps
            except Exception as error:
                if not is_refusal(error):
                    raise
            else:
                raise Mismatch(f"maps although the plan is {what}")

    def packed(self, by_positions: bool) -> None:
        texts = [row[:n] for row, n in zip(self.inputs["input_ids"], self.lengths, strict=True)]
        with torch.no_grad(), eager_calls(self.model) as calls:
            logits = [self.model(input_ids=text[None], use_cache=False).logits for text in texts]
        inputs = {
            "input_ids": torch.cat(texts)[None],
            "attention_mask": torch.ones(1, sum(self.lengths), dtype=torch.long),
            "position_ids": torch.cat([torch.arange(n) for n in self.lengths])[None],
            "cu_seq_lens_q": torch.tensor([0, *self.lengths]).cumsum(0).int(),
        }
        if by_positions:  # transformers recognises positions that start again where it is given no mask
            del inputs["cu_seq_lens_q"], inputs["attention_mask"]
        with torch.no_grad(), capture(self.model, self.plan) as record:
            found = self.model(**inputs, use_cache=False).logits
            maps = record.maps
        half, padding = len(calls) // 2, max(self.lengths) - min(self.lengths)
        expected = []
        for first, second in zip(calls[:half], calls[half:], strict=True):
            weights = torch.cat([first.weights, nn.functional.pad(second.weights, (0, padding) * 2)])
            expected.append(reduce_weights(weights.double(), self.plan))
        self.compare("packed maps", maps, torch.stack(expected, 1))
        self.compare("packed logits", found, torch.cat(logits, 1))

    @torch.no_grad()
    def without_plan(self, what: str, run: Callable[[], Tensor]) -> None:
        """Compare with eager attention, or with sdpa where the two differ, as for padding that a recurrence reads."""

        def under(implementation: str) -> Tensor:
            self.model.set_attn_implementation(implementation)
            torch.manual_seed(3)  # for models that sample, such as reformer's hashes
            return run()

        try:
            expected = under("eager")
        except Exception as error:
            self.outcome.notes.append(f"{what}: eager attention fails: {_message(error)}")
            return
        found = under("molsaki")
        try:
            self.compare(what, found, expected)
        except Mismatch as mismatch:
            try:
                expected = under("sdpa")
            except ValueError:  # the model has none
                raise mismatch from None
            self.compare(what, found, expected)
            self.outcome.without_plan = "as sdpa"
            self.outcome.notes.append(f"{what}: sdpa and eager attention differ")


def _work(pipe: Any) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(check(pipe.recv()))


def walk(names: list[str], limit: float = 120.0) -> Iterator[Outcome]:
    """`check` of each name, in a second process that is replaced when a model takes more than ``limit`` seconds."""
    context = multiprocessing.get_context("spawn")
    worker = None
    for name in names:
        if worker is None:
            pipe, other = context.Pipe()
            worker = context.Process(target=_work, args=(other,), daemon=True)
            worker.start()
            other.close()
        pipe.send(name)
        try:
            if not pipe.poll(limit):
                raise TimeoutError(f"more than {limit} s")
            yield pipe.recv()
        except (EOFError, TimeoutError) as error:
            worker.kill()
            worker = None
            yield Outcome(name, "crash", f"the process ended or stalled: {error!r}")


PAGE = """\
# Models

Every class in the causal mapping of transformers {version}, {total} names, built tiny and random and compared with its
own eager attention: **{counts}.** This page is generated by `python -m tests.helpers.causal_models`
({seconds:.0f} CPU seconds); the test suite checks a third of the rows again.

Each model has hidden size 64, heads of 16, 2 to 6 layers and windows of {window} tokens, runs in float64 and without
dropout on a right-padded batch of 40 and 29 tokens. *Right* means that the maps inside `capture`, the logits, and the
gradient of every weight for a loss on both equal those of eager attention; that a plan that reaches into the padding is
refused; and that without a plan, under `attn_implementation="molsaki"`, the logits of right- and left-padded batches
and of `generate()` (greedy, with its cache) are equal too. *Refused* means that `capture` raises the error in the last
column when it is entered or at the first attention that has no map, not after a forward. The reference are the weights
that eager attention applies to the values.

- **layers**: the decoder layer of each map, `record.layers`. Layers without attention have none.
- **packed**: two texts in one row with `cu_seq_lens_q` equal the texts alone, or `capture` refuses packing.
- **no plan**: running without a plan. "as sdpa": equal to PyTorch's sdpa, which differs from eager attention there.
- **error**: the largest relative error of all comparisons.

| model type | outcome | layers | packed | no plan | error | reason |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

Under transformers 4.57.6 (139 names, same command, 2026-11-27): 57 right, 68 refused, 13 not built, none silently
wrong, and one fault: `generate()` of blt without a plan raises an error about the shape of its mask. More is refused
there because many models build their mask themselves (bart and its kin, bamba, biogpt, falcon_h1, fuyu, granitemoe,
granitemoeshared, musicgen, opt, persimmon). GPT-2's `scale_attn_by_inverse_layer_idx` is ignored, as it is by sdpa: its
modeling file applies it in its eager function alone.

Variants, not counted above:

| model type: variant | outcome | layers | packed | no plan | error | reason |
| --- | --- | --- | --- | --- | --- | --- |
{variants}
"""


def main(names: list[str]) -> int:
    found = {}
    for outcome in walk(names or MODEL_TYPES + VARIANTS):
        found[outcome.name] = outcome
        print(outcome.row if not names else outcome, flush=True)
    counts = collections.Counter(found[name].kind for name in MODEL_TYPES if name in found)
    print(dict(counts), file=sys.stderr)
    if not names:
        page = PAGE.format(
            version=transformers.__version__,
            total=len(MODEL_TYPES),
            counts=", ".join(f"{count} {kind}" for kind, count in counts.most_common()),
            seconds=sum(outcome.seconds for outcome in found.values()),
            window=WINDOW,
            rows="\n".join(found[name].row for name in MODEL_TYPES),
            variants="\n".join(found[name].row for name in VARIANTS),
        )
        TABLE.write_text(page, encoding="utf-8")
    return int(any(outcome.kind not in ("right", "refused", "not built") for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
