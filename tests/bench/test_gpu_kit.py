"""Tests the preparation of a GPU machine: the stand-in for a device, the kit, and the selection of kernels."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_kit, layer
from benchmarks.shapes import cuda_grid
from tests.helpers import budget, hardware_cases, kernel_cases

ROOT = Path(__file__).parents[2]


def stand_in(tmp_path: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """Run a program on the stand-in; return the process and the kernels that it requested."""
    keys = tmp_path / "keys.jsonl"
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stand_in", "--keys", str(keys), *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=variables | environment,
    )  # fmt: skip
    return done, gpu_kit.read_keys(keys)


needs_the_stand_in = pytest.mark.skipif(
    torch.version.cuda is None
    or not importlib.metadata.version("triton").startswith(("3.6", "3.7"))
    or shutil.which("gcc") is None,
    reason="the stand-in takes a CUDA build of torch, Triton 3.6 and gcc: the GPU machine's environment",
)


@needs_the_stand_in
def test_every_kernel_is_launched_by_the_small_cases(tmp_path):
    done, keys = stand_in(tmp_path, "--dry", "benchmarks.small_cases")
    assert done.returncode == 0 and "small cases: done" in done.stdout, done.stdout
    sources = "".join(path.read_text() for path in (ROOT / "molsaki_kernels/_triton").glob("*.py"))
    kernels = {
        line.split("(")[0][4:] for line in sources.splitlines() if line.startswith("def ") and "_kernel(" in line
    }
    kernels.remove("fa4_preprocess_kernel")  # needs flash-attn 4, and is launched only if asked for
    assert len(kernels) > 8 and {key["kernel"] for key in keys} == kernels


@needs_the_stand_in
def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    """The kernels, under the same keys, and their C launchers."""
    case = ("pytest", "-q", "-m", "gpu", "tests/kernels/triton/test_lse_gradient.py", "-k", "torch.bfloat16-1-64-none")
    done, filled = stand_in(tmp_path, *case, TRITON_STORE_BINARY_ONLY="1")
    assert done.returncode == 0 and filled and not any(key["known"] for key in filled), done.stdout
    assert list((tmp_path / "triton").glob("*/__triton_launcher*.so"))
    (tmp_path / "keys.jsonl").unlink()
    done, again = stand_in(tmp_path, "--dry", *case)
    assert done.returncode == 0 and all(key["known"] for key in again), done.stdout
    assert {key["key"] for key in again} == {key["key"] for key in filled}


def test_keys_are_counted():
    keys = [
        {"kernel": "map_dq_kernel", "key": "a", "known": False, "seconds": 1.5},
        {"kernel": "map_dq_kernel", "key": "b", "known": True, "seconds": 0.0},
        {"kernel": "fold_kernel", "key": "a2", "known": False, "seconds": 2.0},
        {"kernel": "map_dq_kernel", "key": "b", "known": True, "seconds": 0.0},
    ]
    text = gpu_kit.count_keys(keys)
    assert text == "3 kernels (map_dq 2, fold 1), 1 of them in the cache, 4 CPU seconds to compile"


def prepare(tmp_path, monkeypatch, failing=()):
    """A kit made from an invented cache: a requested kernel, one of earlier code, a launcher, flash-attn 4."""
    home = tmp_path / "made"
    asked, earlier = "ab" * 32, "cd" * 32
    monkeypatch.setattr(gpu_kit, "VERSIONS", {})
    monkeypatch.setattr(gpu_kit, "triton_key", lambda: "12" * 32)
    monkeypatch.setattr(gpu_kit, "install_flash4", lambda site: write(site / "flash_attn/__init__.py", b"VERSION = 4"))
    for key in (asked, earlier):
        write(home / "triton" / gpu_kit.cache_folder(key) / "kernel.cubin", b"machine code")
    write(home / "triton/LAUNCHER/__triton_launcher.so", b"not a library")
    write(home / "flash-attn-4-cache/a.o", os.urandom(5000))
    key = {"kernel": "fold_kernel", "key": asked, "known": True, "seconds": 0.0}

    def rehearse(command, env, **_):
        write(Path(env["OUT"]) / "keys.jsonl", json.dumps(key).encode())
        write(Path(env["OUT"]) / "status.txt", b"small: passed, 1 s")
        assert env["REHEARSE"] in ("fill", "dry")
        return subprocess.CompletedProcess(command, int(env["REHEARSE"] in failing))

    monkeypatch.setattr(gpu_kit.subprocess, "run", rehearse)
    monkeypatch.setattr(gpu_kit, "commit", lambda: "abc1234")
    gpu_kit.prepare(tmp_path / "kit", home, True, ["first", "second"])
    monkeypatch.undo()
    monkeypatch.setattr(gpu_kit, "triton_key", lambda: "12" * 32)
    return tmp_path / "kit"


@pytest.fixture
def kit(tmp_path, monkeypatch):
    return prepare(tmp_path, monkeypatch)


def test_a_failed_rehearsal_is_an_error_after_the_kit_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="rehearsals failed: dry first, dry second; their logs are in"):
        prepare(tmp_path, monkeypatch, failing=("dry",))
    assert (tmp_path / "kit/first/triton.tar.xz").exists() and (tmp_path / "kit/second/flash4.2").exists()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_both_halves_are_unpacked(kit, tmp_path):
    home = tmp_path / "home"
    lines = gpu_kit.unpack("first", kit, home)
    assert lines[0] == "kit: 1 kernels, 1 of 1 keys matched when it was made"  # not those of earlier code
    assert lines[1].endswith("the same here") and "1 launchers do not load here" in lines[2]
    assert [path.name for path in (home / "triton").iterdir()] == [gpu_kit.cache_folder("ab" * 32)]
    assert (kit / "first/commit").read_text() == "abc1234\n"
    (line,) = gpu_kit.unpack("second", kit, home)
    assert line == "kit: flash-attn 4 unpacked, 1 compiled kernels"
    assert (home / "flash-attn-4/flash_attn/__init__.py").exists()


def test_the_second_half_says_what_it_misses(kit, tmp_path):
    (kit / "first").rename(tmp_path / "elsewhere")
    lines = gpu_kit.unpack("second", kit, tmp_path / "home")
    assert "every kernel is compiled anew" in lines[0]
    assert "first half of flash-attn 4 is not on this machine" in lines[1]
    write(tmp_path / "home/flash4.1", b"of another kit")
    assert "not of one kit" in gpu_kit.unpack("second", kit, tmp_path / "home")[-1]
    (line,) = gpu_kit.unpack("first", tmp_path / "nothing", tmp_path / "home")
    assert "compiled as they are needed" in line


def test_the_second_half_brings_the_kernels_where_the_first_script_did_not_run(kit, tmp_path):
    lines = gpu_kit.unpack("second", kit, tmp_path / "home")
    assert lines[0].startswith("kit: 1 kernels") and lines[-1].startswith("kit: flash-attn 4 unpacked")
    assert list((tmp_path / "home/triton").glob("*/*.cubin"))


def test_it_is_unpacked_without_the_program_xz(kit, tmp_path, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "xz" else which(name))
    monkeypatch.setattr(gpu_kit.subprocess, "run", None)  # tar would need xz
    assert gpu_kit.unpack("first", kit, tmp_path / "home")[0].startswith("kit: 1 kernels")


def test_another_triton_is_named(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kit, "triton_key", lambda: "34" * 32)
    assert "every kernel is compiled anew" in gpu_kit.unpack("first", kit, tmp_path / "home")[1]


def test_a_half_that_is_too_large_is_refused(tmp_path, monkeypatch, request):
    monkeypatch.setattr(gpu_kit, "LIMIT", 100)
    with pytest.raises(ValueError, match="kit/.* is larger than"):
        request.getfixturevalue("kit")


def test_other_versions_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_kit, "VERSIONS", {"torch": "1.0"})
    assert gpu_kit.main(["prepare", "--kit", str(tmp_path / "kit"), "--home", str(tmp_path / "home")]) == 1
    message = capsys.readouterr().err
    assert f"torch {torch.__version__}, expected 1.0" in message and "GPU_PYTHON" in message
    assert not (tmp_path / "kit").exists()
    assert gpu_kit.fits("2.11.0+cu130", "2.11") and not gpu_kit.fits("2.1.0", "2.11") and gpu_kit.fits("3.6", "3.6")


def test_kernels_for_the_profiler_are_the_slowest_against_their_predictions(tmp_path, capsys):
    path = tmp_path / "kernels.csv"
    names = {"map_dq_kernel": (60, 20), "map_dk_kernel": (30, 28), "fold_kernel": (90, 33), "elementwise": (5, None)}
    layer.write_csv(path, [{"kernel": k, "us": us, "predicted_us": expected} for k, (us, expected) in names.items()])
    assert gpu_kit.main(["slowest", str(path)]) == 0
    assert gpu_kit.main(["slowest", str(tmp_path / "nothing.csv")]) == 0
    assert capsys.readouterr().out.split() == ["map_dq|fold|map_dk", gpu_kit.DEFAULT_KERNELS]


def test_launches_have_the_predictions_of_their_stages():
    names = ("flash_forward_kernel", "map_dq_kernel", "cudnn", "map_dq_kernel", "map_dk_kernel")
    stages = [layer.stage(name, names[:i]) for i, name in enumerate(names)]
    assert stages == ["flash_forward", "map_dlse", "cudnn", "map_dq_add", "map_dk"]
    assert layer.stage("map_dq_kernel", ["map_dlse_kernel"]) == "map_dq_add"
    shape = next(shape for shape in cuda_grid() if shape.name.startswith("1x4096 H32/32 D128 W256"))
    expected = layer.predicted_kernels(shape, "NVIDIA H100 80GB HBM3", "molsaki, sdpa")
    assert {"map_dlse", "map_dq_add", "map_dk"} <= set(expected) and all(us > 0 for us in expected.values())
    assert layer.predicted_kernels(shape, "another", "molsaki, sdpa") == {}


def test_shares_of_the_budget_are_written(tmp_path, monkeypatch, capsys):
    """Every comparison of a check appends a line, a failed one too, and the summary prints the largest."""
    path = tmp_path / "shares.csv"
    monkeypatch.setenv("MOLSAKI_ERROR_SHARES", str(path))
    exact = {"out": torch.ones(4, dtype=torch.float64), "dq": torch.zeros(4, dtype=torch.float64)}
    eager = {"out": torch.tensor([1.0, 1.0, 1.0, 1.01]), "dq": torch.zeros(4)}
    found = {"out": torch.tensor([1.0, 1.0, 1.0, 1.005]), "dq": torch.tensor([0.0, 0.0, 0.0, 1e-6])}
    kernel_cases.check("sdpa default", found, exact, eager)
    with pytest.raises(AssertionError, match="triton default: out: error .* exceeds the budget"):
        kernel_cases.check("triton default", {"out": found["out"] + 1, "dq": found["dq"]}, exact, eager)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == budget.COLUMNS
    assert [(line["case"], line["result"], line["dtype"]) for line in lines] == [
        ("sdpa default", "out", "float32"), ("sdpa default", "dq", "float32"), ("triton default", "out", "float32"),
    ]  # fmt: skip
    assert float(lines[0]["share"]) == pytest.approx(0.25, rel=0.01)
    assert all(line["test"].endswith("::test_shares_of_the_budget_are_written") for line in lines)
    assert budget.main([str(path)]) == 1
    output = capsys.readouterr().out
    assert "3 comparisons, 1 over the budget" in output
    sdpa = next(line for line in output.splitlines() if line.startswith("sdpa") and " out " in line)
    assert sdpa.split()[:5] == ["sdpa", "float32", "out", "1", "0.250"]


def test_the_blockwise_oracle_is_the_oracle():
    """On a CPU; the hardware tests of long sequences compare with it."""
    x = hardware_cases.long_inputs(300, 4, 2, 32, torch.float64, 40, device="cpu")
    exact = kernel_cases.oracle(kernel_cases.Case("long", D=32), x, torch.float64, "both")
    found = hardware_cases.walk(x, torch.float64, rows=64)
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-10)
