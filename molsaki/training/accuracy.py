"""Exact accuracy of a student's greedy replies, during its training."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molsaki.config import EvaluateConfig
from molsaki.evaluation.evaluate import generate
from molsaki.evaluation.scoring import score
from molsaki.text.examples import Example


def count_right(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], options: EvaluateConfig
) -> tuple[int, int]:
    """How many of the replies are right, and how many questions were asked; too long ones are not.

    The student is in evaluation mode meanwhile, and the generators of random numbers are not advanced.
    """
    was_training = student.training
    student.eval()  # type: ignore[no-untyped-call]
    try:
        replies, _ = generate(student, tokenizer, examples, options)
    finally:
        student.train(was_training)
    asked = [(example, reply) for example, reply in zip(examples, replies, strict=True) if type(reply) is str]
    return sum(bool(score(example, reply, options.mode)["right"]) for example, reply in asked), len(asked)
