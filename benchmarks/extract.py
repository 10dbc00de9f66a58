"""Measures the extraction of a data set's maps against a forward without maps of the same texts in the same batches.

    python -m benchmarks.extract --model FOLDER --data FILE [--examples 200] [--batch_tokens 8192] [--rounds 5]
                                 [--threads N] [--dtype float32] [--device cpu|cuda] [--csv FILE]

Each contender processes all the texts, in turns:

- ``extract``: everything that `molsaki extract` does between the first text and the last map: segmenting and
  tokenizing, the forward with maps, the mixture; the texts are packed without padding;
- ``plain, packed``: only the decoder's forward of the same packed texts, with the same attention but no maps;
- ``extract, padded`` and ``plain``: the texts are padded to similar lengths; the latter uses transformers' SDPA.

Tokens are counted without padding. On a busy machine, compare the quantities of processor time, with ``--threads 1``.
"""

from __future__ import annotations

import argparse
import collections
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
from molsaki.teacher.extract import batches_of, entries_of
from molsaki.teacher.teacher_maps import mixture_of, probe
from molsaki.text.examples import read_examples

from .layer import describe, read_records, write_csv
from .measure import ratio

BASE = "plain"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the teacher and its tokenizer")
    parser.add_argument("--data", required=True, help="JSON lines file with question and rationale")
    parser.add_argument("--examples", type=int, default=200, help="use that many from the start")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="tokens per forward, padding included")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls per contender, after one warm-up call")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="append the records to this file")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    records = read_records(arguments.csv)
    records += measured(arguments, describe(torch.device(arguments.device)))
    if arguments.csv:
        write_csv(arguments.csv, records)


def contenders(arguments: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], int, int]:
    """Return the functions to time by name, the number of texts and the number of tokens."""
    device = torch.device(arguments.device)
    config = ExtractConfig(batch_tokens=arguments.batch_tokens)
    teacher = load_model(arguments.model, "--model", arguments.dtype).to(device).eval()
    teacher.set_attn_implementation(NAME)
    specs = [TokenizerSpec(load_tokenizer(arguments.model, "--model"), "plain", context_length(teacher.config))]
    examples = read_examples(arguments.data, rationale=False)[: arguments.examples]
    depth, layers, _ = probe(teacher.base_model)
    mixture = mixture_of(config, depth, 1, layers, 1)

    def extraction(packing: bool) -> Callable[[], object]:
        return lambda: collections.deque(
            entries_of(examples, range(len(examples)), config, specs, teacher, mixture, packing), maxlen=0
        )

    def without_maps(packing: bool, attention: str) -> Callable[[], object]:
        batches = batches_of(examples, range(len(examples)), config, specs, packing)
        inputs = [texts.to(device).model_inputs() for _, texts in batches if texts is not None]

        @torch.no_grad()
        def run() -> list[Tensor]:
            teacher.set_attn_implementation(attention)
            out = [teacher.base_model(**batch)[0][..., -1, 0].cpu() for batch in inputs]
            teacher.set_attn_implementation(NAME)
            return out

        return run

    found = {BASE: without_maps(False, "sdpa"), "extract, padded": extraction(False)}
    if can_pack(teacher):
        found |= {"plain, packed": without_maps(True, NAME), "extract": extraction(True)}
    batches = batches_of(examples, range(len(examples)), config, specs, False)
    lengths = [item.tokens for pending, _ in batches for item in pending]
    return found, sum(length > 0 for length in lengths), sum(lengths)


def measured(arguments: argparse.Namespace, machine: dict) -> list[dict]:
    """Time every contender; return records of contender, quantity and value."""
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
    records = []
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
            records.append(common | {"contender": name, "quantity": quantity, "value": value} | machine)
            print(f"{name:16s} {quantity:40s} {value:10.4f}")
    return records


if __name__ == "__main__":
    main()
