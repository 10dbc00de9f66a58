"""Computes what fills the memory of one GPU in distillation on a long text. Nothing here is measured on a GPU.

    python -m benchmarks.memory [--tokens 16384 32768 65536 131072] [--map sentences|words] [--markdown]

The teacher is Llama-3.1-8B in bfloat16 without gradient, the student Llama-3.2-1B in float32 with bfloat16 autocast and
AdamW, one text per step. Sizes of weights, maps, their workspace and the head's chunks follow from the shapes and the
code that allocates them. Bytes that autograd saves per token are counted: one and two layers of the student's widths
run on a CPU with few tokens, and every tensor that the forward saves is added up.

``--map sentences`` has a step per sentence and a word per number, as many as GSM8K's rationales one after another have
(a sentence per 16 tokens, a number per 9). ``--map words`` has 256 steps and 3,000 words at every length, as with
``--splitter words:N --max_key_words 3000``.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from molsaki.method.mixture import SCORED_AT_ONCE
from molsaki.modeling.attention_hook import NAME
from molsaki.modeling.lm_head import LOGITS_AT_ONCE

GB = 1e9
ROWS = 64  # queries of a tile of the map's kernels
TRACKED = 32, 96  # tokens with which saved bytes are counted


@dataclasses.dataclass(frozen=True)
class Model:
    """A Llama; ``tied``: embedding and head are one matrix."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        layer = attention + 3 * self.width * self.inner + 2 * self.width
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.width + self.width

    def config(self, layers: int) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=layers, vocab_size=64,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, tie_word_embeddings=True,
        )  # fmt: skip


TEACHER = Model("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256, tied=False)
STUDENT = Model("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128256, tied=True)


@dataclasses.dataclass(frozen=True)
class Text:
    """A text of ``tokens``, with the size of its map."""

    tokens: int
    steps: int
    words: int
    key_tokens: int

    @classmethod
    def of(cls, tokens: int, kind: str) -> Text:
        if kind == "words":
            return cls(tokens, 256, 3000, 3600)
        return cls(tokens, tokens // 16, tokens // 9, tokens // 8)

    @property
    def map_bytes(self) -> int:
        """One layer's map in float32."""
        return 4 * self.steps * self.words

    @property
    def scratch_bytes(self) -> int:
        """The partial sums of the map's forward on a GPU (`map_forward` in Triton), with one group of heads."""
        return 4 * (self.tokens // ROWS + self.steps) * self.key_tokens


def teacher(text: Text, model: Model = TEACHER) -> dict[str, float]:
    """Bytes of extraction: what is allocated at the same time in the last layer and when the maps are mixed."""
    token = 2 * (2 * model.width + 3 * model.inner)  # two residuals, gate, up and their product
    maps = 2 * model.layers * text.map_bytes  # each layer's, and all stacked
    scored = 2 * min(4 * SCORED_AT_ONCE, model.layers * text.map_bytes)
    return {
        "weights": 2 * model.parameters,
        "activations of a layer": text.tokens * token,
        "maps": maps,
        "map scratch": max(text.scratch_bytes, scored),
    }


def student(text: Text, saved: Saved, checkpointing: bool, model: Model = STUDENT) -> dict[str, float]:
    """Bytes of a training step with stored maps, where the backward begins."""
    state = 16 * model.parameters  # weight, gradient and AdamW's two moments in float32
    casts = 2 * model.parameters  # bfloat16 copies that autocast keeps during the forward
    per_token = saved.boundary * model.layers + saved.layer if checkpointing else saved.layer * model.layers
    head = 4 * text.tokens * model.width + 6 * LOGITS_AT_ONCE
    maps = 3 * model.layers * text.map_bytes  # each layer's, all stacked, and their gradient
    loss = 10 * text.map_bytes  # mixed, uniform and teacher's maps, masks, logarithms of both sides, gradients
    dk = 4 * model.kv_heads * text.key_tokens * model.head_dim
    return {
        "weights, gradients, AdamW": state,
        "autocast's copies": casts,
        "saved activations": text.tokens * per_token,
        "head": head,
        "maps": maps,
        "attention loss": loss,
        "map scratch": text.scratch_bytes + dk,
    }


@dataclasses.dataclass(frozen=True)
class Saved:
    """Bytes per token that autograd saves: of a layer, and of a checkpointed one."""

    layer: float
    boundary: float


def count_saved(model: Model = STUDENT) -> Saved:
    """Count the bytes per token and layer that the forward saves under bfloat16 autocast, parameters excluded."""
    found = {}
    for checkpointing in (False, True):
        counts = {
            (layers, tokens): _saved(model, layers, tokens, checkpointing) for layers in (1, 2) for tokens in TRACKED
        }
        small, large = TRACKED
        per_layer = [counts[2, tokens] - counts[1, tokens] for tokens in TRACKED]
        found[checkpointing] = (per_layer[1] - per_layer[0]) / (large - small)
    return Saved(found[False], found[True])


def _saved(model: Model, layers: int, tokens: int, checkpointing: bool) -> int:
    torch.manual_seed(0)
    made = LlamaForCausalLM(model.config(layers)).train()
    made.set_attn_implementation(NAME)
    if checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    own = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}
    shapes = {tuple(parameter.shape) for parameter in made.parameters()}
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_weight = tuple(tensor.shape) in shapes or tuple(tensor.shape[::-1]) in shapes  # autocast's copies, too
        if storage.data_ptr() not in own and not is_weight:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no address is used again
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        made.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(sizes.values())


def rows(lengths: list[int], kind: str, saved: Saved) -> list[dict[str, object]]:
    """One record per length and run, in GB."""
    found: list[dict[str, object]] = []
    for tokens in lengths:
        text = Text.of(tokens, kind)
        for run, parts in (
            ("teacher", teacher(text)),
            ("student", student(text, saved, checkpointing=False)),
            ("student, checkpointing", student(text, saved, checkpointing=True)),
        ):
            total = sum(parts.values())
            found.append({"tokens": tokens, "run": run} | {name: part / GB for name, part in parts.items()})
            found[-1]["total"] = total / GB
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536, 131072])
    parser.add_argument("--map", choices=["sentences", "words"], default="sentences")
    arguments = parser.parse_args()
    saved = count_saved()
    print(f"{STUDENT.name}: a layer saves {saved.layer:,.0f} bytes per token, a checkpointed one {saved.boundary:,.0f}")
    for row in rows(arguments.tokens, arguments.map, saved):
        parts = ", ".join(f"{name} {part:.1f}" for name, part in row.items() if isinstance(part, float))
        print(f"{row['tokens']:>8,} {row['run']:24s} {parts}")


if __name__ == "__main__":
    main()
