"""The dry run of ``extract``."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from molsaki.config import ExtractConfig
from molsaki.dry_run.counts import Counts, Found, count_examples
from molsaki.dry_run.timing import chosen_batches, memory_of, timed
from molsaki.measuring import bytes_of
from molsaki.store.map_store import DESCRIPTION, Store, compare, shard_name
from molsaki.store.map_store_writer import StoreWriter
from molsaki.teacher.extract import batches_of, entries_of, mixed_maps, prepare_extraction


def dry_run_extract(config: ExtractConfig) -> Found:
    """What ``molsaki extract`` would do."""
    start = time.perf_counter()
    job = prepare_extraction(config)
    job.check_templates()
    loading = time.perf_counter() - start
    folder = Path(job.folder)
    with contextlib.suppress(FileNotFoundError):
        existing = json.loads((folder / DESCRIPTION).read_bytes())
        size = {name: existing[name] for name in ("version", "examples", "shard_size") if name in existing}
        compare(folder, existing, json.loads(json.dumps(size | {"examples": len(job.examples)} | job.description)))
    shards = [
        range(first, min(first + job.shard_size, len(job.examples)))
        for first in range(0, len(job.examples), job.shard_size)
    ]
    finished = [number for number in range(len(shards)) if (folder / shard_name(number)).is_file()]
    counts, texts_per_batch, start = Counts(), [], time.perf_counter()
    missing_tokens = 0
    for number, shard in enumerate(shards):
        for pending, _ in batches_of(job.examples, shard, config, job.specs, job.packing):
            for item in pending:
                if item.text is None:
                    counts.leave_out(item.entry.reason)
                else:
                    counts.add(item.steps, item.words, item.tokens)
            tokens = sum(item.tokens for item in pending)
            if tokens:
                texts_per_batch.append(([item.number for item in pending], tokens))
            if number not in finished:
                missing_tokens += tokens
    counts.need_some()
    tokenizing = time.perf_counter() - start

    def run(numbers: Sequence[int]) -> Found:
        for _, texts in batches_of(job.examples, numbers, config, job.specs, job.packing):
            if texts is not None:
                mixed_maps(job.teacher, job.mixture, texts, config.map_heads)
        return {}

    probe = timed(run, texts_per_batch, job.teacher.device)
    some = list(dict.fromkeys(n for numbers, _ in chosen_batches(texts_per_batch)[1:] for n in numbers))[:64]
    with tempfile.TemporaryDirectory() as part:
        writer = StoreWriter(part, job.description, len(some), len(some))
        entries: Found = {}
        for found, _ in entries_of(job.examples, some, config, job.specs, job.teacher, job.mixture, job.packing):
            entries |= cast(Any, found)
        writer.write(0, [entries[cast(Any, number)] for number in some])
        writer.finish()
        shapes = [one.maps.shape for one in entries.values() if one.maps is not None]
        maps = sum(shape[-2] * shape[-1] for shape in shapes) * job.entry_bytes
        overhead = max(Store(part).num_bytes - maps, 0) / len(some)
    size = counts.entries * job.entry_bytes + len(job.examples) * overhead
    seconds = missing_tokens / probe.rate + tokenizing
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "examples": count_examples(job.examples, counts),
        "per_example": counts.summary(),
        "work": {
            "shards": len(shards),
            "shards_finished": len(finished),
            "forward_passes": len(texts_per_batch),
            "tokens": missing_tokens,
        },
        "store": {"folder": job.folder, "bytes": round(size), "bytes_per_example": round(size / len(job.examples))},
        "memory": memory_of(job.teacher.device, {"teacher": bytes_of(job.teacher)}),
        "time": {
            "seconds": loading + seconds / world,
            "of_which_loading": loading,
            "of_which_tokenizing": tokenizing / world,
            "measured": probe.how("forward passes") + (f"; divided by {world} processes" if world > 1 else ""),
        },
    }
