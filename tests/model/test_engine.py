"""Frozen parts of an adapter stay to the last bit, and the rest trains as if they were not there."""

import numpy as np
import pytest

from raysim.lora.layout import Layout, Vector
from raysim.model.language_model import LanguageModel
from raysim.model.private_train import PrivateSettings, clipped_gradient_sum, train_literal, train_private
from raysim.model.train import TrainSettings, train_adapter
from tests.method_calls import RECORDS, some_adapter
from tests.tiny_models import build, encode, sharp_base

PLAIN = TrainSettings(num_epochs=2, max_steps=0, batch_size=2, lr=0.05, optimizer="adamw", weight_decay=0.1, max_grad_norm=0.0, prox_mu=0.5)
PRIVATE = PrivateSettings(
    num_steps=2, batch_size=3, sampling_prob=0.5, lr=0.05, optimizer="adamw", clip_norm=0.1, noise_multiplier=1.0, secure_noise=False
)


@pytest.fixture
def lm() -> LanguageModel:
    return build(sharp_base())


def names_of(layout: Layout, group: str) -> frozenset[str]:
    return frozenset(name for name in layout.names if f".lora_{group}." in name)


def trained(lm: LanguageModel, how: str, adapter: Vector) -> Vector:
    examples = encode(lm, RECORDS)
    if how == "plain":
        return train_adapter(lm, adapter, examples, settings=PLAIN, seed=1)[0]
    step = train_private if how == "private" else train_literal
    return step(lm, adapter, examples, settings=PRIVATE, seed=1)[0]


@pytest.mark.parametrize("how", ["plain", "private", "literal"])
def test_what_is_frozen_stays_whatever_decay_and_noise_would_do(lm: LanguageModel, how: str) -> None:
    adapter, is_A = some_adapter(lm), lm.layout.group_mask("A")
    free = trained(lm, how, adapter)
    assert (free[is_A] != adapter[is_A]).any()
    lm.train_only(names_of(lm.layout, "B"))
    half = trained(lm, how, adapter)
    assert half[is_A].tobytes() == adapter[is_A].tobytes()
    assert (half[~is_A] != adapter[~is_A]).mean() > 0.5
    lm.train_only(frozenset(lm.layout.names))
    assert lm.frozen is None
    assert trained(lm, how, adapter).tobytes() == free.tobytes(), "freezing leaves no trace"


def test_the_norm_that_is_clipped_is_that_of_what_trains(lm: LanguageModel) -> None:
    """Else what is frozen would eat up the bound of the rest."""
    lm.set_adapter(some_adapter(lm))
    examples, is_A = encode(lm, RECORDS), lm.layout.group_mask("A")
    whole, norms, _ = clipped_gradient_sum(lm, examples[:1], clip_norm=1e30, max_batch=1)
    lm.train_only(names_of(lm.layout, "B"))
    half, half_norms, _ = clipped_gradient_sum(lm, examples[:1], clip_norm=1e30, max_batch=1)
    assert not half[is_A].any()
    np.testing.assert_allclose(half[~is_A], whole[~is_A], rtol=1e-9)
    assert half_norms == pytest.approx([float(whole[~is_A].norm())], rel=1e-6)
    assert half_norms[0] < norms[0]
