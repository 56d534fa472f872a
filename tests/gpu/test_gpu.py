"""Runs on a CUDA device: finite, learning, and the same bits for the same seed."""

import math
from pathlib import Path

import pytest

from raysim.runs.run import Run, open_backend, resolved, run
from tests.small_runs import small

pytestmark = pytest.mark.gpu

ON_GPU = ["resources.backend=local", "resources.client.num_gpus=1"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["fedit", "fedpit", "dplora-example"])
def test_the_same_seed_gives_the_same_adapter_on_the_device(tmp_path: Path, method: str, dtype: str) -> None:
    first, second, other = (
        on_device(method, f"train.dtype={dtype}", f"seed={seed}", out=tmp_path / str(i)) for i, seed in enumerate([0, 0, 1])
    )
    assert first.summary["adapter_sha256"] == second.summary["adapter_sha256"]
    assert first.summary["adapter_sha256"] != other.summary["adapter_sha256"]
    for record in first.records:
        assert math.isfinite(record["train_loss"])
        assert math.isfinite(record["eval"]["heldout_nll"])


def test_training_on_the_device_lowers_the_loss_as_it_does_on_the_processor(tmp_path: Path) -> None:
    settings = ["train.dtype=float32", "train.num_epochs=4", "server.num_rounds=3"]
    device = on_device("fedit", *settings, out=tmp_path / "device")
    processor = run(small("fedit", *settings, out=tmp_path / "processor"), display=False)
    losses = [record["eval"]["heldout_nll"] for record in device.records]
    assert losses[-1] < losses[0]
    assert losses == pytest.approx([record["eval"]["heldout_nll"] for record in processor.records], rel=0.02)


def test_auto_is_bfloat16_on_the_device_and_the_model_lies_there(tmp_path: Path) -> None:
    config = resolved(small("fedit", *ON_GPU, "train.dtype=auto", out=tmp_path / "run"))
    assert config.train.dtype == "bfloat16"
    with open_backend(config) as backend:
        lm = backend.worker.language_model(config.lora)
        assert lm.flat.device.type == "cuda"
        assert all(parameter.device.type == "cuda" for parameter in lm.model.parameters())


def on_device(method: str, *settings: str, out: Path) -> Run:
    """A small run to its end, its clients on the device."""
    return run(small(method, *ON_GPU, *settings, out=out), display=False)
