"""Converts the records of common data-set formats to the fields of an example: question, rationale, answer, choices.

`FORMATS` has one entry per format. A record's format is recognised by its keys, or given by the option ``data_format``.
Every other field of a record, such as ``id``, ``choices`` or ``gold``, is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from molsaki.extras import regex
from molsaki.text.answers import CALCULATOR, final_answer, stated_answer
from molsaki.text.conversations import Turn, checked_context, split_turns, turns_of
from molsaki.text.numbers import find_numbers
from molsaki.text.thinking import NOT_CLOSED, UNBALANCED, state_of

Fields = dict[str, Any]  # the JSON object of a record
AUTO, OWN = "auto", "molsaki"
EARLIER = "earlier_turns"  # the field of the turns before a question


@dataclasses.dataclass(frozen=True)
class Format:
    """One format of records.

    Attributes:
        keys: those that every record has.
        convert: returns the fields of our format that a record lacks under their names.
        has: whether a record with these keys is in the format.
        turns: of a conversation, its turns; up to the last one of the assistant, or all.
    """

    keys: Sequence[str]
    convert: Callable[[Fields], Fields]
    has: Callable[[Fields], bool] = lambda record: True
    turns: Callable[[Fields, bool], list[Turn]] | None = None


def format_of(record: Fields) -> str:
    """The name in `FORMATS` of the first format that the record is in.

    Raises:
        ValueError: it is in none.
    """
    for name, one in FORMATS.items():
        if all(key in record for key in one.keys) and one.has(record):
            return name
    if "question" in record:
        return OWN  # the reader says what is missing
    check_case("question", record, ("id", "question", "rationale", "answer", "gold"))
    read = "; ".join(f"{name} ({', '.join(one.keys)})" for name, one in FORMATS.items() if name != OWN)
    raise ValueError(
        f"question: missing; the fields are {', '.join(map(str, record)) or 'none'}. Expected question, rationale and "
        f"answer, or the fields of one of: {read}"
    )


def check_case(missing: str, record: Fields, names: Sequence[str]) -> None:
    """Raise a ValueError for a missing field if the record has fields that differ from ``names`` only in case or in
    white space."""
    there = {str(field).strip().lower(): field for field in record}
    wrong = {there[name]: name for name in names if name in there and name not in record}
    listed = ", ".join(f"{field!r} to {name!r}" for field, name in wrong.items())
    if wrong:
        raise ValueError(f"{missing}: missing; rename {listed}: names of fields are lower case")


def to_fields(record: Fields, name: str = AUTO, with_reply: bool = True) -> Fields:
    """The record with the fields of our own format.

    Args:
        name: a format of `FORMATS`, or ``"auto"`` to recognise it.
        with_reply: whether the last reply of a conversation is used. If not, and the last turn is the user's, that turn
            is the question, and the record has its answer in a field.

    Raises:
        ValueError: it is in no format, or its fields are invalid; the message names the format.
    """
    name = format_of(record) if name == AUTO else name
    if name == OWN:
        return record
    one = FORMATS[name]
    try:
        if not with_reply and one.turns is not None:
            turns = one.turns(record, False)
            if turns and turns[-1][0] == "user":
                return record | _asked(turns, record)
        return record | one.convert(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"format {name}: {detail}") from None


def _is_gsm8k(record: Fields) -> bool:
    return isinstance(record["answer"], str) and "####" in record["answer"] and "rationale" not in record


def _gsm8k(record: Fields) -> Fields:
    if "####" not in record["answer"]:
        raise ValueError(
            f"answer: expected a solution that ends in #### and the answer, got {record['answer'][-60:]!r}"
        )
    rationale = CALCULATOR.sub("", record["answer"].rpartition("####")[0]).strip()
    return {"rationale": rationale, "answer": final_answer(record["answer"])}


def _math(record: Fields) -> Fields:
    solution = record["solution"]
    answer = record.get("answer") or final_answer(solution)
    if answer == solution.strip():
        raise ValueError(f"solution: expected one with a \\boxed{{}} answer, got {solution[-60:]!r}")
    return {"question": record["problem"], "rationale": solution, "answer": answer}


def _turns_of_messages(record: Fields, until_reply: bool = True) -> list[Turn]:
    return turns_of(record["messages"], "messages", until_reply)


def _messages(record: Fields) -> Fields:
    return _conversation(_turns_of_messages(record), "messages", record)


def _turns_of_sharegpt(record: Fields, until_reply: bool = True) -> list[Turn]:
    turns = turns_of(record["conversations"], "conversations", until_reply)
    if isinstance(record.get("system"), str) and record["system"].strip() and turns[:1] and turns[0][0] != "system":
        turns.insert(0, ("system", record["system"]))
    return turns


def _sharegpt(record: Fields) -> Fields:
    return _conversation(_turns_of_sharegpt(record), "conversations", record)


def _prompt_completion(record: Fields) -> Fields:
    """TRL's; both are texts or both are lists of messages."""
    if isinstance(record["prompt"], str) and isinstance(record["completion"], str):
        return _reply(record["prompt"], record["completion"], record)
    turns = turns_of(record["prompt"], "prompt") + turns_of(record["completion"], "completion", until_reply=True)
    return _conversation(turns, "prompt, completion", record)


def _conversation(turns: Sequence[Turn], where: str, record: Fields) -> Fields:
    context, question, reply = split_turns(turns, where)
    return _reply(question, reply, record) | _earlier(context)


def _asked(turns: Sequence[Turn], record: Fields) -> Fields:
    """The fields of a conversation whose last turn is a question without a reply."""
    answer = record.get("answer", record.get("gold"))
    if answer is None:
        raise ValueError("the last turn is the user's: expected its answer in a field answer or gold")
    return {"question": turns[-1][1], "answer": answer} | _earlier(checked_context(turns[:-1], "messages"))


def _earlier(context: Sequence[Turn]) -> Fields:
    return {EARLIER: [{"role": role, "content": text} for role, text in context]} if context else {}


def _alpaca(record: Fields) -> Fields:
    """Also with ``system`` and ``history``, pairs of an instruction and its output."""
    fields = _reply("\n".join(filter(None, [record["instruction"], record.get("input")])), record["output"], record)
    earlier = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for pair in record.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"history: expected pairs of an instruction and its output, got {pair!r}")
        earlier += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return fields | ({EARLIER: earlier} if earlier else {})


def _reply(question: str, reply: str, record: Fields) -> Fields:
    """The fields of a reply. Its answer is the record's, else the answer that it states, or a number at its end."""
    state = state_of(reply)
    if state in ("not closed", "unbalanced"):
        raise ValueError(NOT_CLOSED if state == "not closed" else UNBALANCED)
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


# The first format that matches a record is used.
FORMATS: dict[str, Format] = {
    "gsm8k": Format(("question", "answer"), _gsm8k, has=_is_gsm8k),
    OWN: Format(
        ("question",),
        lambda record: record,
        has=lambda record: ("answer" in record or "gold" in record) and not isinstance(record.get("choices"), dict),
    ),
    "csqa": Format(("question", "answerKey"), _csqa),
    "openbookqa": Format(("question_stem", "choices", "answerKey"), _csqa),
    "aqua": Format(("question", "options", "correct"), _aqua),
    "math": Format(("problem", "solution"), _math),
    "messages": Format(("messages",), _messages, turns=_turns_of_messages),
    "sharegpt": Format(("conversations",), _sharegpt, turns=_turns_of_sharegpt),
    "alpaca": Format(("instruction", "output"), _alpaca),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion),
    "dss": Format(("input", "label"), lambda record: {"question": record["input"], "answer": record["label"]}),
    "svamp": Format(
        ("Body", "Question", "Answer"),
        lambda record: {"question": f"{record['Body']} {record['Question']}", "answer": record["Answer"]},
    ),
}
