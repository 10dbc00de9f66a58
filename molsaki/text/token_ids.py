"""Steps and key words of existing token ids, such as the batches of another library or generated texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from molsaki.text.alignment import Tokens, token_ranges
from molsaki.text.frames import name_of
from molsaki.text.segment import segment
from molsaki.text.spans import Span
from molsaki_kernels.plan import StepPlan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
LONGEST_CHARACTER = 8  # tokens: four bytes, preceded by some invalid ones


def plan_from_ids(
    input_ids: Tensor | Sequence[Sequence[int]],
    labels: Tensor | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    question_steps: bool = True,
    **options: Any,
) -> StepPlan:
    """The plan of a right-padded batch of token ids, such as a batch of another library's training loop.

    The rationale of a text spans from its first to its last label. The question is everything before, including the
    words of a chat template; everything after is padding. The ids are decoded and cut by `molsaki.segment`, so they may
    be a model's own output. Special tokens are in no step. A text without labels has neither steps nor words.

    Args:
        input_ids: ``(N, M)``.
        labels: ``(N, M)``, of the same positions as ``input_ids``; -100 where there is none.
        tokenizer: the fast tokenizer that the ids are of.
        question_steps: whether the question's sentences are steps as well; its key words count in any case.
        **options: of `molsaki.segment`, such as ``key``, ``splitter`` and ``number_words``; not ``key="given"``.

    Raises:
        TypeError, ValueError: the tokenizer is not a fast one, ids and labels are of different shapes, or an option is
            not as described.
    """
    if not tokenizer.is_fast:
        raise TypeError(f"tokenizer: expected a fast tokenizer (tokenizer.json), got {name_of(tokenizer)}")
    for name, value in (("input_ids", input_ids), ("labels", labels)):
        if any(not isinstance(row, Sequence) for row in _lists(value)):
            raise ValueError(f"{name}: expected (N, M), a list of ids per text, got one list")
    rows = [list(map(int, row)) for row in _lists(input_ids)]
    targets = [[int(label) != IGNORE for label in row] for row in _lists(labels)]
    if list(map(len, rows)) != list(map(len, targets)):
        raise ValueError(
            f"labels: expected the shape of input_ids, {[len(row) for row in rows]} tokens, got "
            f"{[len(row) for row in targets]}"
        )
    specials = special_ids(tokenizer)
    steps, words = [], []
    for ids, has_label in zip(rows, targets, strict=True):
        found: tuple[list[Span], list[list[int]]] = ([], [])
        if any(has_label):
            first, stop = has_label.index(True), len(ids) - has_label[::-1].index(True)
            found = steps_and_words(ids[:stop], first, tokenizer, options, question_steps, specials)
        steps.append(found[0])
        words.append(found[1])
    plan = StepPlan.from_spans(steps, words)
    return plan.to(input_ids.device) if hasattr(input_ids, "device") else plan


def right_padded(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same batch with the padding on the right, where molsaki expects it: the tokens of each text move to the left.

    Args:
        inputs: ``attention_mask (N, M)``, 0 at padding anywhere in a row, and other tensors ``(N, M)`` of the same
            positions, such as ``input_ids`` and ``labels``.
    """
    order = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    return {name: tensor.gather(1, order) for name, tensor in inputs.items()}


def _lists(rows: Any) -> Any:
    return rows.tolist() if hasattr(rows, "tolist") else rows


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of the special tokens, which are no part of a text."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return added.union(tokenizer.all_special_ids)


def steps_and_words(
    ids: list[int],
    first: int,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    question_steps: bool = True,
    specials: set[int] | None = None,
) -> tuple[list[Span], list[list[int]]]:
    """The token range of each step of one text, and the tokens of each key word.

    Args:
        first: the first token of the rationale.
        options: of `molsaki.segment`.
        specials: `special_ids` of the tokenizer, if they are known.
    """
    specials = special_ids(tokenizer) if specials is None else specials
    special = [int(token in specials) for token in ids]
    text, offsets = decode_with_offsets(ids, special, tokenizer)
    border = next((offsets[t][0] for t in range(first, len(ids)) if not special[t]), len(text))
    question, rationale = text[:border], text[border:]
    spans = segment(question, rationale, **options)
    # `segment` drops white space around both: find the characters of its text in this one.
    start = spans.rationale_start
    question_shift = len(question) - len(question.lstrip())
    rationale_shift = border + len(rationale) - len(rationale.lstrip()) - start

    def moved(span: Span) -> Span:
        shift = rationale_shift if span[0] >= start else question_shift
        return span[0] + shift, span[1] + shift

    steps_here = [*map(moved, spans.steps)]
    if steps_here:  # white space belongs to the step before it; at the beginning, to the first step
        steps_here[0] = 0, steps_here[0][1]
    for s, (_, stop) in enumerate(spans.steps):
        if stop == start:
            steps_here[s] = steps_here[s][0], stop + rationale_shift
    is_rationale = [first >= start for first, _ in spans.steps]
    heads = [next((i for i in range(*span) if not text[i].isspace()), span[0]) for span in offsets]
    tokens = Tokens(ids, offsets, heads, special, num_closing=0)
    steps, words = token_ranges(tokens, steps_here, [*map(moved, spans.words)], len(ids))
    kept = [step for step, own in zip(steps, is_rationale, strict=True) if own or question_steps]
    return kept, words


def decode_with_offsets(
    ids: Sequence[int], special: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """The text of token ids without special tokens, and the characters of each token; none for special tokens.

    All tokens that are parts of one character get this character.
    """
    decode = tokenizer.backend_tokenizer.decode
    offsets: list[Span] = [(0, 0)] * len(ids)
    own = [t for t in range(len(ids)) if not special[t]]
    pieces: list[str] = []
    context: list[int] = []  # the tokens of the last piece, since decoding the next one depends on them
    waiting: list[int] = []  # the tokens of the next piece so far
    before, end = "", 0
    for t in range(len(ids)):
        if special[t]:
            offsets[t] = (end, end)
            continue
        waiting.append(t)
        after = decode([ids[i] for i in (*context, *waiting)], skip_special_tokens=False)
        is_open = after.endswith("\ufffd")  # the first bytes of a character, or invalid bytes
        if is_open and len(waiting) < LONGEST_CHARACTER and t != own[-1]:
            continue
        pieces.append(after[len(before) :])
        for i in waiting:
            offsets[i] = (end, end + len(pieces[-1]))
        end += len(pieces[-1])
        context, waiting = waiting, []
        before = decode([ids[i] for i in context], skip_special_tokens=False)
    return "".join(pieces), offsets
