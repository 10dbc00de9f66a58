"""Random models and word problems for the examples, without downloads.

The models are too small to reason: they show that an example runs and what it prints. Every example takes the names of
    real models on its command line. To write the folder that the training loops of `examples/training_loops` read:

    python examples/tiny_models.py FOLDER       # FOLDER/student, FOLDER/teacher, FOLDER/train.jsonl and more
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def arguments(doc: str | None, *names: str) -> list[str]:
    """The values of the options --NAME of an example, in this order; missing ones default to tiny models.

    Tiny models and data, and results without a given folder, are written to a new temporary folder.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        parser.add_argument(f"--{name}")
    given = vars(parser.parse_args())
    folder = Path(tempfile.mkdtemp(prefix="molsaki-example-"))
    write(folder)
    defaults = {
        "model": str(folder / "teacher"),
        "train_file": str(folder / "train.jsonl"),
        "learning_rate": "1e-4" if given.get("student") else "3e-3",  # the latter is too large for real models
    }
    return [given[name] or defaults.get(name, str(folder / name)) for name in names]


def write(folder: Path) -> None:
    """Write a teacher, a student, which have one tokenizer, a teacher with another one, and sixteen word problems."""
    write_model(folder / "teacher", layers=3)
    write_model(folder / "student", layers=2)
    write_model(folder / "other_teacher", layers=3, merges=60)
    lines = [json.dumps(row) + "\n" for row in problems(16)]
    (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")


def write_model(folder: Path, *, layers: int, merges: int = 0) -> None:
    """Write a random Llama and a byte-level tokenizer; ``merges`` above 0 gives the latter longer tokens."""
    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), ["<|pad|>", "<|end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    size = len(special) + len(alphabet) + merges
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([f"{row['question']} {row['rationale']}" for row in problems(16)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], eos_token=special[1])

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(layers)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() > 1:  # larger than transformers' own, so that attention is not uniform
            parameter.data.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def problems(count: int) -> list[dict[str, str]]:
    """Word problems with a rationale of two sentences."""
    rows = []
    for i in range(count):
        a, b, c = 3 + i % 7, 2 + i % 5, 1 + i % 3
        question = f"Ann has {a} bags of {b} nuts. She eats {c}. How many nuts are left?"
        rationale = f"There are {a} * {b} = {a * b} nuts. After eating, {a * b} - {c} = {a * b - c} are left."
        rows.append({"question": question, "rationale": rationale, "answer": str(a * b - c)})
    return rows


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
