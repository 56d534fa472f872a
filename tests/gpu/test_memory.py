"""On a CUDA device: activations computed again, quantised training, one rank of DeepSpeed, and a plan beside what was allocated."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raysim.commands.plan import plan
from raysim.config import Config
from raysim.federation.setup import encode_data
from raysim.lora.layout import initial_adapter
from raysim.methods.call import examples_at_once
from raysim.model.base_model import load_base_model
from raysim.model.language_model import build_language_model
from raysim.model.train import TrainSettings, train_adapter
from raysim.runs.run import Run, resolved, run
from tests.small_runs import small

pytestmark = pytest.mark.gpu

ON_GPU = ["resources.backend=local", "resources.client.num_gpus=1"]


def on_device(method: str, *settings: str, out: Path) -> Run:
    """A small run to its end, its clients on the device."""
    return run(small(method, *ON_GPU, *settings, out=out), display=False)


def adapters(first: Run, second: Run) -> list[str]:
    return [one.summary["adapter_sha256"] for one in (first, second)]


def test_activations_computed_again_change_no_bit(tmp_path: Path) -> None:
    first, second = (on_device("fedit", f"train.gradient_checkpointing={on}", out=tmp_path / on) for on in ("false", "true"))
    assert len(set(adapters(first, second))) == 1


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_a_quantised_base_trains(tmp_path: Path, how: str) -> None:
    pytest.importorskip("bitsandbytes")
    done = on_device("fedit", f"model.quantization={how}", "train.num_epochs=4", out=tmp_path / "run")
    losses = [record["eval"]["heldout_nll"] for record in done.records]
    assert losses[-1] < losses[0]


def test_one_rank_is_plain_torch(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    plain = on_device("fedit", "train.dtype=float32", out=tmp_path / "torch")
    ranked = on_device("fedit", "train.dtype=float32", "train.engine=deepspeed", "deepspeed.zero_stage=3", out=tmp_path / "ranks")
    losses = [[record["eval"]["heldout_nll"] for record in one.records] for one in (plain, ranked)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_a_plan_is_within_a_fifth_of_what_is_allocated() -> None:
    config: Config = resolved(small("fedit", *ON_GPU, "model.name=smollm2-135m-instruct", "data.max_length=256", out=Path("unused")))
    planned = plan(config, gpus=1, gpu_bytes=80 * 10**9)
    base = load_base_model(config.model.name, dtype=config.train.dtype)
    lora = config.lora
    lm = build_language_model(base, rank=lora.rank, alpha=lora.alpha, dropout=0.0, target_modules=list(lora.target_modules), device="cuda")
    examples = sorted(encode_data(config, lm).train, key=lambda example: -example.num_tokens)[: examples_at_once(config)]
    settings = TrainSettings(1, 1, len(examples), 1e-3, "adamw", 0.0, 1.0, 0.0)
    adapter = initial_adapter(lm.layout, seed=0)
    train_adapter(lm, adapter, examples, settings=settings, seed=0)
    torch.cuda.reset_peak_memory_stats()
    train_adapter(lm, adapter, examples, settings=settings, seed=0)
    assert planned.base_bytes + planned.client_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.2)
