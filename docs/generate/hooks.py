"""Hooks of the documentation site: pages from outside of docs/, notebooks, GitHub's Markdown, formulas.

The pages are written for repository viewers too. They link to files outside of docs/, which `on_files` adds to the site
under `SOURCE`, and they are GitHub's Markdown, which `as_python_markdown` rewrites for Python-Markdown.
"""

from __future__ import annotations

import base64
import html
import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify  # type: ignore[import-untyped]

SOURCE = "source"  # the folder of the site for files from outside of docs/
LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".c": "c",
    ".h": "c",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".cff": "yaml",
    ".toml": "toml",
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    "": "text",
}  # fmt: skip; a file that is neither one of these nor Markdown nor a notebook is copied
LINKED = 20  # files of a folder; of a larger one only the names are listed
NOT_LISTED = {"__pycache__", ".git", ".venv"}

_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})")
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s]+)|(\b(?:src|href)=\")([^\"]+)")
_ITEM = re.compile(r"(?:[-*+]|\d{1,9}[.)])[ \t]+")
_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_MARKER = re.compile(r"^<!-- (?:generated|end)\b.*?-->\n?", re.MULTILINE)

# Weights of pages in the search: an option is looked up more often than what was once tried.
BOOST = {"reference/configuration.md": 4, "troubleshooting.md": 2, "lab/2026-11.md": 0.3, f"{SOURCE}/CHANGELOG.md": 0.3}
_slug = slugify(case="lower")
_origins: dict[str, str] = {}  # page of the site -> its path in the repository


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the notebooks in docs/ to the section of the navigation that `extra.notebooks` names."""
    docs, section = Path(config.docs_dir), config.extra.get("notebooks")
    found: list[Any] = [{title(path): path.relative_to(docs).with_suffix(".md").as_posix()} for path in notebooks(docs)]
    for entry in config.nav or []:
        if isinstance(entry, dict) and section in entry:
            listed = json.dumps(entry[section])
            entry[section] += [one for one in found if next(iter(one.values())) not in listed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks in docs/, and every file outside of it that a page links to, as a page or a copy."""
    root, docs = Path(config.config_file_path).resolve().parent, Path(config.docs_dir).resolve()
    folder = docs.relative_to(root).as_posix()
    _origins.clear()
    for notebook in notebooks(docs):
        name = notebook.relative_to(docs).as_posix()
        if (copy := files.get_file_from_path(name)) is not None:
            files.remove(copy)
        for file in notebook_files(notebook, name.removesuffix(".ipynb") + ".md", config):
            files.append(file)
    todo = []
    for uri in re.findall(rf'"{SOURCE}/([^"]+)"', json.dumps(config.nav)):  # in the navigation, linked to or not
        files.append(*outside_files(root / uri, uri, f"{SOURCE}/{uri}", config))
        _origins[f"{SOURCE}/{uri}"] = uri
    for file in files.documentation_pages():
        _origins.setdefault(file.src_uri, f"{folder}/{file.src_uri}")
        todo.append((file.src_uri, file.content_string))
    while todo:
        page, text = todo.pop()
        for target in targets(text):
            path = resolve(target, _origins[page], root)
            if path is None or path.startswith(f"{folder}/") or is_linked_elsewhere(path, config):
                continue
            uri = site_path(path, root)
            if files.get_file_from_path(uri) is not None:
                continue
            for file in outside_files(root / path, path, uri, config):
                files.append(file)
                if file.is_documentation_page():
                    _origins[file.src_uri] = path if (root / path).is_file() else f"{path}/index.md"
                    todo.append((file.src_uri, file.content_string))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to files outside of docs/, and GitHub's Markdown as Python-Markdown's."""
    root = Path(config.config_file_path).resolve().parent
    folder = Path(config.docs_dir).resolve().relative_to(root).as_posix()
    here = page.file.src_uri
    if here in BOOST:
        page.meta.setdefault("search", {"boost": BOOST[here]})
    origin = _origins.get(here, f"{folder}/{here}")

    def rewrite(target: str) -> str:
        path = resolve(target, origin, root)
        if path is None:
            return target
        if is_linked_elsewhere(path, config):
            kind = "tree" if (root / path).is_dir() else "blob"
            return f"{str(config.repo_url).rstrip('/')}/{kind}/main/{path}"
        inside = path.startswith(f"{folder}/")
        if inside and path.endswith(".ipynb"):
            path, target = (text.replace(".ipynb", ".md") for text in (path, target))
        if inside and origin == f"{folder}/{here}":
            return target
        uri = path.removeprefix(f"{folder}/") if inside else site_path(path, root)
        anchor = target.partition("#")[2]
        return posixpath.relpath(uri, posixpath.dirname(here) or ".") + (f"#{anchor}" if anchor else "")

    return with_anchors(as_python_markdown(with_links(_MARKER.sub("", markdown), rewrite)))


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML, which browsers draw without a script."""
    return _MATH.sub(lambda found: mathml(html.unescape(found[3]), "block" if found[2] == "[" else "inline"), content)


def mathml(latex: str, display: str) -> str:
    """A formula as MathML; a block is in an element that scrolls."""
    latex = latex.replace("\n", " ")
    element: str = convert(latex, display=display)
    return element if display == "inline" else f'<div class="formula">{element}</div>'


def notebooks(docs: Path) -> list[Path]:
    """The notebooks in a folder, without checkpoints."""
    return sorted(path for path in docs.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def title(notebook: Path) -> str:
    """The first heading of a notebook, or its name."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    headings = re.findall(
        r"^# (.+)$", "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), re.M
    )
    return headings[0].replace("`", "") if headings else notebook.stem


def notebook_files(path: Path, uri: str, config: MkDocsConfig) -> list[File]:
    """A notebook as a page, and its pictures."""
    parts, files = [], []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        if cell["cell_type"] != "code" or not source:
            continue
        parts.append(f"```python\n{source}\n```")
        for index, output in enumerate(cell.get("outputs", [])):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{posixpath.splitext(uri)[0]}-{number}-{index}.png"
                content = base64.b64decode("".join(data["image/png"]))
                files.append(File.generated(config, name, content=content))
                alt = "".join(data.get("text/plain", ["output"])).strip().replace("[", "(").replace("]", ")")
                parts.append(f"![{alt}]({posixpath.basename(name)})")
                continue
            text = "".join(output.get("text") or data.get("text/plain") or output.get("traceback") or []).rstrip()
            if text:
                parts.append(f"```text\n{text}\n```")
    return [File.generated(config, uri, content="\n\n".join(parts)), *files]


def outside_files(file: Path, path: str, uri: str, config: MkDocsConfig) -> list[File]:
    """The files of the site for one file or folder of the repository."""
    if file.is_dir():
        names = sorted(
            f"{one.name}/" if one.is_dir() else one.name for one in file.iterdir() if one.name not in NOT_LISTED
        )
        names = [name for name in names if not name.startswith(".")]
        link = len(names) <= LINKED
        listed = "\n".join(f"- [`{n}`]({n})" if link and not n.endswith("/") else f"- `{n}`" for n in names)
        return [File.generated(config, uri, content=f"{HIDDEN}# `{path}/`\n\n{listed}\n")]
    if file.suffix == ".ipynb":
        return notebook_files(file, uri, config)
    if file.suffix not in LANGUAGES:
        return [File.generated(config, uri, abs_src_path=str(file))]
    fence = "`" * 4
    text = file.read_text(encoding="utf-8").rstrip()
    code = f"{HIDDEN}# `{path}`\n\n{fence}{LANGUAGES[file.suffix]}\n{text}\n{fence}\n"
    return [File.generated(config, uri, content=code)]


HIDDEN = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n"


def is_linked_elsewhere(path: str, config: MkDocsConfig) -> bool:
    """Whether links to a file lead to the repository, which needs its address; pages are part of the site anyway."""
    return bool(config.repo_url) and not path.startswith("docs/") and not path.endswith((".md", ".png", ".svg"))


def site_path(path: str, root: Path) -> str:
    """The path in the site of a file or folder outside of docs/."""
    if (root / path).is_dir():
        return f"{SOURCE}/{path}/" + ("README.md" if (root / path / "README.md").exists() else "index.md")
    suffix = posixpath.splitext(path)[1]
    if suffix == ".ipynb":
        return f"{SOURCE}/{path.removesuffix('.ipynb')}.md"
    return f"{SOURCE}/{path}" + (".md" if suffix in LANGUAGES else "")


def resolve(target: str, origin: str, root: Path) -> str | None:
    """The path in the repository that a link of the file ``origin`` leads to, or None if it leads to no file."""
    if re.match(r"[a-z][a-z0-9+.-]*:|[#/]", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target.partition("#")[0]))
    if path.startswith("..") or not (root / path).exists():
        return None
    return f"{path}/README.md" if (root / path / "README.md").exists() else path


def targets(markdown: str) -> list[str]:
    """The targets of all links and pictures."""
    found: list[str] = []
    with_links(markdown, lambda target: found.append(target) or target)  # type: ignore[func-returns-value]
    return found


def with_links(markdown: str, rewrite: Callable[[str], str]) -> str:
    """The text with the targets of links and pictures rewritten, except in code."""

    def replaced(text: str) -> str:
        return _LINK.sub(lambda found: (found[1] or found[3]) + rewrite(found[2] or found[4]), text)

    parts = []
    for is_code, block in blocks(markdown):
        if is_code:
            parts.append(block)
            continue
        end = 0
        for code in _CODE.finditer(block):
            before = block[end : code.start()]
            parts += [replaced(before), code[0]]
            end = code.end()
        parts.append(replaced(block[end:]))
    return "".join(parts)


def blocks(markdown: str) -> list[tuple[bool, str]]:
    """The text as alternating parts, fenced code (True) and all else (False)."""
    found: list[tuple[bool, list[str]]] = [(False, [])]
    fence = ""
    for line in markdown.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if not fence and mark:
            fence = mark[2]
            found.append((True, [line]))
            continue
        found[-1][1].append(line)
        if fence and mark and mark[2].startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
            found.append((False, []))
    return [(is_code, "".join(lines)) for is_code, lines in found]


def with_anchors(markdown: str) -> str:
    """The text with ids for headings that repeat an earlier one: name-1, as in repository viewers, not name_1."""
    seen: dict[str, int] = {}

    def numbered(found: re.Match[str]) -> str:
        slug = _slug(found[2], "-")
        seen[slug] = seen.get(slug, -1) + 1
        return f"{found[0]} {{ #{slug}-{seen[slug]} }}" if seen[slug] else found[0]

    heading = re.compile(r"^(#{1,6}) +(.+?) *$", re.MULTILINE)
    return "".join(block if is_code else heading.sub(numbered, block) for is_code, block in blocks(markdown))


def as_python_markdown(markdown: str) -> str:
    """GitHub's Markdown as Python-Markdown: what belongs to a list item is indented by four, and a list or table that
    follows a line of text begins after an empty line."""
    lines: list[str] = []
    offsets: list[int] = []  # of the text of each list item that is open, outermost first
    fence, parts = "", markdown.splitlines()
    for number, line in enumerate(parts):
        text = line.lstrip(" ")
        indent, mark = len(line) - len(text), _FENCE.match(line)
        if not text:
            lines.append("")
            continue
        if not fence:
            is_item = _ITEM.match(text)
            is_lazy = bool(lines and lines[-1]) and not is_item and not mark and not text.startswith(("#", "|"))
            while offsets and indent < offsets[-1] and not is_lazy:
                offsets.pop()
            depth = len(offsets)
            extra = max(indent - offsets[-1], 0) if offsets else indent
            before = lines[-1].strip() if lines else ""
            is_table = (
                text.startswith("|") and number + 1 < len(parts) and re.match(r"\s*\|[\s:|-]+\|\s*$", parts[number + 1])
            )
            if before and (
                (is_item and not depth and not _in_list(lines)) or (is_table and not before.startswith("|"))
            ):
                lines.append("")
            lines.append(" " * (4 * depth + extra) + text)
            if is_item and extra < 4:
                offsets.append(indent + len(is_item[0]))
            fence = mark[2] if mark else ""
            continue
        lines.append(" " * (4 * len(offsets) + max(indent - (offsets[-1] if offsets else 0), 0)) + text)
        if mark and mark[2].startswith(fence) and not text.strip().strip(fence[0]):
            fence = ""
    return "\n".join(lines) + "\n"


def _in_list(lines: list[str]) -> bool:
    """Whether the last paragraph of the lines is part of a list."""
    for line in reversed(lines):
        if not line or line.startswith(("```", "~~~")):
            return False
        if line.startswith("    ") or _ITEM.match(line):
            return True
    return False
