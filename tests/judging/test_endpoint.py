"""A judge behind a socket: what it asks, how it takes failures, what it pays for twice (nothing), and what it never writes down."""

import contextlib
import email.utils
import gzip
import html
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from raysim.judging.endpoint import Endpoint, EndpointJudge, JudgeError, endpoint_from
from raysim.judging.pairwise import Pair, Question, judge_pairs
from raysim.judging.prompts import REMINDER, json_turns, write_ratings
from tests.judge_server import Behaviour, Call, Reply, Server, at, completion, fair, fair_ratings, patience, serving
from tests.small_runs import environment

QUESTIONS = [Question(f"instruction {i}", f"first {i}", f"second {i}") for i in range(6)]
KEY = 'sk-"quoted"-0123456789'


def rate(server: Server, journal: Path, questions: list[Question] = QUESTIONS, *, key: str = "", **changes: Any) -> list[Any]:
    with EndpointJudge(at(server, key=key), journal=journal, settings=patience(**changes)) as judge:
        return judge.rate(questions)


def entries(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


ESCAPES: dict[str, Callable[[str], str]] = {
    "as it is": lambda key: key,
    "for JSON": lambda key: json.dumps(key)[1:-1],
    "for JSON, all of it": lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    "for JSON, some of it": lambda key: "".join(f"\\u{ord(c):04X}" if c.isdigit() else c for c in key),
    "for JSON, twice": lambda key: json.dumps(json.dumps(key)[1:-1])[1:-1],
    "for an address": lambda key: urllib.parse.quote(key, safe=""),
    "for an address, all of it": lambda key: "".join(f"%{ord(c):02x}" for c in key),
    "for an address, twice": lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe=""),
    "for HTML": html.escape,
    "for HTML, twice": lambda key: html.escape(html.escape(key)),
    "for HTML, by number": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "for HTML, by hexadecimal number": lambda key: "".join(f"&#x{ord(c):X};" for c in key),
    "in capitals": str.upper,
}


def unescaped(text: str) -> set[str]:
    """A text, and what it says once escapes of any kind are taken away, however deep."""
    found = {text}
    while new := {form for one in found for form in _read_once(one)} - found:
        found |= new
    return found


def _read_once(text: str) -> list[str]:
    by_number = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
    return [html.unescape(text), urllib.parse.unquote(text), by_number, re.sub(r"\\+([\"/\\])", r"\1", text)]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("place", ["a completion", "another field", "no completion", "an error"])
def test_a_server_that_repeats_the_key_in_any_escape_has_it_blotted_out(tmp_path: Path, name: str, place: str) -> None:
    said = f"you sent {ESCAPES[name](KEY)}!"
    raw = said if name.startswith("for JSON") else json.dumps(said)[1:-1]
    good = json.dumps(completion(write_ratings(fair_ratings(QUESTIONS[0]))))
    bodies = {
        "a completion": json.dumps(completion("SAID")).replace("SAID", raw),
        "another field": good[:-1] + f', "system": {{"{raw}": ["{raw}"]}}}}',
        "no completion": f'{{"detail": "{raw}"}}',
        "an error": f'{{"detail": "{raw}"}}',
    }
    reply = Reply(bodies[place].encode(), status=400 if place == "an error" else 200)
    with serving(lambda call: reply) as server, contextlib.suppress(ValueError):
        rate(server, tmp_path / "judge.jsonl", QUESTIONS[:1], key=KEY, max_unparsed=0)
    written = (tmp_path / "judge.jsonl").read_text()
    assert "[key]" in written
    assert not any(KEY.lower() in form.lower() for form in unescaped(written))


ODD_REPLIES: dict[str, Reply] = {
    "a number beyond all": Reply(b'{"choices": [{"message": {"content": "x"}, "logprob": 1e999}], "usage": {"prompt_tokens": -1e999}}'),
    "a usage of 400 digits": Reply(
        b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1%s, "completion_tokens": 1}}' % (b"0" * 400)
    ),
    "a usage of 5000 digits": Reply(b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1%s}}' % (b"0" * 5000)),
    "a usage that is true": Reply(
        b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": true, "completion_tokens": -1}}'
    ),
    "an unknown charset": Reply(completion("x"), headers={"Content-Type": "application/json; charset=klingon"}),
    "a charset that is no text's": Reply(completion("x"), headers={"Content-Type": "application/json; charset=base64"}),
    "UTF-16": Reply(json.dumps(completion("x")).encode("utf-16"), headers={"Content-Type": "application/json; charset=utf-8"}),
    "no text at all": Reply(bytes(range(256))),
    "nothing": Reply(b""),
    "deep nesting": Reply(b"[" * 100_000),
    "deep nesting within": Reply(b'{"choices": [{"message": {"content": "x"}}], "more": ' + b"[" * 990 + b"]" * 990 + b"}"),
    "half a surrogate pair": Reply(b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
    "a zero byte": Reply(b'{"choices": [{"message": {"content": "\\u0000"}}]}'),
    "a broken gzip": Reply(b"\x1f\x8bnone", headers={"Content-Encoding": "gzip"}),
    "a list": Reply(b"[]"),
    "no end": Reply(b'{"choices": [{"message": {"content": "' + b"x" * 20_000_000 + b'"}}]}'),
    "a packed reply of 100 MB": Reply(gzip.compress(bytes(100_000_000), compresslevel=1), headers={"Content-Encoding": "gzip"}),
    "no choices": Reply(b'{"choices": []}'),
    "a rest until the year 1": Reply(b"{}", status=429, headers={"Retry-After": "Mon, 01 Jan 0001 00:00:00 -2359"}),
    "a rest that is no time": Reply(b"{}", status=503, headers={"Retry-After": "1e999"}),
}


@pytest.mark.parametrize("reply", ODD_REPLIES.values(), ids=list(ODD_REPLIES))
def test_an_odd_reply_is_unparsed_or_one_line_and_the_journal_stays_of_use(tmp_path: Path, reply: Reply) -> None:
    journal = tmp_path / "judge.jsonl"
    prices = {"price_prompt": 1.0, "price_completion": 1.0}
    for behave in (lambda call: reply, fair):  # the second time the same journal is read
        with serving(behave) as server, EndpointJudge(at(server), journal=journal, settings=patience(max_unparsed=1, **prices)) as judge:
            with contextlib.suppress(JudgeError, ValueError):
                assert len(judge.rate(QUESTIONS[:1])) == 1
            assert judge.tally()["cost"] < 1e6
    assert all(entries(journal))
    assert journal.stat().st_size < 10_000_000
    assert journal.stat().st_mode & 0o777 == 0o600


def failing_first(reply: Reply, times: int = 1) -> Behaviour:
    """Fails the first `times` requests for each question, then answers fairly."""
    seen: Counter[str] = Counter()

    def behave(call: Call) -> Reply:
        seen[str(call.question)] += 1
        return reply if seen[str(call.question)] <= times else fair(call)

    return behave


# --- what it asks, and what it makes of the answers


def test_every_question_is_asked_once_in_its_order_and_read(tmp_path: Path) -> None:
    journal = tmp_path / "judge.jsonl"
    with serving() as server:
        found = rate(server, journal, [*QUESTIONS, QUESTIONS[0]], key=KEY)
    assert found == [fair_ratings(question) for question in [*QUESTIONS, QUESTIONS[0]]]
    assert Counter(str(call.question) for call in server.calls) == Counter(map(str, QUESTIONS))
    for call in server.calls:
        assert call.headers["Authorization"] == f"Bearer {KEY}"
        messages = [{"role": role, "content": text} for role, text in json_turns(call.question)]
        assert call.body == {"model": "m", "messages": messages, "temperature": 0.0, "max_tokens": 200}
    noted = [str(entry["request"]) for entry in entries(journal)]
    assert sorted(noted) == sorted(str(call.body) for call in server.calls)
    assert all(entry["reply"]["usage"]["prompt_tokens"] == 100 and entry["status"] == 200 for entry in entries(journal))


def test_without_a_key_no_authorization_is_sent(tmp_path: Path) -> None:
    with serving() as server:
        rate(server, tmp_path / "j", QUESTIONS[:1])
    assert "Authorization" not in server.calls[0].headers


def test_pairs_go_through_both_orders(tmp_path: Path) -> None:
    pairs = [Pair("i", "a", "b"), Pair("i", "c", "c")]
    with serving() as server, EndpointJudge(at(server), journal=tmp_path / "j", settings=patience()) as judge:
        judged = judge_pairs(pairs, judge)
    assert judged[0].by_order[0] == judged[0].by_order[1] == judged[0].outcome
    assert judged[1].outcome == "tie"
    assert len(server.calls) == 3, "a pair of equal texts reads the same in both orders"


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(tmp_path: Path, concurrency: int) -> None:
    with serving(lambda call: Reply(fair(call).body, delay_s=0.1)) as server:
        rate(server, tmp_path / "j", concurrency=concurrency)
    assert server.most_at_once == concurrency


# --- failures that pass


@pytest.mark.parametrize("reply", [Reply({"error": "x"}, status=status) for status in (408, 429, 500, 503)], ids=lambda reply: reply.status)
def test_what_may_pass_is_asked_again(tmp_path: Path, reply: Reply) -> None:
    behave = failing_first(reply, times=2)
    with serving(behave) as server, EndpointJudge(at(server), journal=tmp_path / "j", settings=patience()) as judge:
        assert judge.rate(QUESTIONS[:2]) == [fair_ratings(question) for question in QUESTIONS[:2]]
        tally = judge.tally()
    assert (tally["num_sent"], tally["num_failed"], tally["num_replies"]) == (6, 4, 2)
    assert [entry["status"] for entry in entries(tmp_path / "j")].count(reply.status) == 4
    assert all("HTTP" in entry["error"] for entry in entries(tmp_path / "j") if entry["reply"] is None)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_wait_that_a_server_asks_for_is_kept_by_all_requests(tmp_path: Path, form: str) -> None:
    def behave(call: Call) -> Reply:
        if call.number:
            return fair(call)
        wanted = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2 from now
        return Reply({}, status=429, headers={"Retry-After": wanted})

    with serving(behave) as server:
        assert None not in rate(server, tmp_path / "j", concurrency=1, first_wait_s=0.0)
    first, *others = server.calls
    assert others[0].at - first.at >= 0.95
    assert len(others) == len(QUESTIONS)


def test_a_wait_longer_than_allowed_ends_the_run_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with (
        serving(lambda _: Reply({}, status=429, headers={"Retry-After": "3600"})) as server,
        pytest.raises(JudgeError, match=r"wants 3600 s of rest, more than max_wait_s=5"),
    ):
        rate(server, tmp_path / "j")
    assert time.monotonic() - start < 3


def test_waits_double_with_jitter_that_the_seed_decides(tmp_path: Path) -> None:
    def waits(seed: int) -> list[float]:
        with (
            serving(lambda _: Reply({}, status=500)) as server,
            pytest.raises(JudgeError, match="could not be had in 4 attempts; last: HTTP 500"),
        ):
            rate(server, tmp_path / f"{time.monotonic_ns()}", QUESTIONS[:1], seed=seed, first_wait_s=0.2, max_wait_s=0.5)
        return [after.at - before.at for before, after in pairwise(server.calls)]

    first = waits(0)
    for found, wait in zip(first, (0.2, 0.4, 0.5), strict=True):
        assert wait / 2 <= found <= wait + 0.1, first
    assert waits(0) == pytest.approx(first, abs=0.05)
    assert waits(1) != pytest.approx(first, abs=0.005)


def test_a_request_that_times_out_is_sent_again(tmp_path: Path) -> None:
    with serving(failing_first(Reply({}, delay_s=1.5))) as server:
        assert rate(server, tmp_path / "j", QUESTIONS[:1], timeout_s=0.4) == [fair_ratings(QUESTIONS[0])]
    assert [entry["error"].split(":")[0] for entry in entries(tmp_path / "j")] == ["ReadTimeout", ""]


def test_a_connection_that_breaks_in_the_middle_is_made_again(tmp_path: Path) -> None:
    with serving(failing_first(Reply(completion("half"), hang_up=True))) as server:
        assert rate(server, tmp_path / "j", QUESTIONS[:1]) == [fair_ratings(QUESTIONS[0])]
    assert entries(tmp_path / "j")[0]["error"].startswith("RemoteProtocolError")


def test_a_server_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with serving() as server:
        pass
    with pytest.raises(JudgeError, match=rf"the judge at {server.url} could not be had in 4 attempts; last: ConnectError"):
        rate(server, tmp_path / "j")


@pytest.mark.parametrize(
    ("status", "check"), [(400, "parameters"), (401, "RAYSIM_JUDGE_KEY"), (404, "often ends in /v1"), (307, "RAYSIM_JUDGE_URL")]
)
def test_a_refusal_is_not_repeated(tmp_path: Path, status: int, check: str) -> None:
    reply = Reply({"error": "no such thing"}, status=status, headers={"Location": "/elsewhere"})
    with serving(lambda _: reply) as server, pytest.raises(ValueError, match=rf"(?s)HTTP {status}: .*no such thing.*check .*{check}"):
        rate(server, tmp_path / "j", concurrency=1)
    assert len(server.calls) == 1


def test_one_failure_stops_the_waits_of_the_others(tmp_path: Path) -> None:
    def behave(call: Call) -> Reply:
        return Reply({}, status=400, delay_s=0.3) if call.question == QUESTIONS[1] else Reply({}, status=500)

    start = time.monotonic()
    with serving(behave) as server, pytest.raises(ValueError, match="refuses the request"):
        rate(server, tmp_path / "j", concurrency=2, first_wait_s=60.0, max_wait_s=60.0)
    assert time.monotonic() - start < 10
    assert len(server.calls) == 2


# --- replies that cannot be read


def test_an_unreadable_reply_is_handed_back_with_a_reminder(tmp_path: Path) -> None:
    def behave(call: Call) -> Reply:
        return Reply(completion("The first is better.")) if len(call.body["messages"]) == 3 else fair(call)

    with serving(behave) as server:
        assert rate(server, tmp_path / "j", QUESTIONS[:1]) == [fair_ratings(QUESTIONS[0])]
    first, second = (call.body["messages"] for call in server.calls)
    assert second == [*first, {"role": "assistant", "content": "The first is better."}, {"role": "user", "content": REMINDER}]


@pytest.mark.parametrize("content", ["I would rather not.", None, "", write_ratings(fair_ratings(QUESTIONS[0])).replace("answer_1", "a")])
def test_what_stays_unreadable_is_unparsed_after_so_many_requests(tmp_path: Path, content: str | None) -> None:
    def behave(call: Call) -> Reply:
        return Reply(completion(None if content is None else f"{content}{call.number}")) if call.question == QUESTIONS[0] else fair(call)

    with serving(behave) as server:
        found = rate(server, tmp_path / "j", QUESTIONS[:2], max_unparsed=2)
        assert found == [None, fair_ratings(QUESTIONS[1])]
        asked = Counter(str(call.question) for call in server.calls)
        assert asked[str(QUESTIONS[1])] == 1
        # The same nothing twice is the same request a third time, which the journal answers.
        assert asked[str(QUESTIONS[0])] == (2 if content is None else 3)
        assert rate(server, tmp_path / "j", QUESTIONS[:2], max_unparsed=2) == found
        assert len(server.calls) == asked.total(), "what was unreadable is in the journal and is not paid for again"


BROKEN: list[Any] = [b"<html>busy</html>", b"", {}, {"choices": []}, {"choices": [{"message": {}}]}, [1], completion(5), b'{"a":' * 3000]


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_completion_is_asked_for_again_and_counted(tmp_path: Path, body: Any) -> None:
    with serving(failing_first(Reply(body))) as server:
        assert rate(server, tmp_path / "j", QUESTIONS[:1]) == [fair_ratings(QUESTIONS[0])]
    with serving(lambda _: Reply(body)) as server, EndpointJudge(at(server), journal=tmp_path / "k", settings=patience()) as judge:
        assert judge.rate(QUESTIONS[:1]) == [None]
        assert (judge.tally()["num_sent"], judge.tally()["num_failed"], judge.tally()["num_replies"]) == (3, 3, 0)
    assert [entry["error"][:18] for entry in entries(tmp_path / "k")] == ["no chat completion"] * 3


def test_odd_but_valid_completions_are_kept_as_they_are(tmp_path: Path) -> None:
    """Not-a-number among log-probabilities, and half a surrogate pair in the text."""
    body = json.dumps(completion(write_ratings(fair_ratings(QUESTIONS[0])) + " \ud83d") | {"logprobs": float("nan")}).encode()
    with serving(lambda _: Reply(body)) as server:
        for _ in range(2):
            assert rate(server, tmp_path / "j", QUESTIONS[:1]) == [fair_ratings(QUESTIONS[0])]
    assert len(server.calls) == 1
    assert entries(tmp_path / "j")[0]["reply"]["logprobs"] is None


# --- nothing is paid for twice


def test_a_second_judge_asks_nothing_and_says_the_same(tmp_path: Path) -> None:
    with serving() as server:
        first = rate(server, tmp_path / "j")
    assert rate(server, tmp_path / "j") == first, "the server is gone, and is not missed"
    with EndpointJudge(at(server), journal=tmp_path / "j", settings=patience(price_prompt=10.0, price_completion=30.0)) as judge:
        assert judge.rate(QUESTIONS) == first
        assert judge.tally() == {
            "num_sent": 0,
            "num_failed": 0,
            "num_replayed": 6,
            "num_replies": 6,
            "num_without_usage": 0,
            "prompt_tokens": 600,
            "completion_tokens": 120,
            "cost": pytest.approx((600 * 10.0 + 120 * 30.0) / 1e6),
        }


def test_a_server_killed_in_the_middle_is_gone_on_with_elsewhere(tmp_path: Path) -> None:
    """The second server, on another port, is asked for what the first did not answer, and for nothing else."""
    with serving(lambda call: fair(call) if call.number < 3 else Reply({}, status=503)) as dying, pytest.raises(JudgeError):
        rate(dying, tmp_path / "j", concurrency=1)
    answered = {str(entry["request"]) for entry in entries(tmp_path / "j") if entry["reply"] is not None}
    assert len(answered) == 3
    with serving() as next_one:
        assert rate(next_one, tmp_path / "j") == [fair_ratings(question) for question in QUESTIONS]
    asked = {str(call.body) for call in next_one.calls}
    assert len(next_one.calls) == len(asked) == 3
    assert not asked & answered


def test_another_model_or_parameter_is_another_judgement(tmp_path: Path) -> None:
    with serving() as server:
        for changes in ({}, {"parameters": {"temperature": 0.5}}, {"parameters": {"temperature": 0.5, "seed": 1}}):
            rate(server, tmp_path / "j", QUESTIONS[:1], **changes)
        other = Endpoint(url=server.url, model="other")
        with EndpointJudge(other, journal=tmp_path / "j", settings=patience()) as judge:
            judge.rate(QUESTIONS[:1])
    assert len(server.calls) == 4


JUDGING = """
import signal, sys
from pathlib import Path
from raysim.judging.endpoint import EndpointJudge
from tests.judge_server import Server, at, patience
from tests.judging.test_endpoint import MANY
signal.signal(signal.SIGINT, signal.default_int_handler)
with EndpointJudge(at(Server(sys.argv[1], [])), journal=Path(sys.argv[2]), settings=patience(concurrency=2)) as judge:
    judge.rate(MANY)
"""
MANY = [Question(f"instruction {i}", f"first {i}", f"second {i}") for i in range(24)]


@pytest.mark.parametrize(("ending", "num_again"), [(signal.SIGKILL, 2), (signal.SIGINT, 0)])
def test_an_ended_run_asks_again_at_most_for_what_was_under_way(tmp_path: Path, ending: signal.Signals, num_again: int) -> None:
    """A killed process loses the two requests that are under way; an interrupted one hears them out, and sends no more."""
    journal = tmp_path / "j"
    with serving(lambda call: Reply(fair(call).body, delay_s=0.1)) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", JUDGING, server.url, str(journal)], env=environment(), stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while len(server.calls) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, ending)
        _, printed = process.communicate(timeout=30)
        assert process.returncode != 0
        assert printed.strip().endswith("KeyboardInterrupt" if ending == signal.SIGINT else "")
        num_first = len(server.calls)
        assert 10 <= num_first < len(MANY)
        assert rate(server, journal, MANY) == [fair_ratings(question) for question in MANY]
    asked = Counter(str(call.body) for call in server.calls)
    assert len(asked) == len(MANY)
    assert asked.total() - len(MANY) <= num_again


# --- what a run tells of itself


def test_tokens_that_a_server_does_not_count_are_said_to_be_missing(tmp_path: Path) -> None:
    usages: list[Any] = [None, {}, {"prompt_tokens": "many", "completion_tokens": 1}, {"prompt_tokens": 7, "completion_tokens": 2}]

    def behave(call: Call) -> Reply:
        return Reply(completion(write_ratings(fair_ratings(call.question)), usage=usages[call.number]))

    with serving(behave) as server, EndpointJudge(at(server), journal=tmp_path / "j", settings=patience(price_prompt=1.0)) as judge:
        judge.rate(QUESTIONS[:4])
        tally = judge.tally()
    assert (tally["num_without_usage"], tally["prompt_tokens"], tally["completion_tokens"], tally["cost"]) == (3, 7, 2, None)


def test_the_key_is_written_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A server that repeats the key in its replies and in its errors, plainly and in JSON's spelling."""
    caplog.set_level(0)
    telling = json.dumps({"error": f"Incorrect API key: {KEY}"})

    def behave(call: Call) -> Reply:
        told = call.headers["Authorization"].removeprefix("Bearer ")
        assert told == KEY
        if call.question == QUESTIONS[0]:
            return Reply(completion(write_ratings(fair_ratings(call.question)) + told))
        return Reply(f"{told} {telling}".encode(), status=401)

    settings = patience(concurrency=1)
    with serving(behave) as server, EndpointJudge(at(server, key=KEY), journal=tmp_path / "j", settings=settings) as judge:
        with pytest.raises(ValueError, match=r"Incorrect API key: \[key\]") as raised:
            judge.rate(QUESTIONS[:2])
        shown = f"{judge.endpoint!r} {judge.endpoint} {judge.tally()}"
    written = (tmp_path / "j").read_text()
    assert written.count("[key]") == 3
    for text in (written, str(raised.value), shown, caplog.text):
        assert "0123456789" not in text
        assert "Bearer" not in text


def test_a_placeholder_for_a_key_does_not_spoil_replies(tmp_path: Path) -> None:
    with serving() as server:
        assert rate(server, tmp_path / "j", QUESTIONS[:1], key="a") == [fair_ratings(QUESTIONS[0])]


def test_the_endpoint_comes_from_the_environment() -> None:
    variables = {"RAYSIM_JUDGE_URL": " http://localhost:8000/v1/ ", "RAYSIM_JUDGE_MODEL": "big", "RAYSIM_JUDGE_KEY": "k\n"}
    assert endpoint_from(variables) == Endpoint("http://localhost:8000/v1", "big", "k")
    assert endpoint_from(variables | {"RAYSIM_JUDGE_KEY": ""}).key == ""
    for name in ("RAYSIM_JUDGE_URL", "RAYSIM_JUDGE_MODEL"):
        with pytest.raises(ValueError, match=f"{name} is not set"):
            endpoint_from({key: value for key, value in variables.items() if key != name})


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://h/v1", "http:///v1", "http://user:secret@h/v1", "http://h/v1?key=secret", "http://h:port/v1", ""]
)
def test_addresses_that_are_none_are_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ValueError, match="RAYSIM_JUDGE_URL must be an address") as raised:
        Endpoint(url=url, model="m")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("key", ["a\nb", "schlüssel", "a b"])
def test_keys_that_no_header_holds_are_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match="RAYSIM_JUDGE_KEY has characters") as raised:
        Endpoint(url="http://h/v1", model="m", key=key)
    assert key not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": 0},
        {"max_attempts": 0},
        {"max_unparsed": -1},
        {"first_wait_s": float("inf")},
        {"timeout_s": 0.0},
        {"parameters": {"stream": True}},
    ],
    ids=str,
)
def test_settings_that_no_configuration_gives_are_a_fault(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        patience(**changes)
