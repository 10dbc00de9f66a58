"""The tables of the performance pages, from the committed records in benchmarks/results."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from docs.generate.marked import table

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
Record = dict[str, str]
BOTH, FORWARD = "forward+backward", "forward"
PLAIN, NATIVE, SDPA, EAGER = "sdpa, CPU flash", "molsaki, native", "molsaki, sdpa", "eager with weights"
NATIVE_ALONE, PRODUCT = "molsaki's native attention", "matrix product of 2,048"
SHORT = {"sdpa, cuDNN": "cuDNN", "sdpa, aten flash": "aten flash", "flash-attn 4": "flash-attn 4"}
# Columns of the table of the H200: the contender of each, and the engine that it stands for.
H200 = {
    "`triton`": "molsaki, triton",
    "`flash_attn`": "molsaki, flash_attn",
    "`sdpa`, cuDNN": "molsaki, sdpa (cuDNN)",
    "`sdpa`, aten flash": "molsaki, sdpa",
    "eager with weights": EAGER,
}
WIDENED = ("molsaki, flash_attn, widened", "molsaki, sdpa (cuDNN), widened", "molsaki, sdpa, widened")
STORED, LIVE, DSS = "molsaki, stored maps", "molsaki, live teacher", "dss"


@functools.cache
def read(name: str) -> tuple[Record, ...]:
    """The records of a file, in order."""
    with (RESULTS / name).open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def latest(records: Iterable[Record]) -> dict[str, Record]:
    """The records of one shape, pass and mode by contender: of the commit that was measured last, the last of each.

    Raises:
        ValueError: they were not compared with the same plain attention, so they are not of one run.
    """
    found = [*records]
    last = {one["contender"]: one for one in found if one["commit"] == found[-1]["commit"]}
    if len({one["fastest_plain"] for one in last.values()}) > 1:
        raise ValueError(f"records of several runs: {sorted(last)} of {found[-1]['shape']}")
    return last


def layer(file: str, shape: str, of: str = BOTH, mode: str = "eager") -> dict[str, Record]:
    """The records of a layer by contender, or none."""
    found = [one for one in read(file) if (one["shape"], one["pass"], one["mode"]) == (shape, of, mode)]
    return latest(found) if found else {}


def tokens(record: Record) -> str:
    """Such as: 1 x 4,096."""
    return f"{record['batch']} x {int(record['tokens']):,}"


def ratio(records: dict[str, Record], contender: str, over: str = PLAIN) -> float | None:
    """The ratio of two medians, or None if the contender was not measured."""
    if contender not in records:
        return None
    return float(records[contender]["median_ms"]) / float(records[over]["median_ms"])


def paired(records: dict[str, Record], contender: str, over: str) -> float:
    """The ratio of two contenders by the median ratios of neighbouring calls, which other work disturbs less."""
    return float(records[contender]["over_plain"]) / float(records[over]["over_plain"])


def rounded(one: float | None, digits: int) -> str:
    """A number, or an empty cell."""
    return "" if one is None else f"{one:,.{digits}f}"


def cpu_shapes() -> list[str]:
    """The shapes of the CPU table: float32 and as many key heads as query heads, by length."""
    found = {one["shape"]: one for one in read("layer-xeon-2core.csv")}
    rows = [one for one in found.values() if one["dtype"] == "float32" and one["q_heads"] == one["kv_heads"]]
    return [one["shape"] for one in sorted(rows, key=lambda one: int(one["tokens"]))]


def cpu_layer() -> str:
    """One layer on a CPU."""
    rows = []
    for shape in cpu_shapes():
        both, forward = (layer("layer-xeon-2core.csv", shape, of) for of in (BOTH, FORWARD))
        one = both[NATIVE]
        rows.append([
            tokens(one), f"{one['words']}, {one['steps']}", rounded(ratio(both, NATIVE), 2),
            rounded(ratio(forward, NATIVE), 2), rounded(ratio(both, EAGER), 1), rounded(ratio(both, SDPA), 2),
            f"{float(both[PLAIN]['peak_mib']):.0f} / {float(one['peak_mib']):.0f}",
        ])  # fmt: skip
    head = ["batch x tokens", "key words, steps", "both passes over plain SDPA", "forward"]
    head += ["eager with weights, both passes", "engine `sdpa`, both passes", "peak MiB, plain SDPA / ours"]
    return table(head, rows)


def cpu_bf16() -> str:
    """One layer in bfloat16 on a CPU with AMX."""
    file, rows = "layer-xeon-2core-amx-bf16.csv", []
    for shape in {one["shape"]: one for one in read(file)}:
        row = []
        for records in (layer(file, shape, of) for of in (BOTH, FORWARD)):
            tflops = [float(records[name]["attention_tflops"]) for name in (NATIVE, PRODUCT)]
            row.append([
                rounded(paired(records, NATIVE, PLAIN), 2), rounded(paired(records, NATIVE, NATIVE_ALONE), 2),
                rounded(paired(records, EAGER, PLAIN), 1), f"{tflops[0] / tflops[1]:.2f} of {1e3 * tflops[1]:,.0f}",
            ])  # fmt: skip
        both, forward = row
        one = records[NATIVE]
        rows.append([
            tokens(one), f"{one['words']}, {one['steps']}", both[0], forward[0], both[1], forward[1], both[2], both[3],
        ])  # fmt: skip
    head = ["batch x tokens", "key words, steps", "both passes over plain SDPA", "forward"]
    head += ["map over no map, both passes", "forward"]
    head += ["eager with weights over plain SDPA, both passes", "share of the rate of products, GFLOP/s, both passes"]
    return table(head, rows)


def step(file: str, batch: str, dtype: str, contender: str, quantity: str) -> float:
    """A quantity of a training step, of its latest record."""
    wanted = (batch, dtype, contender, quantity)
    found = [
        one for one in read(file) if tuple(one[name] for name in ("batch", "dtype", "contender", "quantity")) == wanted
    ]
    return float(found[-1]["value"])


def batches(file: str, student: str) -> list[tuple[str, str]]:
    """The batches and dtypes that a student was trained with, shortest first."""
    found = {(one["batch"], one["dtype"]): int(one["tokens"]) for one in read(file) if one["student"] == student}
    return sorted(found, key=lambda key: (found[key], key[0], key[1] != "float32"))


def batch_name(batch: str, dtype: str, usual: str) -> str:
    """Such as: 1 x 1,024, bfloat16 autocast."""
    size, *kind = batch.split()
    number, length = size.split("x")
    names = [f"{number} x {int(length):,}", *kind]
    return ", ".join([*names, *([dtype.replace("bf16", "bfloat16")] if dtype != usual else [])])


def cpu_step() -> str:
    """A whole training step on a CPU."""
    file, share = "step-xeon-2core.csv", "share of eager's peak"
    rows = []
    for batch, dtype in batches(file, "student10"):
        of = functools.partial(step, file, batch, dtype)
        rows.append([
            batch_name(batch, dtype, "float32"), f"{of(STORED, 'time over dss'):.3f}",
            f"{of(STORED, 'times faster than eager'):.1f}", f"{of(STORED, share):.2f}",
            f"{of(STORED, f'{share}, with weights and optimizer'):.2f}", f"{of(LIVE, 'time over dss'):.2f}",
        ])  # fmt: skip
    head = ["batch", "stored maps over DSS", "eager over stored maps", "share of eager's peak memory of a step"]
    return table([*head, "with weights and optimizer", "live teacher over DSS"], rows)


def h200_shapes() -> list[tuple[str, str, str]]:
    """The shape, pass and mode of each row of the table of the H200, by length."""
    found = {(one["shape"], one["pass"], one["mode"]): int(one["tokens"]) for one in read("layer-h200.csv")}
    return sorted(found, key=lambda key: (found[key], key[1] == FORWARD, key[2] != "eager"))


def h200_name(record: Record) -> str:
    """Such as: 16 x 256, 9/3 heads of 64, 20 words."""
    q, kv, D, words = (record[name] for name in ("q_heads", "kv_heads", "head_dim", "words"))
    usual = (q, kv, D) == ("32", "32", "128")
    return f"{tokens(record)}, {int(words):,}" if usual else f"{tokens(record)}, {q}/{kv} heads of {D}, {words} words"


def fastest(records: dict[str, Record]) -> tuple[Record, str]:
    """The fastest plain attention, and its time with its name."""
    one = records[next(iter(records.values()))["fastest_plain"]]
    ms = float(one["median_ms"])
    return one, f"{ms:.{2 if ms > 2 else 3}f} ({SHORT[one['contender']]})"


def over_plain(records: dict[str, Record], contender: str) -> float | None:
    """The recorded ratio to the fastest plain attention: the median of those of neighbouring calls."""
    return float(records[contender]["over_plain"]) if contender in records else None


def h200_layer() -> str:
    """One layer on an H200, all engines."""
    rows = []
    for shape, of, mode in h200_shapes():
        found = layer("layer-h200.csv", shape, of, mode)
        one = found["molsaki, triton"]
        old = " *" if one["commit"] != read("layer-h200.csv")[-1]["commit"] else ""
        cells = [rounded(over_plain(found, name), 1 if name == EAGER else 2) for name in H200.values()]
        passes = "both" if of == BOTH else of
        rows.append([h200_name(one) + old, passes, mode, fastest(found)[1], f"{float(one['target']):.2f}", *cells])
    return table(["batch x tokens, words", "passes", "mode", "fastest plain, ms", "target", *H200], rows)


# The rows of the short table: the mode that says most about a shape.
SHORT_ROWS = (
    ("16x256 H9/3 D64 W20 bfloat16", "graph"),
    ("2x2048 H32/32 D128 W64 bfloat16", "eager"),
    ("1x4096 H32/32 D128 W256 bfloat16", "eager"),
    ("1x16384 H32/32 D128 W1024 bfloat16", "eager"),
)


def h200_short() -> str:
    """One layer on an H200, the fastest engine."""
    rows = []
    for shape, mode in SHORT_ROWS:
        found = layer("layer-h200.csv", shape, BOTH, mode)
        engines = {column: over_plain(found, name) for column, name in H200.items() if name != EAGER}
        best, least = min(((c, r) for c, r in engines.items() if r is not None), key=lambda pair: pair[1])
        one = found["molsaki, triton"]
        cells = [f"{float(one['target']):.2f}", f"{least:.2f} ({best})", rounded(over_plain(found, EAGER), 1)]
        rows.append([h200_name(one), mode, fastest(found)[1], *cells])
    head = ["batch x tokens, words", "mode", "fastest plain, ms", "target", "our best engine", "eager with weights"]
    return table(head, rows)


def h200_memory() -> str:
    """Peak memory of one layer on an H200."""
    rows = []
    for shape, of, mode in h200_shapes():
        if (of, mode) != (BOTH, "eager"):
            continue
        found = layer("layer-h200.csv", shape, of, mode)
        widened = next(name for name in ("molsaki, sdpa (cuDNN), widened", *WIDENED) if name in found)
        names = ["molsaki, triton", "molsaki, flash_attn", "molsaki, sdpa (cuDNN)", widened, EAGER]
        cells = [f"{float(found[name]['peak_mib']):,.0f}" if name in found else "" for name in names]
        rows.append([h200_name(found["molsaki, triton"]), f"{float(fastest(found)[0]['peak_mib']):.0f}", *cells])
    head = ["batch x tokens, words", "plain", "`triton`", "`flash_attn`", "`sdpa`", "widened values"]
    return table([*head, "eager with weights"], rows)


# And their names in predictions: dlse is folded into O and dO here, and dq added to the attention's.
MAP_KERNELS = {"map_partials": "map_partials", "map_reduce": "map_reduce", "map_dlse": "map_fold"}
MAP_KERNELS |= {"map_dq": "map_dq_add", "map_dk": "map_dk", "map_dk_add": "map_dk_add"}


def h200_kernels() -> str:
    """The map's kernels beside cuDNN, before and after the tiles were chosen on the GPU, and predictions."""
    from benchmarks import predict  # which imports Triton

    long, short = SHORT_ROWS[2][0], SHORT_ROWS[0][0]

    def times(shape: str, commit: str) -> dict[str, Record]:
        wanted = (shape, "molsaki, sdpa (cuDNN)", commit)
        found = [one for one in read("kernels-h200.csv") if (one["shape"], one["contender"], one["commit"]) == wanted]
        return {one["kernel"].removesuffix("_kernel"): one for one in found}

    def predictions(shape: str, timed: bool) -> dict[str, float]:
        gpu = predict.GPUS["H200"]
        (wanted,) = (one for one, _ in predict.AIMS if one.name == shape)
        kernels = predict.Work(wanted, gpu, timed=timed).engine(False).kernels(True)
        return {k.name: k.seconds(gpu) * 1e6 for k in kernels}

    before = times(long, "b103b36")
    after = [(times(s, "dd1fa4c"), predictions(s, True), predictions(s, False)) for s in (long, short)]
    rows = []
    for name, predicted_name in MAP_KERNELS.items():
        cells = [f"`{name}`", f"{float(before[name]['us']):.1f}"]
        for found, predicted, now in after:
            us, of = float(found[name]["us"]), predicted[predicted_name]
            cells += [f"{us:.1f}", f"{of:.1f}", f"{us / of:.2f}", f"{now[predicted_name]:.1f}"]
        rows.append(cells)
    head = ["kernel", "1 x 4,096: before", "after", "predicted", "after / predicted", "now, predicted"]
    return table([*head, "16 x 256: after", "predicted", "ratio", "now, predicted"], rows)


def h200_step() -> str:
    """A whole training step on an H200."""
    file, share = "step-h200.csv", "share of eager's peak"
    rows = []
    for batch, dtype in batches(file, "smollm2-135m"):
        of = functools.partial(step, file, batch, dtype)
        rows.append([
            batch_name(batch, dtype, dtype), *(f"{1000 * of(who, 'seconds'):.0f} ms" for who in (DSS, STORED, "eager")),
            f"{of(STORED, 'time over dss'):.2f}", f"{of(STORED, 'times faster than eager'):.1f}",
            f"{of(STORED, share):.2f}", f"{of(STORED, f'{share}, with weights and optimizer'):.2f}",
        ])  # fmt: skip
    head = ["batch", "DSS", "with stored maps", "two eager models", "maps over DSS (target 1.10)"]
    head += ["times faster than eager (target 3)", "share of eager's peak memory (target 0.33)"]
    return table([*head, "with weights and optimizer"], rows)


def summary() -> str:
    """The speed of a layer in one sentence."""
    cpu = [ratio(layer("layer-xeon-2core.csv", shape), NATIVE) for shape in cpu_shapes()]
    gpu = []
    for shape, of, mode in h200_shapes():
        found = layer("layer-h200.csv", shape, of, mode)
        engines = [over_plain(found, name) for name in H200.values() if name != EAGER]
        gpu += [min(one for one in engines if one is not None)] if of == BOTH else []
    low, high = (f"{pick(one for one in cpu if one is not None):.2f}" for pick in (min, max))
    return (
        f"[Performance](performance.md), forward and backward: one layer with its map takes {low} to {high} of the "
        "time of PyTorch's attention without one on a CPU (float32, AVX-512), and with the fastest engine "
        f"{min(gpu):.2f} to {max(gpu):.2f} of the time of the fastest attention without one on an H200."
    )


PARTS: dict[str, Callable[[], str]] = {
    "speed in one sentence": summary,
    "a layer on a CPU": cpu_layer,
    "a layer in bfloat16 with AMX": cpu_bf16,
    "a step on a CPU": cpu_step,
    "a layer on an H200, short": h200_short,
    "a layer on an H200": h200_layer,
    "memory on an H200": h200_memory,
    "kernels on an H200": h200_kernels,
    "a step on an H200": h200_step,
}
