"""Everything a run needs to go on, written after each round so that a crash at any moment loses at most that round.

A checkpoint is a folder `state/round-00003`, complete or absent: it is written beside its place, flushed, and renamed;
`manifest.json` holds a SHA-256 for each file and one for itself. Client states that a round did not change are hard links to the last one.
Left out: random generator states. There are none: every stream is named by its round, so nothing has to be restored.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

KEEP = 2
"""Checkpoints kept: the newest, and the one to fall back to if it turns out damaged."""


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


def save(state_dir: Path, snapshot: Snapshot, *, changed_clients: set[int]) -> None:
    """Writes the snapshot as `state_dir/round-NNNNN`, atomically, and removes all but the newest `KEEP`.

    Clients not in `changed_clients` must stand in the previous checkpoint as they are in the snapshot.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    target = state_dir / f"round-{snapshot.num_rounds:05d}"
    for left in state_dir.glob(".writing-*"):  # by a process that was killed: a folder has one run at a time
        shutil.rmtree(left)
    scratch = state_dir / f".writing-{os.getpid()}"
    scratch.mkdir()
    assert "adapter" not in snapshot.server_arrays, "the adapter has a field of its own"
    server = {"adapter": snapshot.adapter} | snapshot.server_arrays
    save_file({key: np.ascontiguousarray(value) for key, value in server.items()}, scratch / "server.safetensors")
    tables = {"records": snapshot.records, "synthetic": snapshot.synthetic, "answers": snapshot.answers, "clip_norm": snapshot.clip_norm}
    _write_json(scratch / "records.json", tables)
    previous = state_dir / f"round-{snapshot.num_rounds - 1:05d}"
    for client_id in sorted(snapshot.client_arrays):
        _save_client(scratch, client_id, snapshot, previous=None if client_id in changed_clients else previous)
    files = {path.name: _sha256(path) for path in sorted(scratch.iterdir())}
    manifest = {"num_rounds": snapshot.num_rounds, "config_key": snapshot.config_key, "files": files}
    _write_json(scratch / "manifest.json", manifest | {"sha256": _json_sha256(manifest)})
    for path in scratch.iterdir():
        _flush(path)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    _flush(state_dir)
    complete = _complete(state_dir)
    newer = [path for path in complete if path.name > target.name]  # damaged ones, passed over when this run resumed
    for old in [*complete[: -KEEP - len(newer)], *newer]:
        shutil.rmtree(old)


def load_latest(state_dir: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest snapshot whose checksums hold, or None; and one line for each damaged checkpoint that was passed over."""
    problems: list[str] = []
    for folder in reversed(_complete(state_dir)):
        damage = _damage(folder)
        if damage is None:
            return _load(folder), problems
        problems.append(f"checkpoint {folder.name} is damaged ({damage}); going back to the one before")
    return None, problems


def _load(folder: Path) -> Snapshot:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    tables = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    server = load_file(folder / "server.safetensors")
    arrays: dict[int, dict[str, np.ndarray]] = {}
    records: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("client-*.safetensors")):
        client_id = int(path.stem.removeprefix("client-"))
        arrays[client_id] = load_file(path)
        records[client_id] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return Snapshot(
        num_rounds=manifest["num_rounds"],
        config_key=manifest["config_key"],
        adapter=server.pop("adapter"),
        client_arrays=arrays,
        client_records=records,
        records=tables["records"],
        synthetic=tables["synthetic"],
        clip_norm=tables["clip_norm"],
        server_arrays=server,
        answers=tables.get("answers", []),  # a checkpoint from before they were kept has none
    )


def _save_client(scratch: Path, client_id: int, snapshot: Snapshot, *, previous: Path | None) -> None:
    name = f"client-{client_id:05d}"
    if previous is not None:
        for suffix in (".safetensors", ".json"):
            os.link(previous / (name + suffix), scratch / (name + suffix))
        return
    arrays = {key: np.ascontiguousarray(value) for key, value in snapshot.client_arrays[client_id].items()}
    save_file(arrays, scratch / f"{name}.safetensors")
    _write_json(scratch / f"{name}.json", snapshot.client_records[client_id])


def _damage(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected, files = manifest.pop("sha256"), manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"manifest.json: {type(error).__name__}"
    if _json_sha256(manifest) != expected:
        return "manifest.json has another checksum"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != expected:
            return f"{name} has another checksum"
    return None


def _complete(state_dir: Path) -> list[Path]:
    return sorted(path for path in state_dir.glob("round-*") if path.is_dir())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8", errors="backslashreplace")


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
