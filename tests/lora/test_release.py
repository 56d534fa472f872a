"""Adapters of every rule in real models, of plain and of transposed layers: what trains, what the weights come to, and what plain PEFT loads."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from raysim.lora.factors import delta_size, deltas, entries, layers, products
from raysim.lora.layout import Layout, Vector, flatten, initial_adapter, save_adapter, unflatten
from raysim.lora.release import DELTA, Exported, exported, load_released, save_delta
from raysim.lora.rule import lora_rule
from raysim.lora.rules import average, rolora
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainSettings, train_adapter
from tests.kinds.models import KINDS, build, save
from tests.method_calls import RECORDS
from tests.tiny_models import encode

RANK, ALPHA = 3, 7.0
IDS = torch.tensor([[5, 60, 7, 200, 33, 4, 90]])
TRAIN = TrainSettings(num_epochs=1, max_steps=2, batch_size=3, lr=0.01, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, prox_mu=0.0)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose adapted layers are plain, or transposed (Conv1D), square ones among them."""
    return save(tmp_path_factory.mktemp(request.param), build(KINDS[request.param]))


def language_model(folder: Path, *, between: bool = False) -> LanguageModel:
    return build_language_model(
        load_base_model(str(folder)), rank=RANK, alpha=ALPHA, dropout=0.0, target_modules=["all-linear"], between=between
    )


def random(size: int, *, seed: int) -> Vector:
    return (0.2 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def plain(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def with_changes(folder: Path, changes: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The base with a change, outputs by inputs, added to each named weight, whichever way it is kept."""
    model = plain(folder)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, change in changes.items():
            module = modules[name.removesuffix(".weight")]
            module.weight.add_(change.T if isinstance(module, Conv1D) else change)  # type: ignore[operator]  # any attribute is a tensor to torch
    return model


def changes_of(lm: LanguageModel, vector: Vector, *, delta: Vector | None = None, scale: float = ALPHA / RANK) -> dict[str, torch.Tensor]:
    names = [layer.module.removeprefix("base_model.model.") + ".weight" for layer in layers(lm.layout)]
    found = products(vector, lm.layout, scale=scale, delta=delta)
    return {name: torch.from_numpy(change.astype(np.float32)) for name, change in zip(names, found, strict=True)}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_the_weights_of_a_model_are_the_products_and_the_delta(folder: Path) -> None:
    """So a residual that is transposed, which public code adds to square layers without an error, is another model."""
    lm = language_model(folder)
    vector, delta = random(lm.layout.num_parameters, seed=1), random(delta_size(lm.layout), seed=2)
    lm.set_adapter(vector)
    lm.set_delta(delta)
    found = logits_of(lm.model)
    assert close(found, logits_of(with_changes(folder, changes_of(lm, vector, delta=delta))))
    square = [i for i, layer in enumerate(layers(lm.layout)) if layer.num_inputs == layer.num_outputs]
    assert square
    flipped = delta.copy()
    for i, part in enumerate(deltas(flipped, lm.layout)):
        part[:] = part.T.copy() if i in square else part
    assert not close(found, logits_of(with_changes(folder, changes_of(lm, vector, delta=flipped))))
    with lm.model.disable_adapter():
        assert close(logits_of(lm.model), logits_of(plain(folder))), "who asks for the base gets the base"
    lm.set_delta(None)
    assert close(logits_of(lm.model), logits_of(with_changes(folder, changes_of(lm, vector))))
    lm.set_scale(0.5)
    assert close(logits_of(lm.model), logits_of(with_changes(folder, changes_of(lm, vector, scale=0.5))))
    with pytest.raises(ValueError, match=r"delta: float32 of shape \(3,\), expected float32 of shape"):
        lm.set_delta(np.ones(3, dtype=np.float32))


def loaded(folder: Path, where: Path, release: Exported) -> torch.nn.Module:
    """The released adapter on the base, as plain PEFT loads it."""
    settings = {"base_model": str(folder), "rank": release.rank, "alpha": release.alpha, "dropout": 0.0, "target_modules": ["all-linear"]}
    save_adapter(where, release.adapter, release.layout, **settings, with_order=True)  # type: ignore[arg-type]  # settings by name
    if release.delta is not None:
        save_delta(where, release.delta, release.layout)
    model: torch.nn.Module = PeftModel.from_pretrained(plain(folder), where)
    return model


def test_plain_peft_loads_what_is_released_of_a_moved_base_and_its_loss_is_known(folder: Path, tmp_path: Path) -> None:
    lm = language_model(folder)
    tensors = {"adapter": random(lm.layout.num_parameters, seed=1), "delta": random(delta_size(lm.layout), seed=2)}
    whole = logits_of(with_changes(folder, changes_of(lm, tensors["adapter"], delta=tensors["delta"])))
    full = exported(tensors, lm.layout, alpha=ALPHA, rank=64)
    assert full.loss == pytest.approx(0.0, abs=1e-5)
    assert close(logits_of(loaded(folder, tmp_path / "full", full)), whole)
    cut = exported(tensors, lm.layout, alpha=ALPHA, rank=5)
    values = [
        np.linalg.svd(change.numpy(), compute_uv=False)
        for change in changes_of(lm, **{"vector": tensors["adapter"]}, delta=tensors["delta"]).values()
    ]
    lost, all_of_it = (sum(float(np.square(v[k:]).sum()) for v in values) for k in (5, 0))
    assert cut.loss == pytest.approx((lost / all_of_it) ** 0.5, rel=1e-4)
    assert not close(logits_of(loaded(folder, tmp_path / "cut", cut)), whole)
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 5
    assert close(logits_of(with_changes(folder, load_file(tmp_path / "cut" / DELTA))), whole), "what lies beside it is exact"
    again = load_released(tmp_path / "cut", lm.layout, seed=0)
    assert isinstance(again, dict)
    lm.set_adapter(again["adapter"])
    lm.set_delta(again["delta"])
    assert close(logits_of(lm.model), whole)
    nothing = {"adapter": initial_adapter(lm.layout, seed=0), "delta": np.zeros(delta_size(lm.layout), dtype=np.float32)}
    assert exported(nothing, lm.layout, alpha=ALPHA, rank=5).loss == 0.0


def test_plain_peft_loads_an_adapter_with_an_r_between_its_factors(folder: Path, tmp_path: Path) -> None:
    lm = language_model(folder, between=True)
    vector = random(lm.layout.num_parameters, seed=3)
    lm.set_adapter(vector)
    found = logits_of(lm.model)
    assert close(found, logits_of(with_changes(folder, changes_of(lm, vector))))
    release = exported(vector, lm.layout, alpha=ALPHA, rank=RANK)
    assert all(".lora_R." not in name for name in release.layout.names)
    assert close(logits_of(loaded(folder, tmp_path, release)), found)
    again = load_released(tmp_path, lm.layout, seed=0)
    assert isinstance(again, np.ndarray)
    lm.set_adapter(again)
    assert close(logits_of(lm.model), found)


@pytest.mark.parametrize("name", ["average", "ffa", "rolora", "fedsb", "flora"])
def test_training_moves_what_the_rule_trains_up_to_the_clients_rank_and_nothing_else(folder: Path, name: str) -> None:
    rule = lora_rule(name)
    lm = language_model(folder, between=rule.between)
    given = rule.start(lm.layout, 0)["adapter"]
    given = given + (0.01 if name == "rolora" else 0.0) * random(len(given), seed=4)
    for turn, rank in ((0, RANK), (1, RANK), (0, 2)):
        if rank < RANK:
            given[~(entries(lm.layout, frozenset(lm.layout.names), rank))] = 0.0  # type: ignore[operator]  # a mask
        names = rule.trainable(lm.layout, turn)
        lm.train_only(names, rank=rank)
        trained, _ = train_adapter(lm, given, encode(lm, RECORDS), settings=TRAIN, seed=0)
        mask = entries(lm.layout, names, rank)
        moved = trained != given
        assert not moved[~mask].any() if mask is not None else moved.any()
        for tensor_name, (start, end) in zip(lm.layout.names, lm.layout.spans(), strict=True):
            assert moved[start:end].any() == (tensor_name in names), tensor_name


def test_a_round_of_rolora_that_starts_with_a_has_no_gradient_and_ours_starts_with_b(folder: Path) -> None:
    lm = language_model(folder)
    first = average.start(lm.layout, 0)
    for turn in (rolora.TURN_OF_A, rolora.TURN_OF_B):
        lm.train_only(rolora.trainable(lm.layout, turn))
        if turn == rolora.TURN_OF_A:
            with pytest.raises(RuntimeError, match="no gradient reached the adapter"):
                train_adapter(lm, first["adapter"], encode(lm, RECORDS), settings=TRAIN, seed=0)
        else:
            assert train_adapter(lm, first["adapter"], encode(lm, RECORDS), settings=TRAIN, seed=0)[1].num_steps == 2


def test_keys_that_do_not_fit_are_refused_where_public_code_drops_them(folder: Path) -> None:
    """HetLoRA's public code writes the rank into the keys and loads without strictness: nothing is loaded, and every client trains alone."""
    lm = language_model(folder)
    tensors = unflatten(random(lm.layout.num_parameters, seed=5), lm.layout)
    marked = {name.replace(".weight", ".rank2.weight"): tensor for name, tensor in tensors.items()}
    left = lm.model.load_state_dict(marked, strict=False)
    assert len(left.unexpected_keys) == len(marked), "torch says so to nobody"
    with pytest.raises(ValueError, match=r"adapter: tensor .*rank2\.weight is not part of the layout"):
        flatten(marked, lm.layout)


def test_an_adapter_is_released_as_it_is_where_the_server_keeps_one() -> None:
    layout = Layout(("m.lora_A.weight", "m.lora_B.weight"), ((2, 5), (3, 2)))
    vector = random(layout.num_parameters, seed=0)
    release = exported(vector, layout, alpha=ALPHA, rank=1)
    assert release == dataclasses.replace(release, adapter=vector, layout=layout, rank=2, alpha=ALPHA, delta=None, loss=None)
    assert release.adapter is vector
