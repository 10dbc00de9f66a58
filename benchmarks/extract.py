"""Extraction of a data set's maps against a plain forward without logits of the same texts in the same batches.

    python -m benchmarks.extract --model FOLDER --data FILE [--examples 200] [--batch_tokens 8192] [--rounds 5]
                                 [--threads N] [--dtype float32] [--device cpu|cuda] [--csv FILE]

What is measured, each over all the texts, round after round:

- ``extract``: all that `molsaki extract` does between the first text and the last map: cutting and tokenizing, the
  forward with maps, the mixture; the texts packed into rows without padding;
- ``plain, packed``: the decoder's forward alone, of the same rows, by the same attention without maps;
- ``extract, padded``, and ``plain``: the texts padded to a like length; the latter is transformers' own SDPA.

Tokens are counted without padding. On a machine that others use too, processor time in one thread says more than
seconds: the quantities that are called so, with ``--threads 1``.
"""

from __future__ import annotations

import argparse
import collections
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from molsaki.batches.tokenized import TokenizerSpec
from molsaki.config import ExtractConfig
from molsaki.modeling.attention_hook import NAME
from molsaki.modeling.loading import context_length, load_model, load_tokenizer
from molsaki.modeling.packing_probe import can_pack
from molsaki.teacher.extract import entries_of, mixture_of, probe, tasks_of
from molsaki.text.examples import read_examples

from .layer import describe, write_csv
from .measure import ratio

BASE = "plain"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the teacher and its tokenizer")
    parser.add_argument("--data", required=True, help="JSON lines file with question and rationale")
    parser.add_argument("--examples", type=int, default=200, help="use the first so many")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="tokens in one forward, padding included")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed, after one call each")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="write the rows here, after those that are there")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = list(csv.DictReader(arguments.csv.open())) if arguments.csv and arguments.csv.exists() else []
    rows += measured(arguments, describe(torch.device(arguments.device)))
    if arguments.csv:
        write_csv(arguments.csv, rows)


def contenders(arguments: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], int, int]:
    """What is timed, by name; how many texts that is and how many tokens."""
    device = torch.device(arguments.device)
    config = ExtractConfig(batch_tokens=arguments.batch_tokens)
    teacher = load_model(arguments.model, "--model", arguments.dtype).to(device).eval()
    teacher.set_attn_implementation(NAME)
    sides = [TokenizerSpec(load_tokenizer(arguments.model, "--model"), "plain", context_length(teacher.config))]
    examples = read_examples(arguments.data, rationale=False)[: arguments.examples]
    depth, _ = probe(teacher.base_model)
    mixture = mixture_of(config, depth, 1, 1)

    def extraction(packing: bool) -> Callable[[], object]:
        return lambda: collections.deque(
            entries_of(examples, range(len(examples)), config, sides, teacher, mixture, packing), maxlen=0
        )

    def plain(packing: bool, attention: str) -> Callable[[], object]:
        batches = tasks_of(examples, range(len(examples)), config, sides, packing)
        inputs = [task.to(device).model_inputs() for _, task in batches if task is not None]

        @torch.no_grad()
        def run() -> list[Tensor]:
            teacher.set_attn_implementation(attention)
            out = [teacher.base_model(**batch)[0][..., -1, 0].cpu() for batch in inputs]
            teacher.set_attn_implementation(NAME)
            return out

        return run

    found = {BASE: plain(False, "sdpa"), "extract, padded": extraction(False)}
    if can_pack(teacher):
        found |= {"plain, packed": plain(True, NAME), "extract": extraction(True)}
    texts = [
        item.tokens for batch, _ in tasks_of(examples, range(len(examples)), config, sides, False) for item in batch
    ]
    return found, sum(count > 0 for count in texts), sum(texts)


def measured(arguments: argparse.Namespace, machine: dict) -> list[dict]:
    """The rows: contender, quantity and value each."""
    runs, texts, tokens = contenders(arguments)
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            begin, used = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - used)
    common = {
        "teacher": Path(arguments.model).name,
        "data": Path(arguments.data).name,
        "texts": texts,
        "tokens": tokens,
        "batch_tokens": arguments.batch_tokens,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
    }
    rows = []
    for name in runs:
        values = {
            "tokens a second": tokens / statistics.median(seconds[name]),
            "tokens a processor second": tokens / statistics.median(processor[name]),
        }
        for base in {"extract": (BASE, "plain, packed"), "extract, padded": (BASE,), "plain, packed": (BASE,)}.get(
            name, ()
        ):
            values[f"time over {base}"] = ratio(seconds[name], seconds[base])
            values[f"processor time over {base}"] = ratio(processor[name], processor[base])
        for quantity, value in values.items():
            value = float(f"{value:.5g}")
            rows.append(common | {"contender": name, "quantity": quantity, "value": value} | machine)
            print(f"{name:16s} {quantity:40s} {value:10.4f}")
    return rows


if __name__ == "__main__":
    main()
