"""Whether a stream supports colours, and text in the styles that the command line uses."""

from __future__ import annotations

import os
import re
from typing import Any

STYLES = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def has_colours(stream: Any) -> bool:
    """Whether to colour what is written to a stream: on a terminal only, unless an environment variable decides.

    ``NO_COLOR`` (https://no-color.org) and then ``FORCE_COLOR`` are read; an empty value counts as not set.
    """
    if os.environ.get("NO_COLOR"):
        return False
    force = os.environ.get("FORCE_COLOR")
    if force:
        return force != "0"
    if os.environ.get("TERM") == "dumb":
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # a closed stream, or an object with no more than write
        return False


def styled(text: str, style: str, stream: Any) -> str:
    """The text in a style of `STYLES`, or unchanged if the stream has no colours."""
    return f"\033[{STYLES[style]}m{text}\033[0m" if has_colours(stream) else text


def styled_help(text: str, stream: Any) -> str:
    """A help text with bold headings and coloured flags, where the stream has colours."""
    if not has_colours(stream):
        return text
    text = re.sub(r"(?m)^(\S[^\n]*:)$", lambda found: styled(found[1], "bold", stream), text)
    text = re.sub(r"(?m)^usage:", lambda found: styled(found[0], "bold", stream), text)
    return re.sub(r"(?m)^(  )(-[\w-]+(?:, -[\w-]+)*)", lambda found: found[1] + styled(found[2], "cyan", stream), text)
