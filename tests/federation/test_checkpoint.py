"""Checkpoints: what was saved comes back bit for bit, damage is found and passed over, a crash in the middle does no harm."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raysim.federation.checkpoint import KEEP, Snapshot, load_latest, save


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
    save(folder, first, changed_clients={0, 3})
    save(folder, second, changed_clients={0, 3})
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
        save(tmp_path, snapshot(num_rounds), changed_clients={0, 3})
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
    save(tmp_path, again, changed_clients={0, 3, 5})
    found, problems = load_latest(tmp_path)
    assert problems == []
    assert_equal(found, again)


def test_a_run_that_starts_over_is_not_shadowed_by_damaged_later_rounds(tmp_path: Path) -> None:
    """All checkpoints damaged: the run starts from nothing, and what it saves is what is found."""
    for num_rounds in (3, 4):
        save(tmp_path, snapshot(num_rounds), changed_clients={0, 3})
        (tmp_path / f"round-{num_rounds:05d}" / "server.safetensors").write_bytes(b"")
    found, problems = load_latest(tmp_path)
    assert found is None
    assert len(problems) == 2
    fresh = snapshot(1)
    save(tmp_path, fresh, changed_clients={0, 3})
    assert names(tmp_path) == ["round-00001"]
    assert_equal(load_latest(tmp_path)[0], fresh)
    save(tmp_path, snapshot(2), changed_clients={0})
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
    save(tmp_path, third, changed_clients={0, 3})
    assert_equal(load_latest(tmp_path)[0], third)
    assert "stray" not in names(tmp_path / "round-00003")


def test_unchanged_clients_are_hard_links(tmp_path: Path) -> None:
    first = snapshot(1)
    save(tmp_path, first, changed_clients={0, 3})
    second = replace(snapshot(2), client_arrays={0: snapshot(2).client_arrays[0], 3: first.client_arrays[3]})
    save(tmp_path, second, changed_clients={0})
    for suffix in (".safetensors", ".json"):
        old, new = (tmp_path / f"round-{n:05d}" for n in (1, 2))
        assert (old / f"client-00003{suffix}").samefile(new / f"client-00003{suffix}")
        assert not (old / f"client-00000{suffix}").samefile(new / f"client-00000{suffix}")
    assert_equal(load_latest(tmp_path)[0], second)
    for num_rounds in (3, 4):  # the link outlives the checkpoint in which it was written
        last = replace(snapshot(num_rounds), client_arrays={0: snapshot(2).client_arrays[0], 3: first.client_arrays[3]})
        save(tmp_path, last, changed_clients=set())
    assert not (tmp_path / "round-00001").exists()
    assert_equal(load_latest(tmp_path)[0], last)


def test_arrays_need_not_be_contiguous_and_there_may_be_no_clients(tmp_path: Path) -> None:
    strided = replace(snapshot(1, client_ids=()), adapter=np.arange(100, dtype=np.float32)[::2])
    save(tmp_path, strided, changed_clients=set())
    assert_equal(load_latest(tmp_path)[0], strided)


@pytest.mark.parametrize("field", ["records", "synthetic", "client_records"])
def test_nan_in_a_record_is_refused_and_leaves_the_last_checkpoint(tmp_path: Path, field: str) -> None:
    _, second = save_two(tmp_path)
    poisoned = [{"loss": float("nan")}]
    value = {0: poisoned, 3: []} if field == "client_records" else poisoned
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, replace(snapshot(3), **{field: value}), changed_clients={0, 3})  # type: ignore[arg-type]  # the field is a parameter of the test
    assert_equal(load_latest(tmp_path)[0], second)


def test_manifest_names_every_file(tmp_path: Path) -> None:
    save_two(tmp_path)
    manifest = json.loads((tmp_path / "round-00002" / "manifest.json").read_text())
    assert sorted([*manifest["files"], "manifest.json"]) == names(tmp_path / "round-00002")
