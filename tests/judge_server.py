"""A small HTTP server that speaks the chat completions protocol, and fails as it is told to; a judge in a test asks it over a socket."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from raysim.judging.endpoint import Endpoint, EndpointSettings
from raysim.judging.pairwise import CRITERIA, Question, Ratings
from raysim.judging.prompts import write_ratings

USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}


def quality(text: str) -> tuple[float, ...]:
    """Four scores that only the text decides."""
    return tuple(float(1 + byte % 5) for byte in hashlib.sha256(text.encode()).digest()[: len(CRITERIA)])


def fair_ratings(question: Question) -> Ratings:
    """What a judge says that looks at each answer alone."""
    return Ratings(first=quality(question.first), second=quality(question.second))


def completion(content: Any, usage: Any = USAGE) -> dict[str, Any]:
    """A chat completion with this content."""
    message = {"role": "assistant", "content": content}
    return {"id": "c", "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}


@dataclass
class Call:
    """A request as it came in: when, with what headers and body, and its number from 0."""

    number: int
    at: float
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def question(self) -> Question:
        """What is asked, read out of the first request for it (the third message)."""
        text = self.body["messages"][2]["content"]

        def inside(name: str) -> str:
            return str(text.split(f"<{name}>\n", 1)[1].split(f"\n</{name}>", 1)[0])

        return Question(inside("instruction"), inside("answer_1"), inside("answer_2"))


@dataclass
class Reply:
    """What the server does with a request: a status, a body (an object, or bytes as they are), headers, and seconds before it answers."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    hang_up: bool = False
    """Closes the connection in the middle of the body."""


Behaviour = Callable[[Call], Reply]


def fair(call: Call) -> Reply:
    """Answers as a fair judge would."""
    return Reply(completion(write_ratings(fair_ratings(call.question))))


@dataclass
class Server:
    """A running server: its address, and what it was asked so far."""

    url: str
    calls: list[Call]
    most_at_once: int = 0


@contextmanager
def serving(behaviour: Behaviour = fair) -> Iterator[Server]:
    """A server on a free port of this machine, gone when the block ends."""
    lock, under_way = threading.Lock(), [0]
    server = Server(url="", calls=[])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                call = Call(len(server.calls), time.monotonic(), dict(self.headers), body)
                server.calls.append(call)
                under_way[0] += 1
                server.most_at_once = max(server.most_at_once, under_way[0])
            reply = behaviour(call) if self.path == "/v1/chat/completions" else Reply({"error": "no such path"}, status=404)
            time.sleep(reply.delay_s)
            with lock:
                under_way[0] -= 1
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked has hung up
                self.answer(reply)

        def answer(self, reply: Reply) -> None:
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) + (100 if reply.hang_up else 0)))
            self.end_headers()
            self.wfile.write(content)
            if reply.hang_up:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    httpd.block_on_close = False
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def patience(**changes: Any) -> EndpointSettings:
    """Settings that lose little time."""
    settings: dict[str, Any] = {
        "concurrency": 4,
        "timeout_s": 5.0,
        "max_attempts": 4,
        "first_wait_s": 0.02,
        "max_wait_s": 5.0,
        "max_unparsed": 2,
        "parameters": {"temperature": 0.0, "max_tokens": 200},
        "price_prompt": None,
        "price_completion": None,
        "seed": 0,
    }
    return EndpointSettings(**settings | changes)


def at(server: Server, *, key: str = "") -> Endpoint:
    """The endpoint of a server."""
    return Endpoint(url=server.url, model="m", key=key)
