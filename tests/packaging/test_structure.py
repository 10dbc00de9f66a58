"""Checks imports between modules, the number of positional parameters and arguments, and files that texts name."""

from __future__ import annotations

import ast
import fnmatch
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_POSITIONAL = 8


def modules(*folders: str) -> dict[str, ast.Module]:
    """The syntax tree of each module, by dotted name."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(), str(path))
    return found


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """The modules of ``known`` that a module imports, also inside functions, except for type checking."""
    names = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        todo += ast.iter_child_nodes(node)
    return names & known


KERNELS = modules("molsaki_kernels")
EVERYTHING = KERNELS | modules("molsaki")
BENCHMARKS = modules("benchmarks")


# The groups of molsaki_kernels: their files, which shell patterns name, and the groups that they may import. A file
# belongs to the first group that names it without a "*", else to the first whose pattern matches. From the top down.
FOLDERS = "{attention,attention_map,value_pooling}"
GROUPS: dict[str, tuple[str, str]] = {
    "entry": ("__init__.py", "api selection plan"),
    "api": ("api.py", "selection validation operators tables dispatch plan spec"),
    "selection": ("engine_selection.py", "tables engines widened shared _native support spec"),
    "validation": ("validation.py", "plan spec"),
    "operators": ("ops/*.py", "operators tables widened shared dispatch support spec"),
    "tables": (f"{FOLDERS}/__init__.py", "engines shared spec"),
    "engines": (f"{FOLDERS}/*.py", "engines shared _native _triton support spec"),
    "widened": ("widened_values.py", "shared _triton dispatch support spec"),
    "shared": (
        "attention/{protocol,defaults,lse_gradient,sinks}.py attention_map/protocol.py",
        "shared _native _triton support spec",
    ),
    "aot": ("aot.py", "_triton"),
    "_native": ("_native/*.py", "_native support spec"),
    "_triton": ("_triton/*.py", "_triton support spec"),
    "dispatch": ("direct_call.py", "-"),
    "support": ("{_capability,_compile,_plan_cache,_workspace}.py {masking,strides}.py", "support spec"),
    "spec": ("spec.py", "-"),
    "oracle": ("reference.py", "plan"),
    "plan": ("plan.py", "-"),
}


def expanded(pattern: str) -> list[str]:
    """A pattern with ``{a,b}`` as the patterns that it stands for."""
    before, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    names, _, after = rest.partition("}")
    return [before + name + after for name in names.split(",")]


def group_of(name: str) -> str:
    """The group of a module of molsaki_kernels."""
    path = name.replace(".", "/").removeprefix("molsaki_kernels").lstrip("/")
    path = f"{path}/__init__.py".lstrip("/") if (ROOT / "molsaki_kernels" / path).is_dir() else f"{path}.py"
    patterns = [(p, group) for group, (files, _) in GROUPS.items() for one in files.split() for p in expanded(one)]
    exact = [group for pattern, group in patterns if pattern == path]
    matching = [group for pattern, group in patterns if "*" in pattern and fnmatch.fnmatchcase(path, pattern)]
    assert len(exact) <= 1 and (exact or len(matching) == 1), (name, exact, matching)
    return (exact or matching)[0]


def edges() -> dict[tuple[str, str], list[str]]:
    """The imports between groups: for each pair, the modules. A package's own parents do not count."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, tree in KERNELS.items():
        for other in imported(tree, set(KERNELS)) - {name}:
            if not name.startswith(f"{other}."):
                found.setdefault((group_of(name), group_of(other)), []).append(f"{name} imports {other}")
    return found


def test_imports_of_the_groups():
    """Nothing that the table does not allow, and nothing allowed that no file needs."""
    allowed = {(group, other) for group, (_, others) in GROUPS.items() for other in others.split() if other != "-"}
    found = edges()
    assert not {pair: modules for pair, modules in found.items() if pair not in allowed}
    assert allowed == found.keys()


def test_nothing_imports_upward():
    order = list(GROUPS)
    assert [pair for pair in edges() if order.index(pair[1]) < order.index(pair[0])] == []


def test_every_pattern_names_files():
    for files, _ in GROUPS.values():
        for pattern in (p for one in files.split() for p in expanded(one)):
            assert list((ROOT / "molsaki_kernels").glob(pattern)), pattern


def test_the_design_page_has_the_table_of_imports():
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    block = page.split("### Allowed imports\n")[1].split("```")[1].strip("\n")
    heading, *lines = block.splitlines()
    assert heading.split() == ["group", "files", "imports"]
    starts = [heading.index(word) for word in ("files", "imports")]
    found: dict[str, tuple[str, str]] = {}
    for line in lines:
        group, files, imports = (
            line[: starts[0]].strip(),
            line[starts[0] : starts[1]].strip(),
            line[starts[1] :].strip(),
        )
        if group:
            found[group] = files, imports
        else:  # more files of the group above
            last = list(found)[-1]
            found[last] = f"{found[last][0]} {files}", found[last][1]
    assert list(found.items()) == list(GROUPS.items())


def test_kernels_never_import_the_training_layer():
    for name, tree in KERNELS.items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            assert not any(str(n).split(".")[0] == "molsaki" for n in names), name


def test_the_oracle_imports_only_the_plan():
    assert imported(KERNELS["molsaki_kernels.reference"], set(EVERYTHING)) == {"molsaki_kernels.plan"}


def test_only_tests_and_benchmarks_import_the_oracle():
    users = {
        name for name, tree in EVERYTHING.items() if "molsaki_kernels.reference" in imported(tree, set(EVERYTHING))
    }
    assert not users  # __getattr__ imports it on request


@pytest.mark.parametrize("package", ["attention", "attention_map", "value_pooling"])
def test_engines_never_import_each_other(package):
    """An engine is a module that defines NAME."""
    engines = {
        name
        for name, tree in KERNELS.items()
        if name.startswith(f"molsaki_kernels.{package}.")
        and any(isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "NAME" for n in tree.body)
    }
    assert len(engines) >= 2
    for name in engines:
        assert not imported(KERNELS[name], engines), name


def test_no_import_cycle():
    """Imports inside functions count too."""
    known = set(EVERYTHING)
    graph = {name: imported(tree, known) - {name} for name, tree in EVERYTHING.items()}
    for name in graph:  # of a package's __init__, imports of its own modules do not count
        graph[name] = {other for other in graph[name] if not name.startswith(f"{other}.")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def is_jit(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef):
        return False
    return any("jit" in ast.dump(d) or "kernel" in ast.dump(d) for d in node.decorator_list)


def outside_kernels(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module, without those of jit kernels."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if not is_jit(node):
            yield node
            todo += ast.iter_child_nodes(node)


# transformers determines the parameters of its attention functions.
FIXED_BY_TRANSFORMERS = {"molsaki.modeling.attention_hook.attention"}


def test_positional_parameters():
    """At most eight, except for jit kernels and functions whose parameters transformers determines."""
    for name, tree in (EVERYTHING | BENCHMARKS).items():
        for node in outside_kernels(tree):
            if isinstance(node, ast.FunctionDef) and f"{name}.{node.name}" not in FIXED_BY_TRANSFORMERS:
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
                assert len(names) <= MAX_POSITIONAL, f"{name}.{node.name}: {len(names)} positional parameters"


def is_launch(call: ast.Call) -> bool:
    """Whether a call launches a jit kernel: ``kernel[grid](...)``, or a compiled kernel's ``run``."""
    return isinstance(call.func, ast.Subscript) or ast.unparse(call.func) == "kernel.run"


def test_positional_arguments():
    """At most eight, except for launches of jit kernels and for PyTorch's operators, which take them by position."""
    found = [
        f"{name}:{node.lineno}: {ast.unparse(node.func)}"
        for name, tree in (EVERYTHING | BENCHMARKS).items()
        for node in outside_kernels(tree)
        if isinstance(node, ast.Call) and len(node.args) > MAX_POSITIONAL
        if not is_launch(node) and not ast.unparse(node.func).startswith("aten.")
    ]
    assert not found


@pytest.mark.parametrize(
    ("source", "counted"),
    [
        ("f(1, 2)", 1),
        ("kernel[2, 3](1, 2)", 0),
        ("@triton.jit\ndef kernel(x):\n    f(1, 2)", 0),
        ("@kernel(heuristics={})\ndef forward(x):\n    f(1, 2)", 0),
        ("def g(x):\n    return [f(y, 2) for y in x]", 1),
    ],
)
def test_which_calls_are_counted(source, counted):
    calls = [node for node in outside_kernels(ast.parse(source)) if isinstance(node, ast.Call)]
    assert sum(ast.unparse(call.func) == "f" and not is_launch(call) for call in calls) == counted


@pytest.mark.parametrize("package", ["molsaki_kernels", "molsaki"])
def test_the_design_page_names_every_file_once(package):
    """A folder's ``__init__.py`` may be left out."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    section = page.split(f"\n## `{package}`\n")[1].split("\n### Files\n")[1].split("\n### ")[0]
    named, folder = [], Path()
    for row in section.splitlines():
        first = row.split("|")[1] if row.startswith("|") else ""
        for name in re.findall(r"`([\w./]+\.(?:py|c|h|html|css|js))`", first):
            folder = Path(name).parent if "/" in name or name == first.split("`")[1] else folder
            path = folder / Path(name).name
            named.append(path.as_posix())
    files = {
        path.relative_to(ROOT / package).as_posix()
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".c", ".h", ".html", ".css", ".js")
    }
    assert sorted(named) == sorted(set(named))
    assert set(named) <= files
    assert {name for name in files - set(named) if not name.endswith("/__init__.py")} == set()


def test_folders_of_the_training_layer_import_downwards():
    """The drawing of the design page is compared with the imports, also those inside functions."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    drawing = page.split("\n### Allowed imports of folders\n")[1].split("```")[1]
    lines = [re.findall(r"\w+", line) for line in drawing.strip().splitlines()]
    assert lines[-1][0] == "tools"
    height = {name: -number for number, names in enumerate(lines[:-1]) for name in names}
    folders = {path.name for path in (ROOT / "molsaki").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(height) - set(lines[0]) - {"flags"}
    known = {name for name in EVERYTHING if name.startswith("molsaki.")}
    upwards = []
    for name in known:
        place = name.split(".")[1]
        for other in imported(EVERYTHING[name], known):
            target = other.split(".")[1]
            if (
                place != target
                and place not in lines[0]
                and height.get(target, -len(lines)) >= height.get(place, -len(lines))
            ):
                upwards += [(name, other)] if target in height else []
    assert not upwards


def named_tests(path: Path) -> set[str]:
    """The files of tests/ that a text names: the comments and docstrings of a Python file, all of another one."""
    text = path.read_text(encoding="utf-8")
    named = re.compile(r"(?<![\w/.])tests/[\w/-]+\.\w+")
    if path.suffix != ".py" or not named.search(text):
        return set(named.findall(text))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [token.string for token in tokens if token.type == tokenize.COMMENT]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found += [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    return set(named.findall("\n".join(found)))


def test_tests_that_are_named_exist():
    """In docstrings, comments and documents."""
    folders = ("molsaki_kernels", "molsaki", "benchmarks", "tests", "docs", "examples", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    kinds = (".py", ".md", ".c", ".h", ".sh", ".toml", ".yml", ".yaml")
    found = {
        path: names
        for path in files
        if path.is_file() and (path.suffix in kinds or path.name == "Makefile") and (names := named_tests(path))
    }
    assert len(found) > 10
    missing = {(path.name, name) for path, names in found.items() for name in names if not (ROOT / name).exists()}
    assert not missing


def test_which_names_are_found(tmp_path):
    source = '"""See ``tests/a/b.py``, run/tests/c.py."""\nx = "tests/d.py"  # tests/e_f.json, tests/g'
    (tmp_path / "module.py").write_text(source)
    assert named_tests(tmp_path / "module.py") == {"tests/a/b.py", "tests/e_f.json"}
    (tmp_path / "page.md").write_text("[a](../tests/a.py), `tests/b.py`.")
    assert named_tests(tmp_path / "page.md") == {"tests/b.py"}
