"""Buckets on this machine: moto's S3 behind a door that counts what is written, and refuses it from some write on; and an emulator of Google's."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import fsspec
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
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


class ThereIsOne(Exception):
    """An object that was to be written only where there is none."""


class Objects(Storage):  # type: ignore[misc]  # the emulator has no types
    """What an emulated bucket holds."""

    only_new = False
    """Whether what is being written may take no object's place."""

    def create_file(self, bucket_name: str, file_name: str, *what: Any, **more: Any) -> None:
        """See `Storage`."""
        if self.only_new and any(found["name"] == file_name for found in self.get_file_list(bucket_name)[0]):
            raise ThereIsOne(file_name)
        super().create_file(bucket_name, file_name, *what, **more)


class Googles(RequestHandler):  # type: ignore[misc]  # the emulator has no types
    """The emulator, which also keeps to `ifGenerationMatch=0`: an object is written only where there is none."""

    turn = threading.Lock()

    def do_POST(self) -> None:
        """See `BaseHTTPRequestHandler`."""
        with self.turn:
            self.storage.only_new = "ifGenerationMatch=0" in urlsplit(self.path).query
            try:
                super().do_POST()
            except ThereIsOne:
                self.send_response(HTTPStatus.PRECONDITION_FAILED)
                self.send_header("Content-Length", "0")
                self.end_headers()


@contextlib.contextmanager
def google() -> Iterator[None]:
    """A bucket of Google's kind, and the environment in which a client finds it."""
    storage = Objects(use_memory_fs=True)
    storage.create_bucket(BUCKET, {"name": BUCKET})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Googles, storage))
    found = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.server_port}", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    with _served(server, found, "gs"):
        yield


@contextlib.contextmanager
def bucket() -> Iterator[Door]:
    """A bucket, and the environment in which a client finds it."""
    door = Door(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, door, threaded=True, request_handler=Quiet)
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with _served(server, {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}", **keys}, "s3"):
        client("s3").mkdir(f"s3://{BUCKET}")
        door.written.clear()
        yield door


@contextlib.contextmanager
def _served(server: Any, environment: dict[str, str], kind: str) -> Iterator[None]:
    """Inside, the server answers, and the clients of its kind find it by the environment."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    forget_clients(kind)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        forget_clients(kind)
        server.shutdown()
        server.server_close()
        thread.join()


def forget_clients(kind: str = "s3") -> None:
    """Has fsspec look for the bucket anew."""
    fsspec.get_filesystem_class(kind).clear_instance_cache()


def client(kind: str) -> Any:
    """fsspec's view of it, the same as that of the program."""
    return fsspec.filesystem(kind, use_listings_cache=False)


def objects(url: str) -> dict[str, bytes]:
    """What lies below an address."""
    kind, _, place = url.partition("://")
    filesystem = client(kind)
    return {name.removeprefix(f"{place}/"): filesystem.cat_file(name) for name in filesystem.find(url)}
