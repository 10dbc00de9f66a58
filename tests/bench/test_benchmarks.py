"""Tests the benchmarks without a GPU: grid, resuming, ratios, predictions, pictures, the table of engine selection."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import molsaki_kernels as mk
from benchmarks import auto_table, layer, measure, plots, predict, roofline, tile_sweep
from benchmarks.contenders import Contender, contenders, step, with_lse
from benchmarks.shapes import CPU, HEADS, KEY_TOKENS, LENGTHS, Shape, cuda_grid
from molsaki_kernels import aot, engine_selection
from molsaki_kernels.attention import ENGINES
from molsaki_kernels.spec import AttentionOptions, AttentionRequest

RESULTS = Path(predict.__file__).parent / "results"
CPU_DEVICE = torch.device("cpu")
SMALL = Shape(2, 48, 5, 3, 4, 2, 16)
MACHINE = {
    "device": "NVIDIA H200, invented",
    "arch": "sm90",
    "driver": "1.2",
    "torch": "9.9",
    "triton": "3.9",
    "cudnn": "9",
    "python": "3.11",
    "commit": "abc1234",
    "date": "2026-01-01",
}


def invented_records(shapes: list[Shape], seed: int = 0) -> list[dict]:
    """Return records in the form of a GPU measurement, sampled around the predictions."""
    rng, records = random.Random(seed), []
    names = {
        "sdpa, cuDNN": "plain",
        "sdpa, aten flash": "plain",
        "molsaki, sdpa": "map",
        "molsaki, triton": "map",
        "the map alone": "map alone",
        "eager with weights": "eager",
    }
    for shape in shapes:
        for backward in (False, True):
            for mode in layer.modes(shape, torch.device("cuda")):
                for name, kind in names.items():
                    seconds, _ = layer.prediction(shape, MACHINE["device"], name, kind, backward)
                    times = [seconds * rng.uniform(1.0, 1.2) * (1.4 if name == "sdpa, aten flash" else 1.0)] * 3
                    plain = [layer.prediction(shape, MACHINE["device"], name, "plain", backward)[0]] * 3
                    contender = Contender(name, kind, lambda inputs: inputs.q)
                    fastest = ("sdpa, cuDNN", plain)
                    timing = layer.timing(shape, backward, mode, contender, times, fastest, MACHINE["device"])
                    memory = {"launches": 7, "peak_mib": shape.set_bytes() / 2**20 * rng.uniform(1.5, 2)}
                    records.append({**timing, **memory, **MACHINE})
    return records


def test_the_grid_is_complete_and_ordered():
    grid = cuda_grid()
    assert len({shape.name for shape in grid}) == len(grid)
    for q_heads, kv_heads, head_dim in HEADS:
        for batch, tokens in LENGTHS:
            size = (batch, tokens, q_heads, kv_heads, head_dim)
            words = [s.words for s in grid if (s.batch, s.tokens, s.q_heads, s.kv_heads, s.head_dim) == size]
            expected = [4096] if tokens == 131072 else [w for w in KEY_TOKENS if w <= tokens]
            assert sorted(words) == expected, (batch, tokens)
    assert {(s.batch, s.tokens, s.words) for s in grid[:3]} == {(16, 256, 13), (16, 256, 20), (16, 256, 40)}
    assert [s.tier for s in grid] == sorted(s.tier for s in grid)
    assert all(s.target for s in grid if s.tier == 0)


def test_traffic_is_that_of_the_tensors():
    """Count the bytes of the tensors that one call takes and returns."""
    inputs = with_lse(SMALL.inputs(CPU_DEVICE))
    out, maps = mk.stepwise_attention(*inputs[:3], inputs.plan, engine="sdpa")
    forward = sum(t.nbytes for t in (*inputs[:3], inputs.lse, out, maps))
    assert SMALL.traffic(False) == forward
    backward = sum(t.nbytes for t in (inputs.dout, *inputs[:3]))  # dout in; dq, dk, dv out
    assert SMALL.traffic(True) == 2 * forward + backward + inputs.dmaps.nbytes - maps.nbytes
    assert SMALL.set_bytes() == sum(t.nbytes for t in inputs[:4])


@pytest.mark.parametrize("cache", [0, 1, 1 << 20, 50 << 20])
def test_sets_of_inputs_exceed_the_cache(cache):
    sets = SMALL.sets(cache)
    assert sets == 1 if cache <= 1 else sets == 64 or sets * SMALL.set_bytes() >= 2 * cache
    assert Shape(1, 131072, 16, 5, 32, 32, 128, "bfloat16").sets(60 << 20) == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("contender", contenders(CPU_DEVICE, SMALL), ids=lambda c: c.name)
def test_contenders_agree(contender, compiled):
    """Every contender computes the results and gradients of the oracle."""
    if compiled:
        if contender.kind not in ("plain", "map"):
            pytest.skip("not measured through torch.compile")
        contender = layer.compiled(contender, "aot_eager")
    inputs = with_lse(SMALL.inputs(CPU_DEVICE))
    result, none = step(contender, inputs, False)
    assert none is None
    again, grads = step(contender, inputs, True)
    if contender.kind == "map alone":
        maps = mk.reference.stepwise_map(inputs.q, inputs.k, inputs.lse, inputs.plan)
        expected = (maps, *torch.autograd.grad(maps, (inputs.q, inputs.k, inputs.lse), inputs.dmaps))
    else:
        results = mk.reference.stepwise_attention(*inputs[:3], inputs.plan)[: 1 if contender.kind == "plain" else 2]
        expected = (*results, *torch.autograd.grad(results, inputs[:3], (inputs.dout, inputs.dmaps)[: len(results)]))
    tuples = [x if isinstance(x, tuple) else (x,) for x in (result, again)]
    for found in ((*tuples[0], *grads), (*tuples[1], *grads)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_medians_of_neighbours():
    assert measure.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0
    assert measure.rounds_in(1.0, 0.01) == 100 and measure.rounds_in(1.0, 1e-9) == measure.MAX_ROUNDS
    assert measure.rounds_in(1.0, 0.9) == measure.MIN_ROUNDS and measure.rounds_in(1.0, 5.0) == 3


def test_times_are_of_one_call():
    """The functions make several calls each, in turns."""
    called = []
    functions = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    times = measure.interleaved(functions, CPU_DEVICE, 1e-9, calls=4)
    one = measure.interleaved({"a": lambda: sum(range(20000))}, CPU_DEVICE, 1e-9, calls=1)["a"]
    four = measure.interleaved({"a": lambda: [sum(range(20000)) for _ in range(4)]}, CPU_DEVICE, 1e-9, calls=4)["a"]
    assert {len(t) for t in times.values()} == {3} and called[-6:] == ["a", "b"] * 3
    assert min(four) < 2 * min(one)


def test_launches_are_the_events_on_the_device():
    kinds = torch.autograd.DeviceType
    events = [(kinds.CUDA, False), (kinds.CPU, False), (kinds.CUDA, True), (kinds.CUDA, False)]
    assert measure.count_launches(SimpleNamespace(device_type=d, is_user_annotation=u) for d, u in events) == 2
    assert measure.launches(lambda: torch.ones(2).sum(), CPU_DEVICE) is None
    profile = measure.profiled(lambda: torch.ones(2).sum(), CPU_DEVICE)
    assert measure.count_launches(profile.events()) == 0 and any(e.name == "aten::sum" for e in profile.events())


def run_layer(monkeypatch, folder, *more: str) -> int:
    monkeypatch.setattr(layer, "CPU", [SMALL])
    monkeypatch.setattr(layer, "CPU_MORE", [dataclasses.replace(SMALL, tokens=64)])
    files = ["--csv", str(folder / "layer.csv"), "--json", str(folder / "layer.json")]
    return layer.main(["--device", "cpu", "--seconds", "0.01", *files, *more])


def test_a_second_call_completes_the_grid(monkeypatch, tmp_path, capsys):
    """The first call's limit allows one shape and pass; a second call without a limit measures only the others."""
    seconds = iter([0.0, 1e9])
    monkeypatch.setattr(layer, "expected_seconds", lambda *_: next(seconds))
    assert run_layer(monkeypatch, tmp_path, "--limit", "60") == 0
    assert "3 of 4 left" in capsys.readouterr().out
    first = layer.read_records(tmp_path / "layer.csv")
    assert {(record["tokens"], record["pass"]) for record in first} == {(48, "forward+backward")}
    monkeypatch.setattr(layer, "expected_seconds", lambda *_: 0.0)
    assert run_layer(monkeypatch, tmp_path) == 0
    records = layer.read_records(tmp_path / "layer.csv")
    assert records[: len(first)] == first and len(records) == 4 * len(first)
    assert json.loads((tmp_path / "layer.json").read_text()) == records
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(layer, "measured", lambda *_: pytest.fail("measured again"))
    assert run_layer(monkeypatch, tmp_path) == 0


def test_shapes_of_another_commit_are_measured_again():
    records = [{"shape": "s", "pass": "forward", **MACHINE}]
    assert layer.measured_already(records, MACHINE) == {("s", "forward")}
    for key in ("device", "commit", "torch"):
        assert not layer.measured_already(records, {**MACHINE, key: "other"})


def test_a_failure_of_our_code_sets_the_exit_status(monkeypatch, tmp_path, capsys):
    """The other contenders are still measured, and an engine that refuses a call is not a failure."""

    def broken(error):
        def run(_):
            raise error

        def some(device, shape):
            found = {c.kind: c for c in contenders(device, shape)}
            return [found["plain"], dataclasses.replace(found["map"], run=run)]

        return some

    monkeypatch.setattr(layer, "contenders", broken(RuntimeError("no kernel image")))
    assert run_layer(monkeypatch, tmp_path) == 1 and "no kernel image" in capsys.readouterr().err
    assert {record["kind"] for record in layer.read_records(tmp_path / "layer.csv")} == {"plain", "product"}
    (tmp_path / "layer.csv").unlink()
    monkeypatch.setattr(layer, "contenders", broken(ValueError('engine: "sdpa" cannot do it')))
    assert run_layer(monkeypatch, tmp_path) == 0


def test_modes_graph_and_compile(monkeypatch):
    """Ratios are to the fastest plain attention of the same mode; a contender that cannot be captured is reported."""
    shape = dataclasses.replace(SMALL, dtype="bfloat16")  # predict.py knows no float32
    captured, everything = [], contenders(CPU_DEVICE, shape)
    first_map = [c.kind for c in everything].index("map")

    def capture(calls):
        captured.append(len(calls))
        if len(captured) == first_map + 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: [call() for call in calls]

    machinery = layer.compiled
    monkeypatch.setattr(layer, "modes", lambda *_: ["eager", "graph", "compile"])
    monkeypatch.setattr(layer, "captured", capture)
    monkeypatch.setattr(layer, "compiled", lambda contender: machinery(contender, "aot_eager"))
    failed = []
    records = layer.measured(shape, CPU_DEVICE, True, 0.01, MACHINE, failed)
    kinds = {mode: [r["kind"] for r in records if r["mode"] == mode] for mode in ("eager", "graph", "compile")}
    without_it = [c.kind for i, c in enumerate(everything) if i != first_map]
    compiled = [c.kind for c in everything if c.kind in ("plain", "map")]
    assert kinds == {"eager": [c.kind for c in everything], "graph": without_it, "compile": compiled}
    assert len(failed) == 1 and f"{everything[first_map].name} (graph) cannot" in failed[0]
    for mode in kinds:
        plain = [r for r in records if r["kind"] == "plain" and r["mode"] == mode]
        assert min(plain, key=lambda r: r["median_ms"])["over_plain"] == 1.0
    over = {(r["mode"], r["kind"]): r["predicted_over_plain"] for r in records}
    assert over["eager", "plain"] == 1.0 and over["compile", "map"] == over["eager", "map"] > 1


def test_traces(monkeypatch, tmp_path):
    assert run_layer(monkeypatch, tmp_path, "--only", "48", "--profile", str(tmp_path / "traces")) == 0
    tables = {path.stem: path.read_text() for path in (tmp_path / "traces").glob("*.txt")}
    ours = next(name for name in tables if "backward-molsaki-sdpa" in name)
    assert "_AttentionBackward" in tables[ours]
    assert json.loads((tmp_path / "traces" / f"{ours}.json").read_text())["traceEvents"]


def test_expected_time_adds_up():
    grid = [(shape, True) for shape in cuda_grid()[:6]]
    *lines, last = layer.expectation(grid, None, 240.0)
    assert [line.split("s  ", 1)[1].split("  ")[0].strip() for line in lines] == [shape.name for shape, _ in grid]
    spent, built = 0.0, set()
    for shape, backward in grid:
        spent += layer.expected_seconds(shape, backward, None, built)
        built.add(layer.build_key(shape))
    assert f"about {spent / 60:.0f} minutes in 1 calls" in last or spent > 240


@pytest.mark.parametrize("gpu", predict.GPUS.values(), ids=predict.GPUS)
def test_predictions(gpu):
    """No kernel is faster than its launch, no layer than the peak; more key tokens or tokens take no less time."""
    for shape in cuda_grid():
        work = predict.Work(shape, gpu)
        plain = work.plain()
        for layer_ in work.layers():
            assert len({k.name for k in layer_.kernels(True)}) == len(layer_.kernels(True))
            assert all(k.seconds(gpu) >= k.launches * gpu.launch for k in layer_.kernels(True))
        # Within a percent: map_dlse and map_fold are compiled separately, and differ by a few instructions.
        folded, direct = (work.engine(lse_gradient).seconds(gpu, True) for lse_gradient in (False, True))
        assert 1.01 * folded >= direct > plain.seconds(gpu, True)
        assert plain.seconds(gpu, True) >= shape.flops(True) / gpu.flops
        more = predict.Work(dataclasses.replace(shape, words=2 * shape.words), gpu)
        assert all(b.seconds(gpu) >= a.seconds(gpu) for a, b in zip(row_kernels(work), row_kernels(more), strict=True))
        longer = predict.Work(dataclasses.replace(shape, tokens=2 * shape.tokens), gpu)
        assert longer.fused().seconds(gpu, True) > work.fused().seconds(gpu, True)


REVIEWED = Shape(1, 4096, 256, 32, 32, 32, 128, "bfloat16")


def committed(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_agree_with_the_kernels_times_on_an_h200():
    """Each kernel of the map within a factor of 1.65, all of them together within 10 %."""
    measured: dict[tuple[str, str], list[float]] = {}
    shapes = {s.name: s for s, _ in predict.AIMS}
    for row in committed("kernels-h200.csv"):
        usual = row["contender"] in ("molsaki, sdpa (cuDNN)", "molsaki, flash_attn")
        if row["commit"] == "dd1fa4c" and row["kernel"].startswith("map_") and usual:
            name = row["kernel"].removesuffix("_kernel")
            name = {"map_dq": "map_dq_add"}.get(name, name)
            if name == "map_dlse" and "sdpa" in row["contender"]:
                name = "map_fold"
            measured.setdefault((row["shape"], name), []).append(float(row["us"]))
    total = [0.0, 0.0]
    for (shape, name), times in measured.items():
        work = predict.Work(shapes[shape], predict.GPUS["H200"], timed=True)
        layers = (work.engine(False), work.engine(True))
        (kernel,) = {k for layer_ in layers for k in layer_.kernels(True) if k.name == name}
        predicted, us = kernel.seconds(work.gpu) * 1e6, sum(times) / len(times)
        assert 1 / 1.65 < predicted / us < 1.65, (shape, name, predicted, us)
        total[0] += predicted
        total[1] += us
    assert len(measured) == 2 * 7
    assert total[0] == pytest.approx(total[1], rel=0.1)


@contextlib.contextmanager
def compiled_as(row: dict[str, str]) -> Iterator[None]:
    """The tile of a row of tiles-h200.csv, and what it was compiled to."""
    fields = [f for f in tile_sweep.FIELDS if row[f]]
    numbers = [int(row[name]) for name in ("registers", "shared", "warps", "straight")]
    compiled = roofline.Compiled(*numbers, tuple(map(int, row["loops"].split())), int(row["stages"]))
    with (
        tile_sweep.configured(row["kernel"], tuple((f, int(row[f])) for f in fields)),
        mock.patch.object(predict, "timed_splits", lambda *_: int(row["splits"])),
        mock.patch.object(predict.Work, "compiled", lambda *_: compiled),
    ):
        yield


def test_predictions_agree_with_the_sweep_over_tiles():
    """The 329 tiles that an H200 timed: none is wrong by a factor of 1.8, four of five are right within 25 %."""
    shapes, gpu = {s.name: s for s in tile_sweep.SHAPES}, predict.GPUS["H200"]
    errors = []
    for row in committed("tiles-h200.csv"):
        if not row["straight"]:
            continue
        work = predict.Work(shapes[row["shape"]], gpu, timed=True)
        with compiled_as(row):
            if row["kernel"] == "map_partials":
                kernel = work.partials()
            else:
                kernel = {"map_dq": work.map_dq_add, "map_dlse": work.map_dlse, "map_dk": work.map_dk}[row["kernel"]]()
            ratio = kernel.seconds(gpu) * 1e6 / float(row["us"])
        errors.append((max(ratio, 1 / ratio), row))
    assert len(errors) == 329
    assert max(error for error, _ in errors) < 1.8, max(errors, key=lambda pair: pair[0])
    assert sum(error < 1.25 for error, _ in errors) > 0.8 * len(errors)


def test_instructions_bound_the_kernels():
    """Every warp instruction of every program passes one of a multiprocessor's four schedulers."""
    gpu = predict.GPUS["H200"]
    kernel = predict.Work(REVIEWED, gpu).map_dlse()
    grid = kernel.grid
    loop = sum(grid.trips) * grid.loop.instructions
    issued = (loop + len(grid.trips) * grid.once) * grid.heads * grid.compiled.warps
    assert kernel.seconds(gpu) > issued / (gpu.issue * gpu.clock * gpu.multiprocessors)
    for slower in (dataclasses.replace(gpu, issue=gpu.issue / 2), dataclasses.replace(gpu, stall=4 * gpu.stall)):
        assert kernel.seconds(slower) > 1.5 * kernel.seconds(gpu)


def test_more_tokens_take_longer():
    gpu = predict.GPUS["H100"]
    for shape, _ in predict.AIMS:
        for name, layer_ in predict.designs(shape, gpu).items():
            longer = dataclasses.replace(shape, tokens=2 * shape.tokens, steps=2 * shape.steps)
            assert predict.designs(longer, gpu)[name].seconds(gpu, True) > layer_.seconds(gpu, True)


def test_predictions_use_the_tiles_of_configs():
    """A tile of half the rows doubles the programs."""
    gpu = predict.GPUS["H200"]
    whole = predict.Work(REVIEWED, gpu).map_dq_add()
    rows = predict.configs.map_dq("sm90", torch.bfloat16, 128, 256).rows
    with tile_sweep.configured("map_dq", (("rows", rows // 2),)):
        halved = predict.Work(REVIEWED, gpu).map_dq_add()
    assert len(halved.grid.trips) == 2 * len(whole.grid.trips) == 2 * REVIEWED.tokens // rows


@pytest.mark.parametrize("gpu", predict.GPUS.values(), ids=predict.GPUS)
def test_what_kernels_were_compiled_to_is_that_of_todays_tiles(gpu):
    """A kernel with other warps has other instructions: the file has to be written anew when its tile changes."""
    for shape in cuda_grid():
        layers = predict.Work(shape, gpu).layers()
        assert any(kernel.grid is not None for made in layers for kernel in made.kernels(True))


def test_a_file_of_other_tiles_is_refused(monkeypatch):
    older = {key: found._replace(warps=2 * found.warps) for key, found in predict.COMPILED.items()}
    monkeypatch.setattr(predict, "COMPILED", older)
    with pytest.raises(ValueError, match=r"now.csv has \(8, 2\) warps and stages, configs has \(4, 2\)"):
        predict.Work(REVIEWED, predict.GPUS["H200"]).map_dk()


@pytest.mark.skipif(version("triton") != "3.6.0", reason="compiled/now.csv is of Triton 3.6")
def test_what_kernels_were_compiled_to_is_up_to_date(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # for the compiler's process; not set on a GPU machine
    reports = list(aot.compile_all(["cuda:90"], "^(map_dk-bf16-d128|map_dq_add-bf16-d64|map_partials-bf16-d64-c64)$"))
    assert len(reports) == 3
    for report in reports:
        found = predict.COMPILED[report.target, report.name]
        assert (report.registers, report.shared, report.warps, report.straight) == found[:4]
        assert (tuple(map(int, report.loops.split())), report.stages) == found[4:]


def test_makespan():
    assert roofline.makespan((1.0, 2.0), 1, 4) == 2.0
    assert roofline.makespan((1.0,), 5, 4) == 2.0  # a second wave for one program
    assert roofline.makespan((3.0, 1.0, 1.0, 1.0), 1, 2) == 3.0
    assert roofline.makespan((1.0, 3.0), 500, 10) == pytest.approx(200, rel=0.01)


def test_words_that_do_not_fit_beside_v_take_another_call():
    gpu, many = predict.GPUS["H100"], dataclasses.replace(REVIEWED, words=256)
    layer_ = predict.Work(many, gpu).widened()  # 128 words beside v, the others in a second call
    assert sum("plain" in k.name for k in layer_.kernels(True)) == 4


def test_targets_are_printed(capsys):
    predict.main(["--targets"])
    printed = capsys.readouterr().out
    assert "H200" in printed and "H100" in printed and "widened" in printed and predict.AIMS[0][0].name in printed


def row_kernels(work: predict.Work) -> tuple[predict.Kernel, ...]:
    """Return the kernels that loop over rows, whose splits do not depend on the number of key tokens."""
    return work.map_dlse(), work.map_dq_add(), work.flash_dq(), work.map_fold()


def test_predictions_count_what_the_kernels_do():
    """4,096 tokens, 32 heads of 128, 256 key tokens: the shape of the table in docs/lab/2026-11.md."""
    gpu = predict.GPUS["H200"]
    work = predict.Work(Shape(1, 4096, 256, 32, 32, 32, 128, "bfloat16"), gpu)
    q = 4096 * 32 * 128 * 2
    assert work.product == 4096**2 * 32 * 128
    partials, _ = work.map_alone()
    touched = sum(64 * 64 * math.ceil(256 * (t + 1) * 64 / 4096 / 64) for t in range(64))
    assert partials.flops == touched * 32 * (2 * 128 + 4 * 16)
    assert work.map_fold().memory == 5 * q + 2 * 4096 * 32 * 4
    assert work.map_dq_add().memory == 3 * q + 2 * 4096 * 32 * 4
    assert work.map_dq_add().flops == 2 * 2 * 32 * 128 * work.columns(64, 32)[0]
    # At 256 key tokens the rows are split; at 4,096 there is one split and no sum over splits.
    assert [k.name for k in work.map_gradient()] == ["map_dq_add", "map_dk", "map_dk_add"]
    many = predict.Work(dataclasses.replace(work.shape, words=4096), gpu)
    assert [k.name for k in many.map_gradient()] == ["map_dq_add", "map_dk"]
    assert work.flash_dq().flops > 3 * work.product and work.flash_dkv().flops == 4 * work.product


def test_predictions_are_found_by_the_devices_name():
    shape = cuda_grid()[0]
    assert (
        roofline.gpu_named("NVIDIA H200").name == "H200" and roofline.gpu_named("NVIDIA H100 80GB HBM3").name == "H100"
    )
    assert roofline.gpu_named("AMD EPYC") is None
    assert layer.prediction(shape, "AMD EPYC", "molsaki, sdpa", "map", True) is None
    seconds, over = layer.prediction(shape, "NVIDIA H200", "sdpa, cuDNN", "plain", True)
    assert seconds > 0 and over == 1
    fused = layer.prediction(shape, "NVIDIA H200", "molsaki, triton", "map", True)
    assert fused != layer.prediction(shape, "NVIDIA H200", "molsaki, sdpa", "map", True)


def test_predicted_records(tmp_path, capsys):
    path = tmp_path / "predicted.csv"
    predict.main(["--gpu", "H100", "--csv", str(path), "--only", "16x256 H9/3 D64 W20"])
    records = layer.read_records(path)
    assert {r["label"] for r in records} == {"prediction"}
    assert {r["gpu"] for r in records} == {"H100"}
    fused = next(r for r in records if r["name"] == "fused" and r["pass"] == "forward+backward")
    assert f"{fused['predicted_over_plain']:.2f}" in capsys.readouterr().out


@pytest.fixture
def measured_entries(monkeypatch):
    entries = (
        engine_selection.Measured("cpu", False, 64, (64, 128), (), ("eager", "sdpa"), "a.csv"),
        engine_selection.Measured("cpu", True, 64, (64, 128), (), ("sdpa",), "a.csv"),
        engine_selection.Measured("cpu", False, 64, (128, 256), ("window",), ("eager",), "a.csv"),
    )
    monkeypatch.setattr(engine_selection, "MEASURED", entries)
    monkeypatch.setattr(engine_selection, "DEFAULT_ORDER", {"cpu": ("sdpa", "eager")})


def request(**changes) -> AttentionRequest:
    facts = AttentionRequest(
        device=CPU_DEVICE,
        dtype=torch.float32,
        batch=1,
        q_heads=2,
        kv_heads=2,
        length=64,
        head_dim=64,
        options=AttentionOptions(True, 1.0),
        sinks=False,
        packed=False,
        backward=False,
    )
    return dataclasses.replace(facts, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("eager", "sdpa")),
        ({"backward": True}, ("sdpa", "eager")),
        ({"head_dim": 16}, ("eager", "sdpa")),
        ({"length": 130, "options": AttentionOptions(True, 1.0, window=9)}, ("eager", "sdpa")),
    ],
)
def test_auto_follows_measured_entries(measured_entries, changes, expected):
    assert engine_selection.order(request(**changes)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"length": 63},
        {"length": 128},
        {"head_dim": 80},
        {"packed": True},
        {"sinks": True},
        {"options": AttentionOptions(False, 1.0)},
        {"options": AttentionOptions(True, 1.0, softcap=2.0)},
    ],
)
def test_auto_keeps_its_default_for_requests_that_were_not_measured(measured_entries, changes):
    assert engine_selection.order(request(**changes)) == ("sdpa", "eager")


def test_auto_keeps_its_default_while_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(engine_selection, "MEASURED", ())
    monkeypatch.setattr(engine_selection, "DEFAULT_ORDER", {"cpu": ("x", "y")})
    assert engine_selection.order(request()) == ("x", "y")


def test_every_measured_entry_follows_from_a_committed_csv():
    for source in {entry.source for entry in engine_selection.MEASURED}:
        proposed = auto_table.proposed(layer.read_records(plots.RESULTS / source), source)
        assert {entry for entry in engine_selection.MEASURED if entry.source == source} <= set(proposed)


@pytest.mark.parametrize("compiled", [False, True])
def test_stepwise_attention_follows_measured_entries(measured_entries, monkeypatch, compiled):
    """Compiled: Dynamo traces the choice."""
    monkeypatch.setattr(ENGINES["sdpa"], "forward", lambda *_: pytest.fail("sdpa was chosen"))
    torch.compiler.reset()
    inputs = dataclasses.replace(SMALL, tokens=64, head_dim=64).inputs(CPU_DEVICE)
    attend = mk.stepwise_attention
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out, _ = attend(*inputs[:3], inputs.plan)
        torch.testing.assert_close(out, mk.reference.stepwise_attention(*inputs[:3], inputs.plan)[0])


def test_proposed_entries():
    def records(tokens, ratios, words=16, **changes):
        common = {"mode": "eager", "arch": "sm90", "pass": "forward", "head_dim": 64}
        common |= {"tokens": tokens, "shape": f"{tokens} {words}"}
        return [{**common, "contender": name, "over_plain": over, **changes} for name, over in ratios.items()]

    measured = [
        *records(256, {"molsaki, sdpa": 1.5, "molsaki, triton": 1.2, "sdpa, cuDNN": 1.0, "the map alone": 0.1}),
        *records(512, {"molsaki, sdpa": 1.5, "molsaki, triton": 1.3}),
        # Two shapes of one length: by the geometric mean sdpa is faster. flex lacks one of them and is not compared.
        *records(4096, {"molsaki, sdpa": 1.1, "molsaki, triton": 1.05, "molsaki, flex": 1.0}),
        *records(4096, {"molsaki, sdpa": 1.0, "molsaki, triton": 1.8}, words=64),
        *records(4096, {"molsaki, sdpa": 9.0, "molsaki, triton": 1.0}, mode="graph"),
        *records(4096, {"molsaki, triton": 1.0}, **{"pass": "forward+backward", "head_dim": 128}),
    ]
    assert auto_table.proposed(measured, "x.csv") == [
        engine_selection.Measured("sm90", False, 64, (256, 4096), (), ("triton", "sdpa"), "x.csv"),
        engine_selection.Measured("sm90", False, 64, (4096, 8192), (), ("sdpa", "triton"), "x.csv"),
        engine_selection.Measured("sm90", True, 128, (4096, 8192), (), ("triton",), "x.csv"),
    ]


def test_proposed_entries_of_a_file(tmp_path, capsys):
    layer.write_csv(tmp_path / "h200.csv", invented_records(cuda_grid()[:5]))
    auto_table.main([str(tmp_path / "h200.csv")])
    printed = capsys.readouterr().out
    entries = eval(f"[{printed}]", {"Measured": engine_selection.Measured})
    assert {e.source for e in entries} == {"h200.csv"} and {e.head_dim for e in entries} == {64, 128}
    assert auto_table.proposed(layer.read_records(tmp_path / "h200.csv"), "h200.csv") == entries
    with pytest.raises(SystemExit):
        auto_table.main([str(tmp_path / "nothing.csv")])


def test_pictures_of_a_gpus_records(tmp_path):
    shapes = [s for s in cuda_grid() if (s.kv_heads, s.head_dim) in ((8, 128), (32, 64)) and s.tokens < 32768]
    layer.write_csv(tmp_path / "h200.csv", invented_records(shapes))
    records = layer.read_records(tmp_path / "h200.csv")
    files = plots.draw(records, tmp_path, "h200", "svg")
    assert [path.name for path in files] == [f"h200-{x}.svg" for x in ("time", "memory", "key-tokens")]
    assert all("abc1234" in plots.conditions(records) and path.stat().st_size > 5000 for path in files)

    def of(axes, label):
        return dict(zip(*{line.get_label(): line for line in axes.get_lines()}[label].get_data(), strict=True))

    def ours(**facts):
        facts |= {"kind": "map", "kv_heads": 8, "head_dim": 128, "mode": "eager", "tokens": 4096}
        return [r for r in records if all(r[key] == value for key, value in facts.items())]

    axes = next(
        ax for ax in plots.time_over_plain(records).axes if ax.get_title() == "32/8 heads of 128, bfloat16, forward"
    )
    (record,) = ours(words=256, contender="molsaki, sdpa", **{"pass": "forward"})
    assert of(axes, "molsaki, sdpa")[4096] == record["over_plain"]
    assert of(axes, "molsaki, triton, predicted") and of(axes, "eager with weights")
    assert list(of(axes, "molsaki, triton, as a CUDA graph")) == [256, 512]
    memory = plots.memory_over_tokens(records).axes
    assert len(memory) == 2 and max(of(memory[0], "molsaki, sdpa")) == 16384
    key_tokens = plots.overhead_over_key_tokens(records).axes
    axes = next(ax for ax in key_tokens if ax.get_title() == "32/8 heads of 128, bfloat16, forward+backward")
    percent = of(axes, "1 x 4,096")
    assert list(percent) == [16, 64, 256, 1024, 4096]
    best = min(r["over_plain"] for r in ours(words=64, **{"pass": "forward+backward"}))
    assert percent[64] == pytest.approx(100 * (best - 1))


def test_pictures_show_the_latest_commit():
    old = [{"shape": s, "pass": "forward", "commit": "old", "over_plain": 2.0} for s in ("a", "b")]
    new = [{**old[0], "commit": "new", "over_plain": 1.0}]
    assert plots.latest(old + new) == new + old[1:]


def test_the_committed_pictures_can_be_drawn_again(tmp_path, capsys):
    plots.main(["--output-dir", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (plots.RESULTS / "plots").iterdir()} and len(drawn) == 5
    assert all(path.stat().st_size > 10000 for path in tmp_path.iterdir())
    records = layer.read_records(plots.COMMITTED[0])
    assert not plots.memory_over_tokens([r for r in records if r["dtype"] == "bfloat16"])  # of one length only
    assert "Intel(R) Xeon(R)" in plots.conditions(records)


def test_a_matrix_product_is_not_drawn(tmp_path):
    """A run on a CPU has records of one, beside those of attention."""
    records = layer.read_records(plots.RESULTS / "layer-xeon-2core-amx-bf16.csv")
    assert "product" in {record["kind"] for record in records}
    drawn = plots.draw(records, tmp_path, "bf16", "svg")
    assert drawn and not any("matrix product" in path.read_text(encoding="utf-8") for path in drawn)


@pytest.mark.parametrize("path", sorted(plots.RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_records_name_machine_versions_commit_and_date(path):
    records = layer.read_records(path)
    assert records and all(record[key] for record in records for key in ("device", "torch", "python", "commit", "date"))


def test_pictures_of_whole_steps(tmp_path):
    """Draw records in the form of ``benchmarks.step``: one per quantity."""
    common = {"teacher": "t", "batch": "1x1024", "dtype": "float32", "target": None, **MACHINE}
    cases = itertools.product(("135M", "1b"), (False, True), ("dss", "molsaki, stored maps"))
    records = [
        {
            "student": student,
            "compiled": compiled,
            "contender": name,
            "quantity": quantity,
            "value": value + i,
            **common,
        }
        for i, (student, compiled, name) in enumerate(cases)
        for quantity, value in (("seconds", 1.5), (plots.PEAK, 100.0), ("loss", 9.0))
    ]
    layer.write_csv(tmp_path / "step.csv", records)
    records = layer.read_records(tmp_path / "step.csv")
    time_, memory = plots.step_bars(records).axes
    assert [bar.get_height() for bar in time_.patches] == [1.5, 3.5, 5.5, 7.5, 2.5, 4.5, 6.5, 8.5]
    assert [text.get_text() for text in memory.get_xticklabels()][1] == "135M\n1x1024, compiled"
    assert [path.name for path in plots.draw(records, tmp_path, "step")] == ["step-time-and-memory.png"]
    with pytest.raises(ValueError, match="quantity"):
        plots.step_bars([record for record in records if record["quantity"] == "loss"])
    with pytest.raises(ValueError, match="benchmarks.layer"):
        plots.draw([{"gpu": "H200"}], tmp_path, "predicted")


def test_targets_and_cpu_shapes_are_the_specifications():
    assert [(s.batch, s.tokens, s.target) for s in CPU] == [(8, 256, 1.2), (1, 2048, 1.1), (1, 4096, 1.05)]
    assert {s.target for s in cuda_grid() if s.tokens >= 4096} == {1.05}


def test_tile_sweep_lists_candidates(capsys):
    """Around the configured tiles of every kernel; the sweep itself needs a GPU."""
    assert tile_sweep.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kernels = {line.split()[0] for line in lines[:-1]}
    assert kernels == {*tile_sweep.MAP, *tile_sweep.FLASH} and all(int(line.split()[-1]) > 1 for line in lines[:-1])


def test_calls_on_cuda_follow_each_other(monkeypatch):
    """Short ones in a row between two events, a long one once; a time is that of one call."""
    made = []

    def clock(function):
        before = len(made)
        function()
        return sum(made[before:])

    monkeypatch.setattr(measure, "cuda_clock", clock)
    functions = {"short": lambda: made.append(1e-3), "long": lambda: made.append(0.1)}
    times = measure.interleaved(functions, torch.device("cuda"), 0.5)
    assert all(t == pytest.approx(1e-3) for t in times["short"]) and all(t == pytest.approx(0.1) for t in times["long"])
    last_round = made[-(8 + 1) :]
    assert last_round == [1e-3] * 8 + [0.1]
