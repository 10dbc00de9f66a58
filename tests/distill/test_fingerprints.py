"""Fingerprints change with everything that a map depends on, and with nothing else."""

from __future__ import annotations

import pytest
import torch

from molsaki.config import MixtureOptions
from molsaki.store.fingerprints import describe_mixture, fingerprint_model, fingerprint_spans, fingerprint_tokenizer
from molsaki.text.segment import segment
from tests.helpers import tiny


def test_fingerprints():
    model = tiny.model()
    first = fingerprint_model(model)
    assert fingerprint_model(tiny.model()) == first
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6  # one weight of them all
    assert fingerprint_model(model) != first
    assert fingerprint_model(tiny.model().double()) == first
    headless = tiny.model(tie_word_embeddings=False)
    name = fingerprint_model(headless)
    headless.lm_head.weight.data.zero_()
    assert fingerprint_model(headless) == name  # maps do not depend on it
    again = tiny.model()
    again.config.rms_norm_eps *= 2  # the same weights, another model
    assert fingerprint_model(again) != first
    tokenizer = tiny.tokenizer()
    name = fingerprint_tokenizer(tokenizer)
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=1)
    assert fingerprint_tokenizer(tokenizer) == name
    tokenizer.chat_template = "{{ messages }}"
    assert fingerprint_tokenizer(tokenizer) != name
    spans = segment("Ann has 3 apples.", "3 + 4 = 7.")
    assert fingerprint_spans(spans) == fingerprint_spans(segment("Ann has 3 apples.", "3 + 4 = 7."))
    assert fingerprint_spans(spans) != fingerprint_spans(segment("Ann has 3 apples.", "3 + 4 = 8."))
    assert fingerprint_spans(spans) != fingerprint_spans(segment("Ann has 3 apples.", "3 + 4 = 7.", key=["apples"]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tau_t": 5}, {"tau_t": 5, "teacher_scale": "none"}),  # a whole number is no layer
        ({"tau_t": 0.1}, {"tau_t": 0.1, "teacher_scale": "none"}),
        ({"mixture": "single", "teacher_layer": -1}, {"teacher_layer": 2}),
        ({"mixture": "matched", "teacher_layers": [-1, 0]}, {"teacher_layers": [2, 0]}),
        ({"mixture": "matched", "teacher_layers": (-1, 0)}, {"teacher_layers": [2, 0]}),
        ({"mixture": "last"}, {}),
        ({"mixture": "random", "mixture_seed": 7}, {"student_layers": 2, "mixture_seed": 7}),
        ({"mixture": "uniform"}, {"student_layers": 2, "mixture_seed": 0}),
    ],
)
def test_the_identity_of_a_store_holds_what_the_teachers_map_depends_on(options, expected):
    """Layers of a teacher of three count from the front; nothing else changes."""
    common = {"all_layers": False, "map_heads": "mean", "mixture": options.get("mixture", "mixture")}
    assert describe_mixture(MixtureOptions(**options), 3, False, 2) == common | expected
    whole = {"all_layers": True, "map_heads": "mean"}
    assert describe_mixture(MixtureOptions(**options), 3, True, None) == whole
