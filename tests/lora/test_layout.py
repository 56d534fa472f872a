"""The adapter: a vector and its layout are inverse, what does not fit is refused, and a saved one needs no raysim to load."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raysim.lora.layout import Layout, adapter_sha256, flatten, initial_adapter, load_adapter, save_adapter, unflatten
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model

TARGETS = ["q_proj", "v_proj", "up_proj"]
LAYOUT = Layout(names=("m.lora_A.weight", "m.lora_B.weight"), shapes=((2, 5), (3, 2)))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build_language_model(load_base_model("tiny"), rank=3, alpha=7.0, dropout=0.0, target_modules=TARGETS)


def random_adapter(layout: Layout, *, seed: int = 0) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).standard_normal(layout.num_parameters)).astype(np.float32)


@given(st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_flatten_and_unflatten_are_inverse(shapes: list[tuple[int, ...]], seed: int) -> None:
    layout = Layout(names=tuple(f"tensor_{i}" for i in range(len(shapes))), shapes=tuple(shapes))
    vector = random_adapter(layout, seed=seed)
    tensors = unflatten(vector, layout)
    assert [tuple(tensor.shape) for tensor in tensors.values()] == shapes
    assert flatten(tensors, layout).tobytes() == vector.tobytes()
    assert flatten(dict(reversed(tensors.items())), layout).tobytes() == vector.tobytes(), "the dictionary's order has a say"
    for (start, end), tensor in zip(layout.spans(), tensors.values(), strict=True):
        assert vector[start:end].tolist() == tensor.reshape(-1).tolist()


def test_unflatten_gives_copies() -> None:
    vector = random_adapter(LAYOUT)
    before = vector.tobytes()
    for tensor in unflatten(vector, LAYOUT).values():
        tensor.zero_()
    assert vector.tobytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("m.lora_B.weight"), "tensor m.lora_B.weight is missing"),
        (lambda tensors: tensors.update(other=torch.zeros(1)), "tensor other is not part of the layout"),
        (lambda tensors: tensors.update({"m.lora_A.weight": torch.zeros(5, 2)}), r"has shape \(5, 2\), expected \(2, 5\)"),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_tensors_that_do_not_fit_are_refused(change: object, message: str, tmp_path: Path) -> None:
    tensors = unflatten(random_adapter(LAYOUT), LAYOUT)
    change(tensors)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        flatten(tensors, LAYOUT)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, LAYOUT)


def test_initial_adapter_changes_nothing_and_is_kaiming_uniform(lm: LanguageModel) -> None:
    vector = initial_adapter(lm.layout, seed=3)
    for name, tensor in unflatten(vector, lm.layout).items():
        if ".lora_B." in name:
            assert not tensor.any()
        else:
            bound = 1 / math.sqrt(tensor.shape[1])  # gain sqrt(1/3) of a = sqrt(5), times sqrt(3 / fan_in)
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.25)
    assert initial_adapter(lm.layout, seed=3).tobytes() == vector.tobytes()
    assert initial_adapter(lm.layout, seed=4).tobytes() != vector.tobytes()


def test_initial_factors_are_drawn_independently(lm: LanguageModel) -> None:
    factors = [t for name, t in unflatten(initial_adapter(lm.layout, seed=3), lm.layout).items() if ".lora_A." in name]
    assert len({tensor.numpy().tobytes() for tensor in factors}) == len(factors)


def test_group_masks_divide_the_vector(lm: LanguageModel) -> None:
    mask_a, mask_b = lm.layout.group_mask("A"), lm.layout.group_mask("B")
    assert (mask_a ^ mask_b).all()
    by_name = dict(zip(lm.layout.names, lm.layout.spans(), strict=True))
    for name, (start, end) in by_name.items():
        assert mask_a[start:end].all() == (".lora_A." in name)
    assert int(mask_a.sum()) == sum(3 * shape[1] for name, shape in zip(lm.layout.names, lm.layout.shapes, strict=True) if "lora_A" in name)


def test_sha256_is_of_the_bytes_in_order() -> None:
    first, second = random_adapter(LAYOUT, seed=0), random_adapter(LAYOUT, seed=1)
    assert adapter_sha256(first) == adapter_sha256([first])
    assert adapter_sha256([first, second]) == adapter_sha256(np.concatenate([first, second]))
    assert adapter_sha256([first, second]) != adapter_sha256([second, first])
    changed = first.copy()
    changed[-1] = np.nextafter(changed[-1], np.float32(9))
    assert adapter_sha256(changed) != adapter_sha256(first)


def test_peft_loads_a_saved_adapter_without_raysim(lm: LanguageModel, tmp_path: Path) -> None:
    """The base from a folder of transformers' own, the adapter from ours: the same logits as here, and not the base's."""
    vector = random_adapter(lm.layout)
    lm.set_adapter(vector)
    ids = torch.tensor([lm.tokenizer("What does the patient take?")["input_ids"]])
    with torch.no_grad():
        expected = lm.model(input_ids=ids).logits
    save_base(lm, tmp_path / "base")
    save_adapter(
        tmp_path / "adapter",
        vector,
        lm.layout,
        base_model=str(tmp_path / "base"),
        rank=3,
        alpha=7.0,
        dropout=0.0,
        target_modules=TARGETS,
    )
    core = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        untouched = core(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(core, tmp_path / "adapter")
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    assert (untouched - expected).abs().max() > 1e-3, "the adapter makes no difference that could have been lost"
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert load_adapter(tmp_path / "adapter", lm.layout).tobytes() == vector.tobytes()


def save_base(lm: LanguageModel, folder: Path) -> None:
    with lm.model.disable_adapter():
        plain = AutoModelForCausalLM.from_config(lm.model.get_base_model().config, dtype=torch.float32)
    weights = {
        name.replace(".base_layer", ""): tensor for name, tensor in lm.model.get_base_model().state_dict().items() if ".lora_" not in name
    }
    plain.load_state_dict(weights)
    plain.save_pretrained(folder)


def test_load_reads_what_peft_saves(lm: LanguageModel, tmp_path: Path) -> None:
    vector = random_adapter(lm.layout, seed=5)
    lm.set_adapter(vector)
    lm.model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(lm.layout.names)
    assert load_adapter(tmp_path, lm.layout).tobytes() == vector.tobytes()
