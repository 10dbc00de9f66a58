"""Reading examples: formats, arrays, and what is left out."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import pytest

from molsaki.text.examples import Example, example_of, read_examples
from molsaki.text.formats import FORMATS as FORMATS_OF_RECORDS
from molsaki.text.formats import format_of
from tests.helpers import tiny


def test_read(tmp_path):
    rows = tiny.problems(2) + [{"question": "q", "rationale": "", "answer": 12, "gold": 12.0, "choices": ["a", "12"]}]
    rows.append({"question": "q", "rationale": "r", "answer": "3", "gold": "4", "keywords": ["x"]})
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    path.write_text("\n" + path.read_text())
    read = read_examples(path)
    assert [e.id for e in read] == ["p0", "p1", "4", "5"]
    assert read[2] == Example("4", "q", "", "12", None, ("a", "12"), is_right=True)
    assert (read[3].answer, read[3].keywords, read[3].is_right) == ("4", ("x",), False)


GOOD = {"id": "a", "question": "q", "rationale": "r", "answer": "1"}


BAD = {
    "{broken": "not valid JSON",
    "[1": "not valid JSON",
    "1": "expected a JSON object, got int",
    json.dumps({**GOOD, "question": None}): "id a: question: missing",
    json.dumps({**GOOD, "question": " "}): "id a: question: expected a text, got a blank one",
    json.dumps({**GOOD, "question": ["q"]}): "id a: question: expected a text, got list",
    json.dumps({**GOOD, "question": "\ud83d?"}): "id a: question: expected valid Unicode, got half of a surrogate pair "
    "at character 0",
    json.dumps({**GOOD, "answer": float("nan")}): "id a: answer: expected a text, got float",
    json.dumps({"question": "q", "answer": "1"}): "rationale: missing",
    json.dumps({"question": "q", "rationale": "r"}): "answer: missing",
    json.dumps({**GOOD, "keywords": "one"}): "id a: keywords: expected a list",
    json.dumps({**GOOD, "choices": ["x", "y"]}): "id a: answer: expected one of the choices x, y, or a letter",
    json.dumps({"text": "q", "n": 1}): "question: missing; the fields are text, n. Expected question, rationale and",
    json.dumps(
        {"messages": [{"role": "user", "content": "q"}]}
    ): "format messages: messages: expected a turn of the user and then one of the assistant at the end, got user",
    json.dumps({"instruction": "q", "output": "So 5 of them."}): "format alpaca: the reply states no answer: expected",
    json.dumps({"problem": "q", "solution": "5."}): "format math: solution: expected one with a \\boxed{} answer",
    json.dumps(
        {"question": "q", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "B"}
    ): "format csqa: answerKey",
}


@pytest.mark.parametrize("line", BAD)
def test_one_bad_example_is_left_out_and_named(tmp_path, caplog, line):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(GOOD | {"id": "good"}) + "\n" + line + "\n")
    read = read_examples(path)
    assert [e.id for e in read] == ["good"]
    assert len(read.left_out) == len(read[:1].left_out) == 1 and f"d.jsonl:2: {BAD[line]}" in read.left_out[0]
    assert f"1 of 2 examples left out: {read.left_out[0]}" in caplog.text
    path.write_text("\n" + line + "\n" if line[0] != "[" else line)
    with pytest.raises(ValueError, match=r"d.jsonl: (holds no examples that can be used: .*:2: |not valid JSON)"):
        read_examples(path)


def test_repeated_ids_and_empty_files(tmp_path, caplog):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({**GOOD, "id": id}) for id in "abaca"))
    read = read_examples(path)
    assert [e.id for e in read] == ["a", "b", "c"]
    assert read.left_out == [f"{path}:{n}: id 'a' is line 1's already" for n in (3, 5)]
    path.write_text("".join("{broken\n" for _ in range(9)) + json.dumps(GOOD))
    assert len(read_examples(path).left_out) == 9 and "(and 8 more for this reason)" in caplog.text
    for text in ("", "\n", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"d.jsonl: holds no examples$"):
            read_examples(path)


@pytest.mark.parametrize(
    ("gold", "choices", "message"),
    [
        ("first\nsecond", None, "expected a number, a choice, yes or no, an expression or a text of one line"),
        ("?", None, "expected letters or digits"),
        ("z", ["a", "b"], "expected one of the choices a, b"),
        ("C", ["desk", "river"], "expected one of the choices desk, river, or a letter of one, got 'C'"),
    ],
)
def test_gold_answers_that_no_reply_can_match(tmp_path, gold, choices, message):
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"id": "x", "question": "q", "gold": gold, "choices": choices}])
    with pytest.raises(ValueError, match=f"d.jsonl:1: id x: gold: {message}"):
        read_examples(path, rationale=False)


THINK = "<think>\n5+12=17\n</think>\n\nThe answer is **17**."
FORMATS = {
    "gsm8k": ({"question": "q", "answer": "48/2 = <<48/2=24>>24\n#### 24"}, ("q", "48/2 = 24", "24", None)),
    "math": ({"problem": "q", "solution": "So $\\boxed{9{,}000}$."}, ("q", "So $\\boxed{9{,}000}$.", "9{,}000", None)),
    "csqa": (
        {"question": "q", "rationale": "r", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
        ("q", "r", "y", ("x", "y")),
    ),
    "csqa as published": (
        {
            "question": {"stem": "q", "choices": [{"label": "1", "text": "x"}, {"label": "2", "text": "y"}]},
            "answerKey": "1",
            "rationale": "r",
        },
        ("q", "r", "x", ("x", "y")),
    ),
    "aqua": (
        {"question": "q", "options": ["A)21", "B)21.5"], "rationale": "r", "correct": "B"},
        ("q", "r", "21.5", ("21", "21.5")),
    ),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": THINK},
            ]
        },
        ("q", THINK, "17", None),
    ),
    "messages with reasoning": (
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "reasoning_content": "5+12=17", "content": "The answer is **17**."},
            ]
        },
        ("q", THINK, "17", None),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "5 + 12 = 17."}]},
        ("q", "5 + 12 = 17.", "17", None),
    ),
    "sharegpt with an answer": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "So, 2 of us."}], "answer": "2"},
        ("q", "So, 2 of us.", "2", None),
    ),
    "alpaca": (
        {"instruction": "q", "input": "i", "output": "r. The answer is Rome."},
        ("q\ni", "r. The answer is Rome.", "Rome", None),
    ),
    "dss": ({"input": "q", "label": "5", "rationale": "r"}, ("q", "r", "5", None)),
    "svamp": ({"Body": "b", "Question": "q", "Answer": 5.0, "rationale": "r"}, ("b q", "r", "5.0", None)),
    "true": ({"question": "q", "rationale": "r", "answer": True}, ("q", "r", "yes", None)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    """Each as JSON lines and as an array, in UTF-8 and indented."""
    record, expected = FORMATS[name]
    path = tmp_path / "d.json"
    for text in (
        json.dumps(record),
        json.dumps([record | {"id": "é日"}] + [record] * 2, ensure_ascii=False, indent=1),
        "[" + json.dumps(record) + "]",
    ):
        path.write_text(text, encoding="utf-8")
        for one in read_examples(path):
            assert (one.question, one.rationale, one.answer, one.choices) == expected


def test_arrays(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(
        "\ufeff ["
        + ", ".join(json.dumps(GOOD | {"id": n, "question": "é日"}, ensure_ascii=False) for n in range(4))
        + ",3]\n"
    )
    read = read_examples(path)
    assert [e.id for e in read[1:]] == ["1", "2", "3"] and read[2].question == "é日"
    assert read.left_out == [f"{path}:5: expected a JSON object, got int"]
    for text in ('[{"a": 1} {"a": 2}]', '[{"a": 1}', "[{]", '[{"a": 1}] more'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"d.json: not valid JSON"):
            read_examples(path)


def test_read_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")


def test_examples_are_read_on_access(tmp_path):
    rows = tiny.problems(5)
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(json.dumps(row) for row in rows).encode())
    (tmp_path / "f").mkdir()
    more = tiny.write_jsonl(tmp_path / "e.jsonl", [{**row, "id": "e" + row["id"], "question": "é?"} for row in rows])
    read = read_examples([path, more])
    assert [e.id for e in read] == [row["id"] for row in rows] + ["e" + row["id"] for row in rows]
    assert (read[3].question, read[-1].question, len(read[4:][:3])) == (rows[3]["question"], "é?", 3)
    assert [e.id for e in read[4:][::2]] == ["p4", "ep1", "ep3"]
    assert pickle.loads(pickle.dumps(read))[7] == read[7]
    with pytest.raises(ValueError, match=r"d.jsonl:1: id 'p0' is line 1 of .*d.jsonl's already"):
        read_examples([path, tiny.write_jsonl(tmp_path / "f" / "d.jsonl", rows)])
    path.write_text(path.read_text().replace("Ann", "Bob"))
    assert read[7].id == "ep2"
    with pytest.raises(ValueError, match=r"d.jsonl: has changed since it was opened"):
        read[3]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables(tmp_path, suffix):
    """The same examples as JSON lines; arrays are JSON in a cell, and a changed table is refused."""
    rows = tiny.problems(4)
    rows[1] |= {"question": 'Say "3, 4"\nor\t5?', "keywords": ["x", "y z"], "rationale": "r" * 200_000 + " 3."}
    expected = list(read_examples(tiny.write_jsonl(tmp_path / "d.jsonl", rows)))
    path, names = tmp_path / f"d.{suffix}", ["id", "question", "rationale", "answer", "keywords"]

    def write(rows) -> None:
        if suffix == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(
                pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path
            )
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(
                row | ({"keywords": json.dumps(row["keywords"])} if "keywords" in row else {}) for row in rows
            )

    write(rows)
    read = read_examples(path)
    assert list(read) == expected and list(pickle.loads(pickle.dumps(read))) == expected
    assert list(read[1:3]) == expected[1:3] and read[1].keywords == ("x", "y z")
    write([rows[0] | {"question": "Another one?"}, *rows[1:]])
    with pytest.raises(ValueError, match=rf"d.{suffix}: has changed since it was opened; run again"):
        read[0]
    assert read_examples(path)[0].question == "Another one?"
    assert read_examples([path, tiny.write_jsonl(tmp_path / "e.jsonl", [rows[0] | {"id": "new"}])])[4].id == "new"


def test_tables_that_cannot_be_read(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("question,rationale,answer\nq,r,1,2\n")
    with pytest.raises(ValueError, match="d.csv: row .* has more cells than the header"):
        read_examples(path)
    path.write_text("question,answer\nq,1\n")
    with pytest.raises(ValueError, match="d.csv: holds no examples that can be used: .*d.csv:1: rationale: missing"):
        read_examples(path)
    path.write_bytes(b"question,rationale,answer\n\xff,r,1\n")
    with pytest.raises(ValueError, match="d.csv: not a valid table with a header"):
        read_examples(path)
    pytest.importorskip("pyarrow")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="d.parquet: not a valid Parquet file"):
        read_examples(tmp_path / "d.parquet")


def test_the_format_is_said_or_given(tmp_path, caplog):
    caplog.set_level("INFO", "molsaki")
    gsm8k, dss = {"question": "q", "answer": "1 + 1 = 2\n#### 2"}, {"input": "q", "label": "5", "rationale": "r"}
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [gsm8k, gsm8k, dss])
    read_examples(path)
    assert f"{path}: 2 of format gsm8k, 1 of format dss" in caplog.text
    given = read_examples(path, data_format="gsm8k")
    assert len(given) == 2 and given.left_out == [f"{path}:3: format gsm8k: missing 'answer'"]
    assert given[:1][0].rationale == "1 + 1 = 2"
    both = tiny.write_jsonl(tmp_path / "e.jsonl", [dss | {"question": "own", "answer": "6"}])
    assert read_examples(both)[0].question == "own"
    assert read_examples(both, data_format="dss")[0].question == "q"
    plain = tiny.write_jsonl(tmp_path / "f.jsonl", [{"question": "q", "answer": "no marks"}])
    with pytest.raises(ValueError, match="format gsm8k: answer: expected a solution that ends in ####"):
        read_examples(plain, data_format="gsm8k")


def test_ids_of_several_files_without_any(tmp_path):
    row = {"question": "q", "rationale": "r", "answer": "1"}
    (tmp_path / "x").mkdir()
    one, two = tiny.write_jsonl(tmp_path / "a.jsonl", [row, row]), tiny.write_jsonl(tmp_path / "b.jsonl", [row])
    same = tiny.write_jsonl(tmp_path / "x" / "b.jsonl", [row])
    assert [e.id for e in read_examples(one)] == ["1", "2"]
    assert [e.id for e in read_examples([one, two])] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert [e.id for e in read_examples([one, two, same])[2:]] == [f"{two}:1", f"{same}:1"]


def test_the_records_of_the_documentation(tmp_path):
    """Each is recognised as the format that it stands for, and can be trained on."""
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    block = page.partition("<!-- records -->\n```json\n")[2].partition("```")[0]
    shown = {name: record for line in block.splitlines() for name, record in json.loads(line).items()}
    assert list(shown) and set(shown) == set(FORMATS_OF_RECORDS)
    for name, record in shown.items():
        assert format_of(record) == name
        found = read_examples(tiny.write_jsonl(tmp_path / f"{name}.jsonl", [record]))
        assert found[0].answer in ("7", "7.0") and "7" in found[0].rationale


def test_reasons_are_named_once(tmp_path, caplog):
    row = {"question": "q", "rationale": "r", "answer": "1"}
    bad = [{"id": n, "question": "q", "rationale": "r"} for n in range(4)] + [{"question": "q", "answer": "1"}]
    path = tmp_path / "d.jsonl"
    tiny.write_jsonl(path, [row, *bad])
    read_examples(path)
    assert (
        f"5 of 6 examples left out: {path}:2: id 0: answer: missing (and 3 more for this reason); {path}:6: "
        in caplog.text
    )
    caplog.clear()
    tiny.write_jsonl(path, [row, *({**row, "id": str(n), "keywords": [""] * n} for n in range(1, 8))])
    read_examples(path)
    assert caplog.text.rstrip().endswith("; and 2 more")


def test_a_broken_history():
    record = {"instruction": "q", "output": "So 2.", "history": [["a"]]}
    with pytest.raises(
        ValueError, match="format alpaca: history: expected pairs of an instruction and its output, got"
    ):
        example_of(record, "1", True, False)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("d.csv", "id;question;answer\n1;Why 4?;4\n", "d.csv: the header has one column, 'id;question;answer': its columns "
     "are separated by semicolons, expected ','; save it with commas, as CSV"),
    ("d.csv", "id\tquestion\tanswer\n1\tWhy 4?\t4\n", "are separated by tabs, expected ','; name it .tsv"),
    ("d.tsv", "id,question,answer\n1,Why 4?,4\n", "are separated by commas, expected '\\t'; name it .csv"),
    ("d.csv", "ID,Question,Answer\n1,Why 4?,4\n", "question: missing; rename 'ID' to 'id', 'Question' to 'question', "
     "'Answer' to 'answer': names of fields are lower case"),
    ("d.csv", "question, Answer\nWhy 4?,4\n", "answer: missing; rename ' Answer' to 'answer': names of fields are"),
    ("d.jsonl", '{"Question": "Why 4?", "answer": 4}\n', "question: missing; rename 'Question' to 'question'"),
    ("d.csv", "question\nWhy 4?\n", "d.csv:1: answer: missing"),
])  # fmt: skip
def test_a_table_with_other_columns_gets_a_hint(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        read_examples(tmp_path / name, rationale=False)
    assert message in str(caught.value)
