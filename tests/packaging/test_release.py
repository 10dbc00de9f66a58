"""Checks what a release needs: one version everywhere, a long description for PyPI, the workflow, valid forms."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
URL, TAG = "https://host.example/owner/name", "v9.8.7"
in_a_checkout = pytest.mark.skipif(not GITHUB.exists(), reason="an sdist does not have it")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load(name: str):
    specification = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


readme_for_pypi = load("readme_for_pypi")


def described(text: str, url: str | None) -> str:
    return readme_for_pypi.long_description(text, url, TAG)


def version() -> str:
    return re.search(r'^version = "([^"]+)"', read("pyproject.toml"), re.MULTILINE).group(1)


def test_one_version():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version()
    headings = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    number, _, date = headings[1].partition(" - ")
    assert number == version() and re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    assert str(yaml.safe_load(read("CITATION.cff"))["date-released"]) == date


PAGE = """# Title

[![badge](https://ci.example/b.svg)](https://ci.example) [![own](docs/b.svg)](docs/b.md)

![A map](docs/map.png)

*What it
shows.*

See [`api.py`](molsaki_kernels/api.py), [below](#more "the end"), [there](./docs/x.md#part), [paper](https://arxiv.org).
Code: `[a](b)`, ``[`a`](b)``.

```md
[a](b.md) ![c](d.png)
```
<p><img alt="x" src="docs/x.svg" width="9"> <a href="docs/x.md">x</a> <a href="https://y.example">y</a></p>
"""


def test_links_and_images_are_absolute():
    for url in (URL, URL + "/", URL + ".git"):
        assert described(PAGE, url) == PAGE.replace(
            "[![own](docs/b.svg)](docs/b.md)", f"[![own]({URL}/raw/{TAG}/docs/b.svg)]({URL}/blob/{TAG}/docs/b.md)"
        ).replace("](docs/map.png)", f"]({URL}/raw/{TAG}/docs/map.png)").replace(
            "](molsaki_kernels/api.py)", f"]({URL}/blob/{TAG}/molsaki_kernels/api.py)"
        ).replace('](#more "the end")', f']({URL}/blob/{TAG}/README.md#more "the end")').replace(
            "](./docs/x.md#part)", f"]({URL}/blob/{TAG}/docs/x.md#part)"
        ).replace('src="docs/x.svg"', f'src="{URL}/raw/{TAG}/docs/x.svg"').replace(
            'href="docs/x.md"', f'href="{URL}/blob/{TAG}/docs/x.md"'
        )  # fmt: skip


@pytest.mark.parametrize("url", [None, ""])
def test_without_a_url_nothing_is_broken(url):
    assert described(PAGE, url) == (
        "# Title\n\n[![badge](https://ci.example/b.svg)](https://ci.example) \n\n"
        "See `api.py`, below, there, [paper](https://arxiv.org).\n"
        "Code: `[a](b)`, ``[`a`](b)``.\n\n```md\n[a](b.md) ![c](d.png)\n```\n"
        '<p> <a>x</a> <a href="https://y.example">y</a></p>\n'
    )


def test_what_cannot_be_rewritten_is_refused():
    with pytest.raises(ValueError, match=r"expected https://HOST/PATH, got 'git@host:owner/name'"):
        described(PAGE, "git@host:owner/name")
    text = "See [a][b].\n\n[b]: docs/a.md\n"
    with pytest.raises(ValueError, match=r"expected relative links to be written inline, got '\[b\]: docs/a.md'"):
        described(text, URL)
    assert described(text.replace("docs/a.md", "https://a.example"), URL).endswith("[b]: https://a.example\n")


@pytest.mark.parametrize("url", [URL, None])
def test_the_first_page_on_pypi(url):
    """The README itself: every link is absolute, every file exists, and no text is lost."""
    text = described(read("README.md"), url)
    outside_code = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)", outside_code) + re.findall(r'(?:src|href|srcset)="([^"]*)"', outside_code)
    assert targets and all(target.startswith("https://") for target in targets)
    own = [target.removeprefix(f"{URL}/") for target in targets if target.startswith(URL)]
    assert bool(own) == (url is not None) and "\0" not in text
    for target in own:
        kind, tag, name = target.split("/", 2)
        assert kind in ("blob", "raw") and tag == TAG and (ROOT / name.partition("#")[0]).exists()
        assert kind == ("raw" if name.endswith((".png", ".svg")) else "blob")
    for heading in re.findall(r"^## .*$", read("README.md"), re.MULTILINE):
        assert heading in text
    assert text.count("```") == read("README.md").count("```")


@in_a_checkout
def test_wheels_are_published_from_tags_only():
    workflow = yaml.safe_load((GITHUB / "workflows/wheels.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    publish = jobs["publish"]
    assert "refs/tags/v" in publish["if"] and publish["environment"]["name"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"} and workflow["permissions"] == {"contents": "read"}
    assert set(publish["needs"]) == set(jobs) - {"publish"}  # it waits for all others
    commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert "twine check --strict" in commands
    for file in re.findall(r"\.ci/\w+\.py", commands + read("pyproject.toml")):
        assert (ROOT / file).is_file()
    for job in jobs.values():
        assert job["timeout-minutes"] <= 60


FORMS = ["bug.yml", "wrong-numbers.yml", "feature.yml", "question.yml"]


@in_a_checkout
@pytest.mark.parametrize("name", FORMS)
def test_issue_forms(name):
    """What GitHub requires of a form, and a required field in each."""
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form) <= {"name", "description", "title", "labels", "body"}
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w-]+", one) for one in ids)
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert ("value" if part["type"] == "markdown" else "label") in part["attributes"]
        assert set(part) <= {"type", "id", "attributes", "validations"}
    assert any(part.get("validations", {}).get("required") for part in form["body"])
    if name in ("bug.yml", "wrong-numbers.yml"):
        assert "molsaki doctor --json" in str(form)


@in_a_checkout
def test_every_form_is_tested():
    assert sorted(path.name for path in (GITHUB / "ISSUE_TEMPLATE").iterdir()) == sorted([*FORMS, "config.yml"])
    assert yaml.safe_load((GITHUB / "ISSUE_TEMPLATE/config.yml").read_text())["blank_issues_enabled"] is False
