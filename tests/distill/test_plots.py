"""The pictures: what they show, and that people can read them."""

from __future__ import annotations

import itertools
import re
import warnings
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from molsaki.plotting import style
from molsaki.plotting.curves import plot_layer_weights, plot_losses
from molsaki.plotting.labels import shorten
from molsaki.plotting.map_pictures import _luminance, plot_attention_by_step, plot_map
from molsaki.plotting.study_pictures import plot_accuracy, plot_differences

STEPS = ["Each apple costs $5, a pear $7.", "How much do 3 apples and 2 pears cost together?", "It is $15 + $14."]
WORDS = ["5", "7", "3", "2", "15", "14"]
RNG = np.random.default_rng(0)
HISTORY = [
    {"step": s, **dict.fromkeys(("loss", "loss_pre", "loss_exp", "eval_loss_pre", "eval_set_b_loss_exp"), 3 / s)}
    for s in range(1, 60)
]


def texts(path):
    return [text.replace("&amp;", "&") for text in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())]


def lines(step):
    """The lines of a step's label."""
    return shorten(step, 30, 2).splitlines()


def maps(S, W, names=("teacher", "student")):
    return {name: RNG.random((S, W)) for name in names}


@pytest.fixture
def figures(monkeypatch):
    """The figures that the test draws, instead of files."""
    found = []
    monkeypatch.setattr(style, "save", lambda figure, path, title, *_: found.append((figure, title)))
    return found


def shown_texts(figure, title=""):
    """The texts of a figure after its layout, each with its box: centre, width, height (pixels) and angle."""
    if title:
        figure.suptitle(title, parse_math=False)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(style.DPI)
    canvas.draw()
    renderer = canvas.get_renderer()
    outside = set()  # labels of ticks that are not drawn
    for ax in figure.axes:
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            low, high = sorted(limits)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    outside |= {tick.label1, tick.label2}
    found = []
    for text in figure.findobj(Text):
        box = text.get_window_extent(renderer)
        shown = text.get_text().strip() and text.get_visible() and text not in outside
        if not shown or box.width * box.height == 0:
            continue
        angle = text.get_rotation() % 180
        width, height = box.width, box.height
        if angle == 90:
            width, height = height, width
        elif angle == 45:  # the box around a turned one: both sides are (width + height) / sqrt 2
            height = text.get_fontsize() * style.DPI / 72 * 1.2
            width = box.width * 2**0.5 - height
        found.append((text, ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), width, height, angle, box))
    return found


def corners(item):
    _, (x, y), width, height, angle, _ = item
    turn = np.deg2rad(angle)
    across = np.array([np.cos(turn), np.sin(turn)]) * max(width / 2 - 0.5, 0)
    up = np.array([-np.sin(turn), np.cos(turn)]) * max(height / 2 - 0.5, 0)
    return np.array([(x, y) + i * across + j * up for i, j in ((1, 1), (1, -1), (-1, -1), (-1, 1))])


def overlap(a, b):
    """Whether two turned boxes overlap: no side of either separates them."""
    if a[5].x1 < b[5].x0 or b[5].x1 < a[5].x0 or a[5].y1 < b[5].y0 or b[5].y1 < a[5].y0:
        return False
    first, second = corners(a), corners(b)
    for turn in (np.deg2rad(a[4]), np.deg2rad(b[4])):
        for axis in ((np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn))):
            p, q = first @ axis, second @ axis
            if p.max() <= q.min() or q.max() <= p.min():
                return False
    return True


def assert_readable(figure, title=""):
    """No text overlaps another or leaves the picture, none is small, and the picture is not wider than a page."""
    found = shown_texts(figure, title)
    assert found
    width, height = figure.canvas.get_width_height()
    for text, *_, box in found:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, f"cut: {text.get_text()!r}"
        assert text.get_fontsize() >= 8, f"{text.get_fontsize()} pt: {text.get_text()!r}"
    pairs = [(a[0].get_text(), b[0].get_text()) for a, b in itertools.combinations(found, 2) if overlap(a, b)]
    assert not pairs
    # At 900 pixels, the width of a page on the web, letters of 8 points are then at least 9 pixels.
    assert figure.get_figwidth() <= 11


# --- maps ---


def test_map_is_labelled_with_its_words_and_steps(tmp_path):
    path = plot_map(maps(3, 6), STEPS, WORDS, tmp_path / "new" / "map.svg", title="Problem $1 of $9")
    found = texts(path)
    assert path == tmp_path / "new" / "map.svg"
    assert {"teacher", "student", "Problem $1 of $9", "key word", "reasoning step", "(sentence)", *WORDS} <= set(found)
    assert {line for s, step in enumerate(STEPS, 1) for line in lines(f"{s}. {step}")} <= set(found)
    assert all(found.count(word) >= 2 for word in WORDS)  # under each of the two maps
    assert any("attention, summed over the tokens" in text for text in found)


def test_dollars_and_backslashes_are_not_mathematics(tmp_path):
    steps, words = [r"$\frac{1}{", "$5_a and $7"], ["$5", r"\x$_"]
    numbered = {f"{s}. {step}" for s, step in enumerate(steps, 1)}
    found = texts(plot_map({"$a$": np.ones((2, 2))}, steps, words, tmp_path / "map.svg"))
    assert {"$a$", *numbered, *words} <= set(found)
    found = texts(plot_attention_by_step({"$a$": np.ones((2, 2))}, {"$a$": [3, 4]}, steps, tmp_path / "by.svg", "$t$"))
    assert {"$a$", "$t$", *numbered} <= set(found)
    found = texts(plot_accuracy({"$x_1$": {1: [1], 2: [2]}, "b": {1: [1], 2: [2]}}, "b", tmp_path / "a.svg", "$t$"))
    assert {"$x_1$", "$t$"} <= set(found)


def test_maps_share_one_colour_scale(tmp_path, figures):
    plot_map({"teacher": np.full((1, 2), 0.1), "student": np.full((1, 2), 8.0)}, ["s"], ["1", "2"], tmp_path / "m.png")
    limits = [mesh.get_clim() for ax in figures[0][0].axes[:2] for mesh in ax.collections]
    assert limits == [(0, 8), (0, 8)]


def test_cells_show_their_values(tmp_path):
    found = texts(plot_map({"map": np.array([[0.25, 1.5]])}, ["one step"], ["1", "2"], tmp_path / "map.svg"))
    assert {".25", "1.50"} <= set(found)
    small = texts(plot_map({"map": np.array([[0.025, 0.05]])}, ["one step"], ["1", "2"], tmp_path / "map.svg"))
    assert {".025", ".050"} <= set(small)


@pytest.mark.parametrize(
    ("shape", "word"),
    [((0, 0), "7"), ((2, 0), "7"), ((0, 3), "7"), ((1, 1), "7"), ((17, 40), "7")]
    + [(shape, "1,200.50") for shape in ((5, 13), (17, 40), (2, 60), (60, 2))],
)
def test_map_of_any_size_is_readable(tmp_path, figures, shape, word):
    S, W = shape
    steps = [f"Step {s} has many words, more than fit on two lines of a label in a picture." for s in range(S)]
    plot_map(maps(S, W), steps, [word] * W, tmp_path / "map.png", "problem 7")
    assert_readable(*figures[0])


def test_large_map_shows_every_cell_and_labels_the_largest(tmp_path, figures):
    values = {name: np.zeros((200, 500)) for name in ("teacher", "student")}
    rows, columns = np.arange(3, 200, 13), np.arange(7, 500, 21)
    values["teacher"][np.ix_(rows, columns)] = 1 + np.arange(24)
    values["student"][33, 444] = 0.5
    steps, words = [f"Step {s} of a long text." for s in range(200)], [str(1000 + w) for w in range(500)]
    plot_map(values, steps, words, tmp_path / "map.png", "long")
    figure, title = figures[0]
    teacher, student, top, _ = figure.axes[:4]
    np.testing.assert_array_equal(teacher.images[0].get_array(), values["teacher"])
    np.testing.assert_array_equal(student.images[0].get_array(), values["student"])
    np.testing.assert_array_equal(
        top.collections[0].get_array().reshape(16, 24), values["teacher"][np.ix_(rows, columns)]
    )
    assert [label.get_text() for label in top.get_yticklabels()] == [f"{r + 1}. Step {r} of a long text." for r in rows]
    assert [label.get_text() for label in top.get_xticklabels()] == [f"#{c + 1} {1000 + c}" for c in columns]
    marks = [sorted(line.get_xdata()) for line in teacher.get_lines()]
    assert marks == [columns.tolist(), [499.5] * 16]
    assert "200. Step 199 of a long text." in [label.get_text() for label in teacher.get_yticklabels()]
    assert_readable(figure, title)


def test_very_large_map_keeps_its_largest_values(tmp_path, figures):
    values = np.zeros((2000, 3501))
    values[1234, 2345] = 0.7
    values[1235, 2346] = np.nan
    words = [str(w) for w in range(3501)]
    plot_map({"map": values}, [f"Step {s}." for s in range(2000)], words, tmp_path / "map.png")
    ax = figures[0][0].axes[0]
    image = ax.images[0].get_array()
    assert image.shape == (400, 876) and image.max() == image[1234 // 5, 2345 // 4] == 0.7
    assert ax.get_xlim() == (-0.5, 3500.5) and ax.images[0].get_extent()[1] == 4 * 876 - 0.5
    label = figures[0][0].axes[-1].get_xlabel().replace("\n", " ")
    assert "the largest of 5 x 4" in label and "not a number (1 cells)" in label


def test_map_without_words_says_so(tmp_path):
    assert "no key words" in texts(plot_map(maps(2, 0), STEPS[:2], [], tmp_path / "map.svg"))


def test_cells_that_are_no_numbers_are_hatched(tmp_path, figures):
    values = np.array([[0.5, np.nan, 2.0], [np.inf, 1.0, 0.25]])
    plot_map({"map": values}, STEPS[:2], WORDS[:3], tmp_path / "map.png")
    ax, bar = figures[0][0].axes
    mesh, hatched = ax.collections
    assert mesh.get_clim() == (0, 2) and mesh.get_array().mask.sum() == 2
    assert hatched.get_hatch() and len(hatched.get_paths()) == 2
    assert "not a number (2 cells)" in bar.get_xlabel().replace("\n", " ")
    assert {text.get_text() for text in ax.texts} == {".50", "2.00", "1.00", ".25"}


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_map_without_values_says_so(tmp_path, figures, value):
    plot_map({"map": np.full((3, 6), value)}, STEPS, WORDS, tmp_path / "map.png")
    label = figures[0][0].axes[-1].get_xlabel().replace("\n", " ")
    assert ("all values are 0" in label) == (value == 0) and ("not a number" in label) == (value != 0)


def test_map_of_the_wrong_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"maps\['teacher'\].*\(3, 6\).*\(6, 3\)"):
        plot_map(maps(6, 3), STEPS, WORDS, tmp_path / "map.png")
    with pytest.raises(ValueError, match="at least one"):
        plot_map({}, STEPS, WORDS, tmp_path / "map.png")


def test_a_failed_plot_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = plot_map(maps(3, 6), STEPS, WORDS, tmp_path / "map.png")
    before = path.read_bytes()

    def fail(self, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_map(maps(3, 6), STEPS, WORDS, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- files ---


def test_formats_are_written_together_and_the_same_each_time(tmp_path):
    values = maps(3, 6)
    values["teacher"][1, 1] = np.nan
    for folder, size in (("a", 10.0), ("b", 30.0)):  # whatever a user's settings are
        with matplotlib.rc_context({"font.size": size, "svg.fonttype": "path", "text.parse_math": True}):
            path = plot_map(values, STEPS, WORDS, tmp_path / folder / "map.png", "title", formats=("png", "svg", "pdf"))
        assert path == tmp_path / folder / "map.png"
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["map.pdf", "map.png", "map.svg"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_files_have_a_title_and_a_description(tmp_path):
    values = np.zeros((3, 6))
    values[1, 4] = 0.75
    path = plot_map({"teacher": values}, STEPS, WORDS, tmp_path / "map.png", "Apples & pears", formats=("png", "svg"))
    expected = (
        "teacher: the largest value, 0.75, is that of row 2 (How much do 3 apples and 2 pears cost together?) and"
    )
    info = Image.open(path).info
    assert (
        info["Title"] == "Apples & pears" and expected in info["Description"] and "column 5 (15)" in info["Description"]
    )
    root = ElementTree.parse(path.with_suffix(".svg")).getroot()
    assert root.get("role") == "img"
    assert [child.tag.split("}")[1] for child in root][:2] == ["title", "desc"]
    assert root[0].text == "Apples & pears" and root[1].text == info["Description"]
    assert len(root.findall("{*}title")) == 1


def test_texts_of_any_script_are_one_warning_at_most(tmp_path):
    steps = [
        "小明有3个苹果，每个苹果5元，一共多少钱？请你一步一步地想",
        "لدى أحمد 12 كتابا",
        "🍎🍎 cost 5 \x00\x1b",
        "x" * 200,
    ]
    words = ["苹果五个人民币苹果五个", "كتاب", "🍎", "\x07", "\n", "Donaudampfschifffahrtsgesellschaft"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = plot_map(maps(4, 6, ("教师",)), steps, words, tmp_path / "map.svg", "数学 🍎", formats=("svg", "png"))
    assert [str(w.message).partition(":")[0] for w in caught] in ([], ["pictures"])
    found = texts(path)  # the text is there for the viewer's fonts, and the file is XML in spite of control characters
    assert {"教师", "数学 🍎", "كتاب", "🍎", "↵", "Donaudampfsch…"} <= set(found)
    assert ElementTree.parse(path).getroot()[0].text == "数学 🍎"


def test_texts_of_any_script_do_not_overlap(tmp_path, figures):
    steps = ["小明有3个苹果，每个苹果5元，一共多少钱？请你一步一步地想", "لدى أحمد 12 كتابا", "🍎🍎 cost 5", "x" * 200]
    words = ["苹果五个人民币苹果五个", "كتاب", "🍎", "$5_a", "Donaudampfschifffahrtsgesellschaft", "7"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plot_map(maps(4, 6), steps, words, tmp_path / "map.png", "title")
        assert_readable(*figures[0])


def test_shorten_keeps_the_beginning():
    assert shorten("two  words\nhere", 20) == "two words here"
    assert shorten("a step of many words", 10, 2) == "a step of\nmany words"
    assert shorten("a step of far too many words", 10, 2) == "a step of\nfar too …"
    assert shorten("", 10) == ""
    assert shorten("x" * 25, 10, 2) == "x" * 10 + "\n" + "x" * 9 + "…"
    assert shorten("小明有3个苹果", 8, 2) == "小明有3\n个苹果"  # a Chinese character is two columns wide
    assert shorten("小明有3个苹果", 8) == "小明有3…"
    assert shorten("👩‍👩‍👧a👩‍👩‍👧", 3) == "👩‍👩‍👧…"  # characters that are joined stay together


# --- the other pictures ---


def test_attention_by_step_is_the_share_of_key_words(tmp_path):
    step_maps = {"teacher": np.array([[1.0, 1.0], [0.0, 9.5]]), "student": np.array([[1.0, 2.0], [0.0, np.nan]])}
    tokens = {"teacher": [8, 10], "student": [10, 12]}
    found = texts(plot_attention_by_step(step_maps, tokens, STEPS[:2], tmp_path / "by.svg"))
    assert {"25 %", "95 %", "30 %", "not a number", "on key words", "on other tokens"} <= set(found)


def test_attention_by_step_needs_tokens_of_every_step(tmp_path):
    with pytest.raises(ValueError, match="tokens: expected 3 numbers"):
        plot_attention_by_step(maps(3, 6), {"teacher": [1, 2, 3], "student": [1, 2]}, STEPS, tmp_path / "by.png")


@pytest.mark.parametrize("S", [0, 1, 5, 200])
def test_attention_by_step_of_any_size_is_readable(tmp_path, figures, S):
    steps = [f"Step {s} has many words, more than fit on two lines of a label in a picture." for s in range(S)]
    plot_attention_by_step(maps(S, 3), {n: [9] * S for n in ("teacher", "student")}, steps, tmp_path / "b.png", "title")
    assert_readable(*figures[0])
    assert len(figures[0][0].axes[0].patches) == 2 * S


def test_attention_by_many_steps_counts_neighbours_together(tmp_path, figures):
    plot_attention_by_step({"map": np.full((1000, 2), 0.25)}, {"map": [1, 2] * 500}, ["x"] * 1000, tmp_path / "b.png")
    bars = figures[0][0].axes[0].patches
    assert len(bars) == 2 * 334 and bars[0].get_width() == pytest.approx(100 * 1.5 / 4)  # steps of 1, 2 and 1 tokens


def weights(L):
    return RNG.dirichlet(np.ones(L)).tolist()


def test_layer_weights_of_both_sides(tmp_path, figures, monkeypatch):
    records = [{"step": step, "teacher": weights(30), "student": weights(10)} for step in range(10, 210, 10)]
    plot_layer_weights(records, tmp_path / "weights.svg", "run")
    figure, title = figures[0]
    found = {item[0].get_text() for item in shown_texts(figure, title)}
    assert {
        "teacher: weight of each layer",
        "student: weight of each layer",
        "step 10",
        "step 200",
        "10",
        "170",
    } <= found
    assert_readable(figure)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array()[:, -1], records[-1]["teacher"])
    plot_layer_weights([r | {"step": 100_000 * r["step"]} for r in records], tmp_path / "weights.svg", "run")
    assert_readable(*figures[1])
    monkeypatch.undo()
    assert plot_layer_weights(records[:1], tmp_path / "one.png").exists()


def test_layer_weights_of_one_side(tmp_path):
    found = texts(plot_layer_weights([{"step": 1, "teacher": [0.5, 0.5]}], tmp_path / "weights.svg"))
    assert "teacher: weight of each layer" in found
    assert "student: weight of each layer" not in found


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "student": [1.0]}, {"step": 2, "student": [0.5, 0.5]}],
        [{"step": 1, "student": [1.0]}, {"step": 2, "teacher": [1.0]}],
    ],
)
def test_layer_weights_that_do_not_fit_are_refused(tmp_path, records):
    with pytest.raises(ValueError, match="records"):
        plot_layer_weights(records, tmp_path / "weights.png")


def test_losses_show_what_was_logged(tmp_path):
    history = [{"step": s, "loss": 3 / s, "l_att": 0.1 / s} for s in (1, 2, 3)] + [{"step": 3, "train_runtime": 9.0}]
    curves = {"loss": ["loss"], "attention": ["l_att", "l_att_uniform"], "entropy": ["h_t"]}
    found = texts(plot_losses(history, curves, tmp_path / "losses.svg"))
    assert {"loss", "attention", "l_att"} <= set(found)
    assert not {"l_att_uniform", "entropy"} & set(found)
    with pytest.raises(ValueError, match="h_t"):
        plot_losses(history, {"entropy": ["h_t"]}, tmp_path / "none.png")


def test_losses_say_what_they_are_and_their_logged_names(tmp_path, figures):
    curves = {"loss": ["loss"], "cross-entropy": ["loss_pre", "loss_exp", "eval_loss_pre", "eval_set_b_loss_exp"]}
    plot_losses(HISTORY, curves, tmp_path / "losses.png", "run")
    figure, title = figures[0]
    ax = figure.axes[1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "answer (loss_pre)",
        "rationale (loss_exp)",
        "held out: answer (eval_loss_pre)",
        "held out: rationale (eval_set_b_loss_exp)",
    ]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "nats per token")
    assert_readable(figure, title)


def test_legends_hide_no_curve(tmp_path, figures):
    points = {f"method {i}": {step: [1.0 + i, 2.0] for step in (1, 2)} for i in range(8)}
    plot_losses(HISTORY, {"cross-entropy": ["loss_pre", "loss_exp"]}, tmp_path / "losses.png")
    plot_accuracy(points, "method 0", tmp_path / "accuracy.png", "title")
    plot_layer_weights([{"step": s, "student": [0.5, 0.5]} for s in (1, 2)], tmp_path / "weights.png")
    for figure, title in figures:
        shown_texts(figure, title)
        legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
        assert legends
        for legend in legends:
            assert all(legend.get_window_extent().y1 < ax.bbox.y0 for ax in [legend.axes])
        assert_readable(figure)


def test_differences_are_told_apart_without_colour(tmp_path, figures):
    differences = {"test": {"a": (1.0, 0.5, 1.5), "b": (0.1, -0.5, 0.7)}, "harder": {"a": (-1.0, -2.0, -0.5)}}
    plot_differences(differences, tmp_path / "differences.png", "title")
    figure, title = figures[0]
    faces = [line.get_markerfacecolor() for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert faces == [style.STUDENT, "white"]  # filled where the interval excludes 0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["interval contains 0", "interval excludes 0"]
    assert_readable(figure, title)
    many = {f"test {i}": {"x" * 100 + str(m): (0.0, -1.0, 1.0) for m in range(12)} for i in range(5)}
    plot_differences(many, tmp_path / "differences.png", "title")
    assert_readable(*figures[1])


# --- colours ---

# Machado, Oliveira and Fernandes 2009, severity 1.0: what is seen of linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(colours, blindness="none"):
    """CIE L*a*b* (D65) of colours as somebody sees them."""
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(BLINDNESS[blindness]), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = seen @ to_xyz.T / (0.9505, 1, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_curves_differ_in_colour_with_every_kind_of_colour_blindness(blindness):
    seen = lab(style.COLOURS, blindness)
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 20  # 2.3 is just noticeable; the default colours of matplotlib come down to 5


def test_curves_are_dark_enough_and_differ_without_colour(tmp_path, figures):
    lightness = np.sort(lab(style.COLOURS)[:, 0])
    assert min(np.diff(lightness)) > 4 and lightness[-1] < 62  # 62: a contrast of 3 to white
    names = [f"loss_{i}" for i in range(12)]
    plot_losses([dict.fromkeys(names, 1.0) | {"step": s} for s in (1, 2)], {"many": names}, tmp_path / "losses.png")
    curves = figures[0][0].axes[0].get_lines()
    styles = {(str(line._unscaled_dash_pattern), line.get_marker()) for line in curves}
    assert len(styles) == len(curves) == 12
    key, other = lab([style.TEACHER, style.OTHER])[:, 0]
    assert other - key > 40


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_of_maps_darken_steadily(blindness):
    shades = style.blues()(np.linspace(0, 1, 33))[:, :3]
    assert max(np.diff(lab(shades, blindness)[:, 0])) < 0


def test_values_contrast_with_their_cells(tmp_path, figures):
    plot_map({"map": np.linspace(0.1, 2, 20).reshape(4, 5)}, ["s"] * 4, ["7"] * 5, tmp_path / "map.png")
    ax = figures[0][0].axes[0]
    assert len(ax.texts) == 20
    for text, value in zip(ax.texts, np.linspace(0.1, 2, 20), strict=True):
        cell, letter = (_luminance(matplotlib.colors.to_rgba(c)) for c in (style.blues()(value / 2), text.get_color()))
        assert (max(cell, letter) + 0.05) / (min(cell, letter) + 0.05) > 4.5
