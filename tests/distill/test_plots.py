import re

import matplotlib
import numpy as np
import pytest

from molsaki.plotting.plots import plot_attention_by_step, plot_layer_weights, plot_losses, plot_map, shorten

STEPS = ["Each apple costs $5, a pear $7.", "How much do 3 apples and 2 pears cost together?", "It is $15 + $14."]
WORDS = ["5", "7", "3", "2", "15", "14"]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def text_as_text():
    """Texts stay whole in an SVG file unless they were parsed as mathematics."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        yield


def texts(path):
    return [text.replace("&amp;", "&") for text in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())]


def lines(step):
    """The lines of a step's label."""
    return shorten(step, 30, 2).splitlines()


def maps(S, W, names=("teacher", "student")):
    return {name: RNG.random((S, W)) for name in names}


def test_map_is_labelled_with_its_words_and_steps(tmp_path):
    path = plot_map(maps(3, 6), STEPS, WORDS, tmp_path / "new" / "map.svg", title="Problem $1 of $9")
    found = texts(path)
    assert path == tmp_path / "new" / "map.svg"
    assert {"teacher", "student", "Problem $1 of $9", *WORDS} <= set(found)
    assert {line for step in STEPS for line in lines(step)} <= set(found)
    assert all(found.count(word) >= 2 for word in WORDS)  # under each of the two maps


def test_dollars_and_backslashes_are_not_mathematics(tmp_path):
    steps, words = [r"$\frac{1}{", "$5 and $7"], ["$5", r"\x$_"]
    found = texts(plot_map({"$a$": np.ones((2, 2))}, steps, words, tmp_path / "map.svg"))
    assert {"$a$", *steps, *words} <= set(found)
    found = texts(plot_attention_by_step({"$a$": np.ones((2, 2))}, {"$a$": [3, 4]}, steps, tmp_path / "by.svg", "$t$"))
    assert {"$a$", "$t$", *steps} <= set(found)


def test_maps_share_one_colour_scale(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("molsaki.plotting.plots._save", lambda figure, path, title: figures.append(figure))
    plot_map({"teacher": np.full((1, 2), 0.1), "student": np.full((1, 2), 8.0)}, ["s"], ["1", "2"], tmp_path / "m.png")
    limits = [image.get_clim() for ax in figures[0].axes for image in ax.images]
    assert limits == [(0, 8), (0, 8)]


def test_cells_show_their_values(tmp_path):
    found = texts(plot_map({"map": np.array([[0.25, 1.5]])}, ["one step"], ["1", "2"], tmp_path / "map.svg"))
    assert {".25", "1.50"} <= set(found)


@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (0, 3), (1, 1), (4, 40), (30, 3)])
def test_map_of_any_size(tmp_path, shape):
    S, W = shape
    path = plot_map(maps(S, W), ["A step."] * S, ["1,200.50"] * W, tmp_path / "map.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_map_without_words_says_so(tmp_path):
    assert "no key words" in texts(plot_map(maps(2, 0), STEPS[:2], [], tmp_path / "map.svg"))


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


def test_attention_by_step_is_the_share_of_key_words(tmp_path):
    step_maps = {"teacher": np.array([[1.0, 1.0], [0.0, 9.5]]), "student": np.array([[1.0, 2.0], [0.0, 0.0]])}
    tokens = {"teacher": [8, 10], "student": [10, 12]}
    found = texts(plot_attention_by_step(step_maps, tokens, STEPS[:2], tmp_path / "by.svg"))
    assert {"25%", "95%", "30%", "0%", "key words", "other tokens"} <= set(found)


def test_attention_by_step_needs_tokens_of_every_step(tmp_path):
    with pytest.raises(ValueError, match="tokens: expected 3 numbers"):
        plot_attention_by_step(maps(3, 6), {"teacher": [1, 2, 3], "student": [1, 2]}, STEPS, tmp_path / "by.png")


def test_layer_weights_of_both_sides(tmp_path):
    records = [
        {"step": step, "teacher": RNG.dirichlet(np.ones(30)).tolist(), "student": RNG.dirichlet(np.ones(10)).tolist()}
        for step in range(10, 210, 10)
    ]
    found = texts(plot_layer_weights(records, tmp_path / "weights.svg"))
    assert {"teacher: weight of each layer", "student: weight of each layer", "step 10", "step 200"} <= set(found)
    assert {"10", "190"} <= set(found)
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


def test_shorten_keeps_the_beginning():
    assert shorten("two  words\nhere", 20) == "two words here"
    assert shorten("a step of many words", 10, 2) == "a step of\nmany words"
    assert shorten("a step of far too many words", 10, 2) == "a step of\nfar too …"
    assert shorten("", 10) == ""
