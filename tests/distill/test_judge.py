"""The verdict on a teacher's reply."""

from __future__ import annotations

import pytest

from molsaki.annotation.judge import judge
from molsaki.annotation.prompts import PromptFormat
from molsaki.config import AnnotateConfig
from molsaki.evaluation.generate import Reply
from molsaki.text.examples import Example

PLAIN = PromptFormat.of("plain")
HINT = AnnotateConfig.hint


@pytest.mark.parametrize(
    ("reply", "gold", "phase", "reason"),
    [
        ("3 * 4 = 12 nuts.\nAnswer: 12.0", "12", 1, ""),
        ("3 * 4 = 12 nuts.\n**Answer:** $12", "12", 1, ""),
        ("3 * 4 = 12 nuts.\nFinal answer: 3 * 4 = 12", "12", 1, ""),
        ("3 bags of 4 nuts, so the total is 12.", "12", 1, ""),
        ("<think>Is it 7?</think>3 * 4 = 12 nuts.\nAnswer: 12", "12", 1, ""),
        ("3 * 4 = 12 nuts.\nAnswer: 13", "12", 1, "wrong answer"),
        ("3 * 4 = 7 nuts.\nAnswer: 12", "12", 1, "rationale ends in another answer"),
        ("Answer: 12", "12", 1, "no rationale"),
        ("3 * 4 = 12 nuts.\nAnswer: unknown", "12", 1, "no answer"),
        ("So the answer is 12.\nAnswer: 12", "12", 1, "rationale only states the answer"),
        ("The answer is 12 nuts.\nAnswer: 12", "12", 2, "rationale only states the answer"),
        ("", "12", 2, "no rationale"),
        ("By the hint, 3 bags of 4 nuts are 12.\nAnswer: 12", "12", 2, "rationale mentions the hint"),
        ("A person must say yes.\nAnswer: Yes.", "yes", 1, ""),
        ("3袋每袋4个，一共12个。\nAnswer: 12", "12", 1, ""),
        ("答案是12。\nAnswer: 12", "12", 1, "rationale only states the answer"),
        ("A person must say yes.\nAnswer: no", "yes", 1, "wrong answer"),
    ],
)
def test_judge(reply, gold, phase, reason):
    verdict = judge(Example("i", "How many?", "", gold), Reply(reply, True), PLAIN, HINT, phase)
    assert verdict.reason == reason
    if not reason:
        assert verdict.rationale == reply.rpartition("</think>")[2].split("\n")[0]


def test_judge_of_replies_that_were_cut_off():
    example = Example("i", "How many?", "", "12")
    for text, ended, reason in [
        ("3 * 4 = 12", False, "cut off at max_new_tokens"),
        ("3 * 4 = 12\nAnswer: 12", False, "cut off at max_new_tokens"),  # may have been 120
        ("3 * 4 = 12 nuts\nAnswer: 12\nBy", False, ""),
        ("<think>3 * 4 = 12 nuts\nAnswer: 12\nOr", False, "cut off at max_new_tokens"),  # a thought, no rationale
        ("3 * 4 = 12 nuts", True, ""),
    ]:
        assert judge(example, Reply(text, ended), PLAIN, HINT, 1).reason == reason


def test_a_thinking_trace_is_kept_on_request():
    trace, told = "Hm, 3 * 4.\n</think>", "There are 3 * 4 = 12 nuts."
    example, text = Example("i", "How many?", "", "12"), f"{trace}\n\n{told}\nAnswer: 12"
    for reply in (text, f"<think>\n{text}"):
        assert judge(example, Reply(reply, True), PLAIN, HINT, 1).rationale == told
        kept = judge(example, Reply(reply, True), PLAIN, HINT, 1, keep_thinking=True)
        assert (kept.rationale, kept.reason) == (f"<think>\n{trace}\n\n{told}", "")
    broken = judge(example, Reply(f"<think>a<think>{text}", True), PLAIN, HINT, 1, keep_thinking=True)
    assert broken.reason == "broken thinking trace"
