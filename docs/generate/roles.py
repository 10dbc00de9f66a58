"""Rewrites docstrings for the API pages: roles such as ``:class:`StepPlan```, code, entries with several names."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|attr|meth|data|mod):`(~?)([^`]+)`")
_CODE = re.compile(r"``([^`]+)``")
_NAMES = re.compile(r"(\s+)(\w+(?:, \w+)+): ")


class Roles(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Drop overloads: the signature of the function itself has all parameters."""
        todo: list[griffe.Object] = [pkg]
        while todo:
            one = todo.pop()
            if isinstance(one, griffe.Function):
                one.overloads = None
            todo += [member for member in one.members.values() if isinstance(member, griffe.Object)]


def rewritten(text: str) -> str:
    """A docstring with roles and double backticks as Markdown code, and each argument in an entry of its own."""
    text = _ROLE.sub(lambda found: f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # the section whose >>> is code
    return one_each(_CODE.sub(r"`\1`", text))


def one_each(text: str) -> str:
    """A docstring with one entry for each name of its sections Args and Attributes, also where ours describe several in
    one, and with results as text."""
    lines, section, is_result = [], False, False
    todo = text.splitlines()
    while todo:
        line = todo.pop(0)
        if line and not line[0].isspace():
            section = line in ("Args:", "Attributes:")
            is_result = line in ("Returns:", "Yields:")
        elif is_result:  # griffe takes the words before a colon for a type; ours name none
            parts = line.split("`")
            line = "`".join(part if i % 2 else part.replace(":", "&#58;") for i, part in enumerate(parts))
        found = _NAMES.match(line) if section else None
        if found is None:
            lines.append(line)
            continue
        rest = [line[found.end() :]]
        while todo and (not todo[0].strip() or todo[0].startswith(found[1] + " ")):
            rest.append(todo.pop(0))
        for name in found[2].split(", "):
            lines += [f"{found[1]}{name}: {rest[0]}", *rest[1:]]
    return "\n".join(lines)
