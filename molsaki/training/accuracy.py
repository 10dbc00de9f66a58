"""Exact accuracy of a student's greedy replies, during its training."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.config import EvaluateConfig
from molsaki.evaluation.evaluate import generate
from molsaki.evaluation.scoring import score
from molsaki.modeling.unwrap import evaluation_mode
from molsaki.text.answers import kind_of
from molsaki.text.examples import Example


def count_right(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], options: EvaluateConfig
) -> tuple[int, int]:
    """The number of right replies and the number of questions that were asked.

    A question is not asked if it is too long, if a template refuses it, or if no reply can match its answer. The
    student is in evaluation mode during this, and random number generators are not advanced.
    """
    examples = [example for example in examples if _can_match(example)]
    with evaluation_mode(student):
        replies, _ = generate(student, tokenizer, examples, options)
    asked = [(example, reply) for example, reply in zip(examples, replies, strict=True) if type(reply) is str]
    return sum(bool(score(example, reply, options.mode)["right"]) for example, reply in asked), len(asked)


def _can_match(example: Example) -> bool:
    try:
        kind_of(example.answer, example.choices)
    except ValueError:
        return False
    return True
