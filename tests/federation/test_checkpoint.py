"""Checkpoints: what was saved comes back bit for bit, damage is found and passed over, a crash in the middle does no harm."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as serialised

from raysim.federation.checkpoint import KEEP, MOST_FILES, Snapshot, _spans, load_latest, save


def snapshot(num_rounds: int, *, client_ids: tuple[int, ...] = (0, 3)) -> Snapshot:
    rng = np.random.default_rng(num_rounds)
    return Snapshot(
        num_rounds=num_rounds,
        config_key={"seed": 0, "lora.rank": 4, "model.name": "tiny"},
        adapter=rng.standard_normal(50).astype(np.float32),
        client_arrays={k: {"adapter": rng.standard_normal(50).astype(np.float32), "other": np.arange(3)} for k in client_ids},
        client_records={k: [{"instruction": f"ünï {k}", "response": "b\nc"}] for k in client_ids},
        records=[{"round_index": i, "loss": 0.1 + i, "eval": None} for i in range(num_rounds)],
        synthetic=[{"client_id": 0, "kept": True}],
        server_arrays={"momentum": rng.standard_normal(50), "variance": rng.standard_normal(50)},
    )


def assert_equal(found: Snapshot | None, expected: Snapshot) -> None:
    assert found is not None
    assert found.adapter.dtype == np.float32
    assert found.adapter.tobytes() == expected.adapter.tobytes()
    assert found.client_arrays.keys() == expected.client_arrays.keys()
    for client_id, arrays in expected.client_arrays.items():
        assert {name: a.tobytes() for name, a in found.client_arrays[client_id].items()} == {n: a.tobytes() for n, a in arrays.items()}
    assert {name: (a.dtype, a.tobytes()) for name, a in found.server_arrays.items()} == {
        name: (a.dtype, a.tobytes()) for name, a in expected.server_arrays.items()
    }
    bare = replace(expected, client_arrays={}, server_arrays={})
    assert replace(found, adapter=expected.adapter, client_arrays={}, server_arrays={}) == bare


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_two(folder: Path) -> tuple[Snapshot, Snapshot]:
    """Two rounds in which every client changed."""
    first, second = snapshot(1), snapshot(2)
    save(folder, first)
    save(folder, second)
    return first, second


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "state") == (None, [])
    first, second = save_two(tmp_path / "state")
    found, problems = load_latest(tmp_path / "state")
    assert problems == []
    assert_equal(found, second)
    shutil.rmtree(tmp_path / "state" / "round-00002")
    assert_equal(load_latest(tmp_path / "state")[0], first)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for num_rounds in range(1, 6):
        save(tmp_path, snapshot(num_rounds))
        assert names(tmp_path) == [f"round-{n:05d}" for n in range(max(1, num_rounds - KEEP + 1), num_rounds + 1)]


def test_a_flipped_byte_anywhere_is_found_and_the_one_before_serves(tmp_path: Path) -> None:
    """Every file of the newest checkpoint, at several places in it; in the manifest at every byte."""
    first, second = save_two(tmp_path)
    newest = tmp_path / "round-00002"
    assert len(names(newest)) == 7
    for name in names(newest):
        content = (newest / name).read_bytes()
        places = range(len(content)) if name == "manifest.json" else sorted({0, len(content) // 3, len(content) // 2, len(content) - 1})
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 0x01
            (newest / name).write_bytes(bytes(damaged))
            found, problems = load_latest(tmp_path)
            assert_equal(found, first)
            assert len(problems) == 1, (name, place)
            assert "round-00002 is damaged" in problems[0]
        (newest / name).write_bytes(content)
    assert_equal(load_latest(tmp_path)[0], second)


@pytest.mark.parametrize("name", ["manifest.json", "records.json", "client-00003.json", "client-00000.safetensors", "server.safetensors"])
@pytest.mark.parametrize("truncated", [True, False])
def test_a_missing_or_truncated_file_is_found(tmp_path: Path, name: str, truncated: bool) -> None:
    first, _ = save_two(tmp_path)
    path = tmp_path / "round-00002" / name
    if truncated:
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()
    found, problems = load_latest(tmp_path)
    assert_equal(found, first)
    assert len(problems) == 1
    assert name in problems[0]


def test_a_run_that_fell_back_goes_on_and_replaces_the_damaged_one(tmp_path: Path) -> None:
    save_two(tmp_path)
    (tmp_path / "round-00002" / "records.json").write_text("{}")
    again = snapshot(2, client_ids=(0, 3, 5))
    save(tmp_path, again)
    found, problems = load_latest(tmp_path)
    assert problems == []
    assert_equal(found, again)


def test_a_run_that_starts_over_is_not_shadowed_by_damaged_later_rounds(tmp_path: Path) -> None:
    """All checkpoints damaged: the run starts from nothing, and what it saves is what is found."""
    for num_rounds in (3, 4):
        save(tmp_path, snapshot(num_rounds))
        (tmp_path / f"round-{num_rounds:05d}" / "server.safetensors").write_bytes(b"")
    found, problems = load_latest(tmp_path)
    assert found is None
    assert len(problems) == 2
    fresh = snapshot(1)
    save(tmp_path, fresh)
    assert names(tmp_path) == ["round-00001"]
    assert_equal(load_latest(tmp_path)[0], fresh)
    save(tmp_path, snapshot(2))
    assert names(tmp_path) == ["round-00001", "round-00002"]


def test_a_save_that_was_interrupted_does_no_harm(tmp_path: Path) -> None:
    """A folder half written by a process that died, or by one of our own number."""
    save_two(tmp_path)
    for leftover in (".writing-1", f".writing-{os.getpid()}"):
        shutil.copytree(tmp_path / "round-00001", tmp_path / leftover)
        (tmp_path / leftover / "server.safetensors").unlink()
        (tmp_path / leftover / "stray").write_text("x")
    found, problems = load_latest(tmp_path)
    assert_equal(found, snapshot(2))
    assert problems == []
    third = snapshot(3)
    save(tmp_path, third)
    assert_equal(load_latest(tmp_path)[0], third)
    assert "stray" not in names(tmp_path / "round-00003")


def test_checkpoints_that_are_kept_share_no_file_and_unchanged_clients_are_written_twice_at_most(tmp_path: Path) -> None:
    """So a flipped bit in either leaves the other; what goes is linked to what comes."""
    unchanged = snapshot(1).client_arrays
    inodes = []
    for num_rounds in range(1, 7):
        last = replace(snapshot(num_rounds), client_arrays=unchanged, client_records=snapshot(1).client_records)
        save(tmp_path, last)
        kept = [{path.stat().st_ino for path in folder.iterdir()} for folder in tmp_path.iterdir()]
        assert sum(map(len, kept)) == len(set().union(*kept))
        inodes.append((tmp_path / f"round-{num_rounds:05d}" / "client-00003.safetensors").stat().st_ino)
        assert_equal(load_latest(tmp_path)[0], last)
    assert len(set(inodes)) == 2


@pytest.mark.parametrize("newest", [True, False])
def test_a_flipped_bit_in_an_unchanged_client_damages_one_checkpoint_and_does_not_live_on(tmp_path: Path, newest: bool) -> None:
    unchanged = snapshot(1).client_arrays
    for num_rounds in (1, 2, 3):
        save(tmp_path, replace(snapshot(num_rounds), client_arrays=unchanged))
    path = tmp_path / f"round-0000{3 if newest else 2}" / "client-00003.safetensors"
    path.chmod(0o600)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    with path.open("r+b") as file:  # in place, as a disk does it: every link would have it
        file.write(damaged)
    found, problems = load_latest(tmp_path)
    assert found is not None
    assert (found.num_rounds, len(problems)) == ((2, 1) if newest else (3, 0))
    for num_rounds in (4, 5):
        save(tmp_path, replace(snapshot(num_rounds), client_arrays=unchanged))
    assert_equal(load_latest(tmp_path)[0], replace(snapshot(5), client_arrays=unchanged))
    shutil.rmtree(tmp_path / "round-00005")
    assert_equal(load_latest(tmp_path)[0], replace(snapshot(4), client_arrays=unchanged))


def signed(folder: Path, **changes: Any) -> None:
    """Changes a manifest, with a checksum that is right."""
    manifest = {key: value for key, value in json.loads((folder / "manifest.json").read_text()).items() if key != "sha256"} | changes
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}))


def resigned(folder: Path, name: str, content: bytes) -> None:
    """Puts a file into a checkpoint, with hashes that are right."""
    (folder / name).write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    signed(folder, files=files | {name: hashlib.sha256(content).hexdigest()})


ODD: dict[str, Callable[[Path], Any]] = {
    "a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "a number": lambda folder: (folder / "manifest.json").write_text("7"),
    "null": lambda folder: (folder / "manifest.json").write_text("null"),
    "deeply nested": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "an object that is deeply nested": lambda folder: (folder / "manifest.json").write_text('{"a":' * 900 + "1" + "}" * 900),
    "not UTF-8": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{"),
    "a folder": lambda folder: (folder / "manifest.json").rename(folder / "elsewhere").parent.joinpath("manifest.json").mkdir(),
    "an unlisted file": lambda folder: (folder / "client-00001.safetensors").write_bytes(b""),
    "an unlisted client": lambda folder: [
        shutil.copy(folder / f"client-00003.{k}", folder / f"client-00004.{k}") for k in ("json", "safetensors")
    ],
    "files that are a list": lambda folder: signed(folder, files=["server.safetensors"]),
    "no files": lambda folder: signed(folder, files={}),
    "99 rounds": lambda folder: signed(folder, num_rounds=99),
    "rounds that are text": lambda folder: signed(folder, num_rounds="2"),
    "settings that are a list": lambda folder: signed(folder, config_key=[]),
    "a file above": lambda folder: signed(folder, files={"../round-00001/records.json": "0"}),
    "records that are a list": lambda folder: resigned(folder, "records.json", b"[]"),
    "records of numbers": lambda folder: resigned(
        folder, "records.json", b'{"records": [1], "synthetic": [], "answers": [], "clip_norm": null}'
    ),
    "a clip norm that is text": lambda folder: resigned(
        folder, "records.json", b'{"records": [], "synthetic": [], "answers": [], "clip_norm": "1"}'
    ),
    "tensors that are none": lambda folder: resigned(folder, "server.safetensors", b"\x80\x04pickle"),
    "no adapter": lambda folder: resigned(folder, "server.safetensors", serialised({"other": np.zeros(3)})),
    "a client of one file": lambda folder: resigned(folder, "client-00009.json", b"[]"),
    "a stranger": lambda folder: resigned(folder, "notes.txt", b"hello"),
    "a client's records that are none": lambda folder: resigned(folder, "client-00003.json", b'{"a": 1}'),
}


@pytest.mark.parametrize("damage", ODD.values(), ids=list(ODD))
def test_an_odd_checkpoint_is_passed_over_in_one_line(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    first, _ = save_two(tmp_path)
    damage(tmp_path / "round-00002")
    found, problems = load_latest(tmp_path)
    assert_equal(found, first)
    assert len(problems) == 1
    assert len(problems[0]) < 200


def test_what_does_not_fit_the_run_is_passed_over(tmp_path: Path) -> None:
    first, second = save_two(tmp_path)
    found, problems = load_latest(tmp_path, misfit=lambda found: "too new" if found.num_rounds == 2 else "")
    assert_equal(found, first)
    assert problems == ["checkpoint round-00002 is damaged (too new); going back to the one before"]
    assert_equal(load_latest(tmp_path)[0], second)


def test_a_checkpoint_is_its_owner_s_alone(tmp_path: Path) -> None:
    save_two(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*/*")} == {0o600}


def test_arrays_need_not_be_contiguous_and_there_may_be_no_clients(tmp_path: Path) -> None:
    strided = replace(snapshot(1, client_ids=()), adapter=np.arange(100, dtype=np.float32)[::2])
    save(tmp_path, strided)
    assert_equal(load_latest(tmp_path)[0], strided)


@pytest.mark.parametrize("field", ["records", "synthetic", "client_records"])
def test_nan_in_a_record_is_refused_and_leaves_the_last_checkpoint(tmp_path: Path, field: str) -> None:
    _, second = save_two(tmp_path)
    poisoned = [{"loss": float("nan")}]
    value = {0: poisoned, 3: []} if field == "client_records" else poisoned
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, replace(snapshot(3), **{field: value}))  # type: ignore[arg-type]  # the field is a parameter of the test
    assert_equal(load_latest(tmp_path)[0], second)


def test_manifest_names_every_file(tmp_path: Path) -> None:
    save_two(tmp_path)
    manifest = json.loads((tmp_path / "round-00002" / "manifest.json").read_text())
    assert sorted([*manifest["files"], "manifest.json"]) == names(tmp_path / "round-00002")


# --- many clients


def many(num_rounds: int, count: int = 10 * MOST_FILES) -> Snapshot:
    """Every second client keeps something; one of them nothing but records, one nothing but an array."""
    ids = tuple(range(0, 2 * count, 2))
    whole = snapshot(num_rounds, client_ids=ids)
    whole.client_arrays[ids[3]].clear()
    whole.client_records[ids[4]].clear()
    return whole


def test_many_clients_share_files_and_come_back(tmp_path: Path) -> None:
    save(tmp_path, many(1))
    found, problems = load_latest(tmp_path)
    assert problems == []
    assert_equal(found, many(1))
    files = names(tmp_path / "round-00001")
    assert len(files) <= 2 * 2 * MOST_FILES + 3
    assert "clients-00000-00015.safetensors" in files


def test_spans_stay_while_clients_come() -> None:
    """So that what did not change can be linked."""
    fewer, more = (_spans(list(range(0, count))) for count in (MOST_FILES * 5, MOST_FILES * 8))
    assert fewer.keys() <= more.keys()
    assert sorted(k for ids in more.values() for k in ids) == list(range(MOST_FILES * 8))
    assert _spans(list(range(MOST_FILES))) == {(k, k): [k] for k in range(MOST_FILES)}


def test_a_flipped_byte_in_a_shared_file_is_found_and_does_not_live_on(tmp_path: Path) -> None:
    """Of a file whose clients did not change: what is kept in two checkpoints is in two files."""
    for num_rounds in range(1, 4):
        save(tmp_path, replace(many(1), num_rounds=num_rounds))
    path = tmp_path / "round-00003" / "clients-00000-00015.safetensors"
    assert path.stat().st_ino != (tmp_path / "round-00002" / path.name).stat().st_ino
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found, [problem] = load_latest(tmp_path)
    assert f"{path.name} has another checksum" in problem
    assert_equal(found, replace(many(1), num_rounds=2))
    save(tmp_path, replace(many(1), num_rounds=3))
    assert_equal(load_latest(tmp_path)[0], replace(many(1), num_rounds=3))


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("json", b'{"16": []}', "holds other clients than its name says"),
        ("json", b'{"x": []}', "holds other clients than its name says"),
        ("json", b"[]", "holds other clients than its name says"),
        ("json", b'{"0": {}}', "holds no list of objects"),
        ("json", b'{"2": []}', "holds an array of nobody"),
        ("safetensors", bytes(serialised({"adapter": np.zeros(3)})), "holds an array of nobody"),
    ],
)
def test_a_shared_file_that_holds_something_else_is_passed_over(tmp_path: Path, kind: str, content: bytes, said: str) -> None:
    save(tmp_path, many(1))
    resigned(tmp_path / "round-00001", f"clients-00000-00015.{kind}", content)
    found, [problem] = load_latest(tmp_path)
    assert found is None
    assert said in problem


def test_ten_thousand_clients_are_saved_and_loaded_in_seconds(tmp_path: Path) -> None:
    """The files decide, not the clock: at most a few hundred are flushed to the disk."""
    save(tmp_path, many(1, count=5_000))
    assert len(names(tmp_path / "round-00001")) <= 4 * MOST_FILES + 3
    assert_equal(load_latest(tmp_path)[0], many(1, count=5_000))
