"""Everything a run needs to go on, written after each round so that a crash at any moment loses at most that round.

A checkpoint is a folder `state/round-00003`, complete or absent: it is written beside its place, flushed, and renamed;
`manifest.json` holds a SHA-256 for each file and one for itself. A client's state that has not changed for two rounds is a hard link to the
checkpoint before the last, which is about to go: so no two checkpoints that are kept share a file, and a flipped bit damages one.
Left out: random generator states. There are none: every stream is named by its round, so nothing has to be restored.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
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
        if name.startswith("client-") and name.endswith(".safetensors"):
            client_id = int(name.removeprefix("client-").removesuffix(".safetensors"))
            arrays[client_id] = _tensors(contents[name], name=name)
            records[client_id] = _check_rows(_json(contents[_client_name(client_id, "json")], name=name), name=name)
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
    for client_id, arrays in sorted(snapshot.client_arrays.items()):
        for kind, content in {"safetensors": _packed(arrays), "json": _text(snapshot.client_records[client_id])}.items():
            name = _client_name(client_id, kind)
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
    """Whether a file is one of the two of a client, and the other is there."""
    number = name.removeprefix("client-").partition(".")[0]
    if not (number.isascii() and number.isdecimal()):
        return False
    both = {_client_name(int(number), kind) for kind in ("safetensors", "json")}
    return name in both and both <= set(names)


def _name(num_rounds: int) -> str:
    return f"round-{num_rounds:05d}"


def _client_name(client_id: int, kind: str) -> str:
    return f"client-{client_id:05d}.{kind}"


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
