"""Reading examples from JSON lines files."""

from __future__ import annotations

import json
import pickle

import pytest

from molsaki.text.examples import Example, read_examples
from tests.helpers import tiny


def test_read(tmp_path):
    rows = tiny.problems(2) + [{"question": "q", "rationale": "", "answer": 12, "gold": 12.0, "choices": ["a", "b"]}]
    rows.append({"question": "q", "rationale": "r", "answer": "3", "gold": "4", "keywords": ["x"]})
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    path.write_text("\n" + path.read_text())
    read = read_examples(path)
    assert [e.id for e in read] == ["p0", "p1", "4", "5"]
    assert read[2] == Example("4", "q", "", "12.0", None, ("a", "b"), is_right=True)
    assert (read[3].answer, read[3].keywords, read[3].is_right) == ("4", ("x",), False)


GOOD = {"id": "a", "question": "q", "rationale": "r", "answer": "1"}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "d.jsonl: holds no examples"),
        (json.dumps(GOOD) + "\n{broken\n", ValueError, "d.jsonl:2: not valid JSON"),
        ("[1]\n", ValueError, "d.jsonl:1: expected a JSON object, got list"),
        (json.dumps({**GOOD, "question": None}), ValueError, "d.jsonl:1: question: missing"),
        (json.dumps({**GOOD, "question": " "}), ValueError, "d.jsonl:1: question: expected a text, got a blank one"),
        (json.dumps({**GOOD, "question": ["q"]}), TypeError, "d.jsonl:1: question: expected a text, got list"),
        (json.dumps({"question": "q", "answer": "1"}), ValueError, "d.jsonl:1: rationale: missing"),
        (json.dumps({"question": "q", "rationale": "r"}), ValueError, "d.jsonl:1: answer: missing"),
        (json.dumps({**GOOD, "keywords": "one"}), TypeError, "d.jsonl:1: keywords: expected a list"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), ValueError, "d.jsonl:2: id 'a' is line 1's already"),
    ],
)
def test_read_errors(tmp_path, text, error, message):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(error) as caught:
        read_examples(path)
    assert message in str(caught.value)


def test_read_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")


def test_examples_are_read_on_access(tmp_path):
    rows = tiny.problems(5)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(json.dumps(row) for row in rows).encode())
    more = tiny.write_jsonl(tmp_path / "e.jsonl", [{**row, "id": "e" + row["id"], "question": "é?"} for row in rows])
    read = read_examples([path, more])
    assert [e.id for e in read] == [row["id"] for row in rows] + ["e" + row["id"] for row in rows]
    assert (read[3].question, read[-1].question, len(read[4:][:3])) == (rows[3]["question"], "é?", 3)
    assert [e.id for e in read[4:][::2]] == ["p4", "ep1", "ep3"]
    assert pickle.loads(pickle.dumps(read))[7] == read[7]
    with pytest.raises(ValueError, match=r"d.jsonl:1: id 'p0' is line 1 of .*d.jsonl's already"):
        read_examples([path, path])
    path.write_text(path.read_text().replace("Ann", "Bob"))
    assert read[7].id == "ep2"
    with pytest.raises(ValueError, match=r"d.jsonl: has changed since it was opened"):
        read[3]
