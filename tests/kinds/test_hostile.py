"""Files that are made to do harm: what is read is never executed or unpickled."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raysim.config import DataConfig, load
from raysim.data.sources import read_source
from raysim.model.base_model import load_base_model
from tests.kinds.models import KINDS, build, save


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
