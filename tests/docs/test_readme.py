"""The README: its length, and its snippets, which are run on tiny models as those of the guides are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molsaki_kernels import reference
from tests.docs.test_guides import blocks, models, reader  # noqa: F401
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401

README = Path(__file__).parents[2] / "README.md"


def test_it_fits_on_a_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


def test_every_block_is_run_or_says_why_not():
    found = blocks(README)
    assert len(found) == len(re.findall(r"^```\w+$", README.read_text(encoding="utf-8"), re.M)) == 7
    assert [block.reason is None for block in found].count(True) == 4


def test_the_snippets(reader):  # noqa: F811
    """Each use is followed by a check of what the snippet computed."""
    kernel, maps, commands, loop = (block for block in blocks(README) if block.reason is None)

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 16, requires_grad=True) for heads in (4, 2, 2))
    reader.names.update(q=q, k=k, v=v)
    reader.run(kernel)
    out, found = reader.names["out"], reader.names["maps"]
    (out.square().sum() + found.square().sum()).backward()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    right = reference.stepwise_attention(*exact, reader.names["plan"])
    (right[0].square().sum() + right[1].square().sum()).backward()
    for ours, expected in (
        (out, right[0]),
        (found, right[1]),
        *((x.grad, y.grad) for x, y in zip((q, k, v), exact, strict=True)),
    ):
        assert torch.allclose(ours.double(), expected, rtol=1e-4, atol=1e-5)

    for name in ("teacher", "student"):
        shutil.copytree(reader.models / name, name)
    problem = tiny.problems(1)[0]
    reader.names.update(name="student", question=problem["question"], rationale=problem["rationale"])
    reader.run(maps)
    shown = reader.names["found"]
    assert shown.values.shape[0] == 2 and shown.values.ndim == 3 and float(shown.values.sum()) > 0
    assert Path("map.png").stat().st_size > 1000

    rows = tiny.problems(16)
    tiny.write_jsonl(Path("train.jsonl"), rows[:12])
    tiny.write_jsonl(Path("test.jsonl"), rows[12:])
    commands.body = commands.body.replace("TEACHER", "teacher").replace("STUDENT", "student")
    reader.run(commands)
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert "<html" in page and rows[12]["question"][:20] in page

    tokenizer = AutoTokenizer.from_pretrained("student")
    texts = [f"{row['question']} {row['rationale']}" for row in rows[:2]]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    student, teacher = (AutoModelForCausalLM.from_pretrained(name) for name in ("student", "teacher"))
    reader.names.update(student=student, teacher=teacher, tokenizer=tokenizer, torch=torch, labels=labels, **batch)
    reader.run(loop)
    assert student.get_input_embeddings().weight.grad.isfinite().all()
    assert float(student.get_input_embeddings().weight.grad.norm()) > 0
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("word", ["make demo", "make test"])
def test_the_two_commands_are_targets(word):
    assert word in README.read_text(encoding="utf-8")
    assert re.search(rf"^{word.split()[1]}:", (README.parent / "Makefile").read_text(encoding="utf-8"), re.M)
