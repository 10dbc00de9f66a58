"""The result of a dry run as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from molsaki.dry_run.counts import Found


def render(found: Found) -> str:
    """The result as indented lines, sizes and times in units that fit."""
    lines = ["dry run: nothing was written"]
    for section, entries in found.items():
        lines.append(section.replace("_", " "))
        flat = dict(_flat(entries))
        width = max(map(len, flat), default=0)
        lines += [f"  {name:{width}}  {_shown(section, name, value)}" for name, value in flat.items()]
    return "\n".join(lines)


def _flat(entries: Found) -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if value and isinstance(value, dict) and set(value) <= {"mean", "max", "median", "longest", "total"}:
            yield name.replace("_", " "), ", ".join(f"{key} {one:,}" for key, one in value.items())
        elif isinstance(value, dict):
            if not value:
                yield name.replace("_", " "), "none"
            for key, one in value.items():
                yield f"{name}: {key}".replace("_", " "), one
        else:
            yield name.replace("_", " "), value


def _shown(section: str, name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if section == "memory" or name.startswith("bytes"):
            return _size(value)
        if section == "time":
            return _duration(value)
        return f"{value:,}"
    return str(value)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.3g} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
