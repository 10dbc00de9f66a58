"""Executes a notebook's cells in this Python, and with --write puts their outputs into the file:

    python examples/notebooks/execute.py examples/notebooks/attention_maps.ipynb --write

Jupyter does the same (Run > Run All Cells). This needs neither Jupyter nor a kernel, so the tests can run it, and its
outputs depend on the results alone: no times, no counters of a session. Pictures are files in ``maps`` beside the
notebook while it runs.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import sys
import types
from pathlib import Path
from typing import Any


class Image:
    """Stands in for ``IPython.display.Image`` where IPython is not installed: a PNG file as a cell's output."""

    def __init__(self, filename: str | Path):
        self.data = Path(filename).read_bytes()

    def _repr_png_(self) -> bytes:
        return self.data


def execute(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the notebook's code cells one after another; return it with their outputs, and their variables.

    The working directory is that of the notebook meanwhile. An error in a cell is raised as it is.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    module = types.ModuleType("IPython.display")
    module.Image = Image  # type: ignore[attr-defined]
    parent = types.ModuleType("IPython")
    parent.version_info = (9, 0)  # type: ignore[attr-defined]  # matplotlib reads it
    names = {"IPython": parent, "IPython.display": module}
    saved, folder = {name: sys.modules.get(name) for name in names}, Path.cwd()
    variables: dict[str, Any] = {"__name__": "__main__"}
    os.chdir(path.parent)
    sys.modules.update(names)
    try:
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(code, 1):
            cell["execution_count"], cell["outputs"] = number, _run(number, "".join(cell["source"]), variables)
    finally:
        os.chdir(folder)
        for name, before in saved.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
    return notebook, variables


def _run(number: int, source: str, variables: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of a cell: what it prints, and the value of its last line if that is an expression."""
    parsed = ast.parse(source)
    last = parsed.body.pop() if parsed.body and isinstance(parsed.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(parsed, f"cell {number}", "exec"), variables)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), variables)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(True)})
    if value is not None:
        data: dict[str, Any] = {}
        if hasattr(value, "_repr_png_"):
            data["image/png"] = base64.b64encode(value._repr_png_()).decode() + "\n"
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(True)
        shown = "<IPython.core.display.Image object>" if isinstance(value, Image) else repr(value)
        data["text/plain"] = shown.splitlines(True)
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true", help="write the outputs into the file")
    arguments = parser.parse_args()
    notebook, _ = execute(arguments.notebook)
    if arguments.write:
        arguments.notebook.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            print("".join(output.get("text", output.get("data", {}).get("text/plain", []))))


if __name__ == "__main__":
    main()
