"""Turns the records of common data-set formats into the fields of an example: question, rationale, answer, choices.

A record that has ``question`` and ``answer`` or ``gold`` is in our own format. Others are recognised by their keys, see
`FORMATS`. Every other field of a record, such as ``id``, ``choices`` or ``gold``, is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import regex

from molsaki.text.answers import CALCULATOR, final_answer, stated_answer
from molsaki.text.numbers import find_numbers

Fields = dict[str, Any]  # the JSON object of a record


def to_fields(record: Fields) -> Fields:
    """The record with the fields of our own format.

    Raises:
        ValueError: it is in no format, or is not what its format says; the message names the format.
    """
    own = "question" in record and ("answer" in record or "gold" in record)
    if own and isinstance(record.get("answer"), str) and "####" in record["answer"] and "rationale" not in record:
        return record | _gsm8k(record)
    if own and not isinstance(record.get("choices"), dict):
        return record
    for name, (keys, convert) in FORMATS.items():
        if all(key in record for key in keys):
            try:
                return record | convert(record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                detail = f"missing {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"format {name}: {detail}") from None
    if "question" in record:
        return record  # the reader names what is missing
    read = "; ".join(f"{name} ({', '.join(keys)})" for name, (keys, _) in FORMATS.items())
    raise ValueError(
        f"question: missing; the fields are {', '.join(map(str, record)) or 'none'}. Expected question, rationale and "
        f"answer, or the fields of one of: {read}"
    )


def _gsm8k(record: Fields) -> Fields:
    rationale = CALCULATOR.sub("", record["answer"].rpartition("####")[0]).strip()
    return {"rationale": rationale, "answer": final_answer(record["answer"])}


def _math(record: Fields) -> Fields:
    solution = record["solution"]
    answer = record.get("answer") or final_answer(solution)
    if answer == solution.strip():
        raise ValueError(f"solution: expected one with a \\boxed{{}} answer, got {solution[-60:]!r}")
    return {"question": record["problem"], "rationale": solution, "answer": answer}


def _messages(record: Fields) -> Fields:
    turns = [(turn["role"], turn.get("content"), turn.get("reasoning_content")) for turn in record["messages"]]
    return _turns(turns, record)


def _sharegpt(record: Fields) -> Fields:
    roles = {"human": "user", "gpt": "assistant"}
    turns = [(roles.get(turn["from"], turn["from"]), turn["value"], None) for turn in record["conversations"]]
    return _turns(turns, record)


def _turns(turns: Sequence[tuple[str, Any, str | None]], record: Fields) -> Fields:
    """One question and one reply, after a system turn that becomes the beginning of the question."""
    asked = [turn for turn in turns if turn[0] != "system"]
    if [role for role, _, _ in asked] != ["user", "assistant"] or len(turns) - len(asked) > 1:
        raise ValueError(
            "expected one turn of the user and one of the assistant, with or without one of the system before them, "
            f"got {', '.join(str(role) for role, _, _ in turns) or 'none'}; split longer conversations"
        )
    texts = []
    for role, content, thinking in turns:
        if isinstance(content, list) and all(part.get("type") == "text" for part in content):
            content = "\n".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError(f"expected text in the turn of the {role}, got {str(content)[:60]!r}")
        texts.append(f"<think>\n{thinking.strip()}\n</think>\n\n{content}" if thinking else content)
    return _reply("\n\n".join(texts[:-1]), texts[-1], record)


def _alpaca(record: Fields) -> Fields:
    return _reply("\n".join(filter(None, [record["instruction"], record.get("input")])), record["output"], record)


def _reply(question: str, reply: str, record: Fields) -> Fields:
    """The fields of a reply; its answer is the record's, else the one that it states, or a number at its very end."""
    answer = record.get("answer", record.get("gold"))
    if answer is None:
        answer = stated_answer(reply)
    if answer is None:
        numbers = find_numbers(reply, number_words=False)
        if not numbers or regex.search(r"\w", reply[numbers[-1][1] :]):
            raise ValueError(
                "the reply states no answer: expected 'The answer is ...', '#### ...', \\boxed{...} or a number at its "
                f"end, or a field answer beside it, got {reply[-60:]!r}"
            )
        answer = reply[slice(*numbers[-1])]
    return {"question": question, "rationale": reply, "answer": answer}


def _csqa(record: Fields) -> Fields:
    """CommonsenseQA, ARC and OpenBookQA, as on the Hugging Face hub or as published (``question`` with ``stem``)."""
    question, choices = record.get("question_stem", record.get("question")), record.get("choices")
    if isinstance(question, dict):
        choices, question = question.get("choices", choices), question["stem"]
    if isinstance(choices, list):
        choices = {name: [choice[name] for choice in choices] for name in ("label", "text")}
    if not isinstance(choices, dict):
        raise ValueError(f"choices: expected labels and texts, got {choices!r}")
    labels, texts = choices["label"], choices["text"]
    if record["answerKey"] not in labels or len(labels) != len(texts):
        raise ValueError(f"answerKey: expected one of {', '.join(labels)}, got {record['answerKey']!r}")
    return {"question": question, "choices": texts, "answer": texts[labels.index(record["answerKey"])]}


def _aqua(record: Fields) -> Fields:
    choices = [regex.sub(r"^[A-Z]\s*[).:]\s*", "", option) for option in record["options"]]
    return {"choices": choices, "answer": record["correct"]}


# The keys by which a format is recognised, and its conversion; the first one whose keys are all there is used.
FORMATS: dict[str, tuple[Sequence[str], Callable[[Fields], Fields]]] = {
    "csqa": (("question", "answerKey"), _csqa),
    "openbookqa": (("question_stem", "choices", "answerKey"), _csqa),
    "aqua": (("question", "options", "correct"), _aqua),
    "math": (("problem", "solution"), _math),
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "alpaca": (("instruction", "output"), _alpaca),
    "prompt-completion": (
        ("prompt", "completion"),
        lambda record: _reply(record["prompt"], record["completion"], record),
    ),
    "dss": (("input", "label"), lambda record: {"question": record["input"], "answer": record["label"]}),
    "svamp": (
        ("Body", "Question", "Answer"),
        lambda record: {"question": f"{record['Body']} {record['Question']}", "answer": record["Answer"]},
    ),
}
