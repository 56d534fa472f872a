"""Files that are made to do harm: what is read is never executed or unpickled, and takes a bounded memory and time."""

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from raysim.config import DataConfig, load
from raysim.data import files as data_files
from raysim.data.sources import read_source
from raysim.judging import journal
from raysim.model.base_model import load_base_model
from raysim.results import files
from tests.kinds.models import KINDS, build, save
from tests.run_folders import write_run
from tests.small_runs import environment


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch '{marker}'"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_the_pickle_of_these_tests_does_what_it_is_for(tmp_path: Path) -> None:
    torch.save({"w": Touch(tmp_path / "marker")}, tmp_path / "weights.bin")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert (tmp_path / "marker").exists()


# --- models


def changed(path: Path, **values: Any) -> None:
    """Sets values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_pickled_weights(folder: Path, marker: Path, *, zipped: bool) -> None:
    """The model's weights as transformers wrote them before safetensors, with something beside them."""
    (folder / "model.safetensors").unlink()
    weights = dict(build(KINDS["llama"]).state_dict())
    torch.save(weights | {"extra": Touch(marker)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def with_pickled_shards(folder: Path, marker: Path) -> None:
    with_pickled_weights(folder, marker, zipped=True)
    (folder / "pytorch_model.bin").rename(folder / "shard.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(build(KINDS["llama"]).state_dict(), "shard.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def with_plain_pickle(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker)))


def with_code(folder: Path, marker: Path, *, model_type: str) -> None:
    """A configuration, or the tokenizer's for no type of model, that names classes of a module beside it."""
    module = f"""
        from pathlib import Path
        Path({str(marker)!r}).touch()
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        class Config(LlamaConfig):
            model_type = "own"
        class Model(LlamaForCausalLM):
            config_class = Config
        class Tokenizer(PreTrainedTokenizerFast):
            pass
    """
    (folder / "own.py").write_text("\n".join(line.removeprefix(" " * 8) for line in module.splitlines()))
    if model_type:
        changed(folder / "config.json", model_type=model_type, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    else:
        changed(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Tokenizer"]}, tokenizer_class="Tokenizer")


MODELS: dict[str, Callable[[Path, Path], None]] = {
    "pickled weights": lambda folder, marker: with_pickled_weights(folder, marker, zipped=True),
    "pickled weights of old": lambda folder, marker: with_pickled_weights(folder, marker, zipped=False),
    "pickled shards": with_pickled_shards,
    "a plain pickle": with_plain_pickle,
    "code, of a kind of its own": lambda folder, marker: with_code(folder, marker, model_type="own"),
    "code, of a tokenizer": lambda folder, marker: with_code(folder, marker, model_type=""),
    "code, of a known kind": lambda folder, marker: with_code(folder, marker, model_type="llama"),
}


@pytest.mark.parametrize("how", MODELS)
def test_a_model_s_folder_executes_nothing(how: str, tmp_path: Path) -> None:
    """Each is refused in one line; only code beside a model of a known kind is passed over."""
    folder, marker = save(tmp_path / "model", build(KINDS["llama"])), tmp_path / "marker"
    MODELS[how](folder, marker)
    if how == "code, of a known kind":
        load_base_model(str(folder))
    else:
        with pytest.raises(ValueError, match="no causal language model can be read from") as refused:
            load_base_model(str(folder))
        assert len(str(refused.value).splitlines()) == 1
        assert str(folder) in str(refused.value)
    assert not marker.exists()


# --- configurations and data


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch {}']", "!!python/object/new:os.system ['touch {}']", "!!python/name:os.system ''"]
)
@pytest.mark.parametrize("key", ["name", "sweep.space"])
def test_a_configuration_executes_nothing(tag: str, key: str, tmp_path: Path) -> None:
    marker, value = tmp_path / "marker", tag.format(tmp_path / "marker")
    (tmp_path / "config.yaml").write_text(f"{key}: {value}\n")
    with pytest.raises(ValueError, match=r"config.yaml is not valid YAML: could not determine a constructor for the tag"):
        load(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=f"{key}: cannot read the value"):
        load("", [f"{key}={value}"])
    assert not marker.exists()


def with_script(folder: Path, marker: Path) -> None:
    (folder / f"{folder.name}.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")


DATA: dict[str, Callable[[Path, Path], None]] = {
    "a script": with_script,
    "a pickle": lambda folder, marker: (folder / "train.pkl").write_bytes(pickle.dumps(Touch(marker))) and None,
    "a pickle by another name": lambda folder, marker: (folder / "train.parquet").write_bytes(pickle.dumps(Touch(marker))) and None,
}


@pytest.mark.parametrize("how", DATA)
def test_a_data_set_s_folder_executes_nothing(how: str, tmp_path: Path) -> None:
    folder, marker = tmp_path / "set", tmp_path / "marker"
    folder.mkdir()
    DATA[how](folder, marker)
    with pytest.raises(ValueError, match=r"^data.path=.*set: ") as refused:
        read_source(DataConfig(source="hub", path=str(folder)))
    assert len(str(refused.value).splitlines()) == 1
    assert not marker.exists()


# --- memory and time

LIMITED = """
import resource, sys
from pathlib import Path
from raysim import cli
from raysim.config import DataConfig
from raysim.data.sources import read_source
from raysim.reports import page
from raysim.results import verify
from raysim.sweeps import page as of_sweeps
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20, resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_CPU, (int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 40,) * 2)
for given in sys.argv[1:]:
    command, path = given.split(":", 1)
    try:
        status = read_source(DataConfig(source="jsonl", path=path)) and 0 if command == "data" else cli.main([command, path])
    except ValueError as error:
        print(error, file=sys.stderr)
        status = 2
    print(command, "ended with", status)
"""
"""What is read, in a process that may take 600 MiB more than its imports did, and 40 seconds of processor time."""
LARGE = 50_000_000
"""Bytes of a line."""


def limited(*given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, *given]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return done


LINES = {
    "one text": (b'"' + b"x" * LARGE + b'"', r"line 2 has 50,000,\d\d\d characters, of which a record may have 33,554,432; remove it"),
    "half of that": (
        b'"' + b"x" * (LARGE // 2) + b'"',
        r"line 2: the field 'response' has 25,000,000 characters, and 1,000,000 are the most.*",
    ),
    "many numbers": (b"[" + b"1," * (LARGE // 2) + b"1]", r"line 2 has .* of which a record may have 33,554,432; remove it"),
    "deep": (b"[" * (LARGE // 2), r"line 2 is nested too deeply to be read; flatten it or remove it"),
}
BOMB = r"the file holds more than 1,073,741,824 bytes unpacked; split it, or unpack it|the records do not fit into memory; split the file"


def test_a_record_that_is_too_large_and_a_file_that_unpacks_without_end_are_named(tmp_path: Path) -> None:
    paths, told = [], [*(line for _, line in LINES.values()), BOMB]
    for name, (value, _) in LINES.items():
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_bytes(b'{"instruction": "a", "response": "b"}\n{"instruction": "a", "response": ' + value + b"}\n")
    paths.append(tmp_path / "bomb.jsonl.gz")
    paths[-1].write_bytes(gzip.compress(b"0" * 2**24) * 256)
    assert paths[-1].stat().st_size < 2**23, "4 GiB of zeros"
    done = limited(*(f"data:{path}" for path in paths))
    assert done.stdout == "data ended with 2\n" * len(paths)
    for line, path, text in zip(done.stderr.splitlines(), paths, told, strict=True):
        assert re.fullmatch(f"data.path={path}: ({text})", line), line


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".parquet"])
def test_what_is_unpacked_is_bounded(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, row = tmp_path / f"a{ending}", {"instruction": "a", "response": "b" * 5000}
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3000), path)
    else:
        with data_files.UNPACK[Path(ending).suffix](path, "wt") as file:
            file.write((json.dumps(row) + "\n") * 3000)
    assert path.stat().st_size < 100_000
    source = DataConfig(source="jsonl", path=str(path))
    assert len(read_source(source).records) == 3000
    monkeypatch.setattr(data_files, "MOST_UNPACKED_BYTES", 10**7)
    with pytest.raises(ValueError, match=rf"a{ending}: the file holds more than 10,000,000 bytes unpacked; split it, or unpack it"):
        read_source(source)


def test_a_line_of_a_run_that_is_too_large_is_named_by_report_and_verify(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "fedpit", num_rounds=1)
    path = folder / files.ROUNDS
    with path.open("a") as file:
        file.write(json.dumps({"round_index": 5, "note": "x" * LARGE}) + "\n")
    number = path.read_bytes().count(b"\n")
    told = f"{path}: line {number} has more than 33,554,432 characters; restore the file, or run into another folder"
    done = limited(f"report:{folder}", f"verify:{folder}")
    assert done.stderr == f"raysim: {told}\n"
    assert told in done.stdout
    assert re.findall("^(report|verify) ended with (.)$", done.stdout, flags=re.M) == [("report", "2"), ("verify", "1")]


@pytest.mark.parametrize("name", [files.ROUNDS, files.ANSWERS, files.SYNTHETIC, files.JUDGED, files.JOURNAL])
def test_a_line_that_is_too_large_is_named_in_every_file_of_lines(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_LINE", 1000)
    monkeypatch.setattr(journal, "MOST_LINE", 1000)
    (tmp_path / name).write_text(json.dumps({"round_index": 5, "note": "x" * 1000}) + "\n")
    with pytest.raises(ValueError, match=rf"{name}: line 1 has more than 1,000 (characters|bytes); (restore|remove)"):
        journal.Journal(tmp_path / name) if name == files.JOURNAL else files.read_jsonl(tmp_path / name)


def test_a_file_of_a_run_that_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_BYTES", 100)
    (tmp_path / "a").write_text("[" + "1," * 60 + "1]")
    for read in (files.read_json, files.read_json_list, files.read_jsonl, files.read_csv):
        with pytest.raises(ValueError, match=r"/a has 123 bytes, of which it may have 100; restore the file"):
            read(tmp_path / "a")


def test_a_configuration_is_not_read_beyond_its_bound(tmp_path: Path) -> None:
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(
        ValueError, match=r"config.yaml has more than the 1,048,576 bytes that a configuration may have; name the YAML file"
    ):
        load(tmp_path / "config.yaml")
