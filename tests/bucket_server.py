"""A bucket on this machine: moto's S3 behind a door that counts what is written, and refuses it from some write on."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Response

from raysim.storage import LOCK

BUCKET = "raysim-test"
DENIED = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'


@dataclass
class Door:
    """What stands before the bucket."""

    app: Any
    writes_left: float = float("inf")
    """How many more writes it lets pass, those of a lock aside."""
    written: list[str] = field(default_factory=list)
    """What it let pass: method and path."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answers one request."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if method in ("PUT", "POST", "DELETE"):
            if self.writes_left <= 0:
                return Response(DENIED, status=403, mimetype="application/xml")(environ, start_response)
            if not path.endswith(f"/{LOCK}"):  # which is written again as often as time allows
                self.writes_left -= 1
                self.written.append(f"{method} {path}")
        answer: Iterable[bytes] = self.app(environ, start_response)
        return answer


class Quiet(WSGIRequestHandler):
    """Prints no line for each request."""

    def log(self, type: str, message: str, *args: Any) -> None:
        """See `WSGIRequestHandler`."""


@contextlib.contextmanager
def bucket() -> Iterator[Door]:
    """A bucket, and the environment in which a client finds it."""
    door = Door(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, door, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    found = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    before = {name: os.environ.get(name) for name in (*found, "AWS_DEFAULT_REGION")}
    os.environ.update(found | {"AWS_DEFAULT_REGION": "us-east-1"})
    forget_clients()
    try:
        client().mkdir(f"s3://{BUCKET}")
        door.written.clear()
        yield door
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        forget_clients()
        server.shutdown()
        thread.join()


def forget_clients() -> None:
    """Has fsspec look for the bucket anew."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def client() -> Any:
    """fsspec's view of it, the same as that of the program."""
    return fsspec.filesystem("s3", use_listings_cache=False)


def objects(url: str) -> dict[str, bytes]:
    """What lies below an address."""
    filesystem, prefix = client(), url.removeprefix("s3://") + "/"
    return {name.removeprefix(prefix): filesystem.cat_file(name) for name in filesystem.find(url)}
