"""A judge behind an OpenAI-compatible chat completions endpoint: asked in parallel, patiently, and never twice for the same thing.

Address, model and key come from RAYSIM_JUDGE_URL, RAYSIM_JUDGE_MODEL and RAYSIM_JUDGE_KEY. The key goes into a header of each request
and nowhere else: where a server repeats it, it is blotted out before anything is written or raised.
What may pass (429, a server's error, a broken connection, a time-out) is asked again after a wait that doubles, with jitter, and is no
shorter than what the server asks for. A reply that cannot be read is asked for again a few times, and then counts as unparsed.
Left out: streaming, batch interfaces, other providers' protocols, and limits on tokens a minute (the server's 429 says when).
"""

import email.utils
import html.entities
import json
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from raysim.judging.journal import Journal, request_key
from raysim.judging.pairwise import Question, Ratings
from raysim.judging.prompts import REMINDER, json_turns, read_ratings
from raysim.rng import numpy_rng

PASSING = frozenset({408, 409, 425, 429})
"""Statuses below 500 that say: later."""
MIN_SECRET = 8
"""A shorter key is a placeholder such as `none`, which may well occur in a reply."""
MOST_BYTES, CHUNK_BYTES = 2**23, 2**16
"""Of a reply so much is read, and at a time: a server that goes on for ever is none that answers."""
MOST_TIMEOUTS = 10
"""A reply that comes byte by byte may take that many times `timeout_s`."""
MAX_TOKENS = 2**53
"""A reply that says it took more tokens does not say how many."""
MAX_ERROR_CHARACTERS = 2000
"""Of a reply that is no completion, so much is kept."""


class JudgeError(RuntimeError):
    """The endpoint could not be had; what it has answered so far is kept, and the same command goes on from there."""


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is; `url` is what stands before `/chat/completions`, and `key` may be empty."""

    url: str
    model: str
    key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not _is_plain_address(self.url):
            raise ValueError(
                "RAYSIM_JUDGE_URL must be an address such as https://host/v1, without user, question mark or fragment; "
                "a key belongs into RAYSIM_JUDGE_KEY"
            )
        if not self.model:
            raise ValueError("RAYSIM_JUDGE_MODEL is empty; set it to the name under which the endpoint serves the judge")
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            raise ValueError("RAYSIM_JUDGE_KEY has characters that no HTTP header may hold, such as a line's end; set it again")


@dataclass(frozen=True)
class EndpointSettings:
    """How the endpoint is asked."""

    concurrency: int
    """Requests under way at a time."""
    timeout_s: float
    """Seconds without a byte after which a request counts as lost."""
    max_attempts: int
    """Times a request is sent before the endpoint counts as not to be had."""
    first_wait_s: float
    """Seconds before the second attempt, less up to half of it by jitter; doubled for each further one."""
    max_wait_s: float
    """Longest wait of our own, in seconds, and the longest that a server may ask for."""
    max_unparsed: int
    """Times a reply that cannot be read is asked for again."""
    parameters: Mapping[str, Any]
    """Further fields of each request, such as `temperature` and `max_tokens`; part of what a request is known by."""
    price_prompt: float | None
    """Price of a million prompt tokens, in whatever currency; None if it is not known."""
    price_completion: float | None
    """Price of a million completion tokens."""
    seed: int
    """Root of the jitter."""

    def __post_init__(self) -> None:
        assert min(self.concurrency, self.max_attempts, self.max_unparsed + 1) >= 1, self
        assert 0 < self.timeout_s < math.inf, self
        assert 0 <= max(self.first_wait_s, self.max_wait_s) < math.inf, self
        assert not {"model", "messages", "stream", "n"} & set(self.parameters), "the judge sets these itself"


def endpoint_from(environment: Mapping[str, str]) -> Endpoint:
    """The endpoint that RAYSIM_JUDGE_URL, RAYSIM_JUDGE_MODEL and, if it is set, RAYSIM_JUDGE_KEY name.

    Errors: ValueError naming the variable that is missing or malformed.
    """
    for name in ("RAYSIM_JUDGE_URL", "RAYSIM_JUDGE_MODEL"):
        if not environment.get(name, "").strip():
            raise ValueError(f"{name} is not set; a judge behind an endpoint needs RAYSIM_JUDGE_URL and RAYSIM_JUDGE_MODEL")
    return Endpoint(
        url=environment["RAYSIM_JUDGE_URL"].strip().rstrip("/"),
        model=environment["RAYSIM_JUDGE_MODEL"].strip(),
        key=environment.get("RAYSIM_JUDGE_KEY", "").strip(),
    )


class EndpointJudge:
    """A `Judge` behind an endpoint, with a `journal` of requests and replies; a context manager.

    Guarantees: no request whose reply the journal has is sent again, by this process or a later one; a reply is on disk before it counts;
    the key is written nowhere; the order in which replies come changes no rating.
    """

    def __init__(self, endpoint: Endpoint, *, journal: Path, settings: EndpointSettings) -> None:
        self.endpoint = endpoint
        self.settings = settings
        self._journal = Journal(journal)
        header = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {})
        limits = httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        self._client = httpx2.Client(headers=header, timeout=settings.timeout_s, limits=limits)
        self._secret = re.compile("".join(map(_escaped, endpoint.key)), re.IGNORECASE) if len(endpoint.key) >= MIN_SECRET else None
        self._pause = _Pause()
        self._lock = threading.Lock()
        self._counts = {"num_sent": 0, "num_failed": 0, "num_replayed": 0}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()
        self._journal.close()

    def rate(self, questions: Sequence[Question]) -> list[Ratings | None]:
        """The ratings of each question, in order; None where every reply to it was unreadable.

        Errors: JudgeError if the endpoint cannot be had, ValueError if it refuses what it is asked. Replies so far are kept; to go on,
        make a new judge on the same journal.
        """
        unique = list(dict.fromkeys(questions))
        with ThreadPoolExecutor(max_workers=self.settings.concurrency) as pool:
            futures = {question: pool.submit(self._rate_or_stop, question) for question in unique}
            try:
                wait(futures.values(), return_when=FIRST_EXCEPTION)
            except BaseException as error:
                self._pause.end(error)
            # After an error those that wait give up; those under way are heard out, since they are paid for.
            pool.shutdown(wait=True, cancel_futures=self._pause.error is not None)
        if self._pause.error is not None:
            raise self._pause.error
        return [futures[question].result() for question in questions]

    def tally(self) -> dict[str, Any]:
        """Requests sent by this process and those of them that came to nothing, questions answered from the journal, and of all replies
        in the journal the tokens and the cost.

        `num_without_usage` replies did not say how many tokens they took, and the counts and the cost are less by those. The cost is None
        unless both prices are known.
        """
        usages = [_usage(reply) for reply in self._journal.replies()]
        known = [usage for usage in usages if usage is not None]
        prompt, completion = (sum(usage[i] for usage in known) for i in (0, 1))
        prices = self.settings.price_prompt, self.settings.price_completion
        cost = None if prices[0] is None or prices[1] is None else (prompt * prices[0] + completion * prices[1]) / 1e6
        return {
            **self._counts,
            "num_replies": len(usages),
            "num_without_usage": len(usages) - len(known),
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "cost": cost,
        }

    def _rate_or_stop(self, question: Question) -> Ratings | None:
        try:
            return self._rate(question)
        except BaseException as error:
            self._pause.end(error)
            raise

    def _rate(self, question: Question) -> Ratings | None:
        """One question to its end: an unreadable reply is handed back with a reminder of the form."""
        asked = [{"role": role, "content": text} for role, text in json_turns(question)]
        messages, num_misses = asked, 0
        for _ in range(1 + self.settings.max_unparsed):
            body = {**self.settings.parameters, "model": self.endpoint.model, "messages": messages}
            content = self._content(body, num_misses=num_misses)
            if content is None:
                num_misses += 1
                continue
            ratings = read_ratings(content)
            if ratings is not None:
                return ratings
            messages = [*asked, {"role": "assistant", "content": content}, {"role": "user", "content": REMINDER}]
        return None

    def _content(self, body: dict[str, Any], *, num_misses: int) -> str | None:
        """What the judge says to `body`, from the journal or from the endpoint; None if it answers with something else than a completion,
        as it did `num_misses` times before."""
        key = request_key(body)
        held = self._journal.reply(key)
        if held is not None:
            self._count("num_replayed")
            return _content(held)
        for attempt in range(self.settings.max_attempts):
            self._pause.wait(self._own_wait(key, attempt + num_misses))
            answer = self._send(body, key=key, attempt=attempt + num_misses)
            if answer.completion is not None:
                return _content(answer.completion)
            self._count("num_failed")
            if answer.status == 200:
                return None
            self._refuse(answer)
        raise JudgeError(
            f"the judge at {self.endpoint.url} could not be had in {self.settings.max_attempts} attempts; last: {answer.problem[:300]}"
        )

    def _send(self, body: dict[str, Any], *, key: str, attempt: int) -> "_Answer":
        """Sends one request, and notes in the journal what came of it."""
        self._count("num_sent")
        start = time.monotonic()
        try:
            response, content = self._post(json.dumps(body).encode())
        except httpx2.RequestError as error:
            answer = _Answer(None, problem=self._blotted(f"{type(error).__name__}: {error}"))
        else:
            answer = _read(response, text=self._blotted(_decoded(content)))
        self._journal.append(
            {
                "key": key,
                "url": self.endpoint.url,
                "attempt": attempt,
                "wall_s": round(time.monotonic() - start, 3),
                "status": answer.status,
                "error": answer.problem,
                "request": body,
                "reply": answer.completion,
            }
        )
        return answer

    def _post(self, body: bytes) -> tuple[httpx2.Response, bytes]:
        """The response to a request, and its body, of which no more than `MOST_BYTES` are read."""
        content, deadline = b"", time.monotonic() + MOST_TIMEOUTS * self.settings.timeout_s
        with self._client.stream("POST", f"{self.endpoint.url}/chat/completions", content=body) as response:
            for chunk in response.iter_bytes(CHUNK_BYTES):
                content += chunk
                if len(content) > MOST_BYTES:
                    break
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(f"no end of the reply after {MOST_TIMEOUTS} times timeout_s")
        return response, content[:MOST_BYTES]

    def _refuse(self, answer: "_Answer") -> None:
        """Raises where asking again is of no use; else makes every request wait for as long as the server wants."""
        if answer.status is not None and answer.status < 500 and answer.status not in PASSING:
            remedy = {
                401: "RAYSIM_JUDGE_KEY",
                403: "RAYSIM_JUDGE_KEY",
                404: "RAYSIM_JUDGE_URL (it often ends in /v1) and RAYSIM_JUDGE_MODEL",
            }
            check = remedy.get(answer.status, "RAYSIM_JUDGE_URL, RAYSIM_JUDGE_MODEL and the judge's parameters")
            raise ValueError(f"the judge at {self.endpoint.url} refuses the request ({answer.problem[:300]}); check {check}")
        if answer.retry_after_s > self.settings.max_wait_s:
            raise JudgeError(
                f"the judge at {self.endpoint.url} wants {answer.retry_after_s:.0f} s of rest, more than max_wait_s={self.settings.max_wait_s:g}; "
                "run the command again then, or raise max_wait_s"
            )
        self._pause.ask_for(answer.retry_after_s)

    def _own_wait(self, key: str, attempt: int) -> float:
        """Seconds to wait before an attempt, none before the first (0): doubling, less up to half of it, so that requests that failed
        together do not return together."""
        if attempt == 0:
            return 0.0
        jitter = float(numpy_rng(self.settings.seed, "judge", key, attempt).uniform(0.5, 1.0))
        return min(self.settings.max_wait_s, self.settings.first_wait_s * 2.0 ** min(attempt - 1, 60)) * jitter

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _blotted(self, text: str) -> str:
        return self._secret.sub("[key]", text) if self._secret else text


@dataclass(frozen=True)
class _Answer:
    """What came of a request: its HTTP status (None if there was none), the completion, or else the problem and the rest asked for."""

    status: int | None
    completion: dict[str, Any] | None = None
    problem: str = ""
    retry_after_s: float = 0.0


class _Pause:
    """The waits of all requests of a judge: each waits for its own time, and none goes on before the server wants to hear more."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        """Why requests are to give up; the first reason counts."""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._not_before = 0.0

    def ask_for(self, seconds: float) -> None:
        """No request goes on within the next `seconds`."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + seconds)

    def end(self, error: BaseException) -> None:
        """Whoever waits, or comes to wait, gives up because of `error`."""
        with self._lock:
            self.error = self.error or error
        self._ended.set()

    def wait(self, seconds: float) -> None:
        """Returns after `seconds`, and no sooner than the server wants."""
        until = time.monotonic() + seconds
        while True:
            with self._lock:
                left = max(until, self._not_before) - time.monotonic()
            if self._ended.is_set():
                raise JudgeError("given up, since another request failed")
            if left <= 0:
                return
            self._ended.wait(left)


def _escaped(character: str) -> str:
    """A pattern for a character of a key however a server writes it: as it is, or once or more often escaped for JSON, an address or HTML."""
    code = ord(character)
    names = [rf"&(?:amp;)*{name.rstrip(';')};" for name, text in html.entities.html5.items() if text == character]
    forms = [
        re.escape(character),
        rf"u0*{code:x}",
        rf"x{code:02x}",
        rf"%(?:25)*{code:02x}",
        rf"&(?:amp;)*#0*{code};?",
        rf"&(?:amp;)*#x0*{code:x};?",
    ]
    return rf"\\*(?:{'|'.join([*forms, *dict.fromkeys(names)])})"


def _decoded(content: bytes) -> str:
    """A reply's text, which is JSON and so UTF-8, -16 or -32, whatever its header says of it."""
    return content.decode(json.detect_encoding(content), errors="replace")


def _finite(text: str) -> float | None:
    """A number of a reply; None for one that is too large for any, such as 1e999, which JSON has and files may not hold."""
    value = float(text)
    return value if math.isfinite(value) else None


def _is_plain_address(url: str) -> bool:
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    return parts.scheme in ("http", "https") and bool(parts.host) and not (parts.userinfo or parts.query or parts.fragment)


def _read(response: httpx2.Response, *, text: str) -> _Answer:
    """The answer in a response whose body, without the key, is `text`."""
    if response.status_code != 200:
        problem = f"HTTP {response.status_code}: {text[:MAX_ERROR_CHARACTERS]}"
        return _Answer(response.status_code, problem=problem, retry_after_s=_retry_after(response.headers.get("Retry-After", "")))
    try:
        completion = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
        _content(completion)
        json.dumps(completion)  # what can be read need not be nested so little that it can be written
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return _Answer(200, problem=f"no chat completion: {text[:MAX_ERROR_CHARACTERS]}")
    return _Answer(200, completion=completion)


def _content(completion: dict[str, Any]) -> str:
    """What the model says; empty if it says nothing."""
    content = completion["choices"][0]["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError(f"content is {type(content).__name__}")
    return content or ""


def _usage(completion: dict[str, Any]) -> tuple[int, int] | None:
    """Prompt and completion tokens that a completion says it took."""
    usage = completion.get("usage")
    prompt, answer = (usage.get(f"{kind}_tokens") if isinstance(usage, dict) else None for kind in ("prompt", "completion"))
    counts = [value for value in (prompt, answer) if type(value) is int and 0 <= value <= MAX_TOKENS]
    return (counts[0], counts[1]) if len(counts) == 2 else None


def _retry_after(header: str) -> float:
    """Seconds from now that a Retry-After header asks for, given as seconds or as a date; 0 if it says neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
