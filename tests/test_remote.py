"""Folders of results in a bucket: equal to those on a disk, whole whenever a write fails, held by one command, and gone on with by the next.

The buckets are moto's S3 server and an emulator of Google's, on this machine.
"""

import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysim import remote
from raysim.cli import main
from raysim.config import Config, load
from raysim.results.folders import RunFolder
from raysim.runs.compare import compare
from raysim.runs.run import Backend, open_backend, resolved, run
from tests.bucket_server import BUCKET, Door, bucket, client, forget_clients, google, objects
from tests.conftest import SMALL
from tests.small_runs import overrides, results, wait_for, warm_raysim

UNLIKE = ("environment.json", "report.html", "README.md", "config.yaml", "sha256.json", "rounds.jsonl", "summary.json")
"""Files that hold times, places or hashes of such."""


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    """The way to the bucket."""
    with bucket() as opened:
        yield opened


@pytest.fixture
def url(door: Door, request: pytest.FixtureRequest) -> str:
    """A folder of the test's own, and a door that is open."""
    door.writes_left = float("inf")
    door.written.clear()
    return f"s3://{BUCKET}/runs/with space/{abs(hash(request.node.nodeid))}"


@pytest.fixture(scope="module")
def googles() -> Iterator[None]:
    """A bucket of Google's kind."""
    with google():
        yield


@pytest.fixture(params=["s3", "gs"])
def anywhere(request: pytest.FixtureRequest) -> str:
    """A folder of the test's own, in a bucket of either kind."""
    if request.param == "s3":
        return str(request.getfixturevalue("url"))
    request.getfixturevalue("googles")
    return f"gs://{BUCKET}/runs/with space/{abs(hash(request.node.nodeid))}"


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """Where the runs of this file are made."""
    with open_backend(resolved(small("unused"))) as opened:
        yield opened


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that are known to be stale within a second."""
    monkeypatch.setattr(remote, "BEAT_S", 0.1)
    monkeypatch.setattr(remote, "STALE_S", 1.0)


def small(url: str | Path) -> Config:
    """Three rounds of SCAFFOLD, whose server and clients keep something, measured once."""
    return load("", [*overrides("scaffold", "server.num_rounds=3", "evaluate.every=0", "attack.every=-1", out=Path("unset")), f"out={url}"])


def test_a_run_into_a_bucket_leaves_there_what_one_leaves_on_a_disk(anywhere: str, tmp_path: Path, backend: Backend) -> None:
    done, alone = run(small(anywhere), display=False, backend=backend), run(small(tmp_path / "alone"), display=False, backend=backend)
    assert results(done.out) == results(alone.out)
    there = objects(anywhere)
    here = {path.relative_to(alone.out).as_posix(): path.read_bytes() for path in alone.out.rglob("*") if path.is_file()}
    assert set(there) == set(here), "and no lock"
    same = [name for name in here if Path(name).name not in UNLIKE and not name.startswith(("state/", "figures/"))]
    assert len(same) >= 5
    assert [name for name in same if there[name] != here[name]] == []
    assert f"out: {anywhere}\n" in there["config.yaml"].decode()
    assert str(done.out) not in "".join(content.decode(errors="replace") for content in there.values())
    assert remote.origin(done.page) == f"{anywhere}/report.html"
    assert remote.origin(alone.page) == str(alone.page)


def test_commands_read_and_write_there(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *SMALL, "method.name=fedit", f"out={url}", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {url}/report.html"
    before = objects(url)
    main(["verify", url])
    found = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert found.count("ok") == len(found) - 1 > 10, "all but the figures, which are not drawn here"
    assert objects(url) == before
    client("s3").rm_file(f"{url}/report.html")
    assert main(["report", url]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{url}/report.html"
    assert objects(url)["report.html"].startswith(b"<!")
    assert main(["run", "quickstart", *SMALL, "method.name=fedit", f"out={url}", "lora.rank=2", "--quiet"]) == 2
    refused = capsys.readouterr().err.splitlines()
    assert len(refused) == 1
    assert refused[0].startswith(f"raysim: out='{url}' belongs to another configuration")


@pytest.mark.usefixtures("soon")
def test_whichever_write_fails_it_is_one_line_and_the_same_command_goes_on_to_the_same_bits(
    door: Door, url: str, tmp_path: Path, backend: Backend
) -> None:
    alone = run(small(tmp_path / "alone"), display=False, backend=backend)
    run(small(url), display=False, backend=backend)
    num_writes = len(door.written)
    assert num_writes > 30
    for number in range(0, num_writes, num_writes // 4):
        client("s3").rm(url, recursive=True)
        door.writes_left = number
        with pytest.raises((ValueError, RuntimeError)) as refused:
            run(small(url), display=False, backend=backend)
        assert len(str(refused.value).splitlines()) == 1
        assert url in str(refused.value)
        assert "Access Denied" in str(refused.value)
        door.writes_left = float("inf")
        done = run(small(url), display=False, backend=backend)
        assert results(done.out) == results(alone.out), number
        assert RunFolder(done.out).is_finished


def test_after_each_round_the_bucket_has_what_a_command_elsewhere_goes_on_from(anywhere: str, backend: Backend) -> None:
    kind = anywhere.partition(":")[0]
    states: list[dict[str, bytes]] = []
    done = run(small(anywhere), display=False, backend=backend, on_round=lambda records: states.append(objects(anywhere)))
    for num_rounds, state in enumerate(states, 1):
        client(kind).rm(anywhere, recursive=True)
        for name, content in state.items():
            if name != ".lock":
                client(kind).pipe_file(f"{anywhere}/{name}", content)
        told: list[int] = []
        again = run(small(anywhere), display=False, backend=backend, on_round=lambda records, told=told: told.append(len(records)))  # type: ignore[misc]  # mypy infers no lambda with a default
        assert told == list(range(num_rounds + 1, 4)), "no round is run twice"
        assert results(again.out) == results(done.out)


@pytest.mark.usefixtures("soon")
def test_a_folder_is_one_commands_and_a_lock_that_a_killed_one_left_holds_nobody_up(anywhere: str) -> None:
    kind = anywhere.partition(":")[0]
    with remote.worked_on(anywhere) as copy:
        (copy / "mine.txt").write_text("1")
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=f"out='{anywhere}' is being written by {holder}; wait"), remote.worked_on(anywhere):
            pass
        assert objects(anywhere).keys() == {".lock"}, "it was left alone"
    assert objects(anywhere) == {"mine.txt": b"1"}
    client(kind).pipe_file(f"{anywhere}/.lock", json.dumps({"pid": 1, "host": "gone", "token": "a", "beat": 3}).encode())
    with remote.worked_on(anywhere) as copy:
        assert (copy / "mine.txt").read_text() == "1"
    assert objects(anywhere) == {"mine.txt": b"1"}


@pytest.mark.usefixtures("soon")
def test_a_lock_that_says_nothing_at_all_holds_nobody_up_either(url: str) -> None:
    client("s3").pipe_file(f"{url}/.lock", b"")
    with remote.worked_on(url) as copy:
        (copy / "mine.txt").write_text("1")
    assert objects(url) == {"mine.txt": b"1"}


@pytest.mark.usefixtures("soon")
def test_who_was_taken_for_dead_writes_no_more_and_leaves_the_lock_to_who_took_it(url: str) -> None:
    theirs = json.dumps({"pid": 1, "host": "other", "token": "theirs", "beat": 1}).encode()

    def work() -> None:
        with remote.worked_on(url) as copy:
            client("s3").pipe_file(f"{url}/.lock", theirs)
            wait_for(lambda: (copy.parent.parent / remote.LOST).is_file(), patience_s=20)
            (copy / "mine.txt").write_text("1")

    with pytest.raises(OSError, match="another command has taken the folder over"):
        work()
    assert objects(url) == {".lock": theirs}


def test_a_lock_is_held_on_while_the_bucket_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its client raises: those of buckets have exceptions that are no OSError."""
    tried, is_over = [], threading.Event()

    class Away:
        def cat_file(self, path: str) -> bytes:
            tried.append(path)
            raise RuntimeError("Could not connect to the endpoint URL")

    monkeypatch.setattr(remote, "BEAT_S", 0.01)
    thread = threading.Thread(target=remote._beat, args=(remote._Bucket("s3://b/x", tmp_path, Away()), "s3://b/x/.lock", "mine", is_over))
    thread.start()
    wait_for(lambda: len(tried) > 3, patience_s=20)
    is_over.set()
    thread.join()
    assert not (tmp_path / remote.LOST).exists()


def test_a_bucket_that_is_gone_is_told_of(url: str) -> None:

    def work() -> None:
        with remote.worked_on(url) as copy:
            (copy / "mine.txt").write_text("1")
            client("s3").rm(f"s3://{BUCKET}", recursive=True)

    with pytest.raises(OSError, match="bucket does not exist"):
        work()
    client("s3").mkdir(f"s3://{BUCKET}")


def test_what_goes_back_is_what_changed_and_in_the_order_in_which_it_was_written(door: Door, url: str) -> None:
    with remote.worked_on(url) as copy:
        for name in ("b", "a", "state/c"):
            (copy / name).parent.mkdir(exist_ok=True)
            (copy / name).write_text("1")
            os.utime(copy / name, ns=(0, 10**9 * (1 + len(list(copy.rglob("*"))))))
        (copy / ".writing-1").mkdir()
        (copy / ".writing-1" / "d").write_text("1")
    with remote.worked_on(url) as copy:
        door.written.clear()
        (copy / "a").unlink()
        (copy / "state" / "c").write_text("22")
        remote.push(copy / "state")
        remote.push(copy)
        remote.push(copy.parent.parent)  # no part of a copy: nothing to do
    named = [line.replace(f"/{BUCKET}/{url.removeprefix(f's3://{BUCKET}/')}/", "") for line in door.written]
    assert named == ["PUT state/c", "DELETE a"]
    assert objects(url) == {"b": b"1", "state/c": b"22"}


@pytest.mark.parametrize("name", ["../../evil", "state/../../../evil", "/evil"])
def test_a_name_that_would_lead_out_of_the_copy_is_refused(url: str, name: str, tmp_path: Path) -> None:
    client("s3").call_s3("put_object", Bucket=BUCKET, Key=f"{url.removeprefix(f's3://{BUCKET}/')}/{name}", Body=b"1")
    with pytest.raises(ValueError, match="would lead out of it"), remote.copied(url, key="folder"):
        pass


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("ftp://host/runs", "ftp:// is not taken; s3://, gs:// and folders are"),
        ("s3://bucket", "names no folder in a bucket; give one such as s3://bucket/runs/mine"),
        ("s3://bucket//x", "names no folder in a bucket"),
        ("s3://bucket/../x", "names no folder in a bucket"),
        ("s3://raysim-absent/runs/x", "cannot be had .*bucket does not exist"),
    ],
)
def test_what_is_no_folder_that_can_be_had_is_one_line(door: Door, place: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["run", "quickstart", *SMALL, f"out={place}"], ["verify", place]):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("raysim: ")
        assert re.search(said, line), line


def test_a_bucket_that_nobody_answers_for_is_one_line(door: Door, url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unheard.getsockname()[1]}")
        forget_clients()
        assert main(["run", "quickstart", *SMALL, f"out={url}"]) == 2
    forget_clients()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"raysim: out='{url}' cannot be had (Could not connect to the endpoint URL")


def test_a_comparison_goes_into_a_bucket_too(url: str) -> None:
    entries = "compare={base: {method.name: base}, fedit: {method.name: fedit}}"
    runs = compare(load("", [*SMALL, "server.num_rounds=1", entries, f"out={url}"]), display=False)
    assert {remote.origin(done.out) for done in runs} == {f"{url}/base", f"{url}/fedit"}
    assert {"report.html", "base/summary.json", "fedit/sha256.json", "fedit/state/round-00001/manifest.json"} <= set(objects(url))


@pytest.mark.slow
def test_a_sweep_on_one_node_goes_into_a_bucket_and_goes_on_from_there(url: str, door: Door, tmp_path: Path) -> None:
    """As a command, whose Ray is its own: trials find the bucket by the environment that the command was started in."""
    space = ["sweep.space={method.name: [dplora], lora.rank: [2, 4]}", "sweep.seeds=[0]", "resources.client.num_cpus=1"]
    arguments = ("sweep", "sweep-smoke", *space, f"out={url}", "--quiet")
    done = warm_raysim(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, written = objects(url), [line.rpartition("/")[2] for line in door.written]
    assert written[0] == "sweep.yaml", "a command that is killed leaves what the next one knows a sweep's folder by"
    assert max(place for place, name in enumerate(written) if name == "sha256.json") < written.index("results.csv"), "a trial when it ends"
    assert {"results.csv", "report.html", "sweep.yaml"} <= set(first)
    assert sum(name.endswith("/sha256.json") for name in first) == 2
    assert first["results.csv"].count(b",done,") == 2
    assert warm_raysim(*arguments, cwd=tmp_path).returncode == 0
    assert objects(url)["results.csv"] == first["results.csv"], "nothing was run again: its rows say what time they took"
