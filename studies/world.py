"""The study's world: word problems of several hops among facts that do not matter, their tokenizer and small models.

A problem is a list of facts in random order and a question::

    Facts: Eve has Pam + 9. Cid 8. Pam now has Mia + 2. Mia 5. How many has Eve?

and its rationale a plan and the sums, each of which needs one number of the question, and not the others::

    Eve Pam. Pam Mia. Mia 5. Pam 5 + 2 = 7. Eve 7 + 9 = 16.

Everything is computed from a seed. Names, words and single digits are the tokens. The numbers of the facts have one
digit: to find numbers of two takes small models several times as many steps to learn.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

NAMES = ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jim", "Kay", "Leo"]
NAMES += ["Mia", "Ned", "Oda", "Pam", "Quin", "Rob", "Sue", "Tom", "Uma", "Vic", "Wim", "Zoe"]
WORDS = ["Facts", "How", "many", "has", "how", "now", "The", "answer", "is"]
PAD, END = "<|pad|>", "<|end|>"

FACTS = ("{name} {amount}.", "{name} has {amount}.", "{name} now has {amount}.")
QUESTIONS = ("How many has {name}?", "{name} has how many?")
# Of words that are all in the templates above, in orders that are not.
UNSEEN_FACTS = ("now {name} {amount}.", "now {name} has {amount}.")
UNSEEN_QUESTIONS = ("how many now has {name}?",)

# Name of a test: the options of `problem` in which it differs from the training data.
TESTS: dict[str, dict[str, Any]] = {
    "test": {},
    "distractors": {"noise": (6, 8)},
    "hops": {"hops": (4, 5)},
    "templates": {"facts": UNSEEN_FACTS, "questions": UNSEEN_QUESTIONS},
}
SEEDS = {"train": 1, "validation": 2, "test": 3, "distractors": 4, "hops": 5, "templates": 6}

Problem = dict[str, Any]


def problem(
    rng: random.Random,
    hops: tuple[int, int] = (2, 3),
    noise: tuple[int, int] = (2, 4),
    facts: tuple[str, ...] = FACTS,
    questions: tuple[str, ...] = QUESTIONS,
) -> Problem:
    """A chain of amounts, each from the one before, among facts that do not matter.

    Args:
        hops: least and largest number of amounts in the chain, the first included.
        noise: least and largest number of other facts.
        facts, questions: the templates, one sampled per fact and question.
    """
    length, extra = rng.randint(*hops), rng.randint(*noise)
    people = rng.sample(NAMES, length + extra)
    chain, others = people[:length], people[length:]
    value = rng.randint(2, 9)
    amounts, sums = {chain[0]: str(value)}, [f"{chain[0]} {value}."]
    for before, name in zip(chain, chain[1:], strict=False):
        sign, number = _change(rng, value)
        amounts[name] = f"{before} {sign} {number}"
        new = value + number if sign == "+" else value - number
        sums.append(f"{name} {value} {sign} {number} = {new}.")
        value = new
    for name in others:
        if rng.random() < 0.4:
            amounts[name] = str(rng.randint(2, 9))
        else:
            sign, number = _change(rng, 30)
            amounts[name] = f"{rng.choice([other for other in people if other != name])} {sign} {number}"
    order = list(amounts)
    rng.shuffle(order)
    told = [rng.choice(facts).format(name=name, amount=amounts[name]) for name in order]
    plan = [f"{name} {before}." for before, name in zip(chain, chain[1:], strict=False)][::-1]
    asked = rng.choice(questions).format(name=chain[-1])
    return {
        "question": " ".join(["Facts:", *told, asked]),
        "rationale": " ".join(plan + sums),
        "answer": str(value),
        "gold": str(value),
        "amounts": amounts,
        "order": order,
    }


def _change(rng: random.Random, value: int) -> tuple[str, int]:
    number = rng.randint(2, 9)
    return rng.choice(["+", "-"] if value > number else ["+"]), number


def drill(rng: random.Random, applied: bool = False) -> Problem:
    """Practice without a question: repeat the facts in another order, or sums in a row.

    A student that has seen only drills can copy and add but has never solved a problem, as a small pretrained model.

    Args:
        applied: compute each fact's sum from an amount that is not in the facts, instead of repeating it. A teacher
            learns so to find the number of each fact; the bases of the students do not get these.
    """
    if rng.random() < 0.3:
        sums = []
        for _ in range(8):
            value = rng.randint(1, 70)
            sign, number = _change(rng, value)
            sums.append(f"{value} {sign} {number} = {value + number if sign == '+' else value - number}.")
        return {"question": "Facts:", "rationale": " ".join(sums)}
    found = problem(rng)
    asked = list(found["order"])
    rng.shuffle(asked)
    question = found["question"][: found["question"].rindex(".") + 1]
    told = [
        _applied(rng, name, found["amounts"][name]) if applied else f"{name} {found['amounts'][name]}."
        for name in asked
    ]
    return {"question": question, "rationale": " ".join(told)}


def _applied(rng: random.Random, name: str, amount: str) -> str:
    if amount.isdigit():
        return f"{name} {amount}."
    _, sign, number = amount.split()
    value = rng.randint(13, 60)
    result = value + int(number) if sign == "+" else value - int(number)
    return f"{name} {value} {sign} {number} = {result}."


def problems(name: str, count: int) -> list[Problem]:
    """The first ``count`` problems of a set, by name (`SEEDS`); the training set's are not in the tests."""
    rng = random.Random(SEEDS[name])
    rows = []
    for n in range(count):
        found = problem(rng, **TESTS.get(name, {}))
        rows.append({"id": f"{name}-{n}"} | {key: found[key] for key in ("question", "rationale", "answer", "gold")})
    return rows


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*NAMES, *WORDS, *"0123456789+-="]
    vocabulary = [PAD, END, ".", ":", "?", "\n", " ", *(space + word for word in words for space in ("", " "))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d| ?[+\-=]|\n|[.:?]| "), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def decoder(layers: int, width: int, heads: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen 3 from scratch, a Llama that normalises queries and keys; its random numbers are those of ``seed``."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    return Qwen3ForCausalLM(config)
