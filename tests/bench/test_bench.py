"""Tests ``python -m benchmarks``: what it checks before it times, its table, records, comparison and plot."""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

import benchmarks
import molsaki_kernels as mk
from benchmarks import bench, bench_step, bench_table, candidates, check, compare, layer, machine, measure
from benchmarks.contenders import Contender, step, with_lse
from benchmarks.shapes import CPU, Inputs, Shape
from molsaki_kernels import reference
from tests.bench.test_gpu_kit import needs_the_stand_in, stand_in
from tests.helpers.tiny import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = torch.device("cpu")
SMALL = Shape(2, 48, 5, 3, 4, 2, 16)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Run the probes in this process, which saves seconds of start-up, and keep the runs in a folder of the test."""
    monkeypatch.setattr(check.Worker, "probe", lambda self, *facts: check.probe(*facts, self.device))
    monkeypatch.setattr(bench, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def run(*arguments: str, shape: str = "2x48:3x5") -> int:
    usual = ["--device", "cpu", "--shapes", shape, "--heads", "4/2", "--head_dim", "16", "--seconds", "0.05"]
    return bench.main([*usual, *arguments])


def test_expected_is_the_oracles_result_in_blocks():
    """Blocks of 20 of 48 queries; the map alone at a log-sum-exp that is not the attention's."""
    shape = dataclasses.replace(SMALL, dtype="float64")
    x = with_lse(shape.inputs(DEVICE))
    x = x._replace(lse=(x.lse + 0.0).detach().requires_grad_())
    found = check.expected(x, rows=20)
    results = reference.stepwise_attention(*x[:3], x.plan)
    upstream = (x.dout, x.dmaps.double())
    grads = torch.autograd.grad(results, x[:3], upstream, retain_graph=True)
    for a, b in zip((*results, *grads), found.results("map").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    plain = torch.autograd.grad(results[0], x[:3], upstream[0])
    for a, b in zip((results[0], *plain), found.results("plain").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    maps = reference.stepwise_map(x.q, x.k, x.lse, x.plan)
    alone = torch.autograd.grad(maps, (x.q, x.k, x.lse), upstream[1])
    for a, b in zip((maps, *alone), found.results("map alone").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_contender_passes_the_check(dtype):
    shape = dataclasses.replace(SMALL, dtype=dtype)
    for candidate in candidates.candidates(DEVICE, shape):
        if candidate.contender is None:
            continue
        for backward in (False, True):
            found = check.probe(shape, candidate.name, backward, DEVICE)
            if found.reason is not None and found.reason.startswith("engine: 'native' cannot"):
                assert dtype in ("float16", "float64")
                continue
            assert found.reason is None and found.error < check.LIMITS[dtype] / 2, (candidate.name, found)


FAULTS = {
    "a scaled output": lambda out, maps, grads: (out * 1.01, maps, grads),
    "one wrong number": lambda out, maps, grads: (out.index_fill(2, torch.tensor([3]), 0.0), maps, grads),
    "nan in the map": lambda out, maps, grads: (out, maps.index_fill(1, torch.tensor([0]), math.nan), grads),
    "a map without its mean over heads": lambda out, maps, grads: (out, 4 * maps, grads),
    "a map of another shape": lambda out, maps, grads: (out, maps[:, :1], grads),
    "no gradient through the map": lambda out, maps, grads: (out, maps, None),
    "dk and dv changed places": lambda out, maps, grads: (out, maps, (grads[0], grads[2], grads[1])),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_wrong_results_are_found(fault):
    x = with_lse(SMALL.inputs(DEVICE))
    right = check.expected(x)
    results = mk.stepwise_attention(*x[:3], x.plan, engine="eager")
    grads = torch.autograd.grad(results, x[:3], (x.dout, x.dmaps), retain_graph=True)
    assert check.largest_error(results, grads, "map", right, "float32")[1] is None
    out, maps, changed = fault(*results, grads)
    if changed is None:
        changed = torch.autograd.grad(results[0], x[:3], x.dout)
    _, why = check.largest_error((out, maps), changed, "map", right, "float32")
    assert why is not None and re.match("(out|map|dq|dk|dv) (is wrong|has shape)", why)


def test_a_table_records_json_and_pictures(here, capsys):
    assert run("--dtype", "float32") == 0
    printed = capsys.readouterr().out
    (path,) = here.glob("*/*.csv")
    records = layer.read_records(path)
    with (RESULTS / "layer-xeon-2core.csv").open(newline="") as file:
        committed = next(csv.reader(file))
    assert set(committed) <= set(records[0])  # so that a file can be committed, or appended to
    names = {c.name for c in candidates.candidates(DEVICE, SMALL) if c.contender}
    assert {r["contender"] for r in records} == names and {"eager with weights", "sdpa, math", "molsaki, sdpa"} <= names
    for r in records:
        assert r["median_ms"] > 0 and r["error"] < 1e-4 and r["peak_mib"] is not None and r["commit"] and r["date"]
        assert (r["q1_ms"] is None) == (r["calls"] < 3)
        assert r["q1_ms"] is None or r["q1_ms"] <= r["median_ms"] <= r["q3_ms"]
        # The median of the ratios of single rounds: not the ratio of medians, but never outside of all ratios.
        assert r["over_plain"] > 0 and r["over_sdpa"] > 0
    for which in layer.PASSES:
        some = [r for r in records if r["pass"] == which]
        fastest = min((r for r in some if r["kind"] == "plain"), key=lambda r: r["median_ms"])
        assert {r["fastest_plain"] for r in some} == {fastest["contender"]} and fastest["over_plain"] == 1
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["machine"]["threads"] == 1 and facts["records"] == records
    assert "2 x 48 tokens, 4/2 heads of 16, 3 steps x 5 words, float32: forward + backward" in printed
    assert "attention with its map (" in printed and "no earlier run" in printed
    assert max(map(len, printed[printed.index("2 x 48") :].split("Records:")[0].splitlines())) <= 120
    for name in ("flash-attn 4", "flash-attn 3", "flash-attn 2", "FlexAttention", "sdpa, cuDNN", "molsaki, triton"):
        assert re.search(rf"^  {name} +\S", printed, re.MULTILINE), name
    for suffix in (".png", ".svg"):
        assert path.with_suffix(suffix).stat().st_size > 10000 and f"{path.stem}{suffix}" in printed


def test_a_second_run_is_compared_with_the_first(here, capsys, monkeypatch):
    """The first run's times are a hundredth in its file; another machine's and another shape's are not compared."""

    def paired(functions, *_):
        return {name: {i: 1e-3 * (1 + 0.01 * (i % 3)) for i in range(9)} for name in functions}

    monkeypatch.setattr(bench, "paired", paired)
    arguments = ["--no_plot", "--passes", "forward", "--contenders", "CPU flash", "molsaki, sdpa", "--seconds", "1e3"]
    assert run(*arguments) == 0
    (path,) = here.glob("*/*.csv")
    records = layer.read_records(path)
    earlier = path.with_name("2000-01-01-000000-abc1234.csv")
    for r in records:
        for key in ("median_ms", "q1_ms", "q3_ms"):
            r[key] = r[key] / 100
        for key in ("over_sdpa", "over_sdpa_q1", "over_sdpa_q3"):
            r[key] = r[key] if "CPU flash" in r["contender"] else r[key] / 100
        r["commit"] = "abc1234"
    layer.write_csv(earlier, records)
    path.unlink()
    layer.write_csv(path.with_name("2001-01-01-000000-def5678.csv"), [{**r, "device": "another"} for r in records])
    layer.write_csv(path.with_name("2002-01-01-000000-def5678.csv"), [{**r, "shape": "another"} for r in records])
    assert run(*arguments, "--fail_on_slower", "20") == compare.SLOWER_STATUS
    output = capsys.readouterr()
    assert "abc1234 of" in output.out and "0 faster, 1 slower, 0 no change" in output.out
    assert "molsaki, sdpa" in output.err and "sdpa, CPU flash" not in output.err
    assert run(*arguments, "--compare", "none") == 0
    assert run(*arguments, "--compare", str(earlier)) == 0  # reported, but not a failure
    monkeypatch.setattr(bench, "RUNS", here.parent / "elsewhere")
    assert run(*arguments, "--save", str(here.parent / "my.csv")) == 0
    assert "no earlier run" in capsys.readouterr().out and (here.parent / "my.json").exists()


def test_no_time_for_a_wrong_result(here, capsys, monkeypatch):
    """A contender of ours whose output is wrong by a percent: no record, the fault in the table, exit status 1."""
    usual = candidates.candidates

    def with_a_fault(device, shape, slow_builds=False):
        def wrong(x):
            out, maps = mk.stepwise_attention(x.q, x.k, x.v, x.plan, engine="sdpa")
            return out * 1.01, maps

        def refuses(x):
            raise ValueError("engine: 'sdpa' cannot serve this call")

        return [
            *usual(device, shape, slow_builds),
            candidates.Candidate("molsaki, wrong", "map", Contender("molsaki, wrong", "map", wrong)),
            candidates.Candidate("molsaki, refuses", "map", Contender("molsaki, refuses", "map", refuses)),
        ]

    for module in (bench, check):
        monkeypatch.setattr(module, "candidates", with_a_fault)
    assert run("--no_plot", "--contenders", "CPU flash", "wrong", "refuses") == 1
    output = capsys.readouterr()
    assert "not measured: molsaki, wrong: out is wrong: relative error 1.0e-02" in output.out
    assert "not measured: molsaki, refuses: engine: 'sdpa' cannot serve this call" in output.out
    assert output.err.count("FAILED: molsaki, wrong") == 2 and "refuses" not in output.err
    (path,) = here.glob("*/*.csv")
    assert {r["contender"] for r in layer.read_records(path)} == {"sdpa, CPU flash"}


def test_an_interrupted_run_keeps_what_it_has(here, capsys, monkeypatch):
    usual, calls = bench.measured, []

    def interrupted(*facts):
        calls.append(facts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return usual(*facts)

    monkeypatch.setattr(bench, "measured", interrupted)
    assert run("--no_plot", "--contenders", "CPU flash") == bench.INTERRUPTED
    (path,) = here.glob("*/*.csv")
    assert {r["pass"] for r in layer.read_records(path)} == {"forward+backward"}
    assert "Interrupted" in capsys.readouterr().err


def test_without_matplotlib(here, capsys, monkeypatch):
    for name in ("bench_plot", "plots"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
        monkeypatch.delattr(benchmarks, name, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("--passes", "forward", "--contenders", "CPU flash") == 0
    assert "pip install" in capsys.readouterr().out


@pytest.mark.slow
def test_the_probe_measures_memory_in_a_process_of_its_own():
    """Eager attention keeps 9 x 512 x 512 weights of 4 bytes several times; engine sdpa keeps none."""
    if not check.CLEAR.exists():
        pytest.skip("needs Linux's /proc")
    shape = Shape(1, 512, 8, 4)
    with check.Worker(DEVICE) as worker:
        found = {name: worker.probe(shape, name, True) for name in ("molsaki, sdpa", "eager with weights")}
        assert worker.probe(shape, "nothing of this name", True).reason is not None
    weights = 9 * 512**2 * 4 / 2**20
    assert found["eager with weights"].peak_mib > 3 * weights > weights > found["molsaki, sdpa"].peak_mib > 1
    assert all(p.error is not None and p.seconds > 0 for p in found.values())


def test_a_process_that_dies_is_replaced(monkeypatch):
    made = []

    class Pool:
        def __init__(self, *_, **__):
            made.append(self)

        def submit(self, *_):
            result = concurrent.futures.Future()
            if self is made[0]:
                result.set_exception(BrokenProcessPool("killed"))
            else:
                result.set_result(check.Probe(error=0.5))
            return result

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    with check.Worker(DEVICE) as worker:
        assert "killed" in worker.probe(SMALL, "molsaki, sdpa", False).reason
        assert worker.probe(SMALL, "molsaki, sdpa", False) == check.Probe(error=0.5)
        assert worker.probe(SMALL, "molsaki, sdpa", False) == check.Probe(error=0.5)
    assert len(made) == 2


def test_rounds_pair_every_call_with_the_references(monkeypatch):
    """The slow function takes part in few rounds, spread over all; one twice as slow is not a reference."""
    now, called = [0.0], []
    costs = {"plain": 1e-3, "other plain": 1.2e-3, "slow plain": 3e-3, "ours": 0.5e-3, "eager": 0.4}

    def make(name):
        def function():
            called.append(name)
            now[0] += costs[name]

        return function

    def clock(function):
        before = now[0]
        function()
        return now[0] - before

    monkeypatch.setattr(measure, "_clock", clock)
    functions = {name: make(name) for name in costs}
    times = measure.paired(functions, DEVICE, 1.0, ["plain", "other plain", "slow plain"])
    rounds = {name: set(found) for name, found in times.items()}
    assert rounds["plain"] == rounds["other plain"] and len(rounds["plain"]) > 190
    assert all(found <= rounds["plain"] for found in rounds.values())
    assert len(rounds["eager"]) == 3 and max(rounds["eager"]) - min(rounds["eager"]) > 95
    assert 3 < len(rounds["slow plain"]) < measure.MAX_ROUNDS
    assert all(t == pytest.approx(costs[name]) for name, found in times.items() for t in found.values())
    last = [name for name in called if name != "eager"][-200:]
    assert len({tuple(last[i : i + 2]) for i in range(0, 200, 2)}) > 3  # no fixed order


def test_candidates_are_all_named_with_a_reason_or_a_contender(monkeypatch):
    found = candidates.candidates(DEVICE, SMALL)
    assert all((c.contender is None) != (c.reason is None) for c in found)
    names = [c.name for c in found]
    assert len(set(names)) == len(names)
    for engine in mk.engines():
        assert any(name.startswith(f"molsaki, {engine}") for name in names), engine
    monkeypatch.setattr(candidates, "free_bytes", lambda _: 1 << 30)
    large = {c.name: c for c in candidates.candidates(DEVICE, CPU[-1])}
    for name in candidates.MATERIALISES:
        assert re.fullmatch(r"its weights need about 3\.4 GiB, 1\.0 GiB are free", large[name].reason)
    assert large["sdpa, CPU flash"].contender and large["molsaki, sdpa"].contender


def test_candidates_of_a_gpu(monkeypatch):
    """The list for a simulated Hopper GPU; its contenders are not run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(candidates, "free_bytes", lambda _: 100 << 30)
    flash = importlib.util.find_spec("flash_attn")
    found = {c.name: c for c in candidates.candidates(torch.device("cuda"), CPU[1], slow_builds=True)}
    for name in (*candidates.SDPA, "FlexAttention", "molsaki, sdpa", "molsaki, sdpa (cuDNN)", "molsaki, eager"):
        assert found[name].contender is not None, name
    assert flash or found["flash-attn 2"].reason == "the module flash_attn is not installed"
    assert found["flash-attn 3"].contender or "flash_attn_interface" in found["flash-attn 3"].reason
    assert found["molsaki, native"].reason is not None
    few = {c.name: c for c in candidates.candidates(torch.device("cuda"), CPU[1])}
    assert "--size full" in few["FlexAttention"].reason


@pytest.mark.parametrize("dtype, predicted", [("bfloat16", True), ("float32", False)])
def test_measured_on_a_gpu_that_computes_on_the_cpu(here, monkeypatch, dtype, predicted):
    """The path of a CUDA device, with PyTorch's CUDA functions replaced: warm-up, memory, launches, clocks."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(measure, "cuda_clock", measure._clock)
    monkeypatch.setattr(check, "cuda_peak", lambda call, device: [call(), 7.25][1])
    monkeypatch.setattr(bench, "make_sets", lambda shape, device: layer.make_sets(shape, DEVICE) * 2)
    monkeypatch.setattr(bench, "launches", lambda call, device: [call(), 5][1])
    monkeypatch.setattr(bench, "auto_contender", lambda *_: "molsaki, sdpa")
    monkeypatch.setattr(check, "_case", _case_on_cpu)
    for module in (bench, check):
        monkeypatch.setattr(module, "candidates", lambda device, *a, **b: candidates.candidates(DEVICE, *a, **b))
    arguments = bench.make_parser().parse_args(["--contenders", "CPU flash", "molsaki, sdpa", "map alone"])
    shape = dataclasses.replace(SMALL, dtype=dtype)
    facts = {"device": "NVIDIA H200", "arch": "sm90", "commit": "c", "date": "d", "torch": "t", "isa": ""}
    records, lines, failures = bench.measured(shape, True, arguments, cuda, facts, check.Worker(cuda), 0.05)
    assert not failures and {r["contender"] for r in records} == {"sdpa, CPU flash", "molsaki, sdpa", "the map alone"}
    assert all(r["peak_mib"] == 7.2 and r["launches"] == 5 and bool(r["predicted_ms"]) is predicted for r in records)
    assert any("what auto takes" in line for line in lines)


def _case_on_cpu(shape: Shape, device: torch.device) -> tuple[Inputs, check.Expected]:
    inputs = with_lse(shape.inputs(DEVICE))
    return inputs, check.expected(inputs)


@needs_the_stand_in
def test_on_the_stand_in(tmp_path):
    """Every contender of a GPU takes the whole path to its launches; there are no values to check."""
    out = tmp_path / "run.csv"
    arguments = ("--device", "cuda", "--shapes", "2x64", "--seconds", "0.01", "--save", str(out), "--no_plot")
    done, keys = stand_in(tmp_path, "--dry", "benchmarks", *arguments, "--compare", "none")
    assert done.returncode == 0, done.stdout
    names = {r["contender"] for r in layer.read_records(out)}
    expected = {"molsaki, triton", "molsaki, sdpa"}
    if torch.version.cuda is None:  # seen with a CUDA build: flash attention asks for a device, eager for values
        expected |= {"sdpa, aten flash", "eager with weights"}
    assert expected <= names, done.stdout
    assert keys


def record(contender: str, ms: float, over_sdpa: float | None = None, spread: float = 0.04, **facts) -> dict:
    kind = "plain" if contender.startswith("sdpa") else "map"
    half = spread / 2
    found = {
        "shape": "1x64", "batch": 1, "tokens": 64, "q_heads": 1, "kv_heads": 1, "head_dim": 8, "words": 2, "steps": 2,
        "dtype": "float32", "pass": "forward", "mode": "eager", "contender": contender, "kind": kind, "calls": 100,
        "median_ms": ms, "q1_ms": ms * (1 - half), "q3_ms": ms * (1 + half), "fastest_plain": "sdpa, CPU flash",
        "fastest_sdpa": "sdpa, CPU flash", "device": "here", "torch": "2", "commit": "c", "date": "d", "isa": "",
    }  # fmt: skip
    if over_sdpa is not None:
        found |= {
            "over_sdpa": over_sdpa,
            "over_sdpa_q1": over_sdpa * (1 - half),
            "over_sdpa_q3": over_sdpa * (1 + half),
        }
    return {**found, **facts}


def change(before: dict, after: dict) -> compare.Change:
    (found,) = compare.compared(compare.measurements([before]), compare.measurements([after]))
    return found


def test_a_slow_period_of_the_machine_is_no_change():
    """Both the time of ours and that of SDPA double: their ratio stays."""
    found = change(record("molsaki, x", 1.0, 0.7), record("molsaki, x", 2.0, 0.7))
    assert found.by_ratio and found.verdict == "no change" and found.change == 0
    slower = change(record("molsaki, x", 1.0, 0.7), record("molsaki, x", 1.0, 0.9))
    assert slower.verdict == "slower" and slower.change == pytest.approx(0.9 / 0.7 - 1)
    assert change(record("molsaki, x", 1.0, 0.9), record("molsaki, x", 1.0, 0.7)).verdict == "faster"
    # Another torch has another SDPA, so that the times themselves are compared.
    other = change(record("molsaki, x", 1.0, 0.7), record("molsaki, x", 2.0, 0.7, torch="3"))
    assert not other.by_ratio and other.change == 1 and other.verdict == "slower"


def test_the_verdict_depends_on_the_spread():
    """A change of 12 %: beyond the noise of 100 calls that spread by 4 %, within that of calls that spread by 80 %."""
    for spread, verdict in ((0.04, "slower"), (0.8, "no change")):
        found = change(record("molsaki, x", 1.0, 0.7, spread), record("molsaki, x", 1.12, 0.784, spread))
        assert found.verdict == verdict, found
        assert found.noise == pytest.approx(max(compare.LEAST, 2 * 1.57 * spread / 10))
    unknown = {"q1_ms": None, "q3_ms": None}  # as in records of benchmarks.layer
    found = change(record("molsaki, x", 1.0, **unknown), record("molsaki, x", 1.12, **unknown))
    assert found.verdict == "no change" and found.noise == pytest.approx(2 * compare.UNKNOWN)
    found = change(record("molsaki, x", 1.0, **unknown), record("molsaki, x", 1.3, **unknown))
    assert found.verdict == "slower"
    single = change(record("molsaki, x", 1.0, calls=1), record("molsaki, x", 9.0, calls=1))
    assert single.verdict == "too few calls"
    # The median moved and the first quartile did not: other work took half of the machine for half of the time.
    disturbed = change(record("molsaki, x", 1.0), record("molsaki, x", 1.5, q1_ms=1.0, q3_ms=1.52))
    assert disturbed.change == 0.5 > disturbed.noise and disturbed.verdict == "no change"


def test_status_counts_ours_only(capsys):
    before = [record("molsaki, x", 1.0, 0.7), record("sdpa, CPU flash", 1.0, 1.0)]
    after = [record("molsaki, x", 1.0, 0.8), record("sdpa, CPU flash", 3.0, 1.0)]
    changes = compare.compared(compare.measurements(before), compare.measurements(after))
    assert [c.verdict for c in changes] == ["slower", "the reference"]
    assert compare.status(changes, None) == 0 and compare.status(changes, 20.0) == 0
    assert compare.status(changes, 10.0) == compare.SLOWER_STATUS
    assert compare.status(changes[1:], 10.0) == 0
    lines = compare.report(changes, "before.csv")
    assert any("itself changed by up to +200 %" in line for line in lines)
    assert any(line == "Of ours: 0 faster, 1 slower, 0 no change." for line in lines)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", ["layer-xeon-2core", "layer-h200", "step-xeon-2core", "step-h200"])
def test_committed_records_can_be_compared(name, capsys):
    path = str(RESULTS / f"{name}.csv")
    assert compare.main([path, path, "--fail_on_slower", "0"]) == 0
    printed = capsys.readouterr().out
    assert "no change" in printed and "0 faster, 0 slower" in printed


def test_compare_refuses_other_files(tmp_path, capsys):
    good = str(RESULTS / "layer-xeon-2core.csv")
    with pytest.raises(SystemExit):
        compare.main([good, str(RESULTS / "tiles-h200.csv")])
    assert "after" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "nothing.csv"), good])
    assert "before" in capsys.readouterr().err
    assert compare.main([good, str(RESULTS / "layer-h200.csv")]) == 1
    assert "in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shapes", "2048"], "--shapes"),
        (["--shapes", "1x16:40x2"], "--shapes"),
        (["--shapes", "0x16"], "--shapes"),
        (["--shapes", "1x16", "--heads", "8/3"], "--heads"),
        (["--heads", "8/4"], "--heads"),
        (["--shapes", "1x16", "--head_dim", "0"], "--head_dim"),
        (["--device", "mps"], "--device"),
        (["--threads", "0"], "--threads"),
        (["--compare", "nowhere.csv"], "--compare"),
    ],
)
def test_refused_options(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--device", "cpu", *arguments])
    assert stop.value.code == 2 and f"error: {named}" in capsys.readouterr().err


def test_shapes_that_are_asked_for():
    parser = bench.make_parser()

    def shapes(*arguments):
        return bench.shapes_of(parser.parse_args(["--device", "cpu", *arguments]), parser, DEVICE)

    assert shapes() == CPU
    assert [s.name for s in shapes("--shapes", "1x2048")] == [CPU[1].name]
    (own,) = shapes("--shapes", "3x100:4x9", "--heads", "8/2", "--head_dim", "32", "--dtype", "bf16")
    assert own == Shape(3, 100, 9, 4, 8, 2, 32, "bfloat16")
    assert {s.dtype for s in shapes("--dtype", "bfloat16", "--size", "full")} == {"bfloat16"}
    names = [s.name for s in shapes("--dtype", "bfloat16", "--size", "full")]
    assert len(names) == len(set(names))
    for size in bench.SIZES:
        assert bench.cuda_shapes(size)[0].tokens == 256 and len(bench.cuda_shapes(size)) >= 3


def test_only_slow_contenders_that_store_the_weights_are_timed_once(monkeypatch):
    found = {c.name: c for c in candidates.candidates(DEVICE, SMALL) if c.contender is not None}
    probes = {name: check.Probe(error=0.0, seconds=5.0) for name in found}
    times = bench.timed(SMALL, False, found, probes, DEVICE, 0.01)
    once = {name for name, rounds in times.items() if len(rounds) == 1}
    assert set(times) == set(found) and once == set(candidates.MATERIALISES)
    assert all(times[name] == {-1: 5.0} for name in once)
    fast = dict.fromkeys(found, check.Probe(error=0.0, seconds=1e-3))
    assert all(len(rounds) >= 3 for rounds in bench.timed(SMALL, False, found, fast, DEVICE, 0.01).values())


def test_list_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measured"))
    assert bench.main(["--device", "cpu", "--list"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("would measure") == 3 and "Not measured here" in printed


def test_the_machine(monkeypatch, tmp_path):
    found = machine.machine_of(DEVICE)
    assert found["isa"] == "+".join(machine.isa()) and found["torch"] == torch.__version__
    facts = {"device": "Intel(R) Xeon(R) Processor, 2 threads", "isa": "avx2+avx512+amx"}
    assert machine.folder_of(facts) == "intel-xeon-processor-2-threads-amx"
    assert machine.folder_of({**facts, "isa": "avx2+avx512"}) == "intel-xeon-processor-2-threads-avx512"
    assert machine.folder_of({"device": "NVIDIA H200", "isa": ""}) == "nvidia-h200"
    if shutil.which("git") is None:
        return
    monkeypatch.delenv("COMMIT", raising=False)
    run = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*run, *command], check=True)
    clean = machine.commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "file").write_text("1")
    assert machine.commit_of(tmp_path) == clean  # not tracked
    subprocess.run([*run, "add", "file"], check=True)
    assert machine.commit_of(tmp_path) == f"{clean}-dirty"


def test_reasons_of_pytorchs_attention():
    """It says why a backend cannot serve a call in warnings, and raises an error without a reason."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.warn("Flash attention kernel not used because: (Triggered internally at a.cpp:1)", stacklevel=1)
        warnings.warn("Expected query to be half. (Triggered internally at a.cpp:2)", stacklevel=1)
        warnings.warn("CuDNN attention has been runtime disabled. (Triggered internally at a.cpp:3)", stacklevel=1)
    assert check._why(RuntimeError("No available kernel. Aborting execution."), said) == "Expected query to be half."
    assert check._why(RuntimeError("other\nlines"), said) == "other"


def test_a_training_step(here, capsys):
    arguments = ["--what", "step", "--device", "cpu", "--model", "tiny", "--shapes", "2x64:3x5", "--seconds", "0.1"]
    arguments += ["--no_memory", "--no_plot"]
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "A training step of tiny, batch 2x64, float32" in printed and "a step with stored maps takes" in printed
    (path,) = here.glob("*/*.csv")
    records = layer.read_records(path)
    with (RESULTS / "step-xeon-2core.csv").open(newline="") as file:
        assert set(next(csv.reader(file))) <= set(records[0])
    found = {(r["contender"], r["quantity"]): r for r in records}
    assert {name for name, _ in found} == set(bench_step.CONTENDERS)
    assert found["molsaki, stored maps", "time over dss"]["target"] == 1.1
    assert found["eager", "loss"]["value"] == pytest.approx(found["molsaki, live teacher", "loss"]["value"], rel=1e-4)
    assert bench.main(arguments) == 0
    assert "Compared with" in capsys.readouterr().out


def test_wrong_losses_of_steps():
    losses = {
        "dss": 1.0,
        "dss, sdpa": 1.1,
        "eager": 2.0,
        "molsaki, live teacher": 2.0,
        "molsaki, stored maps": math.nan,
    }
    found = bench_step.wrong(losses, 1e-4)
    assert set(found) == {"dss, sdpa", "molsaki, stored maps"} and "that of dss is 1" in found["dss, sdpa"]


def test_long_times_and_ratios_stay_in_their_columns():
    rows = [
        bench_table.Row("molsaki, flash_attn (own preprocess)", 123456.7, 1234.5, 1000.0, 2000.0, 123456.7, "one call"),
        bench_table.Row("a", 0.01234, 0.5, 0.45, 0.55, None, "fastest plain, what auto takes"),
    ]
    lines = bench_table.table("title", "x plain", rows, [("name", "word " * 60)])
    assert max(map(len, lines)) <= 120 and lines[2].index("one call") == lines[3].index("fastest plain")


def test_step_of_contenders_is_the_projects():
    """The timed function is the checked one: the same function of contenders."""
    assert bench.step is step and check.step is step
