"""Tests the wheel and the sdist: contents, and one layer with only torch and numpy installed and without a compiler.

Nothing is downloaded: the build uses the installed setuptools, and the clean environment links to the torch and numpy
of the running environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from molsaki_kernels._native import build, compile

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
GENERATED = {"build", "dist", "demo", "runs"}  # folders beside pyproject.toml without sources
needs_compiler = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def run(*command, **options) -> str:
    """The standard output and error of a command, which must succeed."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_with(hook: str, source: Path, folder: Path, **environment) -> tuple[Path, str]:
    """The archive that a PEP 517 hook of the project builds, and the output of the build."""
    program = f"from setuptools import build_meta; build_meta.{hook}({str(folder)!r})"
    output = run(sys.executable, "-c", program, cwd=source, env=os.environ | environment)
    (built,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))
    return built, output


def names_in(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as opened:
        return set(opened.namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources, so that a build leaves nothing in the tree."""
    folder = tmp_path_factory.mktemp("source") / "tree"

    def ignored(directory: str, names: list[str]) -> set[str]:
        found = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")(directory, names) - {".ci"}
        return found | (GENERATED & set(names) if Path(directory) == ROOT else set())

    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def unpacked(source, tmp_path_factory) -> Path:
    """The folder of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    archive, _ = build_with("build_sdist", source, folder)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory) -> Path:
    """The wheel, built from the sdist as pip does."""
    return build_with("build_wheel", unpacked, tmp_path_factory.mktemp("wheel"))[0]


def test_the_sdist_contains_all_that_its_tests_need(source, unpacked):
    folders = ("tests", "examples", "docs", "molsaki", "molsaki_kernels", ".ci")
    files = [path for folder in folders for path in (source / folder).rglob("*") if path.is_file()]
    files += [*(source / "benchmarks").glob("*.*"), *(source / "benchmarks/results").glob("*.csv")]
    files += [*(source / "studies").glob("*.*"), *(source / "studies/results").rglob("*.csv")]
    names = (
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
        "setup.py",
        "readme_for_pypi.py",
        "LICENSE",
        "SECURITY.md",
    )
    files += [source / name for name in names]
    missing = [str(path.relative_to(source)) for path in files if not (unpacked / path.relative_to(source)).exists()]
    assert missing == []
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    collected = run(
        sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=unpacked, env=environment
    )
    assert int(re.search(r"(\d+) tests collected", collected).group(1)) > 500


def test_the_links_of_the_sdists_documents(unpacked):
    """Its own test of them, in a process that imports the packages from there."""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    program = ["pytest", "-q", "-p", "no:cacheprovider", "tests/bench/test_documents.py"]
    done = run(sys.executable, "-m", *program, cwd=unpacked, env=environment)
    assert int(re.search(r"(\d+) passed", done).group(1)) > 40 and "skipped" not in done


@needs_compiler
def test_the_wheel_contains_the_engine(wheel):
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    names = names_in(wheel)
    libraries = {f"molsaki_kernels/_native/molsaki-{name}.so" for name in compile.VARIANTS}
    sources = {f"molsaki_kernels/csrc/{path.name}" for path in (*compile.SOURCES, *compile.HEADERS)}
    assert names >= {*libraries, *sources, "molsaki_kernels/py.typed", "molsaki/py.typed"}
    assert "molsaki/annotation/demonstrations.jsonl" in names
    data = {path for path in (ROOT / "molsaki").rglob("*") if path.suffix in (".css", ".html", ".js", ".jsonl")}
    assert names >= {path.relative_to(ROOT).as_posix() for path in data}
    assert {Path(name).suffix for name in names if ".dist-info/" not in name} <= {
        ".py", ".c", ".h", ".so", ".typed", ".jsonl", ".css", ".html", ".js"
    }  # fmt: skip
    assert {name.split("/")[0] for name in names} == {
        "molsaki",
        "molsaki_kernels",
        wheel.name[: wheel.name.index("-py3")] + ".dist-info",
    }
    with zipfile.ZipFile(wheel) as opened:
        for name in libraries:
            assert not re.search(rb"lib(gomp|omp|iomp5)\.so", opened.read(name)), "it uses the OpenMP of PyTorch"


def test_core_dependencies_are_torch_and_numpy(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("/METADATA"))
        lines = opened.read(name).decode().splitlines()
    requires = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert {re.match(r"[\w-]+", x).group() for x in requires if "extra ==" not in x} == {"torch", "numpy"}
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]\n")[2]
    declared = set(re.findall(r"^([\w-]+) = \[", section.partition("\n[")[0], re.MULTILINE))
    assert extras == declared >= {"train", "plot", "triton", "flash", "fused", "all"}


@pytest.mark.parametrize("url", ["https://host.example/owner/name", ""])
def test_the_long_description_and_the_repository(source, tmp_path, url):
    """As PyPI shows them: the metadata of a wheel and of an sdist, with the repository's URL and without it."""
    for hook in ("build_wheel", "build_sdist"):
        folder = tmp_path / hook
        folder.mkdir()
        built, _ = build_with(hook, source, folder, MOLSAKI_REPOSITORY_URL=url, MOLSAKI_PURE_WHEEL="1")
        if hook == "build_wheel":
            with zipfile.ZipFile(built) as opened:
                (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
                text = opened.read(name).decode()
        else:
            with tarfile.open(built) as opened:
                text = opened.extractfile(f"{built.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
        header, _, body = text.partition("\n\n")
        assert "Description-Content-Type: text/markdown" in header and body.startswith("# MoLSAKI")
        assert ("Dynamic: description" in header) and (f"Project-URL: Repository, {url}" in header) == bool(url)
        version = re.search(r"^Version: (.*)$", header, re.MULTILINE).group(1)
        assert (f"]({url}/blob/v{version}/docs/" in body) == bool(url)
        assert "](docs/" not in body and 'src="docs/' not in body


@needs_compiler
@pytest.mark.parametrize("fault", ["no compiler", "a compiler that fails", "a pure wheel is asked for"])
def test_a_wheel_without_the_engine_is_pure_and_the_build_names_the_reason(source, tmp_path, fault):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no space left >&2\n[ $1 = --version ]\n")
    broken.chmod(0o755)
    environment, reason = {
        "no compiler": ({"PATH": "/nowhere", "CC": ""}, "no C compiler"),
        "a compiler that fails": ({"CC": str(broken)}, f"{broken} failed: no space left"),
        "a pure wheel is asked for": ({"MOLSAKI_PURE_WHEEL": "1"}, "MOLSAKI_PURE_WHEEL is 1"),
    }[fault]
    (tmp_path / "wheel").mkdir()
    built, output = build_with("build_wheel", source, tmp_path / "wheel", **environment)
    assert built.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in names_in(built))
    assert f"the wheel is built without the C engine: {reason}" in output


def test_an_editable_install_compiles_nothing(source, tmp_path):
    built, _ = build_with("build_editable", source, tmp_path)
    assert built.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in names_in(built)) and not list(source.rglob("*.so"))


def link_distributions(site_packages: Path, *names: str) -> None:
    """Links installed distributions, and all that they require, into another environment."""
    pending, done = list(names), set()
    while pending:
        name = pending.pop()
        if name in done:
            continue
        done.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on another platform
        requires = [x for x in distribution.requires or () if "extra ==" not in x]
        pending += [re.match(r"[\w.-]+", x).group() for x in requires]
        for top in {path.parts[0] for path in distribution.files} - {"..", "__pycache__"}:
            link = site_packages / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))


# Its argument is one of the wheel's libraries: the processor has what this one needs and no more.
ONE_LAYER = """
import json, sys
from pathlib import Path
import torch
import molsaki_kernels as mk
from molsaki_kernels._native import build, compile

build._processor = lambda: " ".join(compile.VARIANTS[sys.argv[1]].needs)

plan = mk.StepPlan.from_spans([[(0, 20), (20, 48)]], [[[3], [7, 30]]])
found = {}
for name, attention, dtype, extra in (
    ("native", mk.stepwise_attention, torch.float32, {"engine": "native"}),
    ("oracle", mk.reference.stepwise_attention, torch.float32, {}),
    ("bfloat16", mk.stepwise_attention, torch.bfloat16, {"engine": "native"}),
):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 48, 32).bfloat16().to(dtype).requires_grad_() for heads in (4, 2, 2))
    out, maps = attention(q, k, v, plan, **extra)
    found[name] = [out, maps, *torch.autograd.grad(out.square().sum() + maps.square().sum(), (q, k, v))]
rounded = found.pop("bfloat16")
loaded = {Path(line.split()[-1]).name for line in open("/proc/self/maps") if ".so" in line}
print(json.dumps({
    "file": mk.__file__,
    "version": getattr(mk, "__version__", None),
    "difference": max((a - b).abs().max().item() for a, b in zip(*found.values())),
    "relative in bfloat16": max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(rounded, found["oracle"])),
    "ready": str(mk.engines()["native"]),
    "libraries": sorted(name for name in loaded if "molsaki" in name),
    "openmp": sorted(name for name in loaded if name.startswith(("libgomp", "libomp", "libiomp"))),
    "others": sorted({"transformers", "triton", "matplotlib", "scipy"} & set(sys.modules)),
}))
"""


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel, torch and numpy, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    link_distributions(site_packages, "torch", "numpy")
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel)
    return python


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """No compiler on the path, and a cache that does not exist."""
    (tmp_path / "empty").mkdir()
    paths = {"PATH": tmp_path / "empty", "HOME": tmp_path / "home", "MOLSAKI_CACHE": tmp_path / "cache"}
    return {name: str(path) for name, path in paths.items()}


@needs_compiler
@pytest.mark.parametrize("variant", compile.VARIANTS)
def test_one_layer_in_a_clean_environment_without_a_compiler(clean, environment, tmp_path, variant):
    """With each library that this processor can run."""
    missing = compile.VARIANTS[variant].needs - set(build._processor().split())
    if missing:
        pytest.skip(f"the processor has no {', '.join(sorted(missing))}")
    output = run(clean, "-c", ONE_LAYER, variant, cwd=tmp_path / "empty", env=environment)
    found = json.loads(output.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(clean.parents[1])
    assert found["ready"] == "ready" and found["difference"] < 1e-5
    assert found["relative in bfloat16"] < 0.01  # a rounding step is 0.004
    assert found["libraries"] == [f"molsaki-{variant}.so"] and not (tmp_path / "cache").exists()
    assert len(found["openmp"]) == 1 and found["others"] == []


@needs_compiler
def test_a_missing_extra_is_named_in_a_clean_environment(clean, environment, tmp_path):
    program = "from molsaki.extras import require; require('train')"
    done = subprocess.run([clean, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith('run pip install "molsaki-kernels[train]"')


@needs_compiler
def test_the_help_of_every_command_in_a_clean_environment(clean, environment, tmp_path):
    program = "from molsaki.cli import COMMANDS, main\nassert not any(main([name, '--help']) for name in COMMANDS)"
    assert run(clean, "-c", program, cwd=tmp_path, env=environment).count("usage: molsaki ") == 11
