"""FEDIT and LOCIT: the update is what training changed; what stays with a client stays with it."""

from dataclasses import replace

import numpy as np
import pytest

from raysim.methods.call import ClientState
from raysim.methods.fedit import fedit as fedit_group
from raysim.methods.locit import locit as locit_group
from raysim.methods.registry import method_of
from raysim.methods.spec import METHODS
from raysim.model.language_model import LanguageModel
from raysim.model.train import TrainSettings, train_adapter
from tests.method_calls import alone, in_round, make_call, some_adapter
from tests.tiny_models import build, sharp_base

fedit = alone(fedit_group)
locit = alone(locit_group)

SETTINGS = TrainSettings(
    num_epochs=1, max_steps=0, batch_size=4, lr=2e-3, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, prox_mu=0.0
)

TRAINING = [name for name, spec in METHODS.items() if spec.trains]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(sharp_base())


def test_fedit_sends_what_training_changed(lm: LanguageModel) -> None:
    call = make_call(lm)
    result = fedit(lm, call)
    trained, stats = train_adapter(lm, call.adapter, call.shard, settings=SETTINGS, seed=call.seed("train"))
    assert result.upload["adapter"].tobytes() == (trained - call.adapter).tobytes()
    assert result.upload["adapter"].any()
    assert (result.stats, result.state, result.synthetic) == (stats, None, ())


def test_every_client_and_round_has_a_stream_of_its_own(lm: LanguageModel) -> None:
    call = make_call(lm, "train.batch_size=1")
    calls = [call, replace(call, client_id=1), in_round(call, 1), replace(call, config=replace(call.config, seed=1))]
    assert len({one.seed("train") for one in calls}) == 4
    assert len({fedit(lm, one).upload["adapter"].tobytes() for one in calls}) == 4
    assert fedit(lm, call).upload["adapter"].tobytes() == fedit(lm, call).upload["adapter"].tobytes()


def test_settings_are_the_configured_ones(lm: LanguageModel) -> None:
    overrides = ["train.num_epochs=3", "train.max_steps=5", "train.batch_size=2", "train.lr=0.5", "train.optimizer=sgd"]
    overrides += ["train.weight_decay=0.1", "train.max_grad_norm=2", "train.prox_mu=0.3"]
    assert make_call(lm, *overrides).train_settings() == TrainSettings(3, 5, 2, 0.5, "sgd", 0.1, 2.0, 0.3)


def test_the_learning_rate_follows_the_schedule(lm: LanguageModel) -> None:
    call = make_call(lm, "train.lr_schedule=cosine", "train.lr=0.4", "train.min_lr=0.2", "server.num_rounds=4")
    rates = [in_round(call, r).train_settings().lr for r in range(4)]
    assert rates[0] == pytest.approx(0.4)
    assert rates[2] == pytest.approx(0.3)
    assert sorted(rates, reverse=True) == rates


def test_cenit_is_fedit() -> None:
    assert method_of("cenit") is method_of("fedit")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fedprox_without_a_pull_is_fedit(lm: LanguageModel, optimizer: str) -> None:
    """Bit for bit with mu = 0, and with a mu so small that the proximal term is computed and rounds to nothing; not with mu = 1."""
    overrides = [f"train.optimizer={optimizer}", "train.batch_size=2", "train.lr=0.05"]
    plain = fedit(lm, make_call(lm, *overrides)).upload["adapter"].tobytes()
    assert [
        fedit(lm, make_call(lm, *overrides, f"train.prox_mu={mu}")).upload["adapter"].tobytes() == plain for mu in ("0", "1e-30", "1")
    ] == [
        True,
        True,
        False,
    ]


def test_locit_sends_nothing_and_goes_on_from_its_own_adapter(lm: LanguageModel) -> None:
    call = make_call(lm, "method.name=locit")
    first = locit(lm, call)
    assert not first.upload["adapter"].any()
    assert first.state is not None
    own = first.state.arrays["adapter"]
    assert own.tobytes() == train_adapter(lm, call.adapter, call.shard, settings=SETTINGS, seed=call.seed("train"))[0].tobytes()

    later = replace(in_round(call, 1), state=first.state, adapter=some_adapter(lm, seed=8))  # whatever the server may hold
    second = locit(lm, later)
    assert second.state is not None
    expected, _ = train_adapter(lm, own, call.shard, settings=SETTINGS, seed=later.seed("train"))
    assert second.state.arrays["adapter"].tobytes() == expected.tobytes()
    assert not second.upload["adapter"].any()


@pytest.mark.parametrize("name", TRAINING)
def test_an_empty_shard_sends_a_zero_update(lm: LanguageModel, name: str) -> None:
    result = alone(method_of(name))(lm, make_call(lm, f"method.name={name}", records=()))
    assert result.upload["adapter"].dtype == np.float32
    assert result.upload["adapter"].shape == (lm.layout.num_parameters,)
    assert not result.upload["adapter"].any()
    assert (result.stats.num_tokens, result.stats.loss) == (0, None)


@pytest.mark.parametrize("name", TRAINING)
def test_a_call_writes_none_of_its_arguments(lm: LanguageModel, name: str) -> None:
    """Arrays from another process are read-only."""
    call = make_call(lm, f"method.name={name}")
    kept = some_adapter(lm, seed=3)
    for array in (*call.round.broadcast.values(), kept):
        array.setflags(write=False)
    result = alone(method_of(name))(lm, replace(call, state=ClientState(arrays={"adapter": kept, "own": kept, "control": kept})))
    assert result.upload["adapter"].shape == call.adapter.shape
