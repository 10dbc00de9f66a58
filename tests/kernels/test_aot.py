"""The command of the ahead-of-time compiler: its report, and its failures."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest

from molsaki_kernels import aot

pytest.importorskip("triton")

ARGUMENTS = ["--target", "cuda:90"]
COMPILED = aot.Report(
    "flash_forward-bf16-d64",
    "flash_forward_kernel",
    "cuda:90",
    registers=128,
    spills=0,
    shared=65536,
    wgmma=True,
    matrix="wgmma",
    warps=4,
    stages=2,
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=500)


def test_json_of_a_few_variants(tmp_path):
    """In an environment that interprets kernels, with an empty cache."""
    command = ["-m", "molsaki_kernels.aot", *ARGUMENTS, "--json", "--filter", "fold-bf16", "--jobs", "2"]
    result = run(*command, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert {"fold-bf16-d64", "fold-bf16-d128"} <= {row["name"] for row in rows}
    for row in rows:
        assert row["target"] == "cuda:90" and 16 <= row["registers"] <= 255
        assert row["spills"] == 0 and row["shared"] <= 227 * 1024 and row["wgmma"] is False
        assert row["failures"] == []


def test_amd():
    result = run("-m", "molsaki_kernels.aot", "--target", "hip:gfx942", "--filter", "fold-bf16-d64")
    assert result.returncode == 0, result.stderr
    header, row, *_ = (line.split() for line in result.stdout.splitlines())
    assert row[0] == "fold-bf16-d64" and row[header.index("spills")] == "0"


def test_nothing_to_compile():
    result = run("-m", "molsaki_kernels.aot", *ARGUMENTS, "--filter", "no such kernel")
    assert result.returncode == 1 and "no such kernel" in result.stderr


def test_failures_end_in_a_failing_exit_status(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # the command removes it
    failed = dataclasses.replace(COMPILED, failures=("spills 12 registers",))
    monkeypatch.setattr(aot, "compile_all", lambda *_: [COMPILED, failed])
    assert aot.main(ARGUMENTS) == 1
    assert capsys.readouterr().err == "FAILED flash_forward-bf16-d64: spills 12 registers\n"
    monkeypatch.setattr(aot, "compile_all", lambda *_: [COMPILED])
    assert aot.main(ARGUMENTS) == 0


@pytest.mark.parametrize(
    "change, flags, target, words",
    [
        ({}, dict(D=64), "cuda:90", None),
        (dict(spills=8), dict(D=128, HAS_WINDOW=False), "cuda:90", "spills 8"),
        (dict(spills=8), dict(D=128, HAS_WINDOW=True), "cuda:90", None),
        (dict(spills=8), dict(D=256), "cuda:90", None),
        (dict(shared=227 * 1024 + 1), dict(D=256, PACKED=True), "cuda:90", "232448"),
        (dict(shared=65537), dict(D=64), "hip:gfx942", "65536"),
        (dict(wgmma=False, matrix="mma"), dict(D=64), "cuda:90", "wgmma"),
        (dict(wgmma=False, matrix="mma"), dict(D=64), "cuda:80", None),
    ],
)
def test_what_counts_as_a_failure(change, flags, target, words):
    variant = types.SimpleNamespace(constexprs=flags, wants_wgmma=True)
    report = dataclasses.replace(COMPILED, target=target, **change)
    failures = aot._failures(report, variant, aot.TARGETS[target])
    assert (words is None and not failures) or words in failures[0]


def test_a_variant_that_does_not_compile():
    """A shape that is not a power of two is a failure in the report; the run goes on."""
    script = (
        "import dataclasses; from molsaki_kernels import aot; from molsaki_kernels._triton import lse_gradient;"
        "good = lse_gradient.variants('sm90')[0];"
        "bad = dataclasses.replace(good, constexprs=good.constexprs | dict(BM=3));"
        "aot._variants = lambda arch: dict(bad=bad);"
        "print(aot.compile_variant('cuda:90', 'bad').failures[0])"
    )
    result = run("-c", script, TRITON_INTERPRET="0")
    assert result.stdout.startswith("does not compile: "), result.stderr
