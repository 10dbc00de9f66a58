"""Tiny random models, tokenizers, word problems and plans, built offline, for tests that take seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from molsaki_kernels import StepPlan

SPECIAL = ["<|pad|>", "<|end|>"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads make models this small slower, most of all if several tests run on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenizer(merges: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; ``merges`` above 0 learns that many on the word problems, so two differ."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + len(alphabet) + merges, special_tokens=SPECIAL, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([row["question"] + " " + row["rationale"] for row in problems(32)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[1])


def model(layers: int = 2, vocab: int = 258, seed: int = 0, **options) -> LlamaForCausalLM:
    """A random Llama, 32 wide, with 4 query and 2 KV heads of 8, sharp enough that its attention differs by layer."""
    options = dict(tie_word_embeddings=True, max_position_embeddings=512) | options
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None, **options,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)  # the same weights under every version of transformers
    for _, parameter in sorted(made.named_parameters()):
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    return made


def problems(count: int) -> list[dict]:
    """Word problems with a rationale of two steps, as the objects of a JSON lines file."""
    rows = []
    for i in range(count):
        a, b, c = 3 + i % 7, 2 + i % 5, 1 + i % 3
        rows.append(
            {
                "id": f"p{i}",
                "question": f"Ann has {a} bags of {b} nuts. She eats {c}. How many nuts are left?",
                "rationale": f"There are {a} * {b} = {a * b} nuts. After eating, {a * b} - {c} = {a * b - c} are left.",
                "answer": str(a * b - c),
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save(folder: Path, layers: int, tok: PreTrainedTokenizerFast | None = None, seed: int = 0, **options) -> Path:
    """A model and its tokenizer in a Hugging Face folder."""
    tok = tok or tokenizer()
    model(layers, len(tok), seed, **options).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def plan_of(*shapes: tuple[int, int]) -> StepPlan:
    """A plan of sequences with these numbers of steps and words."""
    return StepPlan.from_spans(
        [[(2 * s, 2 * s + 2) for s in range(S)] for S, _ in shapes], [[[w] for w in range(W)] for _, W in shapes]
    )
