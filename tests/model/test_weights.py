"""Weights read tensor by tensor: what transformers reads, from each array where it is to stay, and never a second model beside it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from raysim.model.base_model import load_base_model
from raysim.model.weights import empty_model, matching, places
from tests.kinds.models import KINDS, build, save
from tests.small_runs import environment
from tests.tiny_models import llama_config

DIRECT = ["llama", "llama-tied", "gpt2", "gpt_neo", "gemma3_text", "mamba", "falcon-alibi", "opt"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", DIRECT)
def test_what_is_read_is_what_transformers_reads(tmp_path: Path, kind: str, dtype: str) -> None:
    save(tmp_path, build(KINDS[kind]), max_shard_size="20KB")
    found = load_base_model(str(tmp_path), dtype=dtype)
    assert matching(empty_model(AutoConfig.from_pretrained(tmp_path), dtype=dtype), places(tmp_path)) is not None, "read by ourselves"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    assert found.config == theirs.config.to_dict()
    state = theirs.state_dict()
    assert list(found.tensors) == [name for name in state if name in found.tensors]
    for name, array in found.tensors.items():
        tensor = state[name].to(getattr(torch, dtype)) if state[name].is_floating_point() else state[name]
        expected = tensor.view(torch.uint16) if dtype == "bfloat16" and tensor.dtype == torch.bfloat16 else tensor
        assert array.dtype == expected.numpy().dtype
        assert array.tobytes() == expected.numpy().tobytes(), name
    assert found.num_parameters == sum(parameter.numel() for parameter in theirs.parameters())


def test_end_tokens_of_the_generation_settings_are_read(tmp_path: Path) -> None:
    model = build(KINDS["llama"])
    save(tmp_path, model)
    GenerationConfig(eos_token_id=[1, 7]).save_pretrained(tmp_path)
    assert load_base_model(str(tmp_path)).stop_token_ids == (1, 7)


def test_each_array_lies_where_it_was_put(tmp_path: Path) -> None:
    """As memory that processes share: nothing else is kept of it."""
    save(tmp_path, build(KINDS["llama-tied"]))
    put: list[np.ndarray] = []

    def keep(array: np.ndarray) -> np.ndarray:
        put.append(array.copy())
        return put[-1]

    base = load_base_model(str(tmp_path), keep=keep)
    assert [id(array) for array in base.tensors.values()] == [id(array) for array in put]


def test_two_values_for_tied_weights_are_left_to_transformers(tmp_path: Path) -> None:
    save(tmp_path, build(KINDS["llama-tied"]))
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"lm_head.weight": torch.ones(261, 32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert matching(empty_model(AutoConfig.from_pretrained(tmp_path), dtype="float32"), places(tmp_path)) is None


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    save(tmp_path, build(KINDS["llama"]))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no causal language model can be read"):
        load_base_model(str(tmp_path))


PEAK = """
import sys
from raysim.model.base_model import load_base_model
load_base_model("tiny")  # imports are no part of it
load_base_model({small!r}, dtype="bfloat16")
status = lambda key: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
base = load_base_model({folder!r}, dtype="bfloat16")
print((status("VmHWM") - before) / base.num_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_stored_size(tmp_path: Path) -> None:
    """A hundred million parameters in ten files: no float32 model beside them, and no second copy."""
    config = llama_config(hidden_size=1024, num_layers=8, num_heads=8)
    small, folder = tmp_path / "small", tmp_path / "large"
    save(small, build(KINDS["llama"]).bfloat16())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save(folder, model, max_shard_size="20MB")
    del model
    assert len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    assert sum(place.num_bytes for place in places(folder).values()) > 150e6
    script = PEAK.format(small=str(small), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=200, check=True)
    assert 0.9 < float(done.stdout) < 1.15
