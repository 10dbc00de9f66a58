"""The command of the ahead-of-time compiler: its report, and its failures."""

from __future__ import annotations

import ast
import csv
import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

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
    products=24,
    copies=8,
    warps=4,
    stages=2,
    blocks=3,
    resident=19,
    limit="shared",
)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | environment
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=500)


def test_json_of_a_few_variants(tmp_path):
    """In an environment that interprets kernels, with an empty cache."""
    command = ["-m", "molsaki_kernels.aot", *ARGUMENTS, "--json", "--filter", "map_dk_add-bf16", "--jobs", "2"]
    result = run(*command, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert {"map_dk_add-bf16-d64", "map_dk_add-bf16-d128"} <= {row["name"] for row in rows}
    for row in rows:
        assert row["target"] == "cuda:90" and 16 <= row["registers"] <= 255
        assert row["spills"] == 0 and row["shared"] <= 227 * 1024 and row["wgmma"] is False
        assert row["products"] == row["copies"] == 0
        assert row["blocks"] >= 4 and row["resident"] == round(100 * 4 * row["blocks"] / 64)
        assert row["failures"] == []


def test_two_targets_and_a_csv(tmp_path):
    path = tmp_path / "table.csv"
    command = ["-m", "molsaki_kernels.aot", "--target", "hip:gfx942", "cuda:89", "--filter", "map_dk_add-bf16-d64"]
    result = run(*command, "--csv", str(path))
    assert result.returncode == 0, result.stderr
    header, *rows = (line.split() for line in result.stdout.splitlines())
    assert [row[:2] for row in rows[:2]] == [["hip:gfx942", "map_dk_add-bf16-d64"], ["cuda:89", "map_dk_add-bf16-d64"]]
    assert rows[0][header.index("spills")] == "0"
    assert result.stdout.splitlines()[-1].startswith("1 variants for hip:gfx942, 1 variants for cuda:89, 0 failed")
    with path.open() as file:
        written = list(csv.DictReader(file))
    assert [r["registers"] for r in written] == [row[header.index("registers")] for row in rows[:2]]


@pytest.mark.parametrize(
    "target, warps, registers, shared, blocks, limit",
    [
        # NVIDIA's occupancy calculator, computed by hand from the limits of each compute capability.
        ("cuda:90", 8, 255, 100 * 1024, 1, "registers"),
        ("cuda:90", 4, 213, 16 * 1024, 2, "registers"),
        ("cuda:90", 4, 128, 16 * 1024, 4, "registers"),
        ("cuda:90", 4, 129, 16 * 1024, 3, "registers"),  # allocated in units of 8 registers per thread
        ("cuda:90", 4, 64, 56 * 1024, 4, "shared"),  # 57 KB with the reserved one
        ("cuda:90", 4, 64, 57 * 1024, 3, "shared"),
        ("cuda:90", 8, 32, 0, 8, "registers"),
        ("cuda:90", 1, 16, 0, 32, "blocks"),
        ("cuda:90", 2, 16, 0, 32, "warps"),
        ("cuda:89", 8, 32, 0, 6, "warps"),
        ("cuda:89", 8, 128, 99 * 1024, 1, "shared"),
        ("hip:gfx942", 4, 256, 16 * 1024, 2, "registers"),
        ("hip:gfx942", 4, 64, 32 * 1024, 2, "shared"),
        ("hip:gfx942", 4, 64, 0, 8, "registers"),
    ],
)
def test_occupancy(target, warps, registers, shared, blocks, limit):
    assert aot.occupancy(aot.TARGETS[target], warps, registers, shared) == (blocks, limit)


@pytest.mark.parametrize(
    "capability, target",
    [((8, 0), "cuda:80"), ((8, 9), "cuda:89"), ((9, 0), "cuda:90"), ((10, 0), "cuda:100"), ((12, 0), "cuda:120")],
)
def test_a_device_uses_the_tiles_that_its_target_compiles(capability, target, monkeypatch):
    configs = pytest.importorskip("molsaki_kernels._triton.configs")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert configs._arch_of_device.__wrapped__(0) == aot.TARGETS[target].arch


def test_a_launch_finds_the_compiled_variants():
    """The cache keys of launches with SmolLM2's heads, with a driver that launches nothing."""
    result = run("-m", "tests.helpers.launch_keys", TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {"flash_forward-bf16-d64", "flash_dq-bf16-d64", "flash_dkv-bf16-d64", "fold-bf16-d64"} <= set(found)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000e220000000800 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;               /* 0x0000000102027810 */
        /*0020*/               @P0 BRA 0x50 ;                            /* 0x0000000000000947 */
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;               /* 0x0000000103037810 */
        /*0040*/              @!P1 BRA 0x30 ;                            /* 0xfffffffc00f08947 */
        /*0050*/                   ISETP.NE.AND P2, PT, R2, R4, PT ;     /* 0x000000040200720c */
        /*0060*/               @P2 BRA 0x10 ;                            /* 0xfffffffc00e82947 */
        /*0070*/                   EXIT ;                                /* 0x000000000000794d */
        /*0080*/                   BRA 0x80 ;                            /* 0xfffffffc00fc7947 */
        /*0090*/                   NOP ;                                 /* 0x0000000000007918 */
"""


def test_instructions_are_counted_by_loop():
    """A branch forward is no loop, and neither is the branch to itself behind the end of every kernel."""
    straight, loops = aot.count_instructions(SASS)
    assert (straight, loops) == (3, [4, 2])  # LDC, EXIT and the last branch; then the outer loop and the inner one


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
        (dict(shared=99 * 1024 + 1), dict(D=64), "cuda:89", "101376"),
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


def test_the_cache_keys_do_not_depend_on_the_order_of_launches():
    """Else a cache that was filled in one order would not serve a process that launches in another."""
    script = (
        "import importlib, json, sys; from molsaki_kernels import aot;"
        "modules = [importlib.import_module(f'molsaki_kernels._triton.{name}') for name in aot.MODULES];"
        "kernels = {v.kernel.__name__: v.kernel for module in modules for v in module.variants('sm90')};"
        "names = sorted(kernels, reverse=sys.argv[1] == 'reverse');"
        "keys = {name: kernels[name].cache_key for name in names};"
        "print(json.dumps(keys, sort_keys=True))"
    )
    forward, reverse = (run("-c", script, order, TRITON_INTERPRET="0") for order in ("forward", "reverse"))
    assert len(json.loads(forward.stdout)) >= 8 and forward.stdout == reverse.stdout, forward.stderr


def test_helpers_use_only_helpers_above_them():
    """Their cache keys are computed when the next kernel is defined, see decorators.py."""
    folder = Path(aot.__file__).parent / "_triton"
    for path in folder.glob("*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        decorated = {f.name: f.lineno for f in functions if f.decorator_list}
        for f in functions:
            if any(getattr(d, "id", "") == "jit" for d in f.decorator_list):
                below = {n.id for n in ast.walk(f) if isinstance(n, ast.Name) and decorated.get(n.id, 0) > f.lineno}
                assert not below, f"{path.name}: {f.name} uses {below}"
