"""What a run read from outside: a folder goes on, and is shown, with these files only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from raysim.cli import main
from raysim.config import Config, load
from raysim.data.records import Record
from raysim.model.base_model import load_base_model
from raysim.results import inputs
from raysim.results.verify import verify
from raysim.runs.compare import compare
from raysim.runs.run import run
from raysim.sweeps.sweep import sweep
from tests.conftest import SMALL
from tests.small_runs import WRITING

pytestmark = pytest.mark.pictures

QUICK = ["evaluate.every=0", "attack.every=-1"]


def write_records(path: Path, *, word: str = "tablet", num: int = 24) -> str:
    """A file of invented records, which differ with `word`; its path."""
    rows = [{"instruction": f"How many of number {i}?", "response": f"Take {i} {word}s.", "label": "ab"[i % 2]} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_questions(path: Path, *, right: str = "A") -> str:
    """A file of two multiple-choice questions; its path."""
    rows = [{"question": f"Is it {i}?", "options": {"A": "yes", "B": "no"}, "answer": right} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_model(folder: Path) -> str:
    """The tiny model as a folder in transformers' format; its path."""
    base = load_base_model("tiny")
    folder.mkdir()
    for name, content in base.tokenizer_files.items():
        (folder / name).write_bytes(content)
    save_file(base.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(base.config, default=str))
    return str(folder)


def change_model(folder: Path) -> None:
    """Turns the sign of one tensor of a model's folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = -tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Case = tuple[Callable[[Path], list[str]], Callable[[Path], Any]]
CASES: dict[str, Case] = {
    "data.path": (
        lambda at: ["data.source=jsonl", f"data.path={write_records(at / 'in.jsonl')}", "data.label_field=label"],
        lambda at: write_records(at / "in.jsonl", word="pill"),
    ),
    "synthesis.path": (
        lambda at: ["method.name=fedmit", *WRITING, "synthesis.source=file", f"synthesis.path={write_records(at / 'in.jsonl')}"],
        lambda at: write_records(at / "in.jsonl", word="pill"),
    ),
    "evaluate.choices_path": (
        lambda at: [f"evaluate.choices_path={write_questions(at / 'in.jsonl')}"],
        lambda at: write_questions(at / "in.jsonl", right="B"),
    ),
    "model.name": (lambda at: [f"model.name={write_model(at / 'model')}"], lambda at: change_model(at / "model")),
}


class StopHere(Exception):
    """Ends a run after a round, as a kill would."""


def stopped(config: Config) -> None:
    """Runs one round of `config` and no more."""

    def stop(records: list[dict[str, Any]]) -> None:
        raise StopHere

    with pytest.raises(StopHere):
        run(config, display=False, on_round=stop)


@pytest.mark.parametrize("key", CASES)
def test_a_folder_whose_input_has_changed_is_neither_shown_nor_continued(key: str, tmp_path: Path) -> None:
    settings, change = CASES[key]
    config = load("", [*SMALL, *QUICK, *settings(tmp_path), f"out={tmp_path / 'run'}"])
    stopped(config)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "run" not in path.parts[-3:]}
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("environment.json", "partition.json", "rounds.jsonl")}
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"^{key}: .* has changed since the run began \(sha256 \w+.* then, sha256 \w+.* now\)"):
        run(config, display=False)
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}, "a refusal leaves the folder as it was"
    for path, content in kept.items():
        path.write_bytes(content)
    done = run(config, display=False)
    assert [record["round_index"] for record in done.records] == [0, 1]
    assert [check.name for check in verify(done.out) if not check.ok] == []
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"^{key}: "):
        run(config, display=False)
    assert "input files" in [check.name for check in verify(done.out) if not check.ok]


def test_before_the_first_round_is_done_nothing_binds_a_folder_to_its_files(tmp_path: Path) -> None:
    config = load("", [*SMALL, *QUICK, *CASES["data.path"][0](tmp_path), f"out={tmp_path / 'run'}"])
    stopped(config)
    for path in [*(tmp_path / "run" / "state").rglob("*"), tmp_path / "run" / "rounds.jsonl"]:
        path.unlink() if path.is_file() else None
    for path in (tmp_path / "run" / "state").iterdir():
        path.rmdir()
    write_records(tmp_path / "in.jsonl", word="pill")
    run(config, display=False)
    assert [check.name for check in verify(tmp_path / "run") if not check.ok] == []


def test_comparisons_sweeps_and_audits_refuse_it_too(tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*SMALL, *QUICK, *CASES["data.path"][0](tmp_path)]
    both = load("", [*settings, f"out={tmp_path / 'both'}", "compare={a: {seed: 1}}"])
    compare(both, display=False)
    many = load("", [*settings, "attack.every=0", f"out={tmp_path / 'many'}", "sweep.space={lora.rank: [2]}", "sweep.loggers=[]"])
    assert [row["status"] for row in sweep(many, display=False).rows] == ["done"]
    write_records(tmp_path / "in.jsonl", word="pill")
    for again in (lambda: compare(both, display=False), lambda: sweep(many, display=False)):
        with pytest.raises(ValueError, match=r"^data\.path: in\.jsonl has changed"):
            again()
    assert main(["audit", str(tmp_path / "both" / "a"), "--attack", "membership", "--quiet"]) == 2
    assert "data.path: in.jsonl has changed" in capsys.readouterr().err


def test_of_a_hub_folder_every_file_counts_and_a_copy_elsewhere_is_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_records(tmp_path / name / "train.jsonl")
    (tmp_path / "two" / ".cache").mkdir()
    (tmp_path / "two" / ".cache" / "lock").write_text("x")
    prints = [
        inputs.input_files(load("", ["model.name=tiny", "data.source=hub", f"data.path={tmp_path / name}"])) for name in ("one", "two")
    ]
    assert prints[0] == prints[1]
    assert list(prints[0]["data.path"]) == ["train.jsonl"]
    write_records(tmp_path / "two" / "more.jsonl")
    found = inputs.input_files(load("", ["model.name=tiny", "data.source=hub", f"data.path={tmp_path / 'two'}"]))
    assert list(found["data.path"]) == ["more.jsonl", "train.jsonl"]


def test_a_large_file_of_a_model_is_told_by_blocks_over_its_whole_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "WHOLE_BYTES", 1000)
    path = tmp_path / "model.gguf"
    content = bytearray(inputs.NUM_BLOCKS * inputs.BLOCK_BYTES // 2)  # blocks overlap: every byte is read
    found = []
    for place in (None, 0, len(content) // 3, len(content) - 1):
        if place is not None:
            content[place] ^= 1
        path.write_bytes(content)
        found.append(inputs.input_files(load("", [f"model.name={path}"]))["model.name"]["model.gguf"])
    assert all(set(one) == {"num_bytes", "sha256_of_blocks"} for one in found)
    assert len({one["sha256_of_blocks"] for one in found}) == 4


def test_records_are_told_by_their_content_whatever_their_label() -> None:
    one = Record(0, "a", "b", details=("c",))
    same = Record(0, "a", "b", label="cluster-1", details=("c",))
    others = [Record(1, "a", "b", details=("c",)), Record(0, "a", "b"), Record(0, "a", "b", details=("c",), history=(("user", "x"),))]
    assert inputs.records_print([one]) == inputs.records_print([same])
    assert len({json.dumps(inputs.records_print([record])) for record in [one, *others]}) == 4
