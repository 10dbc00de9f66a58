"""Agreement with the scoring of GSM8K in EleutherAI's lm-evaluation-harness, on the same replies.

Their tasks gsm8k and gsm8k_cot compare strings: flexible-extract takes the last match of a pattern for numbers,
strict-match what follows ``####`` (gsm8k) or "The answer is" (gsm8k_cot). `score` compares values. Every kind of
disagreement that is known is listed with its reason. Needs lm_eval and datasets, but no download.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from molsaki.evaluation.scoring import score
from molsaki.text.examples import Example

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")

AGREED = [  # gold, reply: both right or both wrong
    ("18", "She has 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = <<9*2=18>>18.\n#### 18"),
    ("18", "9 * 2 = 18. The answer is 18."),
    ("18", "So she makes $18 per day."),
    ("18", "\\boxed{18}"),
    ("18", "#### $18"),
    ("18", "#### 18."),
    ("18", "The answer is $18."),
    ("18", "The answer is 18 dollars, since 9 times 2 is 18"),
    ("18", "The answer is **18**."),
    ("18", "18"),
    ("18", "9+9=18!"),
    ("18", "<think>9 or 18</think>The answer is 18."),
    ("1,800", "The answer is 1800."),
    ("1800", "#### 1,800"),
    ("70000", "The profit is $70,000."),
    ("-5", "The answer is -$5."),
    ("5", "10 - 5"),
    ("5", "He has 5,"),
    ("5", "He has 5 - that is all."),
    ("5", "答案是5。"),
    ("18", "The answer is 17."),
    ("18", "#### 19"),
    ("18", "The answer is -18."),
    ("18", "I do not know."),
    ("18", "She makes eighteen dollars."),
    ("18", "The answer is 18 for 9 eggs."),
    ("18", "The answer is 18.\n\nThe answer is 20."),
    ("70000", "The profit is 70.000 dollars"),
    ("1800", "The answer is 1 800."),
    ("5", "They meet at 5:00."),
    ("0.5", "The answer is 50%."),
]
DISAGREED = [  # gold, reply, whether score accepts it and flexible-extract does not; else the other way round
    ("18", "So she makes $18.00 per day.", True, "the same value, written with decimals"),
    ("12", "28.0 - 16.0 = 12.0.", True, "the same value, written with decimals"),
    ("0.5", "The answer is 1/2.", True, "the same value, as a fraction; they take the 2"),
    ("0.5", "The answer is .5.", True, "the same value without the zero"),
    ("18", "The answer is 018.", True, "the same value with a zero before it"),
    ("1800", "The answer is 1.8 thousand.", True, "a scale after the number"),
    ("-5", "The answer is −5.", True, "the minus sign of Unicode; they take the 5"),
    ("18", "16-18", True, "a difference; they take its minus for a sign"),
    ("5", "He has 5...", True, "an ellipsis; their pattern takes the periods too, and ignores one"),
    ("5", "3+2=5 ...", True, "an ellipsis; their pattern takes it for a number"),
    ("5", "He has 5 apples in day2.", True, "a digit in a name; they take the 2"),
    ("18", "So $\\boxed{18}$ dollars, which is step 3.", True, "a number after the box; they take the 3"),
    ("18", "<think>so 18", False, "a thinking trace that does not end gives no answer; they do not know traces"),
    ("18", "The answer is 1,8.", False, "a comma that is no separator of thousands; they delete all commas"),
]
STRICT = [  # task, gold, reply, whether strict-match accepts it, whether score does, the reason if they differ
    ("gsm8k", "18", "She makes 9 * 2 = <<9*2=18>>18.\n#### 18", True, True, ""),
    ("gsm8k", "18", "#### 18 dollars", True, True, ""),
    ("gsm8k", "1800", "#### 1,800", True, True, ""),
    ("gsm8k", "18", "9 * 2 = 18\n#### 19", False, False, ""),
    ("gsm8k", "18", "####18", False, True, "no space"),
    ("gsm8k", "18", "#### $18", False, True, "a currency sign"),
    ("gsm8k", "18", "The answer is 18.", False, True, "no mark"),
    ("gsm8k", "18", "#### 18\n\nQuestion 2: There are 5 apples.", True, False, "the last number after the mark is 5"),
    ("gsm8k", "18", "#### 18 #### 20", True, False, "they take the first mark, score the last"),
    ("gsm8k-cot", "18", "9 * 2 = 18. The answer is 18.", True, True, ""),
    ("gsm8k-cot", "18", "9 * 2 = 18. The answer is 19.", False, False, ""),
    ("gsm8k-cot", "-5", "The answer is -5.", True, True, ""),
    ("gsm8k-cot", "18", "The answer is 18", False, True, "their pattern needs a character after the number"),
    ("gsm8k-cot", "18", "The answer is $18.", False, True, "a currency sign"),
    ("gsm8k-cot", "18", "The final answer is: 18.", False, True, "other words"),
    ("gsm8k-cot", "18", "The answer is 18 for 9 eggs.", True, False, "score takes the last number of a rationale"),
    ("gsm8k-cot", "18", "The answer is 18.\n\nThe answer is 20.", True, False, "they take the first, score the last"),
]

Accepts = Callable[[str, str, str, str], bool]


@pytest.fixture(scope="module")
def accepts() -> Accepts:
    """Whether a task's filter and its exact_match accept a reply: (task, filter, gold, reply)."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

    rows = datasets.Dataset.from_list([{"question": "How much?", "answer": "#### 1"}])
    tasks = {}
    for name in ("gsm8k", "gsm8k-cot"):
        config = yaml.safe_load((Path(lm_eval.__file__).parent / f"tasks/gsm8k/{name}.yaml").read_text())
        config["custom_dataset"] = lambda **_: {"train": rows, "test": rows}
        tasks[name] = ConfigurableTask(config=config)

    def accepts(task: str, filter: str, gold: str, reply: str) -> bool:
        document = {"question": "How much?", "answer": f"Some steps.\n#### {gold}"}
        instance = Instance("generate_until", document, ("", {}), 0, resps=[reply])
        tasks[task]._instances = [instance]
        tasks[task].apply_filters()
        return bool(tasks[task].process_results(document, [instance.filtered_resps[filter]])["exact_match"])

    return accepts


def ours(gold: str, reply: str) -> bool:
    return bool(score(Example("i", "How much?", "", gold), reply, "rationale")["right"])


@pytest.mark.parametrize("task", ["gsm8k", "gsm8k-cot"])
def test_flexible_extract(accepts, task):
    """All disagreements are those listed."""
    found = [(gold, reply, ours(gold, reply), accepts(task, "flexible-extract", gold, reply)) for gold, reply in AGREED]
    assert [one for one in found if one[2] != one[3]] == []
    assert {one[2] for one in found} == {True, False}
    for gold, reply, right, reason in DISAGREED:
        assert (ours(gold, reply), accepts(task, "flexible-extract", gold, reply)) == (right, not right), (
            reply,
            reason,
        )


def test_strict_match(accepts):
    for task, gold, reply, theirs, right, reason in STRICT:
        assert (accepts(task, "strict-match", gold, reply), ours(gold, reply)) == (theirs, right), (reply, reason)
        assert bool(reason) == (theirs != right)
