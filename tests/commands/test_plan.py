"""A plan's figures are those of what is then done: bytes of a real training step, bytes sent, and what fits on a GPU."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysim.cli import main
from raysim.commands.plan import clients_at_once, plan, share_of_gpu
from raysim.config import load
from raysim.lora.release import plain_layout
from raysim.model.base_model import empty_base_model, load_base_model
from raysim.model.footprint import cut, num_layers
from raysim.model.language_model import build_language_model
from tests.conftest import SMALL
from tests.kinds.models import KINDS, build, save
from tests.small_runs import environment
from tests.tiny_models import llama_config

MEASURE = """
import sys
import torch
from raysim.config import load
from raysim.cli import main
from raysim.methods.call import examples_at_once
from raysim.federation.setup import encode_data
from raysim.lora.layout import initial_adapter
from raysim.model.base_model import load_base_model
from raysim.model.language_model import build_language_model
from raysim.model.train import TrainSettings, train_adapter

config = load("", sys.argv[1:])
torch.set_num_threads(1)
status = lambda key: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
base = load_base_model(config.model.name, dtype=config.train.dtype)
lm = build_language_model(base, rank=config.lora.rank, alpha=32.0, dropout=0.0, target_modules=list(config.lora.target_modules))
examples = sorted(encode_data(config, lm).train, key=lambda example: -example.num_tokens)[: examples_at_once(config)]
settings = TrainSettings(1, 1, len(examples), 1e-3, "adamw", 0.0, 1.0, 0.0, keep_activations=not config.train.gradient_checkpointing)
adapter = initial_adapter(lm.layout, seed=0)
train_adapter(lm, adapter, examples[-1:], settings=settings, seed=0)  # what libraries take for themselves
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
train_adapter(lm, adapter, examples, settings=settings, seed=0)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model large enough for its tensors to be what memory goes to."""
    out = tmp_path_factory.mktemp("model")
    config = llama_config(hidden_size=256, num_layers=6, num_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(out, AutoModelForCausalLM.from_config(config))
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("more", [[], ["train.micro_batch_size=4"]])
def test_bytes_of_a_step_are_within_a_fifth_of_what_it_takes(folder: Path, more: list[str]) -> None:
    settings = [*SMALL, f"model.name={folder}", "train.batch_size=8", "partition.scheme=iid", "lora.rank=16", *more]
    planned = plan(load("", settings), timed=False)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *settings], env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert planned.client_bytes == pytest.approx(int(done.stdout), rel=0.2)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt_neo", "gemma3_text"])
def test_parameters_and_bytes_of_a_base_are_known_without_its_weights(tmp_path: Path, kind: str, dtype: str, quantization: str) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    made = build(replace(KINDS[kind], settings=KINDS[kind].settings | {"hidden_size": 64}))
    save(tmp_path, made)
    empty = empty_base_model(str(tmp_path), dtype=dtype, quantization=quantization)
    real = load_base_model(str(tmp_path), dtype=dtype, quantization=quantization)
    assert {name: (array.shape, array.dtype) for name, array in empty.tensors.items()} == {
        name: (array.shape, array.dtype) for name, array in real.tensors.items()
    }
    assert (empty.num_bytes, empty.num_parameters) == (real.num_bytes, real.num_parameters)
    assert real.num_parameters == sum(parameter.numel() for parameter in made.parameters())


def test_a_client_sends_what_is_planned() -> None:
    config = load("", [*SMALL, "partition.num_clients=5", "server.cohort_size=2"])
    lm = build_language_model(load_base_model("tiny"), rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"])
    found = plan(config, timed=False)
    assert found.num_trained == lm.layout.num_parameters
    assert found.uplink_bytes == 2 * 4 * lm.layout.num_parameters
    assert plan(load("", [*SMALL, "method.name=scaffold"]), timed=False).uplink_bytes == 3 * 8 * lm.layout.num_parameters
    assert plain_layout(lm.layout, rank=4) == lm.layout


def test_clients_on_gpus_that_are_not_here(folder: Path) -> None:
    config = load("", [*SMALL, f"model.name={folder}", "partition.num_clients=12", "train.batch_size=8"])
    many = plan(config, gpus=2, gpu_bytes=80 * 10**9, timed=False)
    assert (many.clients_at_once, many.num_gpus) == (12, pytest.approx(1 / 6))
    assert many.dtype == "float32"
    one = round(0.6 * 2**30) + many.base_bytes + many.client_bytes
    few = plan(config, gpus=2, gpu_bytes=int(3.5 * one), timed=False)
    assert (few.clients_at_once, few.num_gpus) == (6, pytest.approx(1 / 3))
    assert few.round_s == pytest.approx(many.round_s), "the cards do the same work"
    with pytest.raises(ValueError, match=r"resources\.client\.num_gpus: not even one client fits"):
        plan(config, gpus=2, gpu_bytes=one // 2, timed=False)
    assert share_of_gpu(8, 8) == 1.0


def test_a_client_of_several_ranks_has_the_base_in_parts(folder: Path) -> None:
    config = load("", [*SMALL, f"model.name={folder}", "partition.num_clients=12", "train.batch_size=8", "resources.backend=ray"])
    alone = plan(config, gpus=8, gpu_bytes=10**12, timed=False)
    context, own = round(0.6 * 2**30), alone.adapter_bytes + alone.activation_bytes
    parts = ["train.engine=deepspeed", "deepspeed.zero_stage=3", "resources.client.num_ranks=4"]
    in_parts = load("", [*SMALL, f"model.name={folder}", "partition.num_clients=12", "train.batch_size=8", "resources.backend=ray", *parts])
    rank = context + alone.base_bytes // 4 + own + alone.optimizer_bytes // 4
    assert plan(in_parts, gpus=8, gpu_bytes=rank + 10, timed=False).clients_at_once == 2
    with pytest.raises(ValueError, match="not even one client fits"):
        plan(in_parts, gpus=8, gpu_bytes=rank - 10, timed=False)


def test_a_base_that_does_not_fit_is_no_negative_number_of_clients(folder: Path) -> None:
    config = load("", [*SMALL, f"model.name={folder}", "train.batch_size=8"])
    took = plan(config, gpus=1, gpu_bytes=10**12, timed=False)
    assert clients_at_once(replace(took, base_bytes=10**15), config, gpus=0, gpu_bytes=0) == 0


def test_a_model_is_cut_to_its_first_layers() -> None:
    settings = build(KINDS["gemma3_text"]).config.to_dict()
    assert num_layers(settings) == 2
    assert (cut(settings, 1)["num_hidden_layers"], len(cut(settings, 1)["layer_types"])) == (1, 1)
    assert cut(settings, 9)["num_hidden_layers"] == 2


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", *SMALL[:3], "data.max_length=900", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_parameters"] == 26944
    assert found["step_s"] > 0
    assert main(["plan", "quickstart", *SMALL[:3], "data.max_length=900"]) == 0
    assert "clients at once" in capsys.readouterr().out
