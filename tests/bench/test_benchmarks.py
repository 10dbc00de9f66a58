"""What of the benchmarks needs no GPU: the grid, resuming, ratios, predictions, pictures, auto's table."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import molsaki_kernels as mk
from benchmarks import auto_table, layer, measure, plots, predict
from benchmarks.contenders import contenders, step, with_lse
from benchmarks.shapes import CPU, HEADS, KEY_TOKENS, LENGTHS, Shape, cuda_grid
from molsaki_kernels import engine_selection as auto
from molsaki_kernels.spec import AttentionOptions, AttentionRequest

CPU_DEVICE = torch.device("cpu")
SMALL = Shape(2, 48, 5, 3, 4, 2, 16)
MACHINE = {
    "device": "NVIDIA H200, made up", "arch": "sm90", "driver": "1.2", "torch": "9.9", "triton": "3.9", "cudnn": "9",
    "python": "3.11", "commit": "abc1234", "date": "2026-01-01",
}  # fmt: skip


def made_up_rows(shapes: list[Shape], seed: int = 0) -> list[dict]:
    """As measured on a GPU, but drawn around the predictions: what plots and tables take."""
    rng, rows = random.Random(seed), []
    names = {"sdpa, cuDNN": "plain", "sdpa, aten flash": "plain", "molsaki, sdpa": "map", "molsaki, triton": "map",
             "the map alone": "map alone", "eager with weights": "eager"}  # fmt: skip
    for shape in shapes:
        for backward in (False, True):
            for mode in layer.modes(shape, torch.device("cuda")):
                for name, kind in names.items():
                    seconds, _ = layer.prediction(shape, MACHINE["device"], name, kind, backward)
                    times = [seconds * rng.uniform(1.0, 1.2) * (1.4 if name == "sdpa, aten flash" else 1.0)] * 3
                    plain = [layer.prediction(shape, MACHINE["device"], name, "plain", backward)[0]] * 3
                    row = layer.row_of(shape, backward, mode, name, kind, times, "sdpa, cuDNN", plain, MACHINE)
                    memory = {"launches": 7, "peak_mib": shape.set_bytes() / 2**20 * rng.uniform(1.5, 2)}
                    rows.append({**row, **memory, **MACHINE})
    return rows


def test_the_grid_is_complete_and_ordered():
    grid = cuda_grid()
    assert len({shape.name for shape in grid}) == len(grid)
    for q_heads, kv_heads, head_dim in HEADS:
        for batch, tokens in LENGTHS:
            words = [
                s.words for s in grid
                if (s.batch, s.tokens, s.q_heads, s.kv_heads, s.head_dim)
                == (batch, tokens, q_heads, kv_heads, head_dim)
            ]  # fmt: skip
            expected = [4096] if tokens == 131072 else [w for w in KEY_TOKENS if w <= tokens]
            assert sorted(words) == expected, (batch, tokens)
    assert {(s.batch, s.tokens, s.words) for s in grid[:3]} == {(16, 256, 13), (16, 256, 20), (16, 256, 40)}
    assert [s.tier for s in grid] == sorted(s.tier for s in grid)
    assert all(s.target for s in grid if s.tier == 0)


def test_traffic_is_that_of_the_tensors():
    """Counted from the tensors that one call takes and gives."""
    inputs = with_lse(SMALL.inputs(CPU_DEVICE))
    out, maps = mk.stepwise_attention(*inputs[:3], inputs.plan, engine="sdpa")
    forward = sum(t.nbytes for t in (*inputs[:3], inputs.lse, out, maps))
    assert SMALL.traffic(False) == forward
    backward = sum(t.nbytes for t in (inputs.dout, *inputs[:3]))  # dout in; dq, dk, dv out
    assert SMALL.traffic(True) == 2 * forward + backward + inputs.dmaps.nbytes - maps.nbytes
    assert SMALL.set_bytes() == sum(t.nbytes for t in inputs[:4])


@pytest.mark.parametrize("cache", [0, 1, 1 << 20, 50 << 20])
def test_inputs_go_around_more_than_a_cache(cache):
    sets = SMALL.sets(cache)
    assert sets == 1 if cache <= 1 else sets == 64 or sets * SMALL.set_bytes() >= 2 * cache
    assert Shape(1, 131072, 16, 5, 32, 32, 128, "bfloat16").sets(60 << 20) == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("contender", contenders(CPU_DEVICE, SMALL), ids=lambda c: c.name)
def test_contenders_agree(contender, compiled):
    """Every contender's result and gradients are those of eager attention."""
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
    """Of functions that make several calls, in turns."""
    made = []
    functions = {name: lambda name=name: made.append(name) for name in ("a", "b")}
    times = measure.interleaved(functions, CPU_DEVICE, 1e-9, calls=4)
    one = measure.interleaved({"a": lambda: sum(range(20000))}, CPU_DEVICE, 1e-9, calls=1)["a"]
    four = measure.interleaved({"a": lambda: [sum(range(20000)) for _ in range(4)]}, CPU_DEVICE, 1e-9, calls=4)["a"]
    assert {len(t) for t in times.values()} == {3} and made[-6:] == ["a", "b"] * 3
    assert min(four) < 2 * min(one)


def test_launches_are_what_ran_on_the_device():
    kinds = torch.autograd.DeviceType
    events = [(kinds.CUDA, False), (kinds.CPU, False), (kinds.CUDA, True), (kinds.CUDA, False)]
    assert measure.count_launches(SimpleNamespace(device_type=d, is_user_annotation=u) for d, u in events) == 2
    assert measure.launches(lambda: torch.ones(2).sum(), CPU_DEVICE) is None
    profile = measure.profiled(lambda: torch.ones(2).sum(), CPU_DEVICE)
    assert measure.count_launches(profile.events()) == 0 and any(e.name == "aten::sum" for e in profile.events())


def run_layer(monkeypatch, folder, *more: str) -> int:
    monkeypatch.setattr(layer, "CPU", [SMALL])
    monkeypatch.setattr(layer, "CPU_MORE", [dataclasses.replace(SMALL, tokens=64)])
    files = ["--csv", str(folder / "rows.csv"), "--json", str(folder / "rows.json")]
    return layer.main(["--device", "cpu", "--seconds", "0.01", *files, *more])


def test_a_second_call_completes_the_grid(monkeypatch, tmp_path, capsys):
    """A limit that the first shape and pass use up, then none; what is there is not measured again."""
    seconds = iter([0.0, 1e9])
    monkeypatch.setattr(layer, "expected_seconds", lambda *_: next(seconds))
    assert run_layer(monkeypatch, tmp_path, "--limit", "60") == 0
    assert "3 of 4 left" in capsys.readouterr().out
    first = layer.read_rows(tmp_path / "rows.csv")
    assert {(row["tokens"], row["pass"]) for row in first} == {(48, "forward+backward")}
    monkeypatch.setattr(layer, "expected_seconds", lambda *_: 0.0)
    assert run_layer(monkeypatch, tmp_path) == 0
    rows = layer.read_rows(tmp_path / "rows.csv")
    assert rows[: len(first)] == first and len(rows) == 4 * len(first)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(layer, "measured", lambda *_: pytest.fail("measured again"))
    assert run_layer(monkeypatch, tmp_path) == 0


def test_rows_of_another_commit_are_measured_anew():
    rows = [{"shape": "s", "pass": "forward", **MACHINE}]
    assert layer.measured_already(rows, MACHINE) == {("s", "forward")}
    for key in ("device", "commit", "torch"):
        assert not layer.measured_already(rows, {**MACHINE, key: "other"})


def test_what_of_ours_fails_ends_in_the_exit_status(monkeypatch, tmp_path, capsys):
    """The others are measured all the same, and an engine that says it cannot is no failure."""

    def broken(error):
        def run(_):
            raise error

        def some(device, shape):
            found = {c.kind: c for c in contenders(device, shape)}
            return [found["plain"], dataclasses.replace(found["map"], run=run)]

        return some

    monkeypatch.setattr(layer, "contenders", broken(RuntimeError("no kernel image")))
    assert run_layer(monkeypatch, tmp_path) == 1 and "no kernel image" in capsys.readouterr().err
    assert {row["kind"] for row in layer.read_rows(tmp_path / "rows.csv")} == {"plain"}
    (tmp_path / "rows.csv").unlink()
    monkeypatch.setattr(layer, "contenders", broken(ValueError('engine: "sdpa" cannot do it')))
    assert run_layer(monkeypatch, tmp_path) == 0


def test_graph_and_compile_rows(monkeypatch):
    """Ratios are to the fastest plain attention of the same mode; what cannot be captured is left out and told."""
    captured, everything = [], contenders(CPU_DEVICE, SMALL)
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
    rows = layer.measured(SMALL, CPU_DEVICE, True, 0.01, False, MACHINE, failed)
    kinds = {mode: [row["kind"] for row in rows if row["mode"] == mode] for mode in ("eager", "graph", "compile")}
    without_it = [c.kind for i, c in enumerate(everything) if i != first_map]
    compiled = [c.kind for c in everything if c.kind in ("plain", "map")]
    assert kinds == {"eager": [c.kind for c in everything], "graph": without_it, "compile": compiled}
    assert len(failed) == 1 and f"{everything[first_map].name} (graph) cannot" in failed[0]
    for mode in kinds:  # the fastest plain one of a mode is what its rows are divided by
        plain = [row for row in rows if row["kind"] == "plain" and row["mode"] == mode]
        assert min(plain, key=lambda row: row["median_ms"])["over_plain"] == 1.0
    over = {(row["mode"], row["kind"]): row["predicted_over_plain"] for row in rows}
    assert over["eager", "plain"] == 1.0 and over["compile", "map"] == over["eager", "map"] > 1


def test_traces(monkeypatch, tmp_path):
    assert run_layer(monkeypatch, tmp_path, "--only", "48", "--profile", str(tmp_path / "traces")) == 0
    tables = {path.stem: path.read_text() for path in (tmp_path / "traces").glob("*.txt")}
    ours = next(name for name in tables if "backward-molsaki-sdpa" in name)
    assert "molsaki_attentionBackward" in tables[ours]
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
    """No kernel beats its launch, no layer the peak; more key tokens or a longer sequence take no less time."""
    for shape in cuda_grid():
        work = predict.Work(shape, gpu)
        plain = work.plain()
        for layer_ in work.layers():
            assert len({k.name for k in layer_.kernels(True)}) == len(layer_.kernels(True))
            assert all(k.seconds(gpu) >= k.launches * gpu.launch for k in layer_.kernels(True))
        assert work.engine(False).seconds(gpu, True) > work.engine(True).seconds(gpu, True) > plain.seconds(gpu, True)
        assert plain.seconds(gpu, True) >= shape.flops(True) / gpu.flops
        more = predict.Work(dataclasses.replace(shape, words=2 * shape.words), gpu)
        assert all(b.seconds(gpu) >= a.seconds(gpu) for a, b in zip(row_kernels(work), row_kernels(more), strict=True))
        longer = predict.Work(dataclasses.replace(shape, tokens=2 * shape.tokens), gpu)
        assert longer.fused().seconds(gpu, True) > work.fused().seconds(gpu, True)


def row_kernels(work: predict.Work) -> tuple[predict.Kernel, ...]:
    """Those that walk over rows and so are not split differently where there are more key tokens."""
    return work.map_dlse(), work.map_gradient()[0], work.flash_dq(), work.fold()


def test_predictions_count_what_the_kernels_do():
    """4,096 tokens, 32 heads of 128, 256 key tokens: the shape of the table in docs/notes.md."""
    gpu = predict.GPUS["H200"]
    work = predict.Work(Shape(1, 4096, 256, 32, 32, 32, 128, "bfloat16"), gpu)
    q = 4096 * 32 * 128 * 2
    assert work.product == 4096**2 * 32 * 128
    partials, _ = work.map_alone()
    touched = sum(64 * 128 * math.ceil(256 * (t + 1) * 64 / 4096 / 128) for t in range(64))
    assert partials.flops == touched * 32 * (2 * 128 + 4 * 16)
    assert work.fold().memory == 4 * q + 4096 * 32 * 4
    add = next(k for k in work.map_gradient() if k.name == "map_dq_add")
    assert add.memory == 3 * q + 2 * 4096 * 32 * 4
    assert add.flops == 2 * work.map_dlse().flops
    # Three splits of the rows at 256 key tokens; at 1,024 there is one, and nothing to add up.
    assert [k.name for k in work.map_gradient()] == ["map_dq_add", "map_dk", "map_dk_add"]
    many = predict.Work(dataclasses.replace(work.shape, words=1024), gpu)
    assert [k.name for k in many.map_gradient()] == ["map_dq_add", "map_dk"]
    assert work.flash_dq().flops > 3 * work.product and work.flash_dkv().flops == 4 * work.product


def test_predictions_are_found_by_the_devices_name():
    shape = cuda_grid()[0]
    assert predict.gpu_named("NVIDIA H200").name == "H200" and predict.gpu_named("NVIDIA H100 80GB HBM3").name == "H100"
    assert predict.gpu_named("AMD EPYC") is None
    assert layer.prediction(shape, "AMD EPYC", "molsaki, sdpa", "map", True) is None
    seconds, over = layer.prediction(shape, "NVIDIA H200", "sdpa, cuDNN", "plain", True)
    assert seconds > 0 and over == 1
    fused = layer.prediction(shape, "NVIDIA H200", "molsaki, triton", "map", True)
    assert fused != layer.prediction(shape, "NVIDIA H200", "molsaki, sdpa", "map", True)


def test_predicted_rows(tmp_path, capsys):
    path = tmp_path / "predicted.csv"
    predict.main(["--gpu", "H100", "--csv", str(path), "--only", "16x256 H9/3 D64 W20"])
    rows = layer.read_rows(path)
    assert {row["label"] for row in rows} == {"prediction"}
    assert {row["gpu"] for row in rows} == {"H100"}
    fused = next(r for r in rows if r["name"] == "fused" and r["pass"] == "forward+backward")
    assert f"{fused['predicted_over_plain']:.2f}" in capsys.readouterr().out


@pytest.fixture
def measured_rows(monkeypatch):
    rows = (
        auto.Measured("cpu", False, 64, (64, 128), (), ("eager", "sdpa"), "a.csv"),
        auto.Measured("cpu", True, 64, (64, 128), (), ("sdpa",), "a.csv"),
        auto.Measured("cpu", False, 64, (128, 256), ("window",), ("eager",), "a.csv"),
    )
    monkeypatch.setattr(auto, "MEASURED", rows)


def call(**changes) -> AttentionRequest:
    facts = dict(
        device=CPU_DEVICE, dtype=torch.float32, batch=1, q_heads=2, kv_heads=2, length=64, head_dim=64,
        options=AttentionOptions(True, 1.0), sinks=False, packed=False, backward=False,
    )  # fmt: skip
    return AttentionRequest(**{**facts, **changes})


def test_auto_takes_measured_rows_only(measured_rows):
    default = ("sdpa", "eager")
    assert auto.order(call(), default) == ("eager", "sdpa")
    assert auto.order(call(backward=True), default) == ("sdpa", "eager")
    assert auto.order(call(head_dim=16), default) == ("eager", "sdpa")
    assert auto.order(call(length=130, options=AttentionOptions(True, 1.0, window=9)), default) == ("eager", "sdpa")
    for unmeasured in (
        dict(length=63), dict(length=128), dict(head_dim=80), dict(packed=True), dict(sinks=True),
        dict(options=AttentionOptions(False, 1.0)), dict(options=AttentionOptions(True, 1.0, softcap=2.0)),
    ):  # fmt: skip
        assert auto.order(call(**unmeasured), default) == default


def test_auto_keeps_its_default_while_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(auto, "MEASURED", ())
    assert auto.order(call(), ("x", "y")) == ("x", "y")


def test_every_row_of_auto_follows_from_a_committed_csv():
    results = layer.Path(__file__).parents[1] / "benchmarks/results"
    for source in {row.source for row in auto.MEASURED}:
        rows = layer.read_rows(results / source)
        assert {row for row in auto.MEASURED if row.source == source} <= set(auto_table.proposed(rows, source))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_door_follows_the_rows(measured_rows, monkeypatch, compiled):
    """Also where Dynamo traces the choice."""
    monkeypatch.setattr(mk.ops.ENGINES["sdpa"], "forward", lambda *_: pytest.fail("sdpa was chosen"))
    torch.compiler.reset()
    inputs = dataclasses.replace(SMALL, tokens=64, head_dim=64).inputs(CPU_DEVICE)
    attend = mk.stepwise_attention
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out, _ = attend(*inputs[:3], inputs.plan)
        torch.testing.assert_close(out, mk.reference.stepwise_attention(*inputs[:3], inputs.plan)[0])


def test_autos_table_from_rows():
    def rows(tokens, ratios, head_dim=64, which="forward", mode="eager", words=16):
        return [
            {"contender": name, "mode": mode, "over_plain": over, "arch": "sm90", "pass": which, "head_dim": head_dim,
             "tokens": tokens, "shape": f"{tokens} {words}"}
            for name, over in ratios.items()
        ]  # fmt: skip

    measured = [
        *rows(256, {"molsaki, sdpa": 1.5, "molsaki, triton": 1.2, "sdpa, cuDNN": 1.0, "the map alone": 0.1}),
        *rows(512, {"molsaki, sdpa": 1.5, "molsaki, triton": 1.3}),
        # Two shapes: the geometric mean says sdpa. The engine that one of them lacks is not compared.
        *rows(4096, {"molsaki, sdpa": 1.1, "molsaki, triton": 1.05, "molsaki, flex": 1.0}),
        *rows(4096, {"molsaki, sdpa": 1.0, "molsaki, triton": 1.8}, words=64),
        *rows(4096, {"molsaki, sdpa": 9.0, "molsaki, triton": 1.0}, mode="graph"),
        *rows(4096, {"molsaki, triton": 1.0}, which="forward+backward", head_dim=128),
    ]
    assert auto_table.proposed(measured, "x.csv") == [
        auto.Measured("sm90", False, 64, (256, 4096), (), ("triton", "sdpa"), "x.csv"),
        auto.Measured("sm90", False, 64, (4096, 8192), (), ("sdpa", "triton"), "x.csv"),
        auto.Measured("sm90", True, 128, (4096, 8192), (), ("triton",), "x.csv"),
    ]


def test_autos_table_from_a_file(tmp_path, capsys):
    layer.write_csv(tmp_path / "h200.csv", made_up_rows(cuda_grid()[:5]))
    auto_table.main([str(tmp_path / "h200.csv")])
    printed = capsys.readouterr().out
    entries = eval(f"[{printed}]", {"Measured": auto.Measured})
    assert {e.source for e in entries} == {"h200.csv"} and {e.head_dim for e in entries} == {64, 128}
    assert auto_table.proposed(layer.read_rows(tmp_path / "h200.csv"), "h200.csv") == entries
    with pytest.raises(SystemExit):
        auto_table.main([str(tmp_path / "nothing.csv")])


def test_pictures_of_a_gpus_rows(tmp_path):
    shapes = [s for s in cuda_grid() if (s.q_heads, s.kv_heads, s.head_dim) == (32, 8, 128) and s.tokens < 32768]
    layer.write_csv(tmp_path / "h200.csv", made_up_rows(shapes))
    rows = layer.read_rows(tmp_path / "h200.csv")
    made = plots.draw(rows, tmp_path, "h200", "svg")
    assert [path.name for path in made] == [f"h200-bfloat16-H32-8-D128-{x}.svg" for x in ("time", "overhead", "memory")]
    assert all("abc1234" in plots.conditions(rows) and path.stat().st_size > 5000 for path in made)
    (axes, _) = plots.time_over_tokens(rows).axes
    drawn = {line.get_label(): line for line in axes.get_lines()}
    row = next(r for r in rows if r["tokens"] == 4096 and r["words"] == 256 and r["contender"] == "molsaki, sdpa"
               and r["pass"] == "forward")  # fmt: skip
    points = dict(zip(*drawn["molsaki, sdpa"].get_data(), strict=True))
    assert points[4096] == row["median_ms"]
    assert {"molsaki, triton, predicted", "molsaki, triton, as a CUDA graph", "eager with weights"} <= drawn.keys()
    overhead = {line.get_label(): line for line in plots.overhead_over_key_tokens(rows).axes[1].get_lines()}
    x, y = overhead["1 x 4,096"].get_data()
    assert list(x) == [16, 64, 256, 1024, 4096]
    best = min(r["over_plain"] for r in rows if r["tokens"] == 4096 and r["words"] == 64 and r["kind"] == "map"
               and r["pass"] == "forward+backward")  # fmt: skip
    assert y[1] == pytest.approx(100 * (best - 1))


def test_pictures_of_the_committed_cpu_rows(tmp_path):
    committed = layer.Path(__file__).parents[1] / "benchmarks/results/cpu-2core-2026-11-22.csv"
    plots.main([str(committed), "--output-dir", str(tmp_path)])
    assert (tmp_path / "cpu-2core-2026-11-22-float32-H9-9-D64-time.png").stat().st_size > 10000
    assert not plots.memory_over_tokens([r for r in layer.read_rows(committed) if r["dtype"] == "bfloat16"])
    assert "AMD EPYC" in plots.conditions(layer.read_rows(committed))


def test_pictures_of_whole_steps(tmp_path):
    """Rows as ``benchmarks.step`` writes them: a row for each quantity."""
    rows = [
        {"teacher": "t", "student": student, "batch": "1x1024", "dtype": "float32",
         "compiled": compiled, "contender": name,
         "quantity": quantity, "value": value + i, "target": None, **MACHINE}
        for i, (student, compiled, name) in enumerate(
            (s, c, n) for s in ("135M", "1b") for c in (False, True) for n in ("dss", "molsaki, stored maps")
        )
        for quantity, value in (("seconds", 1.5), ("peak MiB with weights and optimizer", 100.0), ("loss", 9.0))
    ]  # fmt: skip
    layer.write_csv(tmp_path / "step.csv", rows)
    rows = layer.read_rows(tmp_path / "step.csv")
    time_, memory = plots.step_bars(rows).axes
    assert [bar.get_height() for bar in time_.patches] == [1.5, 3.5, 5.5, 7.5, 2.5, 4.5, 6.5, 8.5]
    assert [text.get_text() for text in memory.get_xticklabels()][1] == "135M\n1x1024, compiled"
    assert [path.name for path in plots.draw(rows, tmp_path, "step")] == ["step.png"]
    with pytest.raises(ValueError, match="quantity"):
        plots.step_bars([row for row in rows if row["quantity"] == "loss"])
    with pytest.raises(ValueError, match="benchmarks.layer"):
        plots.draw([{"gpu": "H200"}], tmp_path, "predicted")


def test_targets_and_cpu_shapes_are_the_specifications():
    assert [(s.batch, s.tokens, s.target) for s in CPU] == [(8, 256, 1.2), (1, 2048, 1.1), (1, 4096, 1.05)]
    assert {s.target for s in cuda_grid() if s.tokens >= 4096} == {1.05}
