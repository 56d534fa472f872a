"""Everything a run needs to go on, written after each round so that a crash at any moment loses at most that round.

A checkpoint is a folder `state/round-00003`, complete or absent: it is written beside its place, flushed, and renamed;
`manifest.json` holds a SHA-256 for each file and one for itself. A client's state that has not changed for two rounds is a hard link to the
checkpoint before the last, which is about to go: so no two checkpoints that are kept share a file, and a flipped bit damages one.
Clients that keep something have two files each while they are few, and more of them share those of a span of ids: a flush to the disk and a hash for
every one of ten thousand would take longer than a round.
Left out: random generator states. There are none: every stream is named by its round, so nothing has to be restored.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load
from safetensors.numpy import save as serialised

from raysim import storage

KEEP = 2
"""Checkpoints kept: the newest, and the one to fall back to if it turns out damaged."""
MANIFEST, SERVER, TABLES = "manifest.json", "server.safetensors", "records.json"
"""The files of a checkpoint beside those of the clients."""
MOST_FILES = 64
"""Spans of ids that have files of their own."""
ROWS = ("records", "synthetic", "answers")
"""The lists of objects in `records.json`."""


@dataclass(frozen=True)
class Snapshot:
    """A run after `num_rounds` rounds."""

    num_rounds: int
    config_key: dict[str, Any]
    """The part of the configuration that results depend on."""
    adapter: np.ndarray
    """The released adapter, float32 of shape (P,)."""
    client_arrays: dict[int, dict[str, np.ndarray]]
    """What each client keeps: arrays by name."""
    client_records: dict[int, list[dict[str, Any]]]
    """What each client keeps: records."""
    records: list[dict[str, Any]]
    """The lines of rounds.jsonl so far."""
    synthetic: list[dict[str, Any]]
    """The lines of synthetic.jsonl so far."""
    clip_norm: float | None = None
    """The next round's bound on updates, where clipping is adaptive."""
    server_arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """What the server remembers beside the adapter: arrays by name (none of them `adapter`)."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """The lines of answers.jsonl so far."""


def save(state_dir: Path, snapshot: Snapshot) -> None:
    """Writes the snapshot as `state_dir/round-NNNNN`, atomically, and removes all but the newest `KEEP`.

    Errors: OSError naming a file; what was there before stays. A run's folder that has gone away is not made anew: half of it would be missing.
    """
    state_dir.mkdir(exist_ok=True)
    target = state_dir / _name(snapshot.num_rounds)
    for left in state_dir.glob(".writing-*"):  # by a process that was killed: a folder has one run at a time
        shutil.rmtree(left)
    scratch = state_dir / f".writing-{os.getpid()}"
    try:
        _write(scratch, snapshot, older=state_dir / _name(snapshot.num_rounds - KEEP))
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # where the disk was full
    storage.flush(state_dir)
    complete = _complete(state_dir)
    newer = [path for path in complete if path.name > target.name]  # damaged ones, passed over when this run resumed
    for old in [*complete[: -KEEP - len(newer)], *newer]:
        shutil.rmtree(old)


def load_latest(state_dir: Path, *, misfit: Callable[[Snapshot], str] = lambda snapshot: "") -> tuple[Snapshot | None, list[str]]:
    """The newest snapshot that is whole, or None; and one line for each damaged checkpoint that was passed over.

    `misfit` says why a snapshot cannot be of the run that asks, whatever its checksums; empty for nothing.
    """
    problems: list[str] = []
    for folder in reversed(_complete(state_dir)):
        try:
            snapshot = load_checkpoint(folder)
            if damage := misfit(snapshot):
                raise ValueError(damage)
            return snapshot, problems
        except ValueError as error:
            problems.append(f"checkpoint {folder.name} is damaged ({error}); going back to the one before")
    return None, problems


def load_checkpoint(folder: Path) -> Snapshot:
    """The snapshot in a checkpoint's folder.

    Errors: ValueError saying what is damaged: every file has the hash that the manifest says, holds what such a file holds, and there is no other.
    """
    contents = _checked_contents(folder)
    manifest = _object(contents[MANIFEST], name=MANIFEST)
    tables, server = _object(contents[TABLES], name=TABLES), _tensors(contents[SERVER], name=SERVER)
    for key in ROWS:
        _check_rows(tables.get(key), name=f"{TABLES}: {key}")
    arrays: dict[int, dict[str, np.ndarray]] = {}
    records: dict[int, list[dict[str, Any]]] = {}
    for name in sorted(contents):
        if (span := _span_of(name)) and name.endswith(".safetensors"):
            rows = _json(contents[_client_name(span, "json")], name=name)
            found = _unpacked(span, _tensors(contents[name], name=name), rows, name=name)
            arrays |= {client_id: own for client_id, (own, _) in found.items()}
            records |= {client_id: said for client_id, (_, said) in found.items()}
    clip_norm = tables.get("clip_norm")
    if not (clip_norm is None or isinstance(clip_norm, float)) or "adapter" not in server:
        raise ValueError(f"{TABLES if 'adapter' in server else SERVER} lacks what a checkpoint holds")
    return Snapshot(
        num_rounds=manifest["num_rounds"],
        config_key=manifest["config_key"],
        adapter=server.pop("adapter"),
        client_arrays=arrays,
        client_records=records,
        clip_norm=clip_norm,
        server_arrays=server,
        **{key: tables[key] for key in ROWS},
    )


def _write(scratch: Path, snapshot: Snapshot, *, older: Path) -> None:
    """Writes the snapshot's files, those of clients as links into the checkpoint `older` where they are whole there and the same."""
    assert "adapter" not in snapshot.server_arrays, "the adapter has a field of its own"
    scratch.mkdir()
    contents = {SERVER: _packed({"adapter": snapshot.adapter} | snapshot.server_arrays)}
    tables = {"records": snapshot.records, "synthetic": snapshot.synthetic, "answers": snapshot.answers, "clip_norm": snapshot.clip_norm}
    contents[TABLES] = _text(tables)
    hashes = {}
    for name, content in contents.items():
        hashes[name] = _put(scratch / name, content)
    for span, ids in _spans(sorted(snapshot.client_arrays)).items():
        arrays, rows = _together(span, {k: (snapshot.client_arrays[k], snapshot.client_records[k]) for k in ids})
        for kind, content in {"safetensors": _packed(arrays), "json": _text(rows)}.items():
            name = _client_name(span, kind)
            hashes[name] = _put(scratch / name, content, older=older / name)
    manifest = {"num_rounds": snapshot.num_rounds, "config_key": snapshot.config_key, "files": hashes}
    storage.write_bytes(scratch / MANIFEST, _text(manifest | {"sha256": _json_sha256(manifest)}), private=True)


def _put(path: Path, content: bytes, *, older: Path | None = None) -> str:
    """Writes a file, or links it to `older` if that holds the very same; its hash."""
    if older is not None and older.is_file() and older.read_bytes() == content:
        try:
            os.link(older, path)
        except OSError:  # a file system without hard links
            older = None
    else:
        older = None
    if older is None:
        storage.write_bytes(path, content, private=True)
    return hashlib.sha256(content).hexdigest()


def _checked_contents(folder: Path) -> dict[str, bytes]:
    """The bytes of a checkpoint's files by name.

    Errors: ValueError naming the first that is missing, too much, or has another hash than the manifest says.
    """
    try:
        manifest = _object((folder / MANIFEST).read_bytes(), name=MANIFEST)
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror or type(error).__name__}") from None
    stated = manifest.pop("sha256", None)
    if _json_sha256(manifest) != stated:
        raise ValueError(f"{MANIFEST} has another checksum")
    hashes = manifest.get("files")
    if not isinstance(hashes, dict) or not isinstance(manifest.get("config_key"), dict) or not {SERVER, TABLES} <= set(hashes):
        raise ValueError(f"{MANIFEST} does not list what a checkpoint holds")
    if type(manifest.get("num_rounds")) is not int or folder.name != _name(manifest["num_rounds"]):
        raise ValueError(f"{MANIFEST} says num_rounds={manifest.get('num_rounds')!r}")
    contents = {}
    there = {path.name for path in folder.iterdir()}
    if odd := sorted((there - {MANIFEST}) ^ set(hashes)):
        raise ValueError(f"{odd[0]} is {'missing' if odd[0] in hashes else 'not in its manifest'}")
    for name, expected in hashes.items():
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror or type(error).__name__}") from None
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise ValueError(f"{name} has another checksum")
    odd_names = [name for name in hashes if name not in (SERVER, TABLES) and not _is_client_pair(name, hashes)]
    if odd_names:
        raise ValueError(f"{odd_names[0]} is no file of a checkpoint")
    return contents | {MANIFEST: (folder / MANIFEST).read_bytes()}


def _is_client_pair(name: str, names: Mapping[str, str]) -> bool:
    """Whether a file is one of the two of a client, or of a span of them, and the other is there."""
    span = _span_of(name)
    both = {_client_name(span, kind) for kind in ("safetensors", "json")} if span else set()
    return name in both and both <= set(names)


Span = tuple[int, int]
"""The first and the last id of the clients that share a file, each of which may keep something."""


def _spans(client_ids: Sequence[int]) -> dict[Span, list[int]]:
    """The clients by the span of ids in which they lie: one each while they are few. The spans stay as more clients come, until their width doubles."""
    width = 1
    while len(client_ids) > MOST_FILES * width:
        width *= 2
    spans: dict[Span, list[int]] = {}
    for client_id in client_ids:
        first = client_id - client_id % width
        spans.setdefault((first, first + width - 1), []).append(client_id)
    return spans


def _together(span: Span, kept: Mapping[int, tuple[dict[str, np.ndarray], list[dict[str, Any]]]]) -> tuple[dict[str, np.ndarray], Any]:
    """What the clients of a span keep as one set of arrays and one of records: a client's own where it is alone, else by its id."""
    if span[0] == span[1]:
        return kept[span[0]]
    arrays = {f"{client_id}/{name}": array for client_id, (own, _) in kept.items() for name, array in own.items()}
    return arrays, {str(client_id): rows for client_id, (_, rows) in kept.items()}


def _unpacked(
    span: Span, arrays: dict[str, np.ndarray], rows: Any, *, name: str
) -> dict[int, tuple[dict[str, np.ndarray], list[dict[str, Any]]]]:
    """The inverse of `_together`.

    Errors: ValueError naming the file if it holds what no file of that span does.
    """
    if span[0] == span[1]:
        return {span[0]: (arrays, _check_rows(rows, name=name))}
    if not isinstance(rows, dict) or not all(_is_in(key, span) for key in rows):
        raise ValueError(f"{name} holds other clients than its name says")
    found: dict[int, tuple[dict[str, np.ndarray], list[dict[str, Any]]]] = {
        int(key): ({}, _check_rows(own, name=name)) for key, own in rows.items()
    }
    for key, array in arrays.items():
        owner, slash, own_name = key.partition("/")
        if not (slash and owner in rows):
            raise ValueError(f"{name} holds an array of nobody ({key})")
        found[int(owner)][0][own_name] = array
    return found


def _is_in(key: str, span: Span) -> bool:
    return key.isascii() and key.isdecimal() and span[0] <= int(key) <= span[1]


def _name(num_rounds: int) -> str:
    return f"round-{num_rounds:05d}"


def _client_name(span: Span, kind: str) -> str:
    first, last = span
    return f"client-{first:05d}.{kind}" if first == last else f"clients-{first:05d}-{last:05d}.{kind}"


def _span_of(name: str) -> Span | None:
    """The span of the clients whose file has this name; None for another file's."""
    found = re.fullmatch(r"client-([0-9]+)\.\w+|clients-([0-9]+)-([0-9]+)\.\w+", name, re.ASCII)
    if found is None:
        return None
    one, first, last = found.groups()
    return (int(one), int(one)) if one else (int(first), int(last))


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    return bytes(serialised({key: np.ascontiguousarray(value) for key, value in arrays.items()}))


def _tensors(content: bytes, *, name: str) -> dict[str, np.ndarray]:
    try:
        return dict(load(content))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} holds no tensors ({type(error).__name__})") from None


def _json(content: bytes, *, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({type(error).__name__})") from None


def _object(content: bytes, *, name: str) -> dict[str, Any]:
    value = _json(content, name=name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds no object but {type(value).__name__}")
    return value


def _check_rows(rows: Any, *, name: str) -> list[dict[str, Any]]:
    """`rows` itself, if it is a list of objects."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{name} holds no list of objects")
    return rows


def _complete(state_dir: Path) -> list[Path]:
    return sorted(path for path in state_dir.glob("round-*") if path.is_dir())


def _text(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", errors="backslashreplace")


def _json_sha256(value: Any) -> str:
    try:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ValueError(f"{MANIFEST} is nested too deeply") from None
