"""``molsaki doctor``: each engine is tested, and everything that can be helped has an action."""

from __future__ import annotations

import builtins
import io
import json
import re

import pytest
import torch

import molsaki_kernels
from molsaki import doctor
from molsaki.cli import main
from molsaki_kernels.attention import ENGINES


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engines"]["eager"] == "ready"
    assert {"flash_attn", "flex"} <= found["engines"].keys() and found["auto"]["cpu"] == "native, then sdpa, then eager"
    assert found["packages"]["torch"][0].isdigit()
    assert found["optional"]["deepspeed"][0].isdigit() or "; pip install deepspeed" in found["optional"]["deepspeed"]
    assert found["selftest"]["sdpa on cpu"].startswith("ok: output, map and gradients in float32")
    assert found["selftest"].keys() >= {"eager on cpu"} and found["summary"]["broken"] == 0
    if found["engines"]["native"] == "ready":
        assert re.search(r"in float32 .*, to \de-0\d; in bfloat16, to \de-0\d$", found["selftest"]["native on cpu"])
        assert found["machine"]["bfloat16_on_cpu"].startswith("native, products ")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "engines" in lines and "passed the self-test; " in lines[-1]
    assert "\033" not in "".join(lines)


@pytest.mark.parametrize("fault", ["wrong values", "NaN", "error"])
def test_an_engine_that_is_broken(monkeypatch, capsys, fault):
    """Another output than eager's, and an error: both are shown, and the exit code is 1."""
    forward = ENGINES["sdpa"].forward

    def broken(*args):
        if fault == "error":
            raise RuntimeError("cuDNN is\nnot there")
        out = forward(*args)
        out.out.mul_(1.1 if fault == "wrong values" else float("nan"))
        return out

    monkeypatch.setattr(ENGINES["sdpa"], "forward", broken)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    expected = "RuntimeError: cuDNN is not there" if fault == "error" else "in float32 differs from eager attention in"
    assert f"FAILED: {expected}" in text
    assert "report it with `molsaki doctor --json`; until then choose another engine" in text
    assert text.splitlines()[-1].startswith("1 broken: sdpa on cpu; ")


def test_bfloat16_products_that_are_wrong(monkeypatch):
    """Engine native is tested in both dtypes: other instructions compute bfloat16."""
    if not molsaki_kernels.engines()["native"].ready:
        pytest.skip(str(molsaki_kernels.engines()["native"]))
    forward = ENGINES["native"].forward

    def wrong(inputs, *rest):
        result = forward(inputs, *rest)
        if inputs.q.dtype == torch.bfloat16:
            result.out.mul_(1.1)
        return result

    monkeypatch.setattr(ENGINES["native"], "forward", wrong)
    assert doctor.self_test(["native"])["native on cpu"].startswith("FAILED: in bfloat16 differs from eager attention")


@pytest.mark.parametrize(("engines", "has_gpu", "expected"), [
    ({"native": "no C compiler (cc, gcc, clang or $CC)"}, False, "install a C compiler: apt install gcc"),
    ({"native": "/usr/bin/cc failed: error: unknown flag"}, False, "try another C compiler"),
    ({"native": "switched off by MOLSAKI_NATIVE=0"}, False, "unset MOLSAKI_NATIVE"),
    ({"native": "could not be compiled or loaded: [Errno 28]"}, False, "set MOLSAKI_CACHE"),
    ({"flash_attn": "flash-attn-4 is not installed; flash-attn is not installed"}, True, "molsaki-kernels[flash]"),
    ({"flash_attn": "flash-attn-4 is not installed; flash-attn is not installed"}, False, None),
    ({"triton": "triton is not installed"}, True, "pip install triton"),
    ({"triton": "no GPU (TRITON_INTERPRET=1 runs the kernels slowly on a CPU)"}, False, None),
    ({"native": "the processor has no AVX2 and FMA"}, False, None),
    ({"sdpa": "ready"}, True, None),
])  # fmt: skip
def test_advice_about_engines(engines, has_gpu, expected):
    found = doctor._advice(engines, {}, has_gpu)
    if expected is None:
        assert found == {}
    else:
        assert expected in found[next(iter(engines))]


def test_a_gpu_that_is_too_old():
    reason = "not ready: needs a GPU of compute capability 8.0 (Ampere) or later, not 7.5"
    found = doctor._advice({"triton": "ready"}, {"triton on cuda": reason}, True)
    assert found == {"triton on cuda": doctor.ENGINE_ADVICE[-1][1]} and "use engine eager" in found["triton on cuda"]


def test_the_reasons_are_those_of_the_engines(monkeypatch):
    """The texts that the advice looks for are the ones that the C engine gives."""
    from molsaki_kernels._native import build

    monkeypatch.setattr(build, "_shipped", lambda processor: None)
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(build, "NEEDED", set())
    _, reason = build._loaded.__wrapped__()
    if reason is not None and "written for Linux" not in reason:
        assert "C compiler" in str(doctor._advice({"native": reason}, {}, False)["native"])


def test_torch_that_cannot_be_imported(monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("libcudart.so.13: cannot open\nshared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "cannot be imported: libcudart.so.13: cannot open shared object file" in text and "pip install torch" in text


def test_packages_that_are_missing_or_too_old(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: {"scipy": None, "transformers": "4.1.0"}.get(name, version(name))
    )
    found = doctor.report()
    assert found["to_do"]["scipy"] == 'pip install "molsaki-kernels[train]"'
    assert "training and most commands need " in str(found["summary"]["result"])
    if version("molsaki-kernels"):
        assert found["to_do"]["transformers"] == '4.1.0 is installed: pip install "transformers>=4.57"'
    assert found["summary"]["broken"] == 0  # the kernels work


def test_colours_of_the_report(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = doctor.render(
        {"engines": {"a": "ready", "b": "FAILED: x"}, "summary": {"broken": 1, "result": "r"}}, io.StringIO()
    )
    assert (
        "\033[32mready\033[0m" in text and "\033[31mFAILED: x\033[0m" in text and text.endswith("nothing to do\033[0m")
    )


@pytest.mark.parametrize("kept", [False, True])
def test_doctor_says_what_gpu_packages_need(monkeypatch, kept):
    monkeypatch.setattr(doctor, "_version", lambda package: "4.0.0b36")
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1" if kept else "0")
    notes = doctor._notes(None)
    assert "missing here: a C compiler" in notes["triton"]
    assert ("again in every process unless" in notes["flash-attn-4"]) is not kept
    assert "FA4" in notes["flash-attn-4 in PyTorch"]
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert doctor._notes("cc") == {} and "notes" not in doctor.render({"a": {"b": 1}, "notes": {}})


def test_every_ready_engine_is_tested():
    ready = [name for name, status in molsaki_kernels.engines().items() if status.ready]
    tested = {name.partition(" on ")[0] for name in doctor.self_test(ready)}
    assert tested >= set(ready) - {"triton"}  # which is ready on a CPU where it is interpreted
