"""The study's world: its problems are right, its tests are not in the training data, and its scoring is by hand."""

from __future__ import annotations

import contextlib
import json
import random
import types

import pytest
import torch
from safetensors.torch import load_file

import molsaki
from studies import heads, looks, mistakes, pretrain, tables, world


def facts_of(question: str) -> dict[str, list[str]]:
    """Name: words of its amount, read from the question without the generator's help."""
    sentences = question.removeprefix("Facts: ").removesuffix(".").split(". ")
    kept = [
        [w for w in sentence.split() if w not in ("now", "has")] for sentence in sentences if "many" not in sentence
    ]
    return {words[0]: words[1:] for words in kept}


def solve(question: str) -> int:
    facts = facts_of(question)
    asked = [word.strip("?") for word in question[question.rindex(".") + 1 :].split()]
    (name,) = [word for word in asked if word in world.NAMES]

    def amount(name: str) -> int:
        words = facts[name]
        if len(words) == 1:
            return int(words[0])
        base, sign, number = words
        return amount(base) + int(number) * (1 if sign == "+" else -1)

    return amount(name)


@pytest.mark.parametrize("name", world.SEEDS)
def test_every_problem_has_the_answer_that_its_facts_give(name):
    rows = world.problems(name, 300)
    assert rows == world.problems(name, 300)
    for row in rows:
        assert solve(row["question"]) == int(row["answer"]) >= 0
        assert row["rationale"].endswith(f" {row['answer']}.")
        for sentence in row["rationale"].removesuffix(".").split(". "):
            if "=" in sentence:
                _, value, sign, number, _, result = sentence.split()
                assert int(value) + int(number) * (1 if sign == "+" else -1) == int(result)


def test_tests_differ_from_the_training_data_as_they_say():
    train = {row["question"] for row in world.problems("train", 10_000)}
    sums = {}
    for name in ("test", "distractors", "hops", "templates"):
        rows = world.problems(name, 2000)
        assert not train & {row["question"] for row in rows}
        counts = [(len(facts_of(row["question"])), row["rationale"].count("=")) for row in rows]
        sums[name] = [sum(c) / len(rows) for c in zip(*counts, strict=True)]
        assert all(("how many now" in row["question"]) == (name == "templates") for row in rows)
    assert sums["distractors"][0] > sums["test"][0] + 3 and sums["hops"][1] == pytest.approx(3.5, abs=0.05)
    assert sums["templates"] == pytest.approx(sums["test"], abs=0.1)


def test_tokens():
    tokens = world.tokenizer()
    for name in world.SEEDS:
        for row in world.problems(name, 50):
            text = f"{row['question']} {row['rationale']} The answer is {row['answer']}."
            ids = tokens(text).input_ids
            assert tokens.decode(ids) == text and tokens.unk_token_id not in ids
    assert tokens.convert_ids_to_tokens(tokens("Eve 17").input_ids) == ["Eve", " 1", "7"]


def test_first_mistakes_by_hand():
    right = "Eve Pam. Mia 15. Pam 15 + 2 = 17. Eve 17 + 10 = 27."
    for reply, kind in (
        (right, None),
        (right + " The answer is 27.", None),
        ("Eve Mia. Mia 15.", "plan"),
        ("Eve Pam. Mia 12. Pam 12 + 2 = 14.", "base"),
        ("Eve Pam. Mia 15. Pam 16 + 2 = 18.", "carry"),
        ("Eve Pam. Mia 15. Pam 15 - 2 = 13.", "operand"),
        ("Eve Pam. Mia 15. Pam 15 + 9 = 24.", "operand"),
        ("Eve Pam. Mia 15. Pam 15 + 2 = 18.", "sum"),
        ("Eve Pam. Mia 15. Eve 15 + 2 = 17.", "plan"),
        ("Eve Pam. Mia 15. Pam 15 + + 2", "form"),
        ("Eve Pam. Mia 15. Pam 15 + 2 = 17.", "form"),
        ("", "plan"),
    ):
        assert mistakes.first_mistake(reply, right) == kind, reply
    scores = mistakes.score([{"rationale": right}] * 2, [right, "Eve Pam. Mia 12."])
    assert scores["exact"] == [1, 0] and scores["first_mistake_base"] == [0, 1]


def test_operands_are_the_numbers_that_sums_need():
    for row in world.problems("train", 100):
        spans = molsaki.segment(row["question"], row["rationale"])
        found = heads.operands(spans)
        texts = [spans.text[a:b].strip() for a, b in spans.steps]
        assert len(found) == row["rationale"].count("=")
        for step, word in found:
            start, stop = spans.words[word]
            assert stop < spans.question_end
            assert texts[step].split()[3] == spans.text[start:stop]
        fine = molsaki.segment(row["question"], row["rationale"], splitter="numbers")
        texts = [fine.text[a:b].strip() for a, b in fine.steps]
        before = heads.operands(fine)
        assert [word for _, word in before] == [word for _, word in found]
        for step, word in before:
            start, stop = fine.words[word]
            assert texts[step].split()[1] in "+-" and texts[step + 1].split()[0] == fine.text[start:stop]


def test_a_head_that_points_is_chosen(monkeypatch):
    """A model whose maps are replaced: its sixth head puts all its attention on the operand."""
    tokens, teacher = world.tokenizer(), world.decoder(2, 32, 4, seed=0).eval()
    rows = world.problems("train", 5)

    def capture(model, plan, map_heads):
        splitter = "numbers" if len(seen) % 2 == 0 else "rules"
        (row,) = [row for row in rows if tokens(f"{row['question']} {row['rationale']}").input_ids == seen[-1]]
        maps = torch.ones(1, 8, plan.num_steps, plan.num_words)
        for step, word in heads.operands(molsaki.segment(row["question"], row["rationale"], splitter=splitter)):
            head = 5 if splitter == "rules" else 3
            maps[0, head, step] = 0
            maps[0, head, step, word] = 1
        return contextlib.nullcontext(types.SimpleNamespace(maps=maps))

    seen = []
    real = heads.plan

    def spy(spans, tokenizer):
        seen.append(tokenizer(spans.text).input_ids)
        return real(spans, tokenizer)

    monkeypatch.setattr(heads, "plan", spy)
    monkeypatch.setattr(heads, "capture", capture)
    chosen = heads.choose(teacher, tokens, rows)
    assert chosen["pointer"] == 5 and chosen["decider"] == 3 and chosen["heads"][0] == 5
    assert chosen["share_of_the_operand"][5] == pytest.approx(1)


def test_looks():
    tokens, model = world.tokenizer(), world.decoder(2, 32, 4, seed=0).eval()
    rows = world.problems("test", 3)
    own = [heads.maps_of(model, tokens, row)[0] for row in rows]
    found = looks.look(model, tokens, rows, own, [True, False, False])
    assert set(found) == set(tables.LOOKS)
    assert found["divergence"] == pytest.approx(0, abs=1e-6)  # from its own maps
    fine = [heads.maps_of(model, tokens, row, "numbers")[0] for row in rows]
    per_row = [heads.shares_of_operands(m, row, "numbers").mean(1) for m, row in zip(fine, rows, strict=True)]
    before = torch.stack(per_row)
    best = before[:, before.mean(0).argmax()]
    assert found["before"] == pytest.approx(best.mean().item()) and 0 < found["before"] < 1
    assert found["before_right"] == pytest.approx(best[0].item())
    assert found["before_wrong"] == pytest.approx(best[1:].mean().item())
    assert found["before_taught"] == pytest.approx(before[:, looks.TAUGHT].mean().item())
    assert set(looks.look(model, tokens, rows, own, None)) == {"whole", "before", "divergence"}


def test_pretraining_learns_drills_and_is_repeatable(tmp_path):
    options = dict(layers=1, width=32, heads=2, seed=3, steps=60, drills=((1.0, 1.0),), size=8)
    for name in ("a", "b"):
        pretrain.pretrain(tmp_path / name, **options)
    first, second = ((tmp_path / name / "log.jsonl").read_text() for name in ("a", "b"))
    losses = [float(line.split('"loss": ')[1].rstrip("}")) for line in first.splitlines()]
    assert losses[-1] < losses[0]
    assert [float(line.split('"loss": ')[1].rstrip("}")) for line in second.splitlines()] == losses
    before = (tmp_path / "a" / "log.jsonl").stat().st_mtime_ns
    pretrain.pretrain(tmp_path / "a", **options)  # a finished model is left as it is
    assert (tmp_path / "a" / "log.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="a: has a model of options .*'heads': 2.* not .*'heads': 4"):
        pretrain.pretrain(tmp_path / "a", **options | {"heads": 4})


def test_pretraining_stops_when_the_loss_is_low_enough(tmp_path):
    options = dict(layers=1, width=32, heads=2, seed=3, drills=((1.0, 1.0),), size=8)
    pretrain.pretrain(tmp_path / "a", steps=1000, enough=3.6, **options)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 3.6 and all(loss >= 3.6 for loss in losses[:-1])
    with pytest.raises(RuntimeError, match="did not fall below 0.1 in 50 steps"):
        pretrain.pretrain(tmp_path / "b", steps=50, enough=0.1, **options)
    assert not (tmp_path / "b" / "model.safetensors").exists()


def test_interrupted_pretraining_continues_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE", 20)
    options = dict(layers=1, width=32, heads=2, seed=3, steps=60, drills=((0.5, 1.0), (1.0, 0.5)), size=4, applied=0.5)
    pretrain.pretrain(tmp_path / "whole", **options)
    calls = iter(range(100))

    def interrupted(*args):
        if next(calls) == 57:
            raise KeyboardInterrupt
        return batch(*args)

    batch = pretrain.batch
    monkeypatch.setattr(pretrain, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "part", **options)
    monkeypatch.setattr(pretrain, "batch", batch)
    pretrain.pretrain(tmp_path / "part", **options)
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "part")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]
    assert not (tmp_path / "part" / pretrain.STATE).exists()


def test_drills_are_right():
    rng = random.Random(5)
    for _ in range(200):
        found = world.drill(rng)
        if found["question"] == "Facts:":
            for sentence in found["rationale"].removesuffix(".").split(". "):
                value, sign, number, _, result = sentence.split()
                assert int(value) + int(number) * (1 if sign == "+" else -1) == int(result)
        else:
            told = facts_of(found["question"])
            repeated = [sentence.split() for sentence in found["rationale"].removesuffix(".").split(". ")]
            assert sorted((name, amount) for name, *amount in repeated) == sorted(told.items())
