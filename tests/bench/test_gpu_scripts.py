"""Tests the scripts for a GPU machine without a GPU: their order, time limits, early end, and output.

The scripts run with a stand-in for Python that succeeds, fails or waits as a test requires. ``test_gpu_kit.py`` tests
their Python commands without a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PYTHON = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
for rule in $RULES; do # PATTERN=STATUS, or PATTERN=sleep
  case "$*" in *"${rule%=*}"*)
    case ${rule#*=} in sleep) exec sleep 60 ;; *) echo "Traceback: ${rule%=*}"; exit "${rule#*=}" ;; esac ;;
  esac
done
exec >&2
case "$*" in *"-c import"*) ;; *) echo "ran $*" ;; esac
exit 0
"""


class Result:
    def __init__(self, run: subprocess.CompletedProcess, out: Path, calls: Path, seconds: float) -> None:
        self.code, self.output, self.seconds = run.returncode, run.stdout, seconds
        self.status = (out / "status.txt").read_text().splitlines()
        self.calls = calls.read_text().splitlines()
        self.files = {path.name for path in out.iterdir()}

    def parts(self) -> dict[str, str]:
        return dict(line.split(": ", 1) for line in self.status if ": " in line)

    def modules(self) -> list[str]:
        """What was run, without checks of versions and without arguments."""
        return [call.split()[1] for call in self.calls if call.startswith("-m ")]


@pytest.fixture
def run(tmp_path):
    if shutil.which("timeout") is None or os.name != "posix":
        pytest.skip("needs bash and timeout")

    def run_script(name: str, rules: str = "", **environment: str) -> Result:
        python, out, calls = tmp_path / "python", tmp_path / "out", tmp_path / "calls"
        python.write_text(PYTHON)
        python.chmod(0o755)
        calls.write_text("")
        path = tmp_path / "bin"  # none of NVIDIA's programs
        path.mkdir(exist_ok=True)
        begin = time.monotonic()
        done = subprocess.run(
            ["bash", str(BENCHMARKS / f"gpu_{name}.sh")], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=120, env=os.environ | {
                "PYTHON": str(python), "OUT": str(out), "CALLS": str(calls), "RULES": rules, "REHEARSE": "",
                "KIT": str(tmp_path / "kit"), "KIT_HOME": str(tmp_path / "home"), **environment,
            },
        )  # fmt: skip
        return Result(done, out, calls, time.monotonic() - begin)

    return run_script


def test_first_runs_everything_in_order(run):
    result = run("first")
    assert result.code == 0, result.output
    names = list(result.parts())
    tests = ["triton", "engines", "models"]
    assert names[0] == "small" and set(tests) < set(names)
    assert max(names.index(t) for t in tests) < names.index("bench") < names.index("kernels") < names.index("end")
    assert all(result.parts()[name].startswith("passed") for name in ("small", *tests, "bench", "kernels"))
    assert {"status.txt", "machine.txt", "logs.tar.gz"} <= result.files and len(result.files) <= 8
    bench = next(call for call in result.calls if "layer" in call and "--csv" in call)
    for shape in ("1x4096 H32/32 D128 W256", "16x256 H9/3 D64 W20", "2x2048 H32/32 D128 W64", "1x16384"):
        assert shape in bench


def test_first_ends_at_once_if_the_first_kernel_fails(run):
    result = run("first", "small_cases=1")
    assert result.code == 3 and result.parts()["small"].startswith("failed (exit status 1)")
    assert result.modules() == ["benchmarks.gpu_kit", "benchmarks.small_cases"]  # nothing after it
    assert any(line.startswith("the first kernels failed: nothing else was started") for line in result.status)
    assert "Traceback: small_cases" in result.output and result.seconds < 15
    assert "logs.tar.gz" in result.files


def test_first_ends_at_once_if_the_first_kernel_hangs(run):
    result = run("first", "small_cases=sleep", SMALL_SECONDS="5")
    assert result.code == 3 and result.parts()["small"].startswith("stopped after 5 s")
    assert result.seconds < 30


def test_first_continues_if_tests_fail(run):
    result = run("first", "test_engines=1")
    assert result.code == 1
    assert result.parts()["engines"].startswith("failed") and result.parts()["bench"].startswith("passed")


def test_a_part_is_stopped_at_its_limit_and_the_whole_at_its_own(run):
    result = run("first", "benchmarks.layer=sleep", BENCH_SECONDS="8", TOTAL_SECONDS="12")
    assert result.code == 1 and result.parts()["bench"].startswith("stopped after")
    assert result.parts()["kernels"] == "not started, no time left"
    assert result.seconds < 40


def test_nothing_starts_without_a_device(run):
    result = run("first", "torch.cuda.is_available())=1")
    assert result.code == 2 and "no CUDA device" in result.status and not result.modules()


def test_second_measures_after_a_first_run_that_passed(run):
    assert run("first").code == 0
    result = run("second")
    assert result.code == 0, result.output
    names = list(result.parts())
    tests = [names.index(name) for name in ("flash4-tests", "preprocess", "long", "repeats", "float16")]
    assert names.index("flash4") < min(tests) and max(tests) < names.index("bench")
    assert len(result.files) <= 8


def test_second_skips_flash_attn_4_where_it_does_not_import(run):
    result = run("second", "flash_attn.cute=1")
    assert result.parts()["flash-attn 4"].startswith("skipped")
    assert not any("flash4" in call for call in result.calls) and result.parts()["bench"].startswith("passed")
    assert "flash4-tests" not in result.parts() and result.parts()["long"].startswith("passed")


def test_second_runs_failed_tests_again_before_it_measures(run):
    run("first", "test_engines=1")
    result = run("second")
    assert any("a test of the first run failed" in line for line in result.status)
    names = list(result.parts())
    assert names.index("again") < names.index("bench")


def test_steps(run):
    result = run("steps", "--compile=1")
    parts = result.parts()
    assert parts["smollm2-135m"].startswith("passed") and parts["1b"].startswith("passed")
    assert result.code == 1 and parts["compiled"].startswith("failed")


def test_tests_run_in_several_processes(run):
    """If pytest-xdist is there."""
    calls = [call for call in run("first").calls if call.startswith("-m pytest")]
    assert len(calls) >= 4 and all(" -n " in call for call in calls)
    calls = [call for call in run("first", "xdist=1").calls if call.startswith("-m pytest")]
    assert len(calls) >= 4 and not any(" -n " in call for call in calls)


@pytest.mark.parametrize("name", ["first", "second", "steps"])
def test_a_rehearsal_runs_every_command_on_the_stand_in(run, name):
    result = run(name, REHEARSE="dry")
    assert result.code == 0, result.output
    measured = [call for call in result.calls if "benchmarks." in call and "experiments" not in call.split()[1]]
    assert measured and all(call.startswith("-m benchmarks.stand_in --dry --keys ") for call in measured)
    assert run(name, REHEARSE="some").code == 2


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.fixture
def study(tmp_path):
    """The folder of a study that was prepared, with a run that was finished before."""
    folder = tmp_path / "study"
    for name in ("results/svamp/dss/1/result.json", "results/svamp/dss/1/student/weights", "results/stores/maps"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "results" / "results.csv").write_text("data\n")
    (folder / "results" / "report.md").write_text("# Report\n")
    (folder / "real-gpu.yaml").write_text("options:\n  max_steps: 400\n  bf16: true\n")
    return folder


def test_study_keeps_results_if_it_is_stopped(run, study, tmp_path):
    limits = {"TOTAL_SECONDS": "24", "END_SECONDS": "10", "STEPS": "7", "PROCESSES": "3"}
    result = run("study", "--processes=sleep", FOLDER=str(study), DATA=str(tmp_path), **limits)
    parts = result.parts()
    assert result.code == 1 and parts["prepare"].startswith("passed") and parts["teacher"].startswith("passed")
    assert parts["students"].startswith("stopped after") and parts["report"].startswith("passed")
    assert "  max_steps: 7\n" in (study / "real-gpu.yaml").read_text()
    assert {"results.csv", "report.md", "results.tar.gz", "logs.tar.gz"} <= result.files and len(result.files) <= 8
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        names = archive.getnames()
    assert "results/svamp/dss/1/result.json" in names and not [n for n in names if "student" in n or "stores" in n]


def test_study_needs_data(run):
    result = run("study", DATA="")
    assert result.code == 2 and "DATA: expected the folder of the data sets, got nothing" in result.status


def test_limits_add_up():
    """The limits of the scripts fit into the ten minutes that a call may take elsewhere."""
    for name, most in (("first", 360), ("second", 300), ("steps", 240), ("study", 540)):
        text = (BENCHMARKS / f"gpu_{name}.sh").read_text()
        total = next(line for line in text.splitlines() if line.startswith("TOTAL_SECONDS="))
        assert int(total.split(":-")[1].rstrip("}")) <= most
    assert sys.executable


def test_second_measures_if_the_tests_were_only_stopped(run):
    run("first", "test_engines=sleep", TESTS_SECONDS="5")
    result = run("second")
    assert "again" not in result.parts() and result.parts()["bench"].startswith("passed")


def test_second_runs_the_first_failed_tests_again(run, tmp_path):
    """In the order in which they failed, also from the packed logs of another machine."""
    logs, first = tmp_path / "logs", tmp_path / "copied"
    logs.mkdir()
    first.mkdir()
    (logs / "triton.log").write_text(
        "tests/kernels/a.py::test_z[1] PASSED [ 5%]\n"
        "tests/kernels/a.py::test_y[torch.bfloat16-64] FAILED [ 10%]\n"
        "[gw3] [ 15%] FAILED tests/kernels/a.py::test_x[2] \n"
        "tests/kernels/a.py::test_b ERROR [ 20%]\n"
        "FAILED tests/kernels/a.py::test_b - AssertionError\n"
        "tests/kernels/a.py::test_c Fatal Python error: Aborted\n"
    )
    (first / "status.txt").write_text("triton: failed (exit status 134), 9 s\n")
    subprocess.run(["tar", "-czf", first / "logs.tar.gz", "-C", logs, "."], check=True)
    result = run("second", FIRST=str(first))
    call = next(call for call in result.calls if call.startswith("-m pytest"))
    names = [word.split("::")[1] for word in call.split() if "::" in word]
    assert names == ["test_y[torch.bfloat16-64]", "test_x[2]", "test_b", "test_c"]


FAULT = """
import pytest, torch

@pytest.mark.parametrize("i", range(6))
def test_kernel(i):
    if i == 2:  # as after a fault in a kernel
        def fail():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, fail
        assert False, "wrong"
"""


def test_a_fault_in_a_kernel_ends_one_process_and_one_test(tmp_path):
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_fault.py").write_text(FAULT)
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert "1 failed, 5 passed" in done.stdout, done.stdout + done.stderr
    assert "fault in " in done.stderr and "wrong" in done.stderr
