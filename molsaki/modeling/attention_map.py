"""`attention_map`: where a model looks in a text, as a labelled array, without eager attention's M x M weights."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import nn

from molsaki.extras import require
from molsaki.modeling.capture import capture
from molsaki.modeling.unwrap import evaluation_mode, input_device
from molsaki.text.alignment import encode, prompt
from molsaki.text.segment import segment
from molsaki.text.spans import Span, Spans
from molsaki.text.token_ids import decode_with_offsets, special_ids, steps_and_words
from molsaki_kernels import StepPlan

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Array = np.ndarray[Any, Any]

SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_CHARS = 100, 60, 400  # limits of a printed map; characters of a row's text


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMap:
    """Attention masses of one text, with labels.

    Attributes:
        values: ``(L, S, W)`` float32, the mean over heads, or ``(L, H, S, W)`` of each head: the attention that the
            tokens of a row put on the tokens of a column, summed over both, or divided by the row's tokens.
        rows, columns: the texts of the S rows and the W columns.
        layers: the decoder layer of each of the L maps.
        row_tokens, column_tokens: the positions of the tokens of each row, ``(start, stop)``, and of each column.
        row_name, column_name, unit: names of a row, a column and the unit of a value, for the axes of pictures.
    """

    values: Array
    rows: list[str]
    columns: list[str]
    layers: tuple[int, ...]
    row_tokens: list[Span]
    column_tokens: list[list[int]]
    row_name: str = "row"
    column_name: str = "column"
    unit: str = "attention, summed over the tokens of the row and of the column"

    def mean(self) -> Array:
        """``(S, W)``, the mean over layers and heads."""
        found: Array = self.values.mean(axis=tuple(range(self.values.ndim - 2)))
        return found

    def to_pandas(self) -> pandas.DataFrame:
        """A frame with a column per word or token, and a row per layer, head (if there is one per head) and step."""
        require("notebook", by="to_pandas:")
        import pandas

        levels: list[Sequence[Any]] = [self.layers, self.rows]
        names = ["layer", "row"]
        if self.values.ndim == 4:
            levels.insert(1, range(self.values.shape[1]))
            names.insert(1, "head")
        index: list[tuple[Any, ...]] = [()]
        for level in levels:
            index = [(*key, value) for key in index for value in level]
        table = self.values.reshape(len(index), len(self.columns))
        return pandas.DataFrame(table, index=pandas.MultiIndex.from_tuples(index, names=names), columns=self.columns)

    def plot(self, path: str | Path, layer: int | None = None, head: int | None = None, title: str = "") -> Path:
        """Draw a heatmap of one layer and head; those that are not given are averaged. See docs/pictures.md.

        Args:
            path: the file, whose suffix is png, svg or pdf.
            layer: a decoder layer, one of ``layers``.
            head: a query head, with ``heads="each"``.
            title: printed above the picture.
        """
        from molsaki.plotting.map_pictures import plot_map

        values, name = self.values, "mean over layers and heads"
        if layer is not None:
            if layer not in self.layers:
                raise ValueError(f"layer: expected one of {self.layers}, got {layer}")
            values, name = values[[self.layers.index(layer)]], f"layer {layer}, mean over heads"
        if head is not None:
            if values.ndim != 4 or not 0 <= head < values.shape[1]:
                count = values.shape[1] if values.ndim == 4 else 0
                raise ValueError(f"head: expected one of {count} heads (attention_map(..., heads='each')), got {head}")
            values, name = (
                values[:, [head]],
                f"head {head}, " + ("mean over layers" if layer is None else f"layer {layer}"),
            )
        mean = values.mean(axis=tuple(range(values.ndim - 2)))
        names = {"rows": self.row_name, "columns": self.column_name, "unit": self.unit}
        return plot_map({name: mean}, self.rows, self.columns, path, title, **names)

    def to_bertviz(self) -> tuple[tuple[torch.Tensor, ...], list[str]]:
        """The input of BertViz, ``head_view(*attention_map.to_bertviz())``: ``(1, H, M, M)`` per layer, and the tokens.

        Raises:
            ValueError: rows and columns are not single tokens, or there is not one map per head.
        """
        tokens = [[start] for start, _ in self.row_tokens]
        if self.values.ndim != 4 or tokens != self.column_tokens or any(b - a != 1 for a, b in self.row_tokens):
            raise ValueError("attention_map: BertViz needs rows='tokens', keys='tokens' and heads='each'")
        return tuple(torch.from_numpy(layer)[None] for layer in self.values), self.columns

    def __str__(self) -> str:
        """A table of the mean over layers and heads; a large one shows only the first and last rows and columns."""
        rows, columns = _ends(len(self.rows), SHOWN_ROWS), _ends(len(self.columns), SHOWN_COLUMNS)
        widths = [0 if w is None else max(len(self.columns[w]), 5) for w in columns]
        mean = self.mean()

        def line(cells: list[str]) -> str:
            return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

        lines = [line(["..." if w is None else self.columns[w] for w in columns])]
        for s in rows:
            if s is None:
                lines.append("...")
                continue
            cells = line(["..." if w is None else f"{mean[s, w]:.2f}" for w in columns])
            row = self.rows[s]
            lines.append(f"{cells}  {row if len(row) <= SHOWN_CHARS else row[: SHOWN_CHARS - 4] + ' ...'}")
        return "\n".join(lines)


def _ends(count: int, most: int) -> list[int | None]:
    """All numbers below ``count`` or, if there are too many, the first and last ones with None between them."""
    numbers: list[int | None] = list(range(count))
    return numbers if count <= most else [*numbers[: most // 2], None, *numbers[-(most // 2) :]]


def attention_map(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Spans | Sequence[Mapping[str, str]] | Sequence[int],
    *,
    rows: Literal["steps", "tokens", "all"] | int | Sequence[Span] = "steps",
    keys: Literal["words", "tokens"] = "words",
    heads: Literal["mean", "each"] = "mean",
    layers: Sequence[int] | None = None,
    per_token: bool = False,
    template: str = "plain",
    **options: Any,
) -> AttentionMap:
    """Where a model looks in one text: the attention of each row on each column, in every layer.

    Runs one forward of the decoder, without logits; it needs memory for the result, not ``L H M^2``. Two of its sums
    are token scores of key-value cache compression: ``rows="all", keys="tokens"`` are the accumulated scores of H2O
    (Zhang et al. 2023, arXiv 2306.14048), ``rows=32, keys="tokens"`` the votes of the last 32 queries of SnapKV (Li et
    al. 2024, arXiv 2404.14469) before its pooling.

    Example:
        >>> found = attention_map(model, tokenizer, molsaki.segment(question, rationale))
        >>> print(found)  # or found.plot("map.png"), found.to_pandas()

    Args:
        model: a Hugging Face decoder whose attention has maps, see docs/models.md.
        tokenizer: its fast tokenizer.
        text: a text; `molsaki.Spans` of a question and a rationale; chat messages (``role`` and ``content``) for the
            chat template; or token ids.
        rows: the steps of the text (sentences, by ``splitter``); single tokens; all tokens as one row; the last n
            tokens as one row; or ranges of token positions, ascending and disjoint.
        keys: the columns: key words (numbers, by ``key``), or every token.
        heads: "mean", over the query heads of a layer, or "each".
        layers: the decoder layers to keep; all if None.
        per_token: divide each row by its number of tokens, so that it is their mean.
        template: for a text or spans: "plain", "chat" or a format string, see `molsaki.text.templates`.
        **options: of `molsaki.segment`, such as ``key`` and ``splitter``, for texts, messages and ids.

    Raises:
        TypeError, ValueError: an argument is not as described, the text has no key word, or the model's attention has
            no map.
    """
    _check(keys, heads, layers)
    ids, steps, words = _read(text, tokenizer, template, options)
    if isinstance(rows, str):
        if rows not in ("steps", "tokens", "all"):
            raise ValueError(f'rows: expected "steps", "tokens", "all", a number or ranges, got {rows!r}')
        chosen = {"steps": steps, "tokens": [(t, t + 1) for t in range(len(ids))], "all": [(0, len(ids))]}[rows]
    elif hasattr(rows, "__index__"):
        if isinstance(rows, bool) or not 1 <= operator.index(rows) <= len(ids):
            raise ValueError(f"rows: expected 1 to {len(ids)} tokens, got {rows}")
        chosen = [(len(ids) - operator.index(rows), len(ids))]
    else:
        try:
            chosen = [(operator.index(start), operator.index(stop)) for start, stop in rows]
        except (TypeError, ValueError):
            raise TypeError(f"rows: expected ranges (start, stop) of token positions, got {rows!r}") from None
        ends = [end for row in chosen for end in row]
        if ends != sorted(ends) or (ends and not 0 <= ends[0] <= ends[-1] <= len(ids)):
            raise ValueError(f"rows: expected ascending, disjoint ranges within 0 to {len(ids)}, got {chosen[:10]}")
    columns = words if keys == "words" else [[t] for t in range(len(ids))]
    if not columns:
        raise ValueError("text: has no key word, so the map has no column; use another key, or keys='tokens'")
    named = {"steps": "reasoning step (sentence)", "tokens": "token (query)", "all": "all tokens"}
    row_name = named[rows] if isinstance(rows, str) else "range of tokens"
    found = _computed(model, tokenizer, ids, chosen, columns, heads, layers, per_token)
    return _named(found, row_name, keys, "sentence" if rows == "steps" else "row", per_token)


def attention_while_generating(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Spans | Sequence[Mapping[str, str]] | Sequence[int],
    *,
    keys: Literal["words", "tokens"] = "tokens",
    heads: Literal["mean", "each"] = "mean",
    layers: Sequence[int] | None = None,
    template: str = "plain",
    generate: Mapping[str, Any] | None = None,
    **options: Any,
) -> AttentionMap:
    """The attention with which a model chose each token of its reply: a row per generated token.

    The reply is generated with the key-value cache as usual. One forward of the whole text then gives the attention of
    the positions that predicted its tokens, which equals that of the generation up to rounding.

    Args:
        text: the prompt, as in `attention_map`; messages get the template's generation prompt.
        generate: keyword arguments of ``model.generate``; decoding is greedy by default.
        **options: of `molsaki.segment`, for ``keys="words"``.

    Raises:
        ValueError: nothing was generated; and as in `attention_map`.
    """
    _check(keys, heads, layers)
    if options and keys == "tokens":
        name = next(iter(options))
        raise ValueError(f"{name}: expected it in generate=dict({name}=...), or keys='words', got keys='tokens'")
    asked, _, _ = _read(text, tokenizer, template, options, is_prompt=True)
    inputs = torch.tensor([asked], device=input_device(model))
    settings = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id}
    with torch.no_grad(), evaluation_mode(model):
        output = cast(Any, model).generate(
            inputs, attention_mask=torch.ones_like(inputs), **settings | dict(generate or {})
        )
    ids = getattr(output, "sequences", output)[0].tolist()
    if len(ids) == len(asked):
        raise ValueError("generate: nothing was generated; expected max_new_tokens of at least 1")
    chosen = [(t - 1, t) for t in range(len(asked), len(ids))]
    columns = [[t] for t in range(len(ids))]
    if keys == "words":
        _, columns = steps_and_words(ids, len(asked), tokenizer, options)
        if not columns:
            raise ValueError("text: has no key word, so the map has no column; use another key, or keys='tokens'")
    found = _computed(model, tokenizer, ids, chosen, columns, heads, layers, False)
    found = dataclasses.replace(found, rows=_labels(ids, [[t] for _, t in chosen], tokenizer))
    return _named(found, "generated token", keys, "token")


def _named(found: AttentionMap, row_name: str, keys: str, row: str, per_token: bool = False) -> AttentionMap:
    """The map with names for its rows, columns and values; sums and means over single tokens are not mentioned."""
    column_name, of = ("key word", "key word") if keys == "words" else ("token (key)", "")
    one = all(stop - start == 1 for start, stop in found.row_tokens)
    sums = ([] if one or per_token else [f"the {row}"]) + ([f"the {of}"] if of else [])
    unit = "attention" + (f", summed over the tokens of {' and of '.join(sums)}" if sums else "")
    if per_token and not one:
        unit += f"; mean over the tokens of the {row}"
    return dataclasses.replace(found, row_name=row_name, column_name=column_name, unit=unit)


def _check(keys: str, heads: str, layers: Sequence[int] | None) -> None:
    for name, value, choices in (("keys", keys, ("words", "tokens")), ("heads", heads, ("mean", "each"))):
        if value not in choices:
            raise ValueError(f'{name}: expected "{choices[0]}" or "{choices[1]}", got {value!r}')
    if layers is not None and not len(layers):
        raise ValueError("layers: expected some, or None for all, got none")


def _read(
    text: Any, tokenizer: PreTrainedTokenizerBase, template: str, options: dict[str, Any], is_prompt: bool = False
) -> tuple[list[int], list[Span], list[list[int]]]:
    """Token ids, steps and words of a text, messages or token ids; for a prompt only the ids."""
    if is_prompt and isinstance(text, (str, Spans)):
        if isinstance(text, str):
            return prompt(text, tokenizer, template=template), [], []
        *context, (_, (start, stop)) = text.asked
        turns = [(role, text.text[a:b]) for role, (a, b) in context]
        return prompt(text.text[start:stop] or text.text, tokenizer, template=template, context=turns), [], []
    if isinstance(text, str):
        text = segment(text, "", **options) if template != "plain" else segment("", text, **options)
    elif isinstance(text, Spans) and options:
        raise ValueError(f"{next(iter(options))}: expected it in molsaki.segment, since text has its steps already")
    if isinstance(text, Spans):
        encoded = encode(text, tokenizer, template=template)
        return encoded.input_ids, encoded.steps, encoded.words
    if isinstance(text, (torch.Tensor, np.ndarray)):
        if text.ndim == 2 and text.shape[0] == 1:
            text = text[0]
        text = text.tolist() if text.ndim == 1 else text
    items = list(text) if isinstance(text, Sequence) else []
    if items and all(isinstance(item, np.integer) for item in items):
        items = [int(item) for item in items]
    if items and all(isinstance(item, int) for item in items):
        return items, *steps_and_words(items, 0, tokenizer, options)
    if not items or not all(isinstance(item, Mapping) for item in items):
        raise TypeError("text: expected a text, molsaki.Spans, messages or token ids, got " + type(text).__name__)
    before = items if is_prompt else items[:-1]
    asked: Any = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True) if before else ""
    whole: Any = asked if is_prompt else tokenizer.apply_chat_template(items, tokenize=False)
    output = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    border = len(asked) if whole.startswith(asked) else 0
    first = next((t for t, (start, _) in enumerate(output["offset_mapping"]) if start >= border), 0)
    ids = output["input_ids"]
    return ids, *steps_and_words(ids, first, tokenizer, options)


@torch.no_grad()
def _computed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    rows: list[Span],
    columns: list[list[int]],
    heads: str,
    layers: Sequence[int] | None,
    per_token: bool,
) -> AttentionMap:
    inputs = torch.tensor([ids], device=input_device(model))
    plan = StepPlan.from_spans([rows], [columns], device=inputs.device)
    decoder: nn.Module = model.base_model
    with evaluation_mode(decoder), capture(decoder, plan, map_heads=heads) as record:
        decoder(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False)
    found, values = record.layers, record.maps[0].float().cpu()
    if heads == "each":
        counts = record.maps_per_layer
        if len(set(counts)) > 1:
            raise ValueError(f"heads: expected layers with one number of heads for 'each', got {list(counts)}")
        values = values.unflatten(0, (len(counts), counts[0]))
    if layers is not None:
        missing = [layer for layer in layers if layer not in found]
        if missing:
            raise ValueError(f"layers: expected some of {found}, got {missing[0]}")
        values, found = values[[found.index(layer) for layer in layers]], tuple(layers)
    if per_token:
        values = values / torch.tensor([[max(stop - start, 1)] for start, stop in rows])
    labels = [_labels(ids, tokens, tokenizer) for tokens in ([list(range(*row)) for row in rows], columns)]
    return AttentionMap(values.numpy(), labels[0], labels[1], found, rows, columns)


def _labels(ids: list[int], tokens: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each group of tokens; for a single special token its name."""
    specials = special_ids(tokenizer)
    special = [int(token in specials) for token in ids]
    text, offsets = decode_with_offsets(ids, special, tokenizer)
    names = []
    for group in tokens:
        if len(group) == 1 and special[group[0]]:
            names.append(str(tokenizer.convert_ids_to_tokens(ids[group[0]])))
        elif len(group) == 1:
            names.append(text[slice(*offsets[group[0]])])
        else:
            names.append(text[offsets[group[0]][0] : offsets[group[-1]][1]].strip() if group else "")
    return names
