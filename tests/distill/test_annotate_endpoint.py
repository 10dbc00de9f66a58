"""``molsaki annotate`` through an endpoint, against a small server: right, concurrent, repeated, resumed and priced."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest

from molsaki.annotation import endpoint, endpoint_teacher
from molsaki.annotation.annotate import annotate
from molsaki.annotation.endpoint import EndpointError
from molsaki.annotation.teacher import TOO_LONG
from molsaki.cli import main
from molsaki.config import AnnotateConfig
from molsaki.flags import parse
from tests.distill.test_annotate import CHAT, RECORDS, RIGHT, SCRIPT, TESTS, Scripted, files, records_of, scripted
from tests.helpers import tiny
from tests.helpers.completions import DROP, Server, completion, serving, text_of

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Short pauses between tries, no proxy, and a key."""
    monkeypatch.setattr(endpoint, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def scripted_reply(body, number=0):
    """What `Scripted` replies to the prompt; a text is cut at the stop strings, as servers do."""
    teacher = Scripted.__new__(Scripted)
    object.__setattr__(teacher, "script", SCRIPT)
    text = Scripted.reply_to(teacher, text_of(body))
    for stop in body.get("stop", ()):
        text = text.partition(stop)[0]
    return text


def sums(count: int) -> list[dict]:
    return [{"id": f"s{i}", "question": f"What is {i} plus 1?", "gold": i + 1} for i in range(count)]


def add(body, number=0):
    """Answers the last question of `sums`."""
    i = int(text_of(body).rpartition("What is ")[2].split()[0])
    return f"We add 1 to {i}, so {i} + 1 = {i + 1}.\nAnswer: {i + 1}"


def config(folder, server, records=RECORDS, **options) -> AnnotateConfig:
    options = dict(endpoint=server.url, teacher="Scripted", batch_size=16, retries=3) | options
    return files(folder, records, **options)


def summary_of(folder) -> dict:
    return json.loads((folder / "out.summary.json").read_text())


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_same_prompts_and_files_as_a_local_teacher(tmp_path, template):
    model, tok = scripted(SCRIPT)
    if template == "chat":
        model.script = SCRIPT | {RECORDS[0]["question"]: {"first": RIGHT, "keywords": "bags, NUTS, squirrels, nuts"}}
    annotate(files(tmp_path / "local", keywords="teacher", template=template), model, tok)

    def reply(body, number):
        return scripted_reply(body) if template == "plain" else Scripted.reply_to(model, text_of(body))

    with serving(Server(reply)) as server:
        found = annotate(config(tmp_path / "far", server, keywords="teacher", template=template))
    for name in ("out.jsonl", "out.wrong.jsonl"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert (found["phase_1"], found["phase_2"], found["keywords"]["kept"]) == (2, 1, 7)
    seen = {text for batch in model.seen for text in batch}
    if template == "plain":
        assert {body["prompt"] for body in server.bodies} == seen
        assert {body["stop"][0] for body in server.bodies} == {"\nQuestion:", "\n"}
    else:
        render = tok.apply_chat_template
        asked = {render(b["messages"], tokenize=False, add_generation_prompt=True) for b in server.bodies}
        assert tok.chat_template == CHAT and asked == seen
        assert not any("stop" in body for body in server.bodies)
    assert set(server.paths) == {"/v1/chat/completions" if template == "chat" else "/v1/completions"}
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in server.bodies} >= {("Scripted", 0.0, 256)}
    assert not any("seed" in body for body in server.bodies)
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert len(server.bodies) == 9 == found["answers"] == found["asked_now"]
    assert (found["prompt_tokens"], found["completion_tokens"], found["cost"]) == (900, 90, None)


def test_requests_at_a_time(tmp_path):
    """All threads wait for one another, which they cannot unless they ask at the same time; never more than allowed."""
    together = threading.Barrier(5)

    def reply(body, number):
        together.wait(timeout=10)
        return add(body)

    with serving(Server(reply)) as server:
        summary = annotate(config(tmp_path, server, sums(20), concurrency=5))
    assert summary["phase_1"] == 20 and server.most_at_once == 5
    assert [record["id"] for record in records_of(tmp_path / "out.jsonl")] == [f"s{i}" for i in range(20)]


def test_a_slow_reply_holds_up_no_other(tmp_path):
    """The first reply is held back until all others are in the journal."""
    work = tmp_path / "out.work.jsonl"

    def reply(body, number):
        if "What is 0 " in text_of(body).rpartition("\n\n")[2]:
            for _ in range(500):
                if work.read_bytes().count(b"\n") == 10:  # the description and nine replies
                    return add(body)
                time.sleep(0.01)
            return "too late"
        return add(body)

    with serving(Server(reply)) as server:
        assert annotate(config(tmp_path, server, sums(10), concurrency=2))["phase_1"] == 10


def test_retry_after_is_honoured(tmp_path):
    """In seconds and as a date; the other threads wait too."""
    for name, value, least in (("s", "0.4", 0.4), ("d", None, 0.05)):

        def reply(body, number, value=value):
            wait = value or formatdate(time.time() + 2, usegmt=True)  # a date has whole seconds
            return (429, {"Retry-After": wait}, {"error": {"message": "slow down"}}) if number == 0 else add(body)

        with serving(Server(reply)) as server:
            assert annotate(config(tmp_path / name, server, sums(3), concurrency=1))["phase_1"] == 3
        assert len(server.bodies) == 4
        assert least <= server.times[1] - server.times[0] < 2.5


def test_a_server_that_asks_to_wait_for_hours(tmp_path):
    busy = (429, {"Retry-After": "7200"}, {"error": {"message": "daily quota"}})
    with serving(Server(lambda body, number: busy if number == 2 else add(body))) as server:
        with pytest.raises(
            EndpointError, match=r"asks to wait 7200 seconds: status 429: daily quota.*2 replies are kept"
        ):
            annotate(config(tmp_path, server, sums(4), concurrency=1))


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}, b"oops"), (503, {}, {"error": "loading model"}), (408, {}, b""), DROP, b"{not json",
        {"error": {"message": "upstream"}}, completion("half a rep", "abort"), completion("We add", None),
    ],
)  # fmt: skip
def test_passing_faults_are_tried_again(tmp_path, fault):
    """Each request fails once."""
    failed = set()

    def reply(body, number):
        text = text_of(body)
        if text not in failed:
            failed.add(text)
            return (200, {}, fault) if isinstance(fault, bytes) else fault
        return add(body)

    with serving(Server(reply)) as server:
        summary = annotate(config(tmp_path, server, sums(3)))
    assert (summary["phase_1"], summary["answers"], len(server.bodies)) == (3, 3, 6)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            (500, {}, {"error": {"message": "out of memory"}}),
            r"status 500: out of memory \(after 4 tries\), at example s",
        ),
        (DROP, r"RemoteProtocolError: .*\(after 4 tries\)"),
        ((200, {}, b"<html>"), r"expected a completion, got '<html>' \(after 4 tries\)"),
        (completion("x", "tool_calls"), r"expected finish_reason stop or length, got 'tool_calls'"),
        ((404, {}, {"error": {"message": "no model Scripted"}}), "status 404: no model Scripted, at example s"),
        ((422, {}, {"detail": [{"msg": "extra field"}]}), "status 422: .*extra field"),
        ((307, {"Location": "/x"}, b""), "status 307: Temporary Redirect"),
    ],
)
def test_a_fault_that_stays_stops_and_keeps_the_replies(tmp_path, fault, message):
    """The message says what is kept; the same command goes on with another URL and asks nothing twice."""
    with serving(Server(lambda body, number: add(body) if number < 4 else fault)) as server:
        with pytest.raises(EndpointError, match=message) as error:
            annotate(config(tmp_path, server, sums(9), concurrency=2))
    assert f"4 replies are kept in {tmp_path / 'out.work.jsonl'}; run the same command again to continue" in str(
        error.value
    )
    assert not (tmp_path / "out.jsonl").exists()
    with serving(Server(add)) as again:
        assert again.url != server.url
        summary = annotate(config(tmp_path, again, sums(9), concurrency=7))
    assert (summary["phase_1"], summary["asked_now"], summary["answers"], len(again.bodies)) == (9, 5, 9, 5)
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (900, 90)  # of the resumed part too


def test_replies_under_way_are_kept_when_another_fails(tmp_path):
    """The refusal comes first, the reply that was under way later."""
    both = threading.Barrier(2)

    def reply(body, number):
        both.wait(timeout=10)
        if "What is 0 " in text_of(body).rpartition("\n\n")[2]:
            return (400, {}, {"error": {"message": "no"}})
        time.sleep(0.3)
        return add(body)

    with serving(Server(reply)) as server:
        with pytest.raises(EndpointError, match="status 400: no, at example s0; 1 replies are kept"):
            annotate(config(tmp_path, server, sums(9), concurrency=2))
    assert len(server.bodies) == 2


def test_no_server_at_all(tmp_path, caplog):
    with serving(Server(add)) as server:
        pass
    with pytest.raises(EndpointError, match=r"ConnectError: .*\(after 3 tries\).* 0 replies are kept"):
        annotate(config(tmp_path, server, retries=2))
    assert not _warnings(caplog)  # one comes with the third failure in a row, if there are more tries
    with pytest.raises(EndpointError, match=r"\(after 4 tries\)"):
        annotate(config(tmp_path, server, retries=3, concurrency=1))
    assert [message.partition("ConnectError")[0] for message in _warnings(caplog)] == [f"{server.url}/completions: "]


def _warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_reply_that_takes_too_long(tmp_path):
    with serving(Server(lambda body, number: [time.sleep(0.5 * (number == 0)), add(body)][1])) as server:
        assert annotate(config(tmp_path, server, sums(1), timeout=0.2))["phase_1"] == 1
    assert len(server.bodies) == 2


def test_others_served_meanwhile_a_busy_server_is_asked_on(tmp_path):
    """One prompt is refused as too much at the time more often than there are retries."""
    refusals, served = [0], [0]

    def reply(body, number):
        if "What is 3 " in text_of(body).rpartition("\n\n")[2] and refusals[0] < 6:
            refusals[0] += 1
            others, start = served[0] + 3, time.monotonic()
            while served[0] < others and time.monotonic() < start + 20:  # until the process has got other replies
                time.sleep(0.01)
            return (429, {}, {"error": {"message": "busy"}})
        time.sleep(0.05)
        served[0] += 1
        return add(body)

    with serving(Server(reply)) as server:
        assert annotate(config(tmp_path, server, sums(60), concurrency=4, retries=3))["phase_1"] == 60
    assert refusals == [6]


def test_a_wrong_key(tmp_path, monkeypatch, caplog, capfd):
    """The server's own message, at once, without the key that it repeats; the key is in no file and no log."""
    caplog.set_level(logging.DEBUG)
    refusal = (401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}})
    with serving(Server(lambda body, number: refusal)) as server:
        data = tiny.write_jsonl(tmp_path / "d.jsonl", RECORDS)
        argv = ["annotate", "--endpoint", server.url, "--teacher", "m", "--data_file", str(data)]
        argv += ["--output_file", str(tmp_path / "o.jsonl"), "--concurrency", "1"]
        assert main(argv) == 2
        error = capfd.readouterr().err
        assert "status 401: Incorrect API key provided: [the API key]" in error
        assert "(API key: from the environment variable OPENAI_API_KEY, --api_key_env)" in error
        assert len(server.bodies) == 1
        assert KEY not in error + caplog.text
        assert all(KEY not in path.read_text() for path in tmp_path.iterdir())
        assert main([*argv, "--api_key_env", "OTHER"]) == 2
        assert "(API key: none is set in the environment variable OTHER" in capfd.readouterr().err
        assert server.keys[-1] is None
        monkeypatch.setenv("OPENAI_API_KEY", "sk-\nx")
        assert main(argv) == 2
        error = capfd.readouterr().err
        assert "--api_key_env: the value of OPENAI_API_KEY cannot be sent" in error and "sk-" not in error


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (400, {"code": "context_length_exceeded", "message": "too much"}, TOO_LONG),
        (400, {"message": "This model's maximum context length is 9 tokens."}, TOO_LONG),
        (400, {"type": "exceed_context_size_error", "message": "exceeds the available context size"}, TOO_LONG),
        (400, {"code": "content_filter", "message": "policy"}, "refused by the server's content filter"),
    ],
)  # fmt: skip
def test_prompts_that_the_server_refuses_are_counted(tmp_path, caplog, status, error, reason):
    def reply(body, number):
        is_long = "What is 1 " in text_of(body).rpartition("\n\n")[2]
        return (status, {}, {"error": error}) if is_long else add(body)

    with serving(Server(reply)) as server:
        summary = annotate(config(tmp_path, server, sums(3)))
    assert (summary["phase_1"], summary["dropped"]) == (2, {reason: 1})
    refused = [(r["id"], r["phase"], r["reply"], r["reason"]) for r in records_of(tmp_path / "out.wrong.jsonl")]
    assert refused == [("s1", 1, None, reason), ("s1", 2, None, reason)]
    assert f"a prompt was left out, possibly the first of several: status 400: {error['message']}" in caplog.text
    assert caplog.text.count("left out") == 1


def test_a_reply_that_the_content_filter_cut_off_is_paid_and_counted(tmp_path):
    filtered = completion("We add 1 to 0, so 0 + 1 = 1.", "content_filter")
    with serving(Server(lambda body, number: filtered if number == 0 else add(body))) as server:
        summary = annotate(config(tmp_path, server, sums(1), price_in=1.0, price_out=2.0))
    assert (summary["phase_2"], summary["answers"], summary["cost"]) == (1, 2, pytest.approx(240e-6))
    assert records_of(tmp_path / "out.wrong.jsonl")[0]["reason"] == "refused by the server's content filter"


def test_a_reply_cut_off_at_the_longest(tmp_path):
    def reply(body, number):
        return completion(add(body), "length")

    with serving(Server(reply)) as server, pytest.raises(ValueError, match="2 cut off at max_new_tokens"):
        annotate(config(tmp_path, server, sums(2), template="chat"))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_is_kept_before_the_content(tmp_path, field):
    """In the journal; the rationale is what follows. A thought that is cut off gives no rationale and no key words."""

    def reply(body, number):
        text = text_of(body)
        if "key words" in text:
            return completion("plus" if "What is 0 " in text else "", "stop" if "What is 0 " in text else "length",
                              **{field: "Perhaps We, add, so?"})  # fmt: skip
        if "What is 2 " in text:
            return completion("", "length", **{field: "Let me see. 2 + 1 = 3.\nAnswer: 3\nOr"})
        return completion(add(body), **{field: "Hm, 7?\n"})

    with serving(Server(reply)) as server:
        options = dict(template="chat", keywords="teacher", max_new_tokens=500)
        summary = annotate(config(tmp_path, server, sums(3), **options))
    assert (summary["phase_1"], summary["dropped"]) == (2, {"cut off at max_new_tokens": 1})
    assert summary["keywords"] == {
        "kept": 1, "not_in_the_text": 0, "rationales_without": 1, "without_list": {"cut off before the list": 1}
    }  # fmt: skip
    assert records_of(tmp_path / "out.jsonl")[0]["rationale"] == "We add 1 to 0, so 0 + 1 = 1."
    replies = [line["reply"] for line in records_of(tmp_path / "out.work.jsonl")[1:] if line["id"] == "s0"]
    assert replies[0] == ["<think>\nHm, 7?\n</think>\n\n" + add({"prompt": "What is 0 "}), True]
    assert {body["max_tokens"] for body in server.bodies} == {500}  # also for key words: it thinks before it lists them


def test_what_a_request_has(tmp_path):
    """Samples have seeds of their own; --request adds fields, and null leaves one out."""
    with serving(Server(add)) as server:
        options = dict(temperature=0.7, samples=4, template="chat", max_new_tokens=99)
        options["request"] = '{"max_tokens": null, "max_completion_tokens": 5, "top_p": 0.9}'
        annotate(config(tmp_path, server, sums(2), **options))
        assert len({body["seed"] for body in server.bodies}) == 8 == len(server.bodies)
        assert all("max_tokens" not in body and "stop" not in body for body in server.bodies)
        wanted = {"model": "Scripted", "max_completion_tokens": 5, "temperature": 0.7, "top_p": 0.9}
        assert all(wanted.items() <= body.items() for body in server.bodies)
        with pytest.raises(ValueError, match="was begun with another request: .*0.9.*now .*0.8"):
            annotate(config(tmp_path, server, sums(2), **options | {"request": {"top_p": 0.8}}))
        before = len(server.bodies)
        annotate(config(tmp_path, server, sums(2), **options))
        assert len(server.bodies) == before


def test_replies_in_any_order_give_the_same_files(tmp_path):
    """Samples are kept in their order, whichever comes first."""

    def reply(body, number):
        time.sleep(0.05 * (body["seed"] % 3))
        return add(body).replace("We add", f"We, {body['seed']}, add")

    for name, concurrency in (("a", 1), ("b", 8)):
        with serving(Server(reply)) as server:
            options = dict(temperature=1.0, samples=3, concurrency=concurrency)
            annotate(config(tmp_path / name, server, sums(2), **options))
    assert (tmp_path / "a/out.jsonl").read_bytes() == (tmp_path / "b/out.jsonl").read_bytes()
    assert len(records_of(tmp_path / "a/out.jsonl")) == 6


def test_cost_and_missing_usage(tmp_path):
    with serving(Server(add)) as server:
        summary = annotate(config(tmp_path / "a", server, sums(5), price_in=2.0, price_out=30.0))
        assert summary["cost"] == pytest.approx(5 * (100 * 2 + 10 * 30) / 1e6)
    with serving(Server(lambda body, number: completion(add(body), usage=(100, 10) if number else None))) as server:
        summary = annotate(config(tmp_path / "b", server, sums(5), price_in=2.0, price_out=30.0))
        assert (summary["cost"], summary["prompt_tokens"], summary["answers_without_usage"]) == (None, 400, 1)
    with serving(Server(lambda body, number: completion(add(body), usage=None))) as server:
        summary = annotate(config(tmp_path / "c", server, sums(5)))
        assert (summary["prompt_tokens"], summary["completion_tokens"]) == (None, None)
        assert summary["answers_without_usage"] == 5
        limited = dict(price_in=2.0, price_out=30.0, max_cost=1.0)
        message = r"--max_cost: cannot be enforced: the server reported no tokens for 2 replies; 2 replies are kept"
        with pytest.raises(EndpointError, match=message):
            annotate(config(tmp_path / "d", server, sums(5), concurrency=2, **limited))
        asked = len(server.bodies)
        with pytest.raises(EndpointError, match=message):
            annotate(config(tmp_path / "d", server, sums(5), **limited))
        assert annotate(config(tmp_path / "c", server, sums(5), **limited))["cost"] is None  # nothing is left to ask
        assert len(server.bodies) == asked


@pytest.mark.parametrize("concurrency", [1, 8])
def test_max_cost_is_never_exceeded(tmp_path, concurrency):
    """Each reply costs as much as its request may cost at most, so that one more reply would exceed the limit."""
    prices = dict(price_in=1.0, price_out=1000.0, max_new_tokens=100)

    def reply(body, number):
        return completion(add(body), usage=(len(body["prompt"]), body["max_tokens"]))

    options = dict(prices, concurrency=concurrency)
    with serving(Server(reply)) as server:
        with pytest.raises(
            EndpointError, match=r"--max_cost: 0.4\d+ of 0.5 is spent, and the next .* 4 replies are kept"
        ):
            annotate(config(tmp_path, server, sums(9), max_cost=0.5, **options))
        assert len(server.bodies) == 4
        with pytest.raises(EndpointError, match="--max_cost"):
            annotate(config(tmp_path, server, sums(9), max_cost=0.5, **options))
        assert len(server.bodies) == 4
        summary = annotate(config(tmp_path, server, sums(9), max_cost=2.0, **options))
    assert len(server.bodies) == 9 and 0.9 < summary["cost"] <= 2.0


def test_more_data_later(tmp_path):
    """A trial with few examples is part of the whole; a question that has changed is asked again; key words too."""
    with serving(Server(lambda body, number: "plus" if "Keywords:" in body["prompt"] else add(body))) as server:
        annotate(config(tmp_path, server, sums(6), limit=2))
        assert annotate(config(tmp_path, server, sums(6)))["asked_now"] == 4
        changed = sums(6)
        changed[3]["question"] = "What is 3 plus 1, please?"
        summary = annotate(config(tmp_path, server, changed, keywords="teacher"))
        assert (summary["asked_now"], summary["answers"], summary["rationales"]) == (7, 13, 6)
        for options, message in (
            ({"teacher": "other"}, "another teacher: 'Scripted', now 'other'"),
            ({"max_new_tokens": 9}, "another max_new_tokens: 256, now 9"),
            ({"template": "chat"}, "another template: 'plain', now 'chat'"),
            ({"shots": 1}, "another shots: None, now 1"),
        ):
            with pytest.raises(ValueError, match=f"out.work.jsonl: was begun with {message}"):
                annotate(config(tmp_path, server, sums(6), **options))
        assert len(server.bodies) == 13


def test_journals_of_a_local_teacher_and_of_an_endpoint_are_not_mixed_up(tmp_path):
    with serving(Server(scripted_reply)) as server:
        annotate(files(tmp_path / "a"), *scripted(SCRIPT))
        with pytest.raises(ValueError, match="was begun with another endpoint: None, now 'completions'"):
            annotate(config(tmp_path / "a", server))
        annotate(config(tmp_path / "b", server))
        with pytest.raises(ValueError, match="was begun with another keywords: None, now 'none'"):
            annotate(files(tmp_path / "b"), *scripted(SCRIPT))
        with pytest.raises(ValueError, match="teacher, tokenizer: expected neither with an endpoint"):
            annotate(config(tmp_path / "b", server), *scripted(SCRIPT))


RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from molsaki.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_asks_nothing_twice(tmp_path, sent):
    """The process is killed, or interrupted, while replies are held back; every reply that it got is used again."""
    hold = threading.Event()

    def reply(body, number):
        if number >= 7:
            hold.wait(20)
        return add(body)

    data, out = tiny.write_jsonl(tmp_path / "d.jsonl", sums(12)), tmp_path / "o.jsonl"
    with serving(Server(reply)) as server:
        argv = ["annotate", "--endpoint", server.url, "--teacher", "m", "--data_file", str(data)]
        argv += ["--output_file", str(out), "--concurrency", "3"]
        command = [sys.executable, "-c", RUN, *argv]
        process = subprocess.Popen(command, cwd=TESTS.parent, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        work = tmp_path / "o.work.jsonl"
        for _ in range(6000):
            if work.exists() and work.read_bytes().count(b"\n") == 8 and len(server.bodies) == 10:
                break
            time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(sent)
        error = process.communicate(timeout=30)[1]
        assert time.monotonic() - start < 10  # it does not wait for the replies that are held back
        if sent == signal.SIGINT:
            assert process.returncode == 130 and "All replies so far are kept" in error
        hold.set()
        asked = len(server.bodies)
        assert asked == 10 and not out.exists()
        server.bodies.clear()
        with work.open("ab") as file:
            file.write(b'{"check": "half a li')
        assert main(argv) == 0
        assert len(server.bodies) == 5  # 12 but 7
    assert len(records_of(out)) == 12
    assert json.loads((tmp_path / "o.summary.json").read_text())["prompt_tokens"] == 1200


def test_an_interrupt_keeps_what_has_arrived(tmp_path, monkeypatch):
    """Also what has arrived while the main thread was busy with another reply."""
    with serving(Server(add)) as server:

        def judge(*args):
            time.sleep(0.3)
            raise KeyboardInterrupt

        monkeypatch.setattr("molsaki.annotation.annotate.judge", judge)
        with pytest.raises(KeyboardInterrupt):
            annotate(config(tmp_path, server, sums(4), concurrency=4, keep_wrong=False))
        monkeypatch.undo()
        time.sleep(0.1)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert annotate(config(tmp_path, server, sums(4)))["phase_1"] == 4
    assert len(server.bodies) == 4


@pytest.mark.parametrize("where", ["local", "endpoint"])
def test_key_words_of_rationales_that_exist(tmp_path, where):
    """Every field of every record stays; a record that has key words or no rationale is not asked about."""
    records = [
        {"id": "a", "question": RECORDS[0]["question"], "rationale": "3 bags of nuts make 12.", "answer": "12",
         "rationale_source": "gpt", "phase": 2, "mine": {"x": [1, None]}},
        {"question": RECORDS[1]["question"], "rationale": "He eats 2, so 3 are left.", "gold": 3, "keywords": None},
        {"id": 7, "question": RECORDS[2]["question"], "rationale": "2 + 2 = 4.", "answer": "4", "keywords": ["coins"]},
        {"id": "e", "question": "What?", "rationale": "", "answer": "1"},
        {"id": "m", "messages": [{"role": "user", "content": RECORDS[3]["question"]},
                                 {"role": "assistant", "content": "Bees make honey. The answer is hive."}]},
    ]  # fmt: skip
    options = dict(rationales="keep", keywords="teacher", keep_wrong=False)
    if where == "local":
        model, tok = scripted(SCRIPT)
        summary = annotate(files(tmp_path, records, **options), model, tok)
        with pytest.raises(ValueError, match="was begun with another rationales"):
            changed = [{**records[0], "rationale": "12 it is, of nuts in bags."}, *records[1:]]
            annotate(files(tmp_path, changed, **options), model, tok)
        with pytest.raises(ValueError, match=r"was begun with another rationales: '\w+', now None"):
            annotate(files(tmp_path, records, keywords="teacher"), model, tok)
    else:
        with serving(Server(scripted_reply)) as server:
            summary = annotate(config(tmp_path, server, records, **options))
            assert len(server.bodies) == 3 and all("Keywords:" in body["prompt"] for body in server.bodies)
    assert records_of(tmp_path / "out.jsonl") == [
        records[0] | {"keywords": ["bags", "NUTS"]},
        {"id": "2"} | records[1] | {"keywords": ["eats", "left"]},
        records[2],
        records[3],
        records[4] | {"keywords": ["bees", "honey", "hive"]},
    ]
    assert (summary["examples"], summary["rationales"]) == (5, 3)
    assert (summary["had_keywords"], summary["without_rationale"]) == (1, 1)
    assert summary["keywords"] == {"kept": 7, "not_in_the_text": 1, "rationales_without": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 3}, "concurrency: 3 has no effect with a teacher that is loaded here; it needs endpoint"),
        ({"price_in": 3.0}, "price_in: 3.0 has no effect with a teacher that is loaded here"),
        ({"endpoint": "http://h/v1", "device": "cpu"}, "device: 'cpu' has no effect with endpoint"),
        ({"endpoint": "http://h/v1", "dtype": "float16"}, "dtype: 'float16' has no effect with endpoint"),
        ({"endpoint": "http://h/v1", "batch_size": 2}, "batch_size: 2 has no effect with endpoint"),
        ({"endpoint": "localhost:8000"}, "endpoint: expected a base URL such as http://localhost:8000/v1"),
        ({"endpoint": "http://me:secret@h/v1?key=secret"}, "user, password and query, got 'http://h/v1'"),
        ({"endpoint": "http://h", "concurrency": 0}, "concurrency: expected at least 1, got 0"),
        ({"endpoint": "http://h", "timeout": 0.0}, "timeout: expected seconds above 0"),
        ({"endpoint": "http://h", "request": "{"}, "request: expected a JSON object, got '{'"),
        ({"endpoint": "http://h", "request": "[1]"}, "request: expected a JSON object, got [1]"),
        ({"endpoint": "http://h", "request": {"stream": True}}, "request: stream: is set by the command"),
        ({"endpoint": "http://h", "price_in": 1.0}, "price_in, price_out: expected both or neither"),
        ({"endpoint": "http://h", "price_in": -1.0, "price_out": 1.0}, "price_in: expected at least 0, got -1"),
        ({"endpoint": "http://h", "max_cost": 1.0}, "max_cost: needs price_in and price_out"),
        ({"endpoint": "http://h", "max_cost": 1.0, "price_in": 1.0, "price_out": 1.0, "request": {"max_tokens": None}},
         "max_cost: needs a longest reply in tokens; by request it is None"),
        ({"rationales": "keep"}, "rationales: keep needs keywords=teacher"),
        ({"rationales": "keep", "keywords": "teacher", "keep_wrong": True}, "keep_wrong: True has no effect with rat"),
        ({"rationales": "some"}, "rationales: expected one of write, keep"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    with pytest.raises(ValueError) as error:
        AnnotateConfig(**options)
    assert message in str(error.value) and "secret" not in str(error.value)


def test_the_command_line_and_yaml_set_a_request(tmp_path):
    argv = ["--endpoint", "http://h/v1", "--request", '{"top_k": 3, "stop": null}']
    assert parse(AnnotateConfig, argv).request == {"top_k": 3, "stop": None}
    (tmp_path / "c.yaml").write_text("endpoint: http://h/v1\nrequest: {top_k: 3}\nprice_in: 1e-1\nprice_out: 2\n")
    found = parse(AnnotateConfig, ["--config", str(tmp_path / "c.yaml")])
    assert (found.request, found.price_in, found.price_out) == ({"top_k": 3}, 0.1, 2.0)


def test_teacher_is_required(tmp_path):
    with pytest.raises(ValueError, match="--teacher: required"):
        annotate(files(tmp_path, endpoint="http://127.0.0.1:1/v1", batch_size=16))


def test_the_most_that_a_request_can_cost():
    spending = endpoint_teacher.Spending(price_in=2.0, price_out=10.0)
    assert spending.most({"prompt": "abcd", "max_tokens": 100}) >= (4 * 2 + 100 * 10) / 1e6
    assert spending.most({"prompt": "é" * 50, "max_tokens": 0}) >= 100 * 2 / 1e6
