"""The documentation site: generated parts are current and right, links and Markdown are rewritten as they should be."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest

import molsaki
import molsaki_kernels
from docs.generate import __main__ as generate
from docs.generate import configuration, engines, performance
from docs.generate.marked import filled, table
from molsaki import cli
from molsaki.flags import parse

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference"
COMMANDS = list(cli.CONFIGURED)


# Generated parts


def test_committed_pages_are_current(capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().out


def test_every_part_is_on_a_page():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert set(re.findall(r"<!-- generated: (.+?) -->", text)) == set(generate.PARTS)


def test_a_part_that_is_not_current(monkeypatch, tmp_path, capsys):
    page = tmp_path / "docs/page.md"
    page.parent.mkdir()
    page.write_text("a\n<!-- generated: x -->\nold\n<!-- end: x -->\nb\n", encoding="utf-8")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "PARTS", {"x": lambda: "new"})
    assert generate.main(["--check"]) == 1 and "page.md: not current" in capsys.readouterr().out
    assert "old" in page.read_text(encoding="utf-8")
    assert generate.main([]) == 0
    assert page.read_text(encoding="utf-8") == "a\n<!-- generated: x -->\n\nnew\n\n<!-- end: x -->\nb\n"
    assert generate.main(["--check"]) == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- generated: y -->\n<!-- end: y -->", "page.md: no generated part y; expected one of x"),
        ("<!-- generated: x -->\n<!-- end: y -->", "page.md: expected <!-- end: x -->, got <!-- end: y -->"),
        ("<!-- generated: x -->\n", "page.md: expected an end"),
    ],
)
def test_wrong_marks(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        filled(text, {"x": str}, Path("page.md"))


def test_a_row_of_another_length():
    with pytest.raises(ValueError, match="expected 2 cells"):
        table(["a", "b"], [["1"]])


# Configuration


def section(command: str) -> str:
    page = (REFERENCE / "configuration.md").read_text(encoding="utf-8")
    return page.split(f"\n## molsaki {command}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described_once(command):
    page = (REFERENCE / "configuration.md").read_text(encoding="utf-8")
    config = configuration.config_class(command)
    own = {field.name for field in configuration.own_fields(config)}
    for field in dataclasses.fields(config):
        anchor = f"{command}-{field.name}" if field.name in own else field.name
        assert page.count(f'<a id="{anchor}"></a>**`{field.name}`**') == 1, field.name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_yaml_files_of_the_page_are_read(command, tmp_path):
    """The first is an example; the second has all options, and its values are the defaults."""
    config = configuration.config_class(command)
    example, everything = re.findall(r"```yaml\n(.*?)```", section(command), flags=re.DOTALL)
    file = tmp_path / "options.yaml"
    if command != "distill":  # whose example has options of TrainingArguments
        file.write_text(example, encoding="utf-8")
        read = parse(config, ["--config", str(file)])
        assert configuration.EXAMPLES[command].items() <= dataclasses.asdict(read).items()
    required = "top: 8\n" if command == "keys" else ""
    file.write_text(everything.replace("# top:\n", required), encoding="utf-8")
    names = set(re.findall(r"^(?:# )?(\w+):", everything, flags=re.MULTILINE))
    assert names == {field.name for field in dataclasses.fields(config) if field.init}
    read = parse(config, ["--config", str(file)])
    for name, value in dataclasses.asdict(config(**({"top": 8} if required else {}))).items():
        given = getattr(read, name)  # an object is JSON here, which TrainingArguments reads
        assert (json.loads(given) if isinstance(value, dict) else given) == value, name


def test_kinds_of_values():
    fields = {field.name: field for field in dataclasses.fields(configuration.DistillOptions)}

    def of(name):
        return configuration.values(fields[name], configuration.DistillOptions)

    assert of("normalise") == ["`softmax`", "`sum`"]
    assert of("objective")[-2:] == ["`molsaki`", "`module:name`"]
    assert of("packing") == ["true or false"] and of("train_file") == ["list of text"]
    assert of("report_to") == ["text", "list of text"] and of("attention_share") == ["number"]


# API


@pytest.mark.parametrize("package, page", [(molsaki_kernels, "api-kernels.md"), (molsaki, "api-training.md")])
def test_every_public_name_is_on_its_page(package, page):
    listed = re.findall(
        rf"^::: {package.__name__}\.(\w+)$", (REFERENCE / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(set(package.__all__) - {"__version__"})


# Engines


def row(text: str, *cells: str) -> list[str]:
    (found,) = [line for line in text.splitlines() if all(cell in line for cell in cells)]
    return [cell.strip() for cell in found.strip("| ").split(" | ")]


def clear():
    engines.why_not.cache_clear()
    engines.widths.cache_clear()


def test_the_table_of_features_is_what_the_engines_answer(monkeypatch):
    head, *_ = engines.features().splitlines()
    columns = [cell.strip() for cell in head.strip("| ").split(" | ")]
    blackwell = dict(zip(columns, row(engines.features(), "sm100, sm110"), strict=True))
    assert blackwell["head_dim"] == "multiples of 8 to 128, and 256; fp16 backward without 256"
    assert blackwell["softcap"] == "yes (256: forward)"
    clear()
    monkeypatch.setattr(engines.ENGINES["eager"], "why_not", lambda request: "no" if request.sinks else None)
    eager = dict(zip(columns, row(engines.features(), "`eager`"), strict=True))
    clear()
    assert (eager["sinks"], eager["softcap"]) == ("no", "yes")


def test_engines_answer_as_before_afterwards():
    before = molsaki_kernels.engines()
    engines.refusals()
    assert molsaki_kernels.engines() == before


def test_tests_that_the_page_names_exist(monkeypatch):
    with pytest.raises(ValueError, match="no test kernels/test_native.py::test_nothing"):
        engines.checked("kernels/test_native.py::test_nothing")
    monkeypatch.setattr(engines, "test_names", lambda path: frozenset({"test_features"}))
    engines.hardware_records.cache_clear()
    with pytest.raises(ValueError, match=r"shares-h200\.csv: no test "):
        engines.hardware_records()


def test_records_of_the_latest_run_count(monkeypatch, tmp_path):
    names = ["run", "engine", "test", "dtype", "comparisons", "over", "largest_share", "case", "date", "commit"]
    rows = [
        ["first", "sdpa", "test_features", "bfloat16", "3", "2", "1.5", "sdpa torch.bfloat16 both", "d1", "c1"],
        ["first", "sdpa", "test_features", "float16", "7", "0", "0.2", "sdpa torch.float16 both", "d1", "c1"],
        ["second", "sdpa", "test_features", "bfloat16", "4", "0", "0.5", "sdpa torch.bfloat16 both", "d2", "c2"],
        ["second", "sdpa", "test_features", "float32", "1", "0", "0.7", "sdpa torch.bfloat16 maps", "d2", "c2"],
    ]
    file = tmp_path / "shares.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([names, *rows])
    monkeypatch.setattr(engines, "SHARES", file)
    engines.hardware_records.cache_clear()
    found = engines.recorded("sdpa")
    engines.hardware_records.cache_clear()
    assert found == [
        "bf16: 5 comparisons, largest share of the budget 0.70 (d2 c2)",
        "fp16: 7 comparisons, largest share of the budget 0.20 (d1 c1)",
    ]


# Measured tables


def test_the_speed_table_of_the_readme():
    """Each row of sizes in the section Speed has the numbers of the records; columns are known by their words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    checked = 0
    for index, cells in enumerate(lines):
        cells = [cell.strip() for cell in cells]
        size = re.fullmatch(r"(\d+) x ([\d,]+)", cells[0])
        if size is None:
            continue
        head = next(lines[i - 1] for i in range(index, 0, -1) if set("".join(lines[i])) <= set("-: "))
        name = f"{size[1]}x{size[2].replace(',', '')} H9/9 D64"
        (shape,) = [shape for shape in performance.cpu_shapes() if shape.startswith(name)]
        both, forward = (
            performance.layer("layer-xeon-2core.csv", shape, of) for of in (performance.BOTH, performance.FORWARD)
        )
        for title, cell in zip((cell.strip().lower() for cell in head[1:]), cells[1:], strict=True):
            if "eager" in title:
                wanted = performance.rounded(performance.ratio(both, performance.EAGER), 1)
            elif "sdpa`" in title:
                wanted = performance.rounded(performance.ratio(both, performance.SDPA), 2)
            elif "backward" in title or "both" in title:
                wanted = performance.rounded(performance.ratio(both, performance.NATIVE), 2)
            elif "forward" in title:
                wanted = performance.rounded(performance.ratio(forward, performance.NATIVE), 2)
            elif "words" in title:
                one = both[performance.NATIVE]
                wanted = f"{one['words']}, {one['steps']}"
            else:
                raise AssertionError(f"README.md: no rule for the column {title!r}")
            assert cell == wanted, (cells[0], title)
            checked += 1
    assert checked >= 8


def test_the_sentence_about_bfloat16_in_the_readme():
    file = "layer-xeon-2core-amx-bf16.csv"
    ranges = []
    for of in (performance.BOTH, performance.FORWARD):
        found = [
            performance.paired(performance.layer(file, shape, of), performance.NATIVE, performance.PLAIN)
            for shape in {one["shape"] for one in performance.read(file)}
        ]
        ranges.append(f"{min(found):.2f} to {max(found):.2f}")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"it takes {ranges[0]} of that attention's time, forward {ranges[1]}" in text
    changes = " ".join((ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split())
    assert f"a layer with its map takes {ranges[0]} of the time of PyTorch's attention" in changes


def test_records_of_two_runs_are_not_mixed():
    one = {"contender": "a", "commit": "c", "fastest_plain": "x", "shape": "s"}
    with pytest.raises(ValueError, match="records of several runs"):
        performance.latest([one, one | {"contender": "b", "fastest_plain": "y"}])
    assert performance.latest([one | {"commit": "old"}, one | {"contender": "b"}]) == {"b": one | {"contender": "b"}}


# The site's hooks


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    from docs.generate import hooks

    return hooks


@pytest.mark.parametrize(
    "github, python",
    [
        ("text\n- a\n- b\n", "text\n\n- a\n- b\n"),
        ("- a\n  more\n  - b\n    more\n- c\n", "- a\n    more\n    - b\n        more\n- c\n"),
        ("1. a\n\n   ```python\n   x = 1\n\n   if x:\n       - y\n   ```\n2. b\n",
         "1. a\n\n    ```python\n    x = 1\n\n    if x:\n        - y\n    ```\n2. b\n"),
        ("text\n| a |\n| --- |\n| 1 |\n", "text\n\n| a |\n| --- |\n| 1 |\n"),
        ("```\n- a\n  - b\n```\n", "```\n- a\n  - b\n```\n"),
        ("10. a\n    b\n\ntext\n", "10. a\n    b\n\ntext\n"),
    ],
)  # fmt: skip
def test_lists_of_repository_viewers(hooks, github, python):
    assert hooks.as_python_markdown(github) == python


def test_links_in_code_stay(hooks):
    text = 'a [b](c.md) `[d](e.md)` ![f](g.png "h")\n\n```\n[i](j.md)\n```\n\n[`k`](l.md#m)\n'
    assert hooks.targets(text) == ["c.md", "g.png", "l.md#m"]
    assert hooks.with_links(text, lambda target: f"x/{target}").count("x/") == 3


def test_headings_that_repeat(hooks):
    assert hooks.with_anchors("# Files\n\n## Files\n\n```\n# Files\n```\n") == (
        "# Files\n\n## Files { #files-1 }\n\n```\n# Files\n```\n"
    )


def test_docstrings(hooks):
    pytest.importorskip("griffe")
    from docs.generate.roles import rewritten

    assert rewritten("See :class:`~a.b.C` and ``x``.\n\nArgs:\n    q, k: of\n        heads.\n    v: it.") == (
        "See `C` and `x`.\n\nArgs:\n    q: of\n        heads.\n    k: of\n        heads.\n    v: it."
    )
    assert rewritten("Returns:\n    ``a:b``, or ``x``: it.") == "Returns:\n    `a:b`, or `x`&#58; it."


def build(folder: Path, **environment: str) -> Path:
    """A small site with the settings of ours."""
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config

    settings = f"""
INHERIT: {ROOT / "mkdocs.yml"}
nav: [Home: index.md, How-to: [other.md], Change: source/CHANGES.md]
hooks: [{ROOT / "docs/generate/hooks.py"}]
plugins: [search, offline]
extra_css: []
extra: {{polyfills: [iframe-worker.js]}}
"""
    (folder / "mkdocs.yml").write_text(settings, encoding="utf-8")
    config = load_config(str(folder / "mkdocs.yml"), **environment)
    build_site(config)
    return folder / "site"


@pytest.fixture
def sources(tmp_path, hooks):
    for name, text in {
        "docs/index.md": "# Home\n\n[c](../CHANGES.md#second) [k](../code/a.py) [f](../code) [r](../rows.csv)"
        "\n\n[n](note.ipynb) $x_{ij} < 1$ and [o](other.md)\n",
        "docs/other.md": "# Other\n\n[home](index.md)\n",
        "docs/iframe-worker.js": "",
        "CHANGES.md": "# Changes\n\n## Second\n\n[home](docs/index.md) [k](code/a.py)\n",
        "code/a.py": "x = '<b>'\n",
        "rows.csv": "a\n1\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    cells = [
        {"cell_type": "markdown", "source": ["# A note\n", "\n", "text"]},
        {"cell_type": "code", "source": ["1 + 1"], "outputs": [{"data": {"text/plain": ["2"]}}]},
        {"cell_type": "code", "source": ["draw()"], "outputs": [{"data": {"image/png": "iVBORw0KGgo="}}]},
    ]
    (tmp_path / "docs/note.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return tmp_path


def test_a_small_site(sources):
    site = build(sources)
    home = (site / "index.html").read_text(encoding="utf-8")
    for target in ("source/CHANGES.html#second", "source/code/a.py.html", "source/code/index.html", "source/rows.csv"):
        assert f'href="{target}"' in home, target
    assert "<math" in home and "\\(" not in home
    changes = (site / "source/CHANGES.html").read_text(encoding="utf-8")
    assert 'href="../index.html"' in changes and 'href="code/a.py.html"' in changes
    assert "&lt;b&gt;" in (site / "source/code/a.py.html").read_text(encoding="utf-8")
    assert 'href="a.py.html"' in (site / "source/code/index.html").read_text(encoding="utf-8")
    note = (site / "note.html").read_text(encoding="utf-8")
    assert "A note" in note and (site / "note-2-0.png").exists() and 'src="note-2-0.png"' in note
    assert 'href="note.html"' in home
    for page in site.rglob("*.html"):  # nothing is loaded from elsewhere
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]*src="?https?:', text), page
        assert not re.findall(r'<link[^>]*href="?https?:[^>]*rel="?stylesheet', text), page


def test_with_the_address_of_the_repository(sources):
    home = (build(sources, repo_url="https://example.org/r") / "index.html").read_text(encoding="utf-8")
    assert 'href="https://example.org/r/blob/main/code/a.py"' in home
    assert 'href="https://example.org/r/tree/main/code"' in home and 'href="source/CHANGES.html#second"' in home


@pytest.mark.parametrize(
    "link", ["[x](missing.md)", "[x](../missing.py)", "[x](other.md#missing)", "[x](../CHANGES.md#no)"]
)
def test_a_broken_link_is_an_error(sources, link):
    from mkdocs.exceptions import Abort

    (sources / "docs/index.md").write_text(f"# Home\n\n{link}\n", encoding="utf-8")
    with pytest.raises(Abort):
        build(sources)
