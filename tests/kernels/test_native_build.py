"""Tests compiling, caching, loading and checking the C library, and the reasons why it is not available."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from molsaki_kernels._native import build, compile, structs

needs_library = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
TESTS = Path(__file__).parent / "test_native.py"


@pytest.fixture
def quick(monkeypatch):
    """Compiles without optimization, for tests that never call the library."""
    monkeypatch.setattr(compile, "FLAGS", ("-O0", *compile.FLAGS[1:]))


def loaded_with(monkeypatch, **environment):
    """The library and the reason that a new process with these variables would get."""
    monkeypatch.delenv("MOLSAKI_CACHE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return build._loaded.__wrapped__()


def reason_with(monkeypatch, **environment):
    return loaded_with(monkeypatch, **environment)[1]


def test_switched_off(monkeypatch):
    assert reason_with(monkeypatch, MOLSAKI_NATIVE="0") == "switched off by MOLSAKI_NATIVE=0"


def test_another_platform(monkeypatch):
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    assert reason_with(monkeypatch).startswith("written for Linux on x86-64, not Darwin")


@needs_library
def test_a_processor_without_avx2(monkeypatch):
    monkeypatch.setattr(build, "_processor", lambda: "flags : fpu sse2")
    assert reason_with(monkeypatch) == "the processor has no AVX2 and FMA"


@needs_library
def test_no_compiler(monkeypatch):
    assert "no C compiler" in reason_with(monkeypatch, PATH="/nowhere", CC="")


@needs_library
def test_using_an_unavailable_library_is_an_error(monkeypatch):
    monkeypatch.setattr(build, "_loaded", lambda: (None, "switched off by a test"))
    with pytest.raises(RuntimeError, match="switched off by a test"):
        build.library()


@needs_library
def test_a_compiler_that_fails(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no space left >&2\nexit 3\n")
    broken.chmod(0o755)
    reason = reason_with(monkeypatch, CC=broken, MOLSAKI_CACHE=tmp_path / "cache")
    assert reason == f"{broken} failed: no space left"
    assert not list((tmp_path / "cache").iterdir())


@needs_library
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    assert "could not be compiled or loaded" in reason_with(monkeypatch, MOLSAKI_CACHE=tmp_path / "file")


@needs_library
def test_a_cache_that_another_user_could_write_to_is_refused(monkeypatch, tmp_path, quick):
    """Without a home folder, the cache is in the temporary folder, in a folder that only this user can write to."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    assert reason_with(monkeypatch, XDG_CACHE_HOME=tmp_path / "file") is None
    (folder,) = tmp_path.glob("molsaki_kernels-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert "only this user can write to" in reason_with(monkeypatch, XDG_CACHE_HOME=tmp_path / "file")


@needs_library
def test_a_damaged_library_is_compiled_again(monkeypatch, tmp_path, quick):
    assert reason_with(monkeypatch, MOLSAKI_CACHE=tmp_path / "whole") is None
    (built,) = (tmp_path / "whole").iterdir()
    damaged = tmp_path / "damaged" / built.name
    damaged.parent.mkdir()
    damaged.write_bytes(b"")  # as after a power cut
    assert reason_with(monkeypatch, MOLSAKI_CACHE=damaged.parent) is None
    assert damaged.stat().st_size == built.stat().st_size


@needs_library
def test_compiled_once(monkeypatch, tmp_path, quick):
    assert reason_with(monkeypatch, MOLSAKI_CACHE=tmp_path) is None
    (built,) = tmp_path.iterdir()
    before = built.stat().st_mtime_ns
    assert reason_with(monkeypatch, MOLSAKI_CACHE=tmp_path) is None
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [before]


@needs_library
def test_no_wider_than_avx2(tmp_path):
    """The sources, compiled without AVX-512, pass the same cases."""
    source = "from molsaki_kernels._native import compile\ncompile.FLAGS += ('-mno-avx512f',)\n"
    chosen = ["-qx", "-p", "no:cacheprovider", str(TESTS), "-k", "test_map or test_attention"]
    source += f"import pytest, sys\nsys.exit(pytest.main({chosen}))"
    environment = os.environ | {"MOLSAKI_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.so")
    assert "ymm" in disassembled(built, "ymm") and "zmm" not in disassembled(built, "ymm")


@needs_library
def test_the_libraries_of_a_wheel(monkeypatch, tmp_path, quick):
    """The best library that the processor can run is loaded. The sources are compiled only if there is none."""
    (tmp_path / "_native").mkdir()
    for name, variant in compile.VARIANTS.items():
        compile.compile_library(compile.compiler(), variant.flags, tmp_path / "_native" / f"molsaki-{name}.so")
    monkeypatch.setattr(build, "__file__", str(tmp_path / "_native" / "build.py"))
    opened = []
    real = ctypes.CDLL
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: opened.append(Path(path).name) or real(path))
    library, reason = loaded_with(monkeypatch, PATH="/nowhere", CC="", MOLSAKI_CACHE=tmp_path / "cache")
    has = set(build._processor().split())
    best = next(name for name, variant in compile.VARIANTS.items() if variant.needs <= has)
    assert reason is None and opened == [f"molsaki-{best}.so"] and not (tmp_path / "cache").exists()
    call, sizes = structs.AttentionCall(head_dim=64, value_dim=64, threads=2), []
    for one in (library, build.library()):
        sizes.append(structs.AttentionMemory())
        one.molsaki_attention_memory(ctypes.byref(call), True, ctypes.byref(sizes[-1]))
    assert bytes(sizes[0]) == bytes(sizes[1]) and sizes[0].work > 0
    bf16, wide, narrow = (tmp_path / "_native" / f"molsaki-{name}.so" for name in compile.VARIANTS)
    assert "zmm" in disassembled(wide, "zmm") and "zmm" not in disassembled(narrow, "")
    assert "tmm" in disassembled(bf16, "tmm") and "tmm" not in disassembled(wide, "")

    damaged = tmp_path / "damaged" / narrow.name
    damaged.parent.mkdir()
    damaged.write_bytes(b"")
    monkeypatch.setattr(build, "__file__", str(damaged.parent / "build.py"))
    assert "no C compiler" in reason_with(monkeypatch, PATH="/nowhere", CC="")


def disassembled(path: Path, default: str) -> str:
    """The kinds of vector and tile registers in a library's code; ``default`` where objdump is not installed."""
    if shutil.which("objdump", path=os.defpath) is None:
        return default
    command = [shutil.which("objdump", path=os.defpath), "-d", path]
    return " ".join(set(re.findall("[tyz]mm", subprocess.run(command, capture_output=True, text=True).stdout)))


@needs_library
def test_the_unit_for_bfloat16(monkeypatch):
    """AMX where there is one; AVX-512 BF16 without it, but not on Intel's processors, where float32 is faster."""
    f32, vectors, tiles = structs.FLOAT32, structs.VECTORS_BF16, structs.TILES_BF16
    expected = {
        ((f32,), "GenuineIntel"): f32,
        ((f32, vectors), "GenuineIntel"): f32,
        ((f32, vectors), "AuthenticAMD"): vectors,
        ((f32, vectors, tiles), "GenuineIntel"): tiles,
    }
    for (units, vendor), unit in expected.items():
        monkeypatch.setattr(build, "bf16_units", lambda units=units: list(units))
        monkeypatch.setattr(build, "_processor", lambda vendor=vendor: f"vendor_id : {vendor} flags : amx_bf16")
        assert build.bf16_unit.__wrapped__() == unit
        monkeypatch.setattr(build, "bf16_unit", build.bf16_unit.__wrapped__)
        assert build.pytorch_is_faster_in_bfloat16() == (unit != tiles)
        monkeypatch.undo()


@needs_library
def test_the_units_of_this_machine():
    """A compiler that knows AVX-512 BF16 and AMX builds them in, and the processor's flags say what it runs."""
    flags, units = set(build._processor().split()), build.bf16_units()
    if (structs.VECTORS_BF16 in units) != ("avx512_bf16" in flags) or (structs.TILES_BF16 in units) != (
        {"amx_tile", "amx_bf16", "avx512_bf16"} <= flags
    ):
        defined = subprocess.run(
            [compile.compiler(), "-march=native", "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True
        ).stdout
        assert "__AMX_BF16__" not in defined or "__AVX512BF16__" not in defined, (units, defined)


@needs_library
def test_one_openmp_runtime_per_process():
    """The library uses the runtime that PyTorch has loaded, so it also works where no other is installed."""
    source = "from molsaki_kernels._native import build; build.library(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
    assert len(set(re.findall(r"\S+/lib(?:gomp|iomp5|omp)\b\S*", maps))) == 1


BROKEN_LAYOUTS = {
    "a field of another size": (
        "LseGradientCall", lambda fields: [(n, ctypes.c_double if n == "vanished" else kind) for n, kind in fields],
        "LseGradientCall.vanished: expected (offset, size) (136, 8) as in Python, got (136, 4) in C",
    ),
    "two fields swapped": (
        "MapCall", lambda fields: [fields[0], fields[2], fields[1], *fields[3:]],
        "MapCall.kv_heads: expected (offset, size) (128, 8) as in Python, got (136, 8) in C",
    ),
    "a field that C does not have": (
        "AttentionCall", lambda fields: [*fields, ("more", ctypes.c_int64)],
        "AttentionCall.more: expected (offset, size) (608, 8) as in Python, got None in C",
    ),
    "two sizes of memory swapped": (
        "AttentionMemory", lambda fields: [fields[1], fields[0], fields[2]],
        "AttentionMemory.packed: expected (offset, size) (0, 8) as in Python, got (8, 8) in C",
    ),
    "a field that only C has": (
        "Plan", lambda fields: fields[:-1],
        "Plan: expected (offset, size) (0, 120) as in Python, got (0, 128) in C",
    ),
}  # fmt: skip


@needs_library
@pytest.mark.parametrize("name", BROKEN_LAYOUTS)
def test_a_struct_that_differs_from_c_is_named(monkeypatch, name):
    struct, change, message = BROKEN_LAYOUTS[name]
    fields = change(list(getattr(structs, struct)._fields_))
    broken = type(struct, (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(structs, struct, broken)
    library, reason = loaded_with(monkeypatch)
    assert library is None and reason == f"the library does not fit this package: {message}"


@needs_library
@pytest.mark.parametrize("name", structs.constants())
def test_a_constant_that_differs_from_c_is_named(monkeypatch, name):
    value = getattr(structs, name)
    monkeypatch.setattr(structs, name, value + 1)
    assert reason_with(monkeypatch) == (
        f"the library does not fit this package: constants.{name}: "
        f"expected (offset, size) ({value + 1}, 0) as in Python, got ({value}, 0) in C"
    )


CHANGES_IN_C = {
    "TASK_ROWS": ("plan.h", "TASK_ROWS = 192", "TASK_ROWS = 384"),
    "MAP_TILE_ROWS": ("plan.h", "MAP_TILE_ROWS = 24", "MAP_TILE_ROWS = 12"),
    "COLUMN_MULTIPLE": ("plan.h", "COLUMN_MULTIPLE = 16", "COLUMN_MULTIPLE = 32"),
    "HEAD_DIM_MULTIPLE": ("plan.h", "HEAD_DIM_MULTIPLE = 16", "HEAD_DIM_MULTIPLE = 32"),
    "MAX_HEAD_DIM": ("simd.h", "MAX_HEAD_DIM = 256", "MAX_HEAD_DIM = 512"),
    "NEVER": ("plan.h", "NEVER INT32_MAX", "NEVER (INT32_MAX - 1)"),
    "FLOAT32": ("attention.h", "FLOAT32, /* vectors", "FLOAT32 = 5, /* vectors"),
    "VECTORS_BF16": ("attention.h", "VECTORS_BF16, /* AVX", "VECTORS_BF16 = 7, /* AVX"),
    "TILES_BF16": ("attention.h", "TILES_BF16 /* AMX", "TILES_BF16 = 6 /* AMX"),
    "AttentionMemory": ("attention.h", "work, packed, parts;\n", "parts, packed, work;\n"),
}


@needs_library
def test_the_table_follows_the_sources(monkeypatch, tmp_path, quick):
    """All constants and the order of the memory's sizes are changed in the sources, and each is found to differ."""
    assert CHANGES_IN_C.keys() - {"AttentionMemory"} == structs.constants().keys()
    for source in (*compile.SOURCES, *compile.HEADERS):
        text = source.read_text()
        for name, (file, before, after) in CHANGES_IN_C.items():
            if file == source.name:
                assert text.count(before) == 1, name
                text = text.replace(before, after)
        (tmp_path / source.name).write_text(text)
    monkeypatch.setattr(compile, "SOURCES", [tmp_path / source.name for source in compile.SOURCES])
    compile.compile_library(compile.compiler(), ("-march=x86-64-v3",), tmp_path / "changed.so")
    library = ctypes.CDLL(str(tmp_path / "changed.so"))
    assert structs.mismatch(library).startswith("AttentionMemory.work: ")
    found = dict(structs._exported(library, "molsaki_layout_constants"))
    assert not [name for name, value in structs.constants().items() if found[name] == (value, 0)]


@needs_library
def test_the_sizes_of_memory_are_for_fields_of_a_call():
    fields = {name for name, *_ in structs.AttentionCall._fields_}
    assert {name for name, *_ in structs.AttentionMemory._fields_} <= fields


@needs_library
def test_a_library_without_tables_is_refused():
    assert structs.mismatch(ctypes.CDLL(None)) == "Plan: the library has no table of its layout"


@needs_library
def test_every_function_has_declared_types():
    source = "".join(file.read_text() for file in compile.SOURCES)
    exported = set(re.findall(r"^(?:void|int64_t) (molsaki_\w+)\(", source, re.MULTILINE))
    assert exported == set(build._FUNCTIONS)
    for name, (result, *arguments) in build._FUNCTIONS.items():
        function = getattr(build.library(), name)
        assert function.argtypes == arguments and function.restype == result
