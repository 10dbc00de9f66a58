"""What all pictures have in common: colours, lines, fonts, and files that are reproducible and accessible."""

from __future__ import annotations

import functools
import io
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from xml.sax.saxutils import escape

from molsaki.extras import require
from molsaki.io import atomic_write
from molsaki.plotting.labels import clean

try:
    import matplotlib
    import matplotlib.style
    from matplotlib import font_manager
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation
except ImportError:
    require("plot")
    raise

P = ParamSpec("P")
R = TypeVar("R")

TEACHER, STUDENT, OTHER = "#1f5a99", "#d1672c", "#d9d9d9"
# Lines differ in hue and in lightness, so that they can be told apart with every kind of colour blindness and in grey;
# each also has its own dash pattern and marker. tests/distill/test_plots.py measures the distances.
COLOURS = (TEACHER, STUDENT, "#2a0a12", "#1fa592", "#8f55ea", "#7d1a08")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.2, 1.2)),
    (0, (6, 1.5, 1.2, 1.5)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MARKERS = ("o", "s", "^", "D", "v", "P")
MISSING = "#c4c4c4"  # a cell that is not a number

DPI = 150


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Draw with matplotlib's defaults and ours, whatever the user's settings are, and fonts for all texts given."""

    @functools.wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        ours: dict[str, Any] = {
            "font.family": ["sans-serif"],
            "font.sans-serif": _fonts(frozenset("".join(_texts([args, kwargs])))),
            "font.size": 9,
            "axes.titlesize": 10.5,
            "figure.titlesize": 11.5,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "text.parse_math": False,  # a text with dollars is not mathematics
            "svg.fonttype": "none",
            "svg.hashsalt": "molsaki",
        }
        with matplotlib.style.context([ours], after_reset=True):
            return function(*args, **kwargs)

    return styled


@functools.cache
def blues() -> Colormap:
    """White to dark blue: its lightness falls steadily, so that it reads the same in grey and without red or green."""
    return matplotlib.colormaps["Blues"].with_extremes(bad=MISSING)


def line(ax: Axes, x: Any, y: Any, number: int, label: str) -> Line2D:
    """One of several curves, told apart by colour, dashes and markers; of many points a few have the marker."""
    every = max(len(x) // 8, 1)
    (line,) = ax.plot(
        x,
        y,
        label=label,
        color=COLOURS[number % len(COLOURS)],
        linestyle=DASHES[(number + number // len(COLOURS)) % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=4,
        linewidth=1.4,
        markevery=(number * every // 3 % every, every),
    )
    return line


def legend(ax: Axes) -> None:
    """A legend below the panel, where it hides no curve."""
    below = ax.transAxes + ScaledTranslation(-0.05, -0.48, ax.figure.dpi_scale_trans)  # inches: below the axis's label
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=below,
        borderaxespad=0,
        borderpad=0,
        handlelength=3.2,
        labelspacing=0.3,
    )


def _texts(value: Any) -> Iterable[str]:
    """All texts in nested arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


# Fonts for what DejaVu Sans, which comes with matplotlib, lacks; those that are installed are used, in this order.
FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB",
    "Hiragino Sans", "Yu Gothic", "Malgun Gothic", "Apple SD Gothic Neo", "Noto Sans Devanagari", "Noto Sans Bengali",
    "Noto Sans Thai", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Symbols", "Noto Sans Symbols 2",
    "Noto Sans Math", "Noto Emoji", "Symbola", "Segoe UI Symbol", "Arial Unicode MS", "Unifont",
)  # fmt: skip


@functools.lru_cache(maxsize=64)
def _fonts(characters: frozenset[str]) -> list[str]:
    """DejaVu Sans and, of the installed fonts above, those with further characters.

    Warns about characters that no font has.
    """
    families = ["DejaVu Sans"]
    ignored = ("Cc", "Cf", "Cs", "Cn", "Mn", "Zl", "Zp")
    missing = {ord(c) for c in characters if unicodedata.category(c) not in ignored}
    missing -= _codes(families[0])
    installed = set(font_manager.get_font_names()) if missing else set()
    for family in FONTS:
        if missing and family in installed and missing & (found := _codes(family)):
            families.append(family)
            missing -= found
    if missing:
        some = "".join(map(chr, sorted(missing)[:10]))
        warnings.warn(
            f"pictures: no installed font has {len(missing)} of the characters, such as {some}; PNG and PDF files show "
            "boxes in their place. Install a font such as Noto Sans CJK, or look at the SVG file in a browser",
            stacklevel=4,
        )
    return families


@functools.lru_cache(maxsize=64)
def _codes(family: str) -> frozenset[int]:
    """The code points that a font has."""
    return frozenset(font_manager.get_font(font_manager.findfont(family)).get_charmap())


def save(figure: Figure, path: str | Path, title: str, description: str, formats: Sequence[str] = ()) -> Path:
    """Write the figure to ``path``, and with each suffix of ``formats``, without metadata that changes between runs."""
    path = Path(path)
    first = path.suffix.removeprefix(".") or "png"
    if title:
        figure.suptitle(clean(title))
    name, description = clean(title or path.stem), clean(description)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Title": name, "Description": description, "Software": None},
        "svg": {"Title": name, "Description": description, "Date": None, "Creator": None},
        "pdf": {"Title": name, "Subject": description, "CreationDate": None, "Creator": None, "Producer": None},
    }
    for suffix in dict.fromkeys((first, *formats)):
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # `_fonts` has warned already
            figure.savefig(buffer, format=suffix, dpi=DPI, metadata=metadata.get(suffix))
        data = buffer.getvalue()
        if suffix == "svg":
            data = _accessible(data.decode(), name, description).encode()
        with atomic_write(path if suffix == first else path.with_suffix(f".{suffix}"), binary=True) as file:
            file.write(data)
    return path


def _accessible(svg: str, name: str, description: str) -> str:
    """The SVG file with its title and description where screen readers look for them."""
    head, tag, rest = svg.partition("<svg ")
    inside, end, rest = rest.partition(">")
    titled = f"<title>{escape(name)}</title>"
    rest = rest.replace(f"\n {titled}", "", 1)
    return f'{head}{tag}role="img" {inside}{end}\n {titled}\n <desc>{escape(description)}</desc>{rest}'
