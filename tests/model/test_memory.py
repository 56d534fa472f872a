"""What training keeps in memory changes none of its results: activations computed again, and batches taken in parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raysim.lora.layout import Vector
from raysim.model.language_model import LanguageModel
from raysim.model.private_train import PrivateSettings, clipped_gradient_sum, train_literal, train_private
from raysim.model.train import TrainSettings, response_nll, train_adapter
from tests.method_calls import RECORDS, some_adapter
from tests.tiny_models import build, encode, sharp_base

PLAIN = TrainSettings(num_epochs=2, max_steps=0, batch_size=4, lr=0.01, optimizer="adamw", weight_decay=0.1, max_grad_norm=1.0, prox_mu=0.5)
PRIVATE = PrivateSettings(
    num_steps=3, batch_size=4, sampling_prob=0.7, lr=0.01, optimizer="adamw", clip_norm=0.1, noise_multiplier=0.5, secure_noise=False
)
HOW = ["plain", "private", "literal"]


@pytest.fixture
def lm() -> LanguageModel:
    return build(sharp_base())


def trained(lm: LanguageModel, how: str, **settings: int) -> tuple[Vector, float | None]:
    examples = encode(lm, RECORDS)
    if how == "plain":
        adapter, stats = train_adapter(lm, some_adapter(lm), examples, settings=replace(PLAIN, **settings), seed=1)
    else:
        step = train_private if how == "private" else train_literal
        adapter, stats = step(lm, some_adapter(lm), examples, settings=replace(PRIVATE, **settings), seed=1)
    return adapter, stats.loss


@pytest.mark.parametrize("how", HOW)
def test_activations_that_are_computed_again_change_no_bit(lm: LanguageModel, how: str) -> None:
    plain, _ = trained(lm, how)
    again, _ = trained(lm, how, keep_activations=False)
    assert not lm.keeps_activations
    assert again.tobytes() == plain.tobytes()
    assert trained(lm, how)[0].tobytes() == plain.tobytes(), "it leaves no trace"


def bytes_saved(lm: LanguageModel) -> int:
    """What a forward pass keeps for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        response_nll(lm, encode(lm, RECORDS))
    return sum(sizes)


def test_activations_are_not_kept(lm: LanguageModel) -> None:
    """Of each layer its input alone is held for the backward pass."""
    held = []
    for kept in (True, False):
        lm.keep_activations(kept)
        lm.model.train()
        held.append(bytes_saved(lm))
        lm.model.eval()
    assert held[1] < held[0] / 2


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_in_parts_is_the_batch(lm: LanguageModel, how: str, size: int) -> None:
    whole, loss = trained(lm, how)
    parts, loss_of_parts = trained(lm, how, micro_batch_size=size)
    np.testing.assert_allclose(parts, whole, atol=2e-5)
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    same, _ = trained(lm, how, micro_batch_size=size)
    assert same.tobytes() == parts.tobytes()


def test_a_part_as_large_as_the_batch_changes_no_bit(lm: LanguageModel) -> None:
    assert trained(lm, "plain", micro_batch_size=4)[0].tobytes() == trained(lm, "plain")[0].tobytes()


def test_the_gradient_of_parts_is_that_of_the_batch_and_not_the_mean_of_their_means(lm: LanguageModel) -> None:
    """Examples of unequal length: one SGD step by hand from the whole batch's loss."""
    examples, settings = (
        encode(lm, RECORDS)[:3],
        replace(PLAIN, num_epochs=1, optimizer="sgd", max_grad_norm=0.0, prox_mu=0.0, weight_decay=0.0),
    )
    start = some_adapter(lm)
    assert len({len(example.scored) for example in examples}) > 1
    found, _ = train_adapter(lm, start, examples, settings=replace(settings, micro_batch_size=1), seed=0)
    lm.set_adapter(start)
    lm.flat_grad.zero_()
    nll_B, count_B = response_nll(lm, examples)
    (nll_B.sum() / count_B.sum()).backward()
    np.testing.assert_allclose(found, start - np.float32(settings.lr) * lm.flat_grad.numpy(), atol=1e-6)
    wrong = sum(nll / count for nll, count in zip(nll_B, count_B, strict=True)) / 3
    assert abs(float(wrong.detach() - (nll_B.sum() / count_B.sum()).detach())) > 1e-3, "else the test could not tell"


def test_each_example_is_clipped_once_however_the_batch_is_taken(lm: LanguageModel) -> None:
    examples = encode(lm, RECORDS)
    lm.set_adapter(some_adapter(lm))
    whole, norms, _ = clipped_gradient_sum(lm, examples, clip_norm=0.1, max_batch=len(examples))
    parts, norms_of_parts, _ = clipped_gradient_sum(lm, examples, clip_norm=0.1, max_batch=1)
    assert norms_of_parts == pytest.approx(norms, rel=1e-4)
    assert len(norms) == len(examples)
    np.testing.assert_allclose(parts.numpy(), whole.numpy(), atol=1e-6)
