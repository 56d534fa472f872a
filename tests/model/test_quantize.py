"""Quantised bases: the numbers of bitsandbytes, memory that is shared and never written, and gradients of single examples that are right."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raysim.config import Config, load
from raysim.lora.layout import save_adapter
from raysim.model.base_model import BaseModel, load_base_model
from raysim.model.generate import Sampling, write_texts
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.private_train import check_private, clipped_gradient_sum
from raysim.model.quantize import PIECE, quantized_parts
from raysim.model.train import mean_nll, response_nll, train_adapter
from raysim.runs import run as runner
from raysim.runs.run import run
from tests.kinds.models import KINDS, build, save
from tests.method_calls import RECORDS, some_adapter
from tests.model.test_memory import PLAIN
from tests.small_runs import small
from tests.tiny_models import ALL_LINEAR, encode

bnb = pytest.importorskip("bitsandbytes")
HOW = ["int8", "nf4"]


def quantized(folder: Path, how: str, *, kind: str = "llama") -> BaseModel:
    wide = replace(KINDS[kind], settings=KINDS[kind].settings | ({"hidden_size": 64, "intermediate_size": 128} if kind == "llama" else {}))
    save(folder, build(wide))
    return load_base_model(str(folder), quantization=how)


def model(base: BaseModel, targets: list[str] = ALL_LINEAR) -> LanguageModel:
    return build_language_model(base, rank=4, alpha=8.0, dropout=0.0, target_modules=targets)


def as_numbers(base: BaseModel, name: str) -> torch.Tensor:
    """A quantised weight in float32, by bitsandbytes."""
    values = torch.from_numpy(base.tensors[name].copy())
    if base.quantization == "int8":
        return values.float() * torch.from_numpy(base.tensors[f"{name}.scale"].copy())[:, None] / 127.0
    state = bnb.functional.QuantState(
        absmax=torch.from_numpy(base.tensors[f"{name}.absmax"].copy()),
        shape=torch.Size(base.quantized[name]),
        code=bnb.functional.get_4bit_type("nf4", device="cpu"),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
    )
    return bnb.functional.dequantize_4bit(values, state)


@pytest.mark.parametrize("how", HOW)
def test_the_model_is_the_plain_one_over_the_dequantised_weights(tmp_path: Path, how: str) -> None:
    base = quantized(tmp_path, how)
    full = load_base_model(str(tmp_path))
    assert base.num_parameters == full.num_parameters
    changed = {name: as_numbers(base, name).numpy() for name in base.quantized}
    error = max(float(np.abs(changed[name] - full.tensors[name]).max() / np.abs(full.tensors[name]).max()) for name in changed)
    assert 0 < error < {"int8": 0.01, "nf4": 0.2}[how]
    plain = model(BaseModel(full.name, full.config, full.tensors | changed, full.dtype, full.tokenizer_files))
    lm, adapter = model(base), some_adapter(plain)
    for one in (lm, plain):
        one.set_adapter(adapter)
        one.model.train()
    examples = encode(lm, RECORDS)
    found, expected = (response_nll(one, examples)[0] for one in (lm, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    before, _ = (train_adapter(one, adapter, examples, settings=PLAIN, seed=0) for one in (plain, plain))
    np.testing.assert_allclose(train_adapter(lm, adapter, examples, settings=PLAIN, seed=0)[0], before[0], atol=1e-3)


@pytest.mark.parametrize("how", HOW)
def test_nothing_writes_to_what_processes_share(tmp_path: Path, how: str) -> None:
    """Arrays of the object store are read-only: a write would end the process."""
    base = quantized(tmp_path, how)
    before = {name: array.tobytes() for name, array in base.tensors.items()}
    lm = model(base)
    train_adapter(lm, some_adapter(lm), encode(lm, RECORDS), settings=PLAIN, seed=0)
    mean_nll(lm, encode(lm, RECORDS), batch_size=2)
    write_texts(lm, [encode(lm, RECORDS)[0].prompt_ids], sampling=Sampling(max_new_tokens=4))
    assert {name: array.tobytes() for name, array in base.tensors.items()} == before
    weight = next(p for name, p in lm.model.named_parameters() if name.endswith("q_proj.base_layer.weight"))
    assert weight.data_ptr() in {array.ctypes.data for array in base.tensors.values()}, "it is not copied"


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_single_examples_are_those_of_autograd(tmp_path: Path, how: str, seed: int) -> None:
    lm = model(quantized(tmp_path, how))
    adapter = (0.1 * np.random.default_rng(seed).standard_normal(lm.layout.num_parameters)).astype(np.float32)
    lm.set_adapter(adapter)
    examples = encode(lm, RECORDS)
    check_private(lm, examples)
    lm.model.train()
    total, norms, _ = clipped_gradient_sum(lm, examples, clip_norm=0.5, max_batch=3)
    expected, own = torch.zeros_like(total), []
    for example in examples:
        lm.flat_grad.zero_()
        nll_B, count_B = response_nll(lm, [example])
        (nll_B / count_B).sum().backward()
        gradient = lm.flat_grad.double()
        own.append(float(gradient.norm()))
        expected += gradient * min(1.0, 0.5 / own[-1])
    assert norms == pytest.approx(own, rel=1e-3)
    assert float((total - expected).norm()) < 1e-3 * float(expected.norm())


def test_a_weight_in_pieces_is_quantised_as_a_whole() -> None:
    weight = torch.randn(PIECE // 64 + 3, 96, generator=torch.Generator().manual_seed(0))
    assert weight.numel() > PIECE
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    found = quantized_parts(weight, "nf4")
    assert torch.equal(found[""], packed)
    assert torch.equal(found[".absmax"], state.absmax)


def test_rows_that_are_no_whole_blocks_are_left_as_they_are(tmp_path: Path) -> None:
    """bitsandbytes reads such weights wrong on a processor; the day it does not, they can be quantised too."""
    save(tmp_path, build(KINDS["llama"]))  # 32 inputs
    with pytest.raises(ValueError, match="no linear layer"):
        load_base_model(str(tmp_path), quantization="nf4")
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    wrong = (bnb.functional.dequantize_4bit(packed, state) - weight).abs().max() / weight.abs().max()
    assert wrong > 0.2


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.quantization: the model has no linear layer"):
        quantized(tmp_path, "nf4", kind="gpt2")


def test_the_released_adapter_says_which_base_it_fits(tmp_path: Path) -> None:
    done = run(small("fedit", "model.quantization=nf4", out=tmp_path / "run"), display=False)
    settings = json.loads((done.out / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_quantization"] == "nf4"
    losses = done.summary["base_heldout_nll"]
    assert set(losses) == {"none", "nf4"}
    assert losses["none"] != losses["nf4"]
    assert losses["nf4"] == pytest.approx(losses["none"], rel=0.05)
    plain = run(small("fedit", out=tmp_path / "plain"), display=False)
    assert "base_model_quantization" not in json.loads((plain.out / "adapter" / "adapter_config.json").read_text())
    assert "base_heldout_nll" not in plain.summary


def test_dplora_runs_on_a_quantised_base(tmp_path: Path) -> None:
    done = run(small("dplora-example", "model.quantization=nf4", out=tmp_path / "run"), display=False)
    assert done.ledger["epsilon"] > 0
    assert done.config.model.quantization == "nf4"


def test_peft_loads_the_adapter(tmp_path: Path) -> None:
    """On the base as it is, since PEFT knows nothing of how it was stored."""
    base = quantized(tmp_path / "model", "nf4")
    lm = model(base)
    save_adapter(
        tmp_path / "adapter",
        some_adapter(lm),
        lm.layout,
        base_model=str(tmp_path / "model"),
        rank=4,
        alpha=8.0,
        dropout=0.0,
        target_modules=ALL_LINEAR,
        quantization="nf4",
    )
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    assert sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name) == lm.layout.num_parameters
    assert load("", ["model.quantization=nf4"]).model.quantization == "nf4"


def test_where_memory_does_not_hold_the_whole_base_too_the_run_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = runner.load_model

    def reads_what_fits(config: Config, *rest: Any) -> BaseModel:
        if config.model.quantization == "none":
            raise MemoryError
        return read(config, *rest)

    monkeypatch.setattr(runner, "load_model", reads_what_fits)
    done = run(small("fedit", "model.quantization=nf4", "server.num_rounds=1", out=tmp_path / "run"))
    assert set(done.summary["base_heldout_nll"]) == {"nf4"}
    said = " ".join(capsys.readouterr().out.split())
    assert "the loss of the base without model.quantization=nf4 is not shown: memory does not hold it beside the other" in said
