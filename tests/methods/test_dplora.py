"""DP-LoRA: what a client does is what the mechanism says, since the mechanism is what is accounted for."""

from dataclasses import replace

import numpy as np
import pytest

from raysim.methods.dplora import dplora as dplora_group
from raysim.model.language_model import LanguageModel
from raysim.model.private_train import PrivateSettings, train_literal, train_private
from tests.method_calls import RECORDS, alone, in_round, make_call
from tests.tiny_models import build, sharp_base

dplora = alone(dplora_group)

EXAMPLE = ["method.name=dplora", "dplora.mode=example", "dplora.num_steps=3", "dplora.lr=0.05", "dplora.optimizer=sgd"]
EXAMPLE += ["privacy.noise_multiplier=0.7", "privacy.clip_norm=0.3", "dplora.batch_size=2"]
LITERAL = [*EXAMPLE, "dplora.mode=literal"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(sharp_base())


def expected_settings(num_steps: int) -> PrivateSettings:
    return PrivateSettings(
        num_steps=num_steps,
        batch_size=2,
        sampling_prob=2 / 6,
        lr=0.05,
        optimizer="sgd",
        clip_norm=0.3,
        noise_multiplier=0.7,
        secure_noise=False,
    )


def test_example_is_private_training_at_the_mechanisms_rate_and_noise(lm: LanguageModel) -> None:
    call = make_call(lm, *EXAMPLE)
    assert call.mechanism.kind == "example"
    result = dplora(lm, call)
    trained, stats = train_private(lm, call.adapter, call.shard, settings=expected_settings(3), seed=call.seed("train"))
    assert result.upload["adapter"].tobytes() == (trained - call.adapter).tobytes()
    assert (result.stats, result.state, result.synthetic) == (stats, None, ())


def test_literal_is_the_published_step(lm: LanguageModel) -> None:
    call = make_call(lm, *LITERAL)
    assert call.mechanism.kind == "literal"
    result = dplora(lm, call)
    trained, stats = train_literal(lm, call.adapter, call.shard, settings=expected_settings(1), seed=call.seed("train"))
    assert result.upload["adapter"].tobytes() == (trained - call.adapter).tobytes()
    assert result.stats == stats
    assert result.stats.num_steps == 1


@pytest.mark.parametrize(
    ("field", "value"), [("noise_multiplier", 2.0), ("clip_norm", 0.9), ("batch_size", 3), ("num_steps", 1), ("shard_sizes", (12, 6, 6))]
)
def test_the_mechanism_decides_and_not_the_configuration(lm: LanguageModel, field: str, value: object) -> None:
    """A number changed in the mechanism alone changes the update: so what is accounted for is what was done."""
    call = make_call(lm, *EXAMPLE)
    changed = replace(call, mechanism=replace(call.mechanism, **{field: value}))
    assert dplora(lm, changed).upload["adapter"].tobytes() != dplora(lm, call).upload["adapter"].tobytes()


def test_the_rate_is_the_accountants_for_the_smallest_shard(lm: LanguageModel) -> None:
    call = make_call(lm, *EXAMPLE)
    mechanism = replace(call.mechanism, shard_sizes=(12, 6, 4))
    rates = [replace(call, mechanism=mechanism, client_id=k).private_settings().sampling_prob for k in range(3)]
    assert rates == pytest.approx([2 / 12, 2 / 6, 2 / 4])
    assert max(rates) == mechanism.sampling_prob


def test_noise_of_clients_and_rounds_is_independent(lm: LanguageModel) -> None:
    """Nothing sampled: what each sends is noise alone, of the stated scale, and unlike any other's."""
    overrides = [*EXAMPLE, "dplora.num_steps=1", "dplora.lr=1.0"]
    call = make_call(lm, *overrides)
    call = replace(call, mechanism=replace(call.mechanism, shard_sizes=(10**9,) * 3))
    calls = [call, replace(call, client_id=1), in_round(call, 1)]
    noises = [dplora(lm, one).upload["adapter"].astype(float) for one in calls]
    for noise in noises:
        assert noise.std() == pytest.approx(0.7 * 0.3 / 2, rel=0.1)
    correlations = np.corrcoef(noises) - np.eye(3)
    assert np.abs(correlations).max() < 0.1


def test_a_retried_call_sends_the_same_bits(lm: LanguageModel) -> None:
    for overrides in (EXAMPLE, LITERAL):
        call = make_call(lm, *overrides, records=RECORDS[:4])
        assert dplora(lm, call).upload["adapter"].tobytes() == dplora(lm, call).upload["adapter"].tobytes()
