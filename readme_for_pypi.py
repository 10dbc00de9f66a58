"""Turns README.md into the long description of the package: PyPI shows no relative links and no relative images.

With the repository's URL they point to the files of the version's tag there, in the form that GitHub and GitLab share
(``URL/blob/TAG/FILE``, ``URL/raw/TAG/FILE``). Without one, links become their text, and images are left out, with a
caption in italics if there is one. setup.py runs this file with nothing but the standard library.
"""

from __future__ import annotations

import re

_CODE = r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^[ \t]*(?P=fence)[^\n]*$|(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)"
_TEXT = r"(?:[^\[\]]|\[[^\[\]]*\](?:\([^()\s]*\))?)*"
_LINK = rf"(?P<image>!?)\[(?P<text>{_TEXT})\]\((?P<target>[^()\s]+)(?P<title>\s+\"[^\"]*\")?\)"
_TAG = (
    r"<(?P<tag>img|a|source)\b(?P<before>[^>]*?)\b(?P<attribute>src|href|srcset)=\"(?P<url>[^\"]*)\"(?P<after>[^>]*)>"
)
_PATTERN = re.compile(f"{_CODE}|{_LINK}|{_TAG}", re.MULTILINE | re.DOTALL)
_DEFINITION = re.compile(r"^ {0,3}\[[^\]]+\]:\s*(?P<target>\S+)", re.MULTILINE)
_CAPTION = re.compile(r"(?<=\0)\s*\n(?:[ \t]*\n)?\*[^*\s][^*]*\*[ \t]*(?=\n|\Z)")
_GONE = "\0"  # in the place of an image that is left out


def long_description(readme: str, url: str | None, tag: str) -> str:
    """README's text for a page on which relative links have no meaning.

    Args:
        readme: Markdown in which links and images are written inline, or as HTML tags with quoted attributes.
        url: the repository's, or None or "" if there is none.
        tag: the git tag of the version.

    Raises:
        ValueError: the URL is none, or the text has a link that cannot be rewritten.
    """
    if url and not re.fullmatch(r"https?://[^\s/]+/\S+", url):
        raise ValueError(f"repository URL: expected https://HOST/PATH, got {url!r}")
    base = url.rstrip("/").removesuffix(".git") if url else None
    text = _rewritten(readme, base, tag)
    if base is None:
        text = re.sub(r"<picture>.*?</picture>", _GONE, text, flags=re.DOTALL)
        text = _CAPTION.sub("", text)
        text = re.sub(rf"^[ \t]*{_GONE}[ \t]*\n(?:[ \t]*\n)*", "", text, flags=re.MULTILINE).replace(_GONE, "")
    return text


def _rewritten(text: str, base: str | None, tag: str) -> str:
    def absolute(target: str, kind: str) -> str:
        name, mark, anchor = target.partition("#")
        return f"{base}/{kind}/{tag}/{name.removeprefix('./') or 'README.md'}{mark}{anchor}"

    def link(match: re.Match[str]) -> str:
        target, label = match["target"], _rewritten(match["text"], base, tag)
        if is_relative(target):
            if base is None:
                return _GONE if match["image"] else label
            target = absolute(target, "raw" if match["image"] else "blob")
        if label == _GONE:  # a link around an image that is left out
            return label
        return f"{match['image']}[{label}]({target}{match['title'] or ''})"

    def html(match: re.Match[str]) -> str:
        if not is_relative(match["url"]):
            return match[0]
        if base is None:
            return "<a>" if match["tag"] == "a" else _GONE
        target = absolute(match["url"], "blob" if match["tag"] == "a" else "raw")
        return f'<{match["tag"]}{match["before"]}{match["attribute"]}="{target}"{match["after"]}>'

    def rewrite(match: re.Match[str]) -> str:
        return match[0] if match["fence"] or match["ticks"] else html(match) if match["tag"] else link(match)

    outside_code = re.sub(_CODE, "", text, flags=re.MULTILINE | re.DOTALL)
    for match in _DEFINITION.finditer(outside_code):
        if is_relative(match["target"]):
            raise ValueError(f"README.md: expected relative links to be written inline, got {match[0]!r}")
    return _PATTERN.sub(rewrite, text)


def is_relative(target: str) -> bool:
    return not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", target)
