from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from molsaki.annotation.annotate import annotate
from molsaki.cli import main
from molsaki.config import AnnotateConfig, ExtractConfig
from molsaki.teacher.extract import extract
from molsaki.text.examples import read_examples
from tests.helpers import tiny
from tests.helpers.tiny import one_thread  # noqa: F401

TESTS = Path(__file__).parents[1]
DATA = Path(__file__).with_name("data")
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Scripted(LlamaForCausalLM):
    """Answers the last question of a prompt from a table, token by token, through the real ``generate``.

    ``script`` maps a question and a phase to the reply.
    """

    script: dict
    tok: object

    def generate(self, input_ids, attention_mask, **options):
        self.width = input_ids.shape[1]
        assert (attention_mask[:, -1] == 1).all()  # padded on the left
        prompts = [self.tok.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.replies = [self.tok(self.reply_to(text)).input_ids for text in prompts]
        self.seen = [*getattr(self, "seen", []), prompts]
        return super().generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    def reply_to(self, text: str) -> str:
        question = max(self.script, key=lambda q: text.rfind(q))
        last = text[text.rfind(question) :]
        phase = "keywords" if "Keywords:" in last or "key words" in text else "hint" if "Hint:" in last else "first"
        return self.script[question][phase]

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}  # all of them, whatever is cached

    def forward(self, input_ids, attention_mask=None, **_):
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        n = input_ids.shape[1] - self.width
        for row, reply in enumerate(self.replies):
            logits[row, 0, reply[n] if n < len(reply) else self.config.eos_token_id] = 99.0
        return CausalLMOutput(logits=logits)


def scripted(script: dict) -> tuple[Scripted, object]:
    tok = tiny.tokenizer()
    tok.chat_template = CHAT
    random = tiny.model(1, max_position_embeddings=8192)
    model = Scripted(random.config).eval()
    model.load_state_dict(random.state_dict())  # the same fingerprint every time
    model.script, model.tok = script, tok
    return model, tok


RIGHT = "There are 3 * 4 = 12 nuts in the bags.\nAnswer: 12"
RECORDS = [
    {"id": "a", "task": "math", "question": "Ann has 3 bags of 4 nuts. How many nuts?", "gold": 12},
    {"id": "b", "question": "Bob has 5 nuts and eats 2. How many nuts are left?", "answer": "3"},
    {"id": "c", "question": "Cid has 2 coins and finds 2. How many coins?", "gold": "4"},
    {"id": "d", "question": "Where do bees sleep?", "gold": "hive", "choices": ["park", "hive", "bank"]},
]
SCRIPT = {
    RECORDS[0]["question"]: {
        "first": RIGHT + "\n\nQuestion: What is next?\nRationale: 5 - 5 = 0.\nAnswer: 0",
        "keywords": " bags, NUTS, squirrels, nuts\nQuestion: more",
    },
    RECORDS[1]["question"]: {
        "first": "Bob has 5 nuts and 2 more, so 5 + 2 = 7.\nAnswer: 7",
        "hint": "Bob eats 2 of 5 nuts, so 5 - 2 = 3 are left.\nAnswer: 3",
        "keywords": "eats; left",
    },
    RECORDS[2]["question"]: {"first": "I do not know.", "hint": "The answer is 4.\nAnswer: 4"},
    RECORDS[3]["question"]: {
        "first": "Bees live where they make honey. They do not go to the bank. So it is the hive.\nAnswer: (b)",
        "keywords": "bees, honey, hive",
    },
}


def files(folder: Path, records=RECORDS, **options) -> AnnotateConfig:
    folder.mkdir(exist_ok=True)
    data = tiny.write_jsonl(folder / "data.jsonl", records)
    base = dict(data_file=str(data), output_file=str(folder / "out.jsonl"), batch_size=2, keep_wrong=True)
    return AnnotateConfig(**base | options)


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("template", ["plain", "chat", "Q: {question}\nA: {rationale}\nAnswer: {answer}"])
def test_two_phases_keep_only_what_is_right(tmp_path, template):
    model, tok = scripted(SCRIPT)
    script = SCRIPT
    if template == "chat":  # ends by its end token, not before the next question
        script = SCRIPT | {RECORDS[0]["question"]: {"first": RIGHT, "keywords": "bags, NUTS, squirrels, nuts"}}
    elif template != "plain":
        script = SCRIPT | {
            RECORDS[0]["question"]: {**SCRIPT[RECORDS[0]["question"]], "first": RIGHT + "\n\nQ: And\nA: 0"}
        }
    model.script = script
    config = files(tmp_path, template=template, keywords="teacher")
    summary = annotate(config, model, tok)
    assert (summary["phase_1"], summary["phase_2"], summary["examples"]) == (2, 1, 4)
    assert summary["dropped"] == {"rationale only states the answer": 1}
    assert summary["keywords"] == {"kept": 7, "not_in_the_text": 1, "rationales_without": 0}
    records = records_of(tmp_path / "out.jsonl")
    assert [record.pop("rationale_source") for record in records] == ["Scripted"] * 3
    assert records == [
        {
            "id": "a", "task": "math", "question": RECORDS[0]["question"],
            "rationale": "There are 3 * 4 = 12 nuts in the bags.", "answer": "12", "gold": "12",
            "keywords": ["bags", "NUTS"], "phase": 1,
        },
        {
            "id": "b", "task": "math", "question": RECORDS[1]["question"],
            "rationale": "Bob eats 2 of 5 nuts, so 5 - 2 = 3 are left.", "answer": "3", "gold": "3",
            "keywords": ["eats", "left"], "phase": 2,
        },
        {
            "id": "d", "task": "commonsense", "question": RECORDS[3]["question"], "choices": ["park", "hive", "bank"],
            "rationale": "Bees live where they make honey. They do not go to the bank. So it is the hive.",
            "answer": "hive", "gold": "hive", "keywords": ["bees", "honey", "hive"], "phase": 1,
        },
    ]  # fmt: skip
    refused = [(record["id"], record["phase"], record["reason"]) for record in records_of(tmp_path / "out.wrong.jsonl")]
    assert refused == [
        ("b", 1, "wrong answer"), ("c", 1, "no answer"), ("c", 2, "rationale only states the answer")
    ]  # fmt: skip
    assert json.loads((tmp_path / "out.summary.json").read_text()) == summary
    assert {p.name for p in tmp_path.iterdir()} == {
        "data.jsonl", "out.jsonl", "out.work.jsonl", "out.wrong.jsonl", "out.summary.json"
    }  # fmt: skip


def test_what_the_teacher_sees(tmp_path):
    """Demonstrations of the question's own task, the hint in phase 2 alone, the choices where they are not named."""
    model, tok = scripted(SCRIPT)
    annotate(files(tmp_path, batch_size=1, shots=1, instruction="Think."), model, tok)
    prompts = {next(r["id"] for r in RECORDS if r["question"] in batch[0]): batch[0] for batch in model.seen[:4]}
    assert prompts["d"].endswith(
        "Question: Where do bees sleep?\nAnswer Choices:\n(a) park\n(b) hive\n(c) bank\nRationale:"
    )
    assert "Answer: refrigerator\n\nQuestion: Where do" in prompts["d"] and "rolls" not in prompts["d"]
    assert prompts["a"].startswith("Think.\n\nQuestion: A baker") and prompts["a"].count("Question:") == 2
    assert not any("Hint" in text for text in prompts.values())
    second = [batch[0] for batch in model.seen[4:]]
    assert len(second) == 2
    assert all("Hint: The answer is 27.\nRationale: The baker" in text for text in second)
    assert {text.rpartition("Hint:")[2] for text in second} == {
        " The answer is 3.\nRationale:", " The answer is 4.\nRationale:"
    }  # fmt: skip
    chat, tok = scripted(SCRIPT)
    annotate(files(tmp_path / "chat", batch_size=1, shots=1, instruction="Think.", template="chat"), chat, tok)
    assert any(
        text.startswith("[user]Think.\n\nA baker") and text.endswith("finds 2. How many coins?[assistant]")
        for (text,) in chat.seen
    )


def test_samples(tmp_path):
    tok = tiny.tokenizer()

    class Varied(Scripted):
        def reply_to(self, text):
            self.calls = getattr(self, "calls", -1) + 1
            return ("3 * 4 = 12 nuts.\nAnswer: 12", "Three bags of 4 nuts make 12.\nAnswer: 12", "7")[self.calls % 3]

    varied = Varied(tiny.model(1, max_position_embeddings=8192).config).eval()
    varied.tok = tok
    config = files(tmp_path, RECORDS[:1], samples=6, temperature=0.5, batch_size=4)
    summary = annotate(config, varied, tok)
    assert (summary["phase_1"], summary["rationales"]) == (1, 2)
    records = records_of(tmp_path / "out.jsonl")
    assert [record["id"] for record in records] == ["a", "a/2"] and records[0]["rationale"] != records[1]["rationale"]
    assert [record["sample"] for record in records_of(tmp_path / "out.wrong.jsonl")] == [3, 6]
    records = [{**RECORDS[1], "id": "a/2"}, RECORDS[0]]
    annotate(files(tmp_path / "b", records, samples=6, temperature=0.5, batch_size=4), varied, tok)
    ids = [record["id"] for record in records_of(tmp_path / "b/out.jsonl")]
    assert len(ids) == len(set(ids)) and "a" in ids  # a second sample of a is not a/2, which is another example


def test_true_generate_loop_of_a_saved_model(tmp_path, capsys):
    """A random teacher: no reply is right, every reason is counted, and a second run decodes nothing."""
    folder = tiny.save(tmp_path / "teacher", 1, max_position_embeddings=4096)
    data = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.problems(3))
    argv = ["annotate", "--teacher", str(folder), "--data_file", str(data), "--output_file", str(tmp_path / "o.jsonl")]
    argv += ["--max_new_tokens", "5", "--batch_size", "2", "--shots", "1", "--keep_wrong"]
    assert main(argv) == 2
    assert "d.jsonl: all 3 examples were left out: 3 cut off at max_new_tokens" in capsys.readouterr().err
    refused = records_of(tmp_path / "o.wrong.jsonl")
    assert [(record["id"], record["phase"]) for record in refused] == [(f"p{i}", k) for i in range(3) for k in (1, 2)]
    assert json.loads((tmp_path / "o.summary.json").read_text())["teacher"] == "teacher"
    assert not (tmp_path / "o.jsonl").exists()
    work = (tmp_path / "o.work.jsonl").read_bytes()
    assert main(argv) == 2
    assert (tmp_path / "o.work.jsonl").read_bytes() == work
    assert json.loads((tmp_path / "o.summary.json").read_text())["tokens"] == 0


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from tests.distill import test_annotate as t
from molsaki.annotation import annotate, journal

torch.set_num_threads(1)
folder = Path(sys.argv[1])
left = 0
whole = journal.ReplyJournal._append

def append(work, value):
    global left
    if not left:
        with work.path.open("ab") as file:
            file.write(b'{"check": "half a li')
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    whole(work, value)

journal.ReplyJournal._append = append
for left in (3, 2, 2):
    child = os.fork()
    if not child:
        annotate.annotate(t.files(folder, keywords="teacher", batch_size=1), *t.scripted(t.SCRIPT))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (folder / "out.jsonl").exists()
    print((folder / "out.work.jsonl").read_bytes().count(b"\\n"))
"""


def test_killed_and_resumed_is_the_same(tmp_path):
    """SIGKILL amid a line in phase 1, phase 2 and the keywords in turn; each run continues where the last stopped."""
    whole = files(tmp_path / "whole", keywords="teacher", batch_size=1)
    annotate(whole, *scripted(SCRIPT))
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(folder)]
    killed = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert killed.returncode == 0, killed.stderr
    assert killed.stdout.split() == ["3", "5", "7"]  # of one line for what it is of and 9 batches
    model, tok = scripted(SCRIPT)
    annotate(files(folder, keywords="teacher", batch_size=1), model, tok)
    assert len(model.seen) == 3
    for name in ("out.jsonl", "out.work.jsonl", "out.wrong.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_journal_of_version_0_1_is_continued(tmp_path):
    """Its 5 lines are used again, and the others are those that version 0.1 wrote."""
    if transformers.__version__ != "5.17.0":
        pytest.skip("the fingerprint of a model depends on the config that this version of transformers writes")
    whole = (DATA / "annotate.work.jsonl").read_bytes()
    config = files(tmp_path, keywords="teacher", batch_size=1)
    half = b"".join(whole.splitlines(keepends=True)[:5]) + b'{"check": "half a li'
    (tmp_path / "out.work.jsonl").write_bytes(half)
    model, tok = scripted(SCRIPT)
    annotate(config, model, tok)
    assert len(model.seen) == len(whole.splitlines()) - 5
    assert (tmp_path / "out.work.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 100}, "another max_new_tokens: 256, now 100"),
        ({"batch_size": 3}, "another batch_size: 2, now 3"),
        ({"keywords": "teacher"}, "another keywords: 'none', now 'teacher'"),
        ({"shots": 2}, r"another demonstrations: '\w+', now '\w+'"),
        ({"limit": 3}, "another number_of_examples: 4, now 3"),
    ],
)
def test_changed_options_are_refused(tmp_path, options, message):
    annotate(files(tmp_path), *scripted(SCRIPT))
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"out.work.jsonl: was begun with {message}"):
        annotate(files(tmp_path, **options), *scripted(SCRIPT))
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_changed_teacher_and_data_are_refused(tmp_path):
    annotate(files(tmp_path), *scripted(SCRIPT))
    model, tok = scripted(SCRIPT)
    model.model.embed_tokens.weight.data += 1
    with pytest.raises(ValueError, match=r"another teacher_weights: '\w+', now '\w+'"):
        annotate(files(tmp_path), model, tok)
    with pytest.raises(ValueError, match=r"another data: '\w+', now '\w+'"):
        annotate(files(tmp_path, [*RECORDS[:3], {**RECORDS[3], "gold": "park"}]), *scripted(SCRIPT))
    lines = (tmp_path / "out.work.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.work.jsonl").write_bytes(b"".join([lines[0], lines[1][:30] + b"X" + lines[1][31:], *lines[2:]]))
    with pytest.raises(ValueError, match=r"out.work.jsonl:2: damaged"):
        annotate(files(tmp_path), *scripted(SCRIPT))
    os.remove(tmp_path / "out.work.jsonl")
    with pytest.raises(ValueError, match=r"--output_file: .*out.jsonl exists without its out.work.jsonl"):
        annotate(files(tmp_path), *scripted(SCRIPT))


def test_too_long_is_counted(tmp_path):
    model, tok = scripted(SCRIPT)
    model.config.max_position_embeddings = 400
    summary = annotate(files(tmp_path, shots=0, instruction="", max_new_tokens=330), model, tok)
    assert summary["phase_1"] == 1
    assert summary["dropped"] == {"prompt and reply longer than the context": 3}
    reasons = [
        (record["id"], record["phase"], record["reply"] is None) for record in records_of(tmp_path / "out.wrong.jsonl")
    ]
    assert reasons == [("b", 1, True), ("b", 2, True), ("c", 1, False), ("c", 2, True), ("d", 1, True), ("d", 2, True)]


def test_extract_reads_the_output(tmp_path):
    annotate(files(tmp_path, keywords="teacher"), *scripted(SCRIPT))
    out = tmp_path / "out.jsonl"
    assert [(e.id, e.answer, e.keywords, e.is_right) for e in read_examples(out)] == [
        ("a", "12", ("bags", "NUTS"), True), ("b", "3", ("eats", "left"), True),
        ("d", "hive", ("bees", "honey", "hive"), True),
    ]  # fmt: skip
    config = ExtractConfig(data_files=[str(out)], store=str(tmp_path / "store"), key="keywords", drop_wrong=True)
    assert extract(config, tiny.model(2), tiny.tokenizer())["left_out"] == {}


def test_demonstrations_of_ones_own(tmp_path):
    model, tok = scripted(SCRIPT)
    own = {"question": "2 and 2?", "rationale": "Add 2 and 2 to get 4.", "answer": 4, "keywords": ["add"]}
    path = tiny.write_jsonl(tmp_path / "own.jsonl", [own])  # of no task: serves all
    annotate(files(tmp_path / "o", examples=str(path), keywords="teacher"), model, tok)
    assert all(text.count("2 and 2?") == 1 for batch in model.seen for text in batch)
    for change, message in [
        ({"answer": 5}, r"own.jsonl: example 1: rationale ends in another answer: 'Add 2"),
        ({"task": "math"}, "no demonstration of task 'commonsense', which example d belongs to; there are those of"),
        ({"rationale": " "}, "own.jsonl: example 1: no rationale: ''"),
    ]:
        tiny.write_jsonl(path, [own | change])
        with pytest.raises(ValueError, match=message):
            annotate(files(tmp_path / "o2", examples=str(path)), model, tok)
    tiny.write_jsonl(path, [{k: v for k, v in own.items() if k != "keywords"}])
    with pytest.raises(ValueError, match="no demonstration with keywords of task 'math'"):
        annotate(files(tmp_path / "o2", examples=str(path), keywords="teacher"), model, tok)


def test_bad_input(tmp_path, monkeypatch):
    model, tok = scripted(SCRIPT)
    assert annotate(files(tmp_path / "some", [RECORDS[0], {"id": "b", "question": "Hm?"}]), model, tok)["left_out"] == 1
    with pytest.raises(ValueError, match=r"data.jsonl:1: id a: task: expected a text, got list"):
        annotate(files(tmp_path, [{**RECORDS[0], "task": ["math"]}]), model, tok)
    with pytest.raises(ValueError, match="id d: gold: expected one of the choices park, hive, bank, .*got 'nest'"):
        annotate(files(tmp_path, [{**RECORDS[3], "gold": "nest"}]), model, tok)
    with pytest.raises(ValueError, match="--teacher: no such folder: /no/model"):
        annotate(files(tmp_path, teacher="/no/model"))
    with pytest.raises(ValueError, match="--output_file: required"):
        annotate(files(tmp_path, output_file=None), model, tok)
    with pytest.raises(ValueError, match="template: expected plain, chat, or a format"):
        annotate(files(tmp_path, template="Q: {question} A: {answer}"), model, tok)
    with pytest.raises(ValueError, match="no chat template"):
        tok.chat_template = None
        annotate(files(tmp_path, template="chat"), model, tok)
    for options, message in [
        ({"samples": 2}, "samples: 2 greedy replies are all the same"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected a number of at least 0"),
        ({"hint": "It is {answer}."}, "hint: expected a text with {question} and {answer}"),
        ({"device": "cpu", "device_map": "auto"}, "give either device or device_map"),
        ({"keywords": "all"}, "keywords: expected one of none, teacher"),
    ]:
        with pytest.raises(ValueError) as error:
            AnnotateConfig(**options)
        assert message in str(error.value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE: annotate runs in one process, got 2"):
        annotate(files(tmp_path), model, tok)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_conversations(tmp_path, template):
    """The turns before a question are asked as turns of a chat, else as a part of the question, and are written."""
    context = [("system", "Be brief."), ("user", "Ann has 3 bags."), ("assistant", "I see.")]
    question, reply = "Each bag has 4 nuts. How many nuts?", RIGHT
    model, tok = scripted({question: {"first": reply, "hint": reply, "keywords": "Ann, bags, bees"}})
    messages = [{"role": role, "content": text} for role, text in context]
    row = {"id": "a", "question": question, "gold": 12, "earlier_turns": messages}
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [row])
    out = tmp_path / "o.jsonl"
    options = dict(data_file=str(data), output_file=str(out), template=template, shots=0, keywords="teacher")
    annotate(AnnotateConfig(**options), model, tok)
    asked = model.seen[0][0]
    if template == "chat":
        assert "Be brief.\n\nAnn has 3 bags.[assistant]I see.<|end|>[user]Each bag" in asked
    else:
        assert f"Question: Be brief.\n\nAnn has 3 bags.\n\nI see.\n\n{question}\n" in asked
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["earlier_turns"] == messages and record["keywords"] == ["Ann", "bags"]
    assert read_examples(out)[0].context == tuple(context)
