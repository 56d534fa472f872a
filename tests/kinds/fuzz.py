"""Feeds damaged and invented files to everything that reads one: each comes to a result, or to a refusal of one line that names the file or the key.

`python -m tests.kinds.fuzz --inputs 20000` draws that many with hypothesis, spread over the readers, prints a table, and ends with status 1 if one was a
fault of ours: another exception than a ValueError, a message of several lines or none, one that names nothing, a file written elsewhere. Damaged are files as this
program writes them: bytes changed, cut, doubled and put in, or a value within them replaced by another kind of value; half of the damaged checkpoints have
their checksums made anew, so that what lies behind these is read. Left out: models and tokenizers, and what a drawn run does (`draw`).
"""

import argparse
import collections
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from raysim.claims.decide import load_runs
from raysim.config import DataConfig, load
from raysim.data.choices import read_choices
from raysim.data.sources import read_source
from raysim.federation.checkpoint import MANIFEST, Snapshot, load_checkpoint, save
from raysim.judging.journal import Journal
from raysim.lora.layout import initial_adapter, load_adapter, save_adapter
from raysim.model.base_model import load_base_model
from raysim.model.language_model import build_language_model
from raysim.results import files
from raysim.results.folders import ComparisonFolder, RunFolder, so_far
from raysim.results.verify import verify
from raysim.runs.run import run
from raysim.sweeps.rows import aggregate, read_results
from raysim.sweeps.space import check_points, check_sweep, grid_points, probe_points, random_points
from tests.conftest import ROOT, SMALL
from tests.kinds import draw
from tests.sweep_folders import grid_rows, write_sweep

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from([10**400, -(10**400), 1e308, 2**63, "\ud800", "..", "../../x", "a\nb", "\0", "x" * 5000, "${x}", "1e400"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)
DEEP = [b"[" * 100_000, b'{"a":' * 50_000, b"[" * 300 + b"]" * 300, b"- " * 2000]


# --- damage


@st.composite
def damaged_bytes(drawn: Callable[[Any], Any], content: bytes) -> bytes:
    """A file's content with one to three changes to its bytes."""
    for _ in range(drawn(st.integers(1, 3))):
        place, end = sorted(drawn(st.tuples(*[st.integers(0, len(content))] * 2)))
        kind = drawn(st.sampled_from(["flip", "cut", "put in", "double", "remove", "replace"]))
        more = drawn(
            st.one_of(
                st.binary(max_size=8), st.sampled_from([*DEEP, b"\xff\xfe", b"\0", b"\n", b'"', b"{", b"]", b"nan", b"1e999", b"9" * 5000])
            )
        )
        if kind == "flip" and place < len(content):
            content = content[:place] + bytes([content[place] ^ 1 << drawn(st.integers(0, 7))]) + content[place + 1 :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "put in":
            content = content[:place] + more + content[place:]
        elif kind == "double":
            content = content[:end] + content[place:]
        elif kind == "remove":
            content = content[:place] + content[end:]
        else:
            content = more
    return content


@st.composite
def damaged_json(drawn: Callable[[Any], Any], content: bytes) -> bytes:
    """The content of a JSON file, or of a file with an object a line, with a value replaced, a key taken away or put in, or a line doubled."""
    lines = (
        [json.loads(line) for line in content.decode().splitlines()]
        if content.count(b"\n") > 1 and content[:1] == b"{" and _by_line(content)
        else None
    )
    value = drawn(st.sampled_from(lines)) if lines else json.loads(content)
    _change(drawn, value)
    if lines is None:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    if drawn(st.booleans()):
        lines.append(drawn(st.sampled_from([*lines, drawn(VALUES)])))
    return "".join(json.dumps(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")


def _by_line(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content.split(b"\n")[0]), dict)
    except ValueError:
        return False


def _change(drawn: Callable[[Any], Any], value: Any) -> None:
    """Changes something within a JSON value."""
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
        if not keys:
            return
        key = drawn(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and drawn(st.integers(0, 3)):
            place = place[key]
            continue
        kind = drawn(st.sampled_from(["replace", "replace", "remove", "put in"]))
        if kind == "replace" or isinstance(place, list):
            place[key] = drawn(VALUES)
        elif kind == "remove":
            del place[key]
        else:
            place[drawn(st.text(max_size=8))] = drawn(VALUES)
        return


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """A file's content, damaged by its bytes, or by its values if it is JSON."""
    try:
        json.loads(content.split(b"\n")[0] if _by_line(content) else content)
    except (ValueError, UnicodeError):
        return damaged_bytes(content)
    return damaged_json(content) | damaged_bytes(content)


# --- readers


@dataclass(frozen=True)
class Reader:
    """Something that reads files."""

    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], Any]
    """Reads an input, which it first writes where it belongs."""
    named: Callable[[Any], tuple[str, ...]]
    """Of these words a refusal must say one: the file, or the key; empty where any key of the configuration will do."""
    share: float = 1.0
    """How many inputs it gets, against the others: fewer where one takes long."""


def readers(folder: Path) -> list[Reader]:
    """All of them, working below `folder`."""
    private = ["privacy.unit=client", "server.num_rounds=2", "attack.every=1", "method.name=fedit"]
    run_folder = run(load("", [*SMALL, *private, f"out={folder / 'run'}"]), display=False).out
    return [
        _config(folder),
        _space(folder),
        *_data(folder),
        _questions(folder),
        _checkpoint(folder),
        _adapter(folder),
        *[_of_a_run(run_folder, name) for name in sorted({path.name for path in run_folder.iterdir() if path.is_file()} | set(ADDED))],
        _verified(run_folder, folder / "verified"),
        *_compared(run_folder, folder / "compared"),
        _results(folder / "sweep"),
        _journal(folder),
    ]


def _config(folder: Path) -> Reader:
    path = folder / "config.yaml"
    # The long ones list comparisons of a hundred runs, each of which is checked: seconds an input.
    shipped = [content for source in sorted((ROOT / "configs").glob("*.yaml")) if len(content := source.read_bytes()) < 2500]
    words = st.lists(
        st.text(max_size=12) | st.builds(lambda key, value: f"{key}={value}", st.sampled_from(sorted(draw.FLAT_DEFAULTS)), VALUES),
        max_size=3,
    )
    drawn = st.integers(0, 2**32).map(lambda number: draw.drawn_file(random.Random(number)))
    contents = (
        st.sampled_from(shipped).flatmap(damaged_bytes)
        | drawn
        | VALUES.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))
    )

    def read(given: tuple[bytes, list[str]]) -> Any:
        path.write_bytes(given[0])
        config = load(str(path), given[1])
        return draw.comparison(config) if config.compare else config

    return Reader("configurations", st.tuples(contents, words), read, lambda given: (), share=3.0)


def _space(folder: Path) -> Reader:
    keys = st.sampled_from(sorted(draw.FLAT_DEFAULTS)) | st.text(max_size=8)
    axis = (
        st.lists(SCALARS, max_size=3)
        | st.dictionaries(st.sampled_from(["uniform", "loguniform", "randint", "x"]), st.lists(SCALARS, max_size=3), max_size=2)
        | VALUES
    )
    spaces = st.dictionaries(keys, axis, max_size=3) | VALUES
    searches = st.sampled_from(["grid", "random", "optuna"])
    path = folder / "space.yaml"

    def read(given: tuple[Any, str]) -> Any:
        path.write_bytes(json.dumps({"sweep": {"space": given[0], "search": given[1], "num_samples": 3}}).encode("utf-8", "surrogatepass"))
        config = load(str(path))
        if not config.sweep.space:
            return None
        check_sweep(config)
        points = {"grid": grid_points, "optuna": probe_points, "random": lambda c: random_points(c, num=3)}[given[1]](config)
        return check_points(config, points)

    return Reader("sweep spaces", st.tuples(spaces, searches), read, lambda given: (), share=1.5)


ROWS = b'{"instruction": "Say it.", "response": "It.", "label": "a"}\n{"instruction": "Again.", "response": "It again.", "label": "b"}\n'
CHATS = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n' * 2
TABLE = b'instruction,response,label\nSay it.,It.,a\n"Again, please","It\nagain",b\n'


def _data(folder: Path) -> list[Reader]:
    found = []
    for name, content in {
        "a.jsonl": ROWS,
        "chats.jsonl": CHATS,
        "a.json": json.dumps([json.loads(x) for x in ROWS.splitlines()]).encode(),
        "a.csv": TABLE,
        "a.tsv": TABLE.replace(b",", b"\t"),
        "a.jsonl.gz": gzip.compress(ROWS, mtime=0),
        "a.parquet": _parquet(),
    }.items():
        path = folder / name

        def read(given: bytes, path: Path = path) -> Any:
            path.write_bytes(given)
            return read_source(DataConfig(source="jsonl", path=str(path)))

        found.append(
            Reader(
                f"data: {name}", damaged(content) | st.binary(max_size=60), read, lambda given, path=path: (path.name, "data."), share=0.7
            )
        )
    return found


def _parquet() -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in ROWS.splitlines()]), stream)
    return stream.getvalue()


def _questions(folder: Path) -> Reader:
    path = folder / "questions.jsonl"
    content = b'{"question": "Which?", "options": {"A": "a", "B": "b"}, "answer_idx": "A"}\n' * 2

    def read(given: bytes) -> Any:
        path.write_bytes(given)
        return read_choices(path, form="medqa")

    return Reader("data: questions", damaged(content), read, lambda given: (path.name,), share=0.7)


def _checkpoint(folder: Path) -> Reader:
    rng = np.random.default_rng(0)
    arrays = {k: {"adapter": rng.standard_normal(6).astype(np.float32)} for k in range(2)}
    records = {k: [{"instruction": "a", "response": "b"}] for k in range(2)}
    snapshot = Snapshot(
        1,
        {"seed": 0},
        arrays[0]["adapter"],
        arrays,
        records,
        [{"round_index": 0}],
        [{"client_id": 0}],
        1.0,
        {"momentum": arrays[1]["adapter"]},
    )
    save(folder / "whole", snapshot)
    (whole,) = (folder / "whole").iterdir()
    contents = {path.name: path.read_bytes() for path in whole.iterdir()}
    inputs = st.sampled_from(sorted(contents)).flatmap(lambda name: st.tuples(st.just(name), damaged(contents[name]), st.booleans()))
    there = folder / "state" / whole.name

    def read(given: tuple[str, bytes, bool]) -> Any:
        shutil.rmtree(there, ignore_errors=True)
        there.mkdir(parents=True)
        for name, content in (contents | {given[0]: given[1]}).items():
            (there / name).write_bytes(content)
        if given[2]:
            _sign(there)
        return load_checkpoint(there)

    return Reader("checkpoints", inputs, read, lambda given: tuple(contents), share=2.0)


def _sign(there: Path) -> None:
    """Makes the checksums of a checkpoint anew, where its manifest is one."""
    try:
        manifest = json.loads((there / MANIFEST).read_bytes())
        manifest.pop("sha256", None)
        manifest["files"] = (
            {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in there.iterdir() if path.name != MANIFEST}
            if isinstance(manifest["files"], dict)
            else manifest["files"]
        )
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        (there / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest}))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, UnicodeError):
        return


def _adapter(folder: Path) -> Reader:
    lm = build_language_model(load_base_model("tiny"), rank=2, alpha=8.0, dropout=0.0, target_modules=["q_proj"])
    place = folder / "adapter"
    save_adapter(
        place, initial_adapter(lm.layout, seed=0), lm.layout, base_model="tiny", rank=2, alpha=8.0, dropout=0.0, target_modules=["q_proj"]
    )
    path = place / files.TENSORS
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size]

    def headed(changed: bytes) -> bytes:
        return len(changed).to_bytes(8, "little") + changed + content[8 + size :]

    def read(given: bytes) -> Any:
        path.write_bytes(given)
        return load_adapter(place, lm.layout)

    return Reader("adapters", damaged_bytes(content) | damaged(header).map(headed), read, lambda given: (files.TENSORS,))


ADDED = {
    files.AUDIT: json.dumps({"membership": {"loss": {"auc": 0.5}}, "exposure": {"by_round": []}, "roc": {"loss": {}}}).encode(),
    files.JUDGE: json.dumps({"made_from": {"kind": "endpoint", "model": "m"}, "words": "It wins.", "tally": None}).encode(),
    files.JUDGED: b'{"record_id": 0, "owner": null, "outcome": "win", "first": [1, 2, 3, 4], "second": [1, 2, 3, 4]}\n' * 2,
    files.SYNTHETIC: b'{"client_id": 0, "round_index": 0, "instruction": "a", "response": "b", "kept": true, "verdict": "kept"}\n' * 2,
}
"""Files of a run that the one of these inputs does not have."""


def _of_a_run(folder: Path, name: str) -> Reader:
    """Everything that a run's folder says, with one of its files damaged."""
    path = folder / name
    content = ADDED.get(name, b"") or path.read_bytes()

    def read(given: bytes) -> Any:
        path.write_bytes(given)
        try:
            of_run = RunFolder(folder)
            return so_far(folder), of_run.ledger, of_run.audit, of_run.judge, of_run.judged, of_run.answers, of_run.damage
        finally:
            path.unlink() if name in ADDED else path.write_bytes(content)

    named = () if name == files.CONFIG else (name,)
    return Reader(f"run: {name}", damaged(content), read, lambda given: named, share=2.0 if name == files.LEDGER else 0.4)


def _verified(source: Path, folder: Path) -> Reader:
    """`raysim verify`, which answers with its checks whatever it finds."""
    shutil.copytree(source, folder)
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != files.CONFIG}
    inputs = st.sampled_from(sorted(contents)).flatmap(lambda name: st.tuples(st.just(name), damaged(contents[name])))

    def read(given: tuple[str, bytes]) -> Any:
        (folder / given[0]).write_bytes(given[1])
        try:
            checks = verify(folder)
        finally:
            (folder / given[0]).write_bytes(contents[given[0]])
        assert all(check.detail.count("\n") == 0 for check in checks), [check.detail for check in checks]
        return checks

    return Reader("verify", inputs, read, lambda given: (given[0],), share=0.1)


def _compared(source: Path, folder: Path) -> list[Reader]:
    """A comparison that decides claims: its own files, which name folders of runs, and what was decided."""
    members = []
    for entry in ("base", "fedit", "fedpit"):
        shutil.copytree(source, folder / f"{entry}-seed-0")
        members.append({"entry": entry, "seed": 0, "folder": f"{entry}-seed-0"})
    comparison = json.dumps({"claims": "fedpit", "members": members}).encode()
    claims = json.dumps([{"verdict": "holds", "claim": "A is above B.", "readings": []}] * 3).encode()
    found = []
    for name, content, what in ((files.COMPARISON, comparison, "comparison"), (files.CLAIMS, claims, "claims")):
        path = folder / name
        path.write_bytes(content)

        def read(given: bytes, path: Path = path, content: bytes = content) -> Any:
            path.write_bytes(given)
            try:
                compared = ComparisonFolder(folder)
                return compared.verdicts, [place.relative_to(folder) for place in compared.run_folders], load_runs(folder)
            finally:
                path.write_bytes(content)

        # A member that names a folder without a run is refused by the name of that.
        found.append(Reader(f"{what} files", damaged(content), read, lambda given, name=name: (name, files.CONFIG, str(folder)), share=0.7))
    return found


def _results(folder: Path) -> Reader:
    path = write_sweep(folder, grid_rows({"lora.rank": [2, 4], "privacy.target_epsilon": [1.0, 3.0]})) / files.RESULTS
    content = path.read_bytes()

    def read(given: bytes) -> Any:
        path.write_bytes(given)
        swept = ["lora.rank", "privacy.target_epsilon"]
        return aggregate(read_results(path, swept=swept), swept=swept)

    return Reader("results of sweeps", damaged_bytes(content), read, lambda given: (files.RESULTS,))


def _journal(folder: Path) -> Reader:
    path = folder / files.JOURNAL
    content = b"".join(json.dumps({"key": str(i) * 64, "reply": {"choices": []}, "seconds": 0.1}).encode() + b"\n" for i in range(3))

    def read(given: bytes) -> Any:
        path.write_bytes(given)
        with Journal(path) as journal:
            return journal.reply("0" * 64)

    return Reader("journals of judges", damaged(content), read, lambda given: (files.JOURNAL,), share=0.7)


# --- what became of it


def outcome(reader: Reader, given: Any) -> str | draw.Fault:
    """`result`, `refused`, or the fault."""
    try:
        reader.read(given)
    except ValueError as error:
        text, named = str(error), reader.named(given)
        if "\n" in text or not text.strip() or isinstance(error, UnicodeError | json.JSONDecodeError):
            return draw.Fault(given, f"{type(error).__name__} that is no refusal: {text[:300]!r}")
        if named and not any(word in text for word in named):
            return draw.Fault(given, f"names neither file nor key: {text[:300]!r}")
        return "refused"
    except Exception:
        return draw.Fault(given, traceback.format_exc())
    return "result"


def fed(reader: Reader, num: int, *, number: int) -> tuple[collections.Counter[str], list[draw.Fault]]:
    """What became of `num` inputs drawn for a reader."""
    counts, faults = collections.Counter[str](), list[draw.Fault]()

    @seed(number)
    @settings(max_examples=num, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(reader.inputs)
    def one(drawn: Any) -> None:
        found = outcome(reader, drawn)
        counts["fault" if isinstance(found, draw.Fault) else found] += 1
        faults.extend([found] if isinstance(found, draw.Fault) else [])

    one()
    return counts, faults


@contextmanager
def watched(folder: Path) -> Iterator[Callable[[], list[str]]]:
    """Inside, what is returned says which files came to lie beside `folder` in its parent."""
    before = set(os.listdir(folder.parent))
    yield lambda: sorted(set(os.listdir(folder.parent)) - before)


def shares(all_readers: list[Reader], num: int) -> Mapping[str, int]:
    """How many of `num` inputs each reader gets."""
    whole = sum(reader.share for reader in all_readers)
    return {reader.name: int(-(-num * reader.share // whole)) for reader in all_readers}


def main() -> int:
    """The command; status 1 if there was a fault."""
    parser = argparse.ArgumentParser(description="feed damaged and invented files to everything that reads one")
    parser.add_argument("--inputs", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name begins so")
    arguments = parser.parse_args()
    total, all_faults = collections.Counter[str](), list[tuple[str, draw.Fault]]()
    with tempfile.TemporaryDirectory() as parent:
        (folder := Path(parent) / "work").mkdir()
        with watched(folder) as strays:
            chosen = [reader for reader in readers(folder) if reader.name.startswith(arguments.only)]
            each = shares(chosen, arguments.inputs)
            print(f"{'reader':28}{'inputs':>8}{'results':>9}{'one-line refusals':>19}{'faults':>8}{'seconds':>9}")
            for reader in chosen:
                started = time.monotonic()
                counts, faults = fed(reader, each[reader.name], number=arguments.seed)
                total += counts
                all_faults += [(reader.name, fault) for fault in faults]
                print(
                    f"{reader.name:28}{counts.total():8}{counts['result']:9}{counts['refused']:19}{counts['fault']:8}{time.monotonic() - started:9.1f}",
                    flush=True,
                )
            assert strays() == [], "nothing is written elsewhere"
    print(f"{'all':28}{total.total():8}{total['result']:9}{total['refused']:19}{total['fault']:8}")
    for name, fault in all_faults[:30]:
        print(f"--- {name}: {fault.given!r:.400}\n{fault.what[-1500:]}")
    return 1 if all_faults else 0


if __name__ == "__main__":
    sys.exit(main())
