"""`WORD_SCORES`: how much each word of a text matters to a model, by its attention or by the gradient of its loss.

Both score a question with its rationale and answer. A score is comparable within one text only.

A word with the text's first token has no score. That token is an attention sink (Xiao et al. 2023, arXiv 2309.17453):
neither the attention that it receives nor its gradient says anything about the word. In texts without a leading special
token, that word would nearly always be selected.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from molsaki.batches.batch import TextBatch
from molsaki.batches.collator import text_batch
from molsaki.batches.tokenized import TokenizedText
from molsaki.modeling.capture import capture
from molsaki.modeling.lm_head import label_logits
from molsaki.modeling.unwrap import evaluation_mode, input_device

Array = np.ndarray[Any, Any]
NO_SCORE = -np.inf  # of a word that cannot be scored


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """A text whose words are scored, up to the last token of its answer.

    Attributes:
        tokens: its ids, the S steps of its rationale and answer, and its W words, in tokens. Its labels are those whose
            cross-entropy `gradient_scores` differentiates.
        seen_from: for each word, the first of the S steps that is after the word's own; S if there is none.
    """

    tokens: TokenizedText
    seen_from: list[int]


@torch.no_grad()
def attention_scores(
    model: PreTrainedModel, texts: Sequence[ScoredText], pad_id: int, layers: Sequence[int] = ()
) -> list[Array]:
    """The attention that each word receives from a token of a later step of the rationale or answer, on average.

    With the weight ``a[l, h, i, j]`` of query i on key j in head h of layer l, and the tokens Q(w) of the steps of
    rationale and answer that come after the step with word w:

        score(w) = mean over l, h of  (sum over i in Q(w), j in w of a[l, h, i, j]) / |Q(w)|

    It is a mean over queries, so an early word does not gain from being visible to more of them. Tokens of the word's
    own step are not counted, because they attend to their neighbours and themselves whatever the words mean. A key that
    a sliding window hides from a query has weight 0 there. Special tokens are in no word.

    The weights are the rows of MoLSAKI's map (arXiv 2604.15701, Eq. 2 and 3): memory is ``L S W`` per text, and no
    ``M x M`` matrix is computed.

    Args:
        model: a Hugging Face decoder whose attention has maps.
        texts: the batch; it is right-padded with ``pad_id``.
        layers: the decoder layers that count, as `capture` numbers them; all if empty.

    Returns:
        For each text ``(W,)`` float64, at least 0; `NO_SCORE` for a word without tokens, with the text's first token,
        or without a later step.

    Raises:
        ValueError: the model's attention has no map, or it has no such layer.
    """
    batch, decoder = _batch(model, texts, pad_id), model.base_model
    assert batch.plan is not None
    with evaluation_mode(decoder), capture(decoder, batch.plan) as record:
        decoder(**batch.model_inputs())
    for layer in layers:
        if layer not in record.layers:
            raise ValueError(f"layers: expected some of {record.layers}, got {layer}")
    kept = [n for n, layer in enumerate(record.layers) if not layers or layer in layers]
    received = record.maps[:, kept].mean(1, dtype=torch.float64).cpu().numpy()  # (N, S, W)
    found = []
    for text, sums in zip(texts, received, strict=True):
        lengths = np.array([stop - start for start, stop in text.tokens.steps])[:, None]
        is_later = np.arange(len(lengths))[:, None] >= np.array(text.seen_from)  # (S, W)
        queries = (lengths * is_later).sum(0)
        scores = (sums[: len(lengths), : len(text.seen_from)] * is_later).sum(0) / np.maximum(queries, 1)
        found.append(np.where(_has_score(text) & (queries > 0), scores, NO_SCORE))
    return found


def gradient_scores(
    model: PreTrainedModel, texts: Sequence[ScoredText], pad_id: int, layers: Sequence[int] = ()
) -> list[Array]:
    """The norm of the gradient of the labels' cross-entropy with respect to the embeddings of each word's tokens.

    With the input embedding ``e[j]`` of token j and the mean cross-entropy L of the text's labels:

        score(w) = sqrt(sum over j in w of |dL / de[j]|^2)

    For a word of one token this is the score of LeaF (Guo et al. 2025, arXiv 2506.07851), which compares the scores of
    two models and uses all tokens of the reply as labels. One forward and backward in evaluation mode; no gradient of a
    weight is computed.

    Args:
        model: a causal language model, under any attention implementation.
        texts: the batch; it is right-padded with ``pad_id``, which changes nothing in a causal model.
        layers: must be empty.

    Returns:
        For each text ``(W,)`` float64, at least 0; `NO_SCORE` for a word without tokens or with the text's first token.

    Raises:
        ValueError: no gradient passes through the weights' quantisation, or the model does not look up its input
            embeddings once.
    """
    if layers:
        raise ValueError(f"layers: expected none with gradients, got {list(layers)}")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = model.config.quantization_config.quant_method
        raise ValueError(f"by: gradient needs weights that gradients pass through, got quantisation {method}")
    batch = _batch(model, texts, pad_id)
    embeddings: list[Tensor] = []

    def as_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    handle = model.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        with evaluation_mode(model), _frozen(model), torch.enable_grad():
            logits = label_logits(model, batch)
            if len(embeddings) != 1:
                raise ValueError(
                    f"model: expected one that looks up its input embeddings once, got {type(model).__name__}, which "
                    f"does so {len(embeddings)} times"
                )
            exact = torch.promote_types(logits.dtype, torch.float32)
            losses = F.cross_entropy(logits.to(exact), batch.targets.to(logits.device), reduction="none")
            means = [loss.mean() for loss in losses.split(batch.counts)]
            (gradient,) = torch.autograd.grad(torch.stack(means).sum(), embeddings)
    finally:
        handle.remove()
    norms = gradient.double().norm(dim=-1).cpu().numpy()  # (N, M)
    return [
        np.where(_has_score(text), [np.linalg.norm(norm[tokens]) for tokens in text.tokens.words], NO_SCORE)
        for text, norm in zip(texts, norms, strict=True)
    ]


ScoreWords = Callable[[PreTrainedModel, Sequence[ScoredText], int, Sequence[int]], list[Array]]
WORD_SCORES: dict[str, ScoreWords] = {"attention": attention_scores, "gradient": gradient_scores}


def _has_score(text: ScoredText) -> Array:
    return np.array([bool(tokens) and 0 not in tokens for tokens in text.tokens.words], bool)


def _batch(model: PreTrainedModel, texts: Sequence[ScoredText], pad_id: int) -> TextBatch:
    return text_batch([text.tokens for text in texts], pad_id, packing=False).to(input_device(model))


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Disables gradients of weights inside the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
