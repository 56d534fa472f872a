"""SCAFFOLD: nothing but FEDIT while the control variates are zero, the paper's recursion afterwards, and c the mean of all c_k."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from raysim.config import load
from raysim.federation.server import begin
from raysim.lora.layout import Vector
from raysim.methods.call import ClientCall, ClientState
from raysim.methods.fedit import fedit as fedit_group
from raysim.methods.scaffold import control_change
from raysim.methods.scaffold import scaffold as scaffold_group
from raysim.model.language_model import LanguageModel
from raysim.model.train import grouped_batches, response_nll
from raysim.privacy.clipping import clip_and_sum
from raysim.privacy.mechanism import Mechanism
from raysim.rng import numpy_rng
from raysim.runs.run import Backend, Run, open_backend, run
from tests.method_calls import alone, in_round, make_call, some_adapter
from tests.rounds import next_step, state_of
from tests.small_runs import small
from tests.tiny_models import build, sharp_base

fedit = alone(fedit_group)
scaffold = alone(scaffold_group)

SGD = ["train.optimizer=sgd", "train.lr=0.1", "train.max_grad_norm=0"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(sharp_base())


def call_of(lm: LanguageModel, *overrides: str, control: Vector | None = None, own: Vector | None = None) -> ClientCall:
    """A call with these control variates, zeros unless given."""
    call = make_call(lm, "method.name=scaffold", *overrides)
    state = None if own is None else ClientState(arrays={"control": own})
    sent = call.round.broadcast if control is None else {**call.round.broadcast, "control": control}
    return dataclasses.replace(call, round=dataclasses.replace(call.round, broadcast=sent), state=state)


def variate(lm: LanguageModel, *, seed: int) -> Vector:
    return (0.05 * np.random.default_rng(seed).standard_normal(lm.layout.num_parameters)).astype(np.float32)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zero_control_variates_are_fedit_bit_for_bit(lm: LanguageModel, optimizer: str) -> None:
    overrides = [f"train.optimizer={optimizer}", "train.batch_size=2"]
    plain = fedit(lm, call_of(lm, *overrides))
    same = scaffold(lm, call_of(lm, *overrides))
    assert plain.upload["adapter"].any()
    assert same.upload["adapter"].tobytes() == plain.upload["adapter"].tobytes()
    assert same.stats == plain.stats
    equal = variate(lm, seed=1)
    also = scaffold(lm, call_of(lm, *overrides, control=equal, own=equal))
    assert also.upload["adapter"].tobytes() == plain.upload["adapter"].tobytes(), "only the difference of the two counts"
    other = scaffold(lm, call_of(lm, *overrides, control=equal))
    assert other.upload["adapter"].tobytes() != plain.upload["adapter"].tobytes()


def gradient(lm: LanguageModel, adapter: Vector, call: ClientCall, batch: list[int]) -> np.ndarray:
    """The gradient of the batch's mean loss at `adapter`, by a backward pass of its own."""
    lm.set_adapter(adapter)
    lm.model.eval()
    lm.flat_grad.zero_()
    nll_B, count_B = response_nll(lm, [call.shard[i] for i in batch])
    (nll_B.sum() / count_B.sum()).backward()
    return lm.flat_grad.numpy().astype(np.float64).copy()


def test_local_steps_and_the_new_variate_are_the_papers(lm: LanguageModel) -> None:
    """w -= lr (g + c - c_k) over the batches in turn, and with SGD the new c_k is the mean of the gradients."""
    control, own = variate(lm, seed=1), variate(lm, seed=2)
    call = call_of(lm, *SGD, "train.batch_size=2", control=control, own=own)
    result = scaffold(lm, call)
    rng = numpy_rng(call.seed("train"), "batches", 0)
    batches = grouped_batches([example.num_tokens for example in call.shard], batch_size=2, rng=rng)
    adapter, gradients = call.adapter.astype(np.float64), []
    for batch in batches:
        gradients.append(gradient(lm, adapter.astype(np.float32), call, batch))
        adapter -= 0.1 * (gradients[-1] + control - own)
    np.testing.assert_allclose(result.upload["adapter"], adapter - call.adapter, rtol=1e-3, atol=1e-5)
    assert result.state is not None
    np.testing.assert_allclose(result.state.arrays["control"], np.mean(gradients, axis=0), rtol=1e-3, atol=3e-5)
    np.testing.assert_array_equal(result.state.arrays["control"], own + result.upload["control"])
    assert np.abs(np.mean(gradients, axis=0)).max() > 1e-2, "gradients too small to be told from the tolerance"


def test_the_correction_follows_adamw_with_the_rounds_learning_rate(lm: LanguageModel) -> None:
    """One step: AdamW's own, then -lr (c - c_k), where the cosine schedule has halved the learning rate."""
    control, own = variate(lm, seed=1), variate(lm, seed=2)
    overrides = ["train.max_steps=1", "train.lr_schedule=cosine", "train.lr=0.02", "train.min_lr=0", "server.num_rounds=4"]
    calls = [in_round(call_of(lm, *overrides, **given), 2) for given in ({}, {"control": control, "own": own})]
    plain, corrected = (scaffold(lm, call) for call in calls)
    np.testing.assert_allclose(corrected.upload["adapter"] - plain.upload["adapter"], -0.01 * (control - own), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(corrected.upload["control"], -control - corrected.upload["adapter"] / 0.01, rtol=1e-4, atol=1e-5)


def test_a_client_without_records_or_with_an_update_that_is_no_number_keeps_its_variate(lm: LanguageModel) -> None:
    own = variate(lm, seed=2)
    empty = dataclasses.replace(call_of(lm, control=variate(lm, seed=1), own=own), shard=())
    result = scaffold(lm, empty)
    assert not result.upload["adapter"].any()
    diverged = dataclasses.replace(call_of(lm, control=variate(lm, seed=1), own=own), adapter=np.full_like(some_adapter(lm), np.inf))
    dropped = scaffold(lm, diverged)
    assert not np.isfinite(dropped.upload["adapter"]).all()
    for one in (result, dropped):
        assert one.state is not None
        assert not one.upload["control"].any()
        assert one.state.arrays["control"].tobytes() == own.tobytes()


# --- the algebra of the two sides, on a problem whose answer is known ---


def quadratic_rounds(*, corrected: bool, num_rounds: int) -> float:
    """Where two clients of unlike curvature and minimum end after rounds of 20 exact local steps each."""
    curvatures, minima, lr, num_steps = (0.5, 5.0), (3.0, -1.0), 0.1, 20
    config = load("", ["partition.num_clients=2", "data.num_train=10"])
    mechanism = Mechanism.from_config(config, shard_sizes=[5, 5])
    state = state_of(0, np.zeros(1, dtype=np.float32), control=np.zeros(1))
    own = [np.zeros(1, dtype=np.float32)] * 2
    for _ in range(num_rounds):
        sent = begin(state, mechanism).broadcast
        adapter, control = sent["adapter"], sent["control"]
        parts = []
        for k in (0, 1):
            w = adapter.copy()
            for _ in range(num_steps):
                w = w - np.float32(lr) * (curvatures[k] * (w - minima[k]) + corrected * (control - own[k]))
            change = control_change(w - adapter, control, num_steps=num_steps, lr=lr)
            own[k] = own[k] + change
            part = clip_and_sum([w - adapter], weights=[5.0], clip_norm=None)
            parts.append(dataclasses.replace(part, further={"control": 5.0 * change.astype(np.float64)}))
        state, _ = next_step(state, parts, mechanism=mechanism, lr=1.0, seed=0)
    return float(state.adapter[0])


def test_it_reaches_the_joint_minimum_from_which_averaging_drifts() -> None:
    """The minimum of the mean of both quadratics is (0.5 * 3 - 5 * 1) / 5.5; averaged local steps stop elsewhere."""
    minimum = (0.5 * 3.0 - 5.0) / 5.5
    assert quadratic_rounds(corrected=True, num_rounds=60) == pytest.approx(minimum, abs=1e-4)
    assert abs(quadratic_rounds(corrected=False, num_rounds=60) - minimum) > 0.1


# --- whole runs ---


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """The tiny model in this process."""
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as opened:
        yield opened


def finished(method: str, *settings: str, backend: Backend, out: Path) -> Run:
    return run(small(method, "evaluate.every=0", "attack.every=-1", *settings, out=out), display=False, backend=backend)


def server_arrays(out: Path, num_rounds: int) -> dict[str, Any]:
    return load_file(out / "state" / f"round-{num_rounds:05d}" / "server.safetensors")


def test_the_first_release_is_fedits_and_the_second_is_not(backend: Backend, tmp_path: Path) -> None:
    for method in ("fedit", "scaffold"):
        finished(method, backend=backend, out=tmp_path / method)
    releases = [[server_arrays(tmp_path / method, r)["adapter"].tobytes() for method in ("fedit", "scaffold")] for r in (1, 2)]
    assert releases[0][0] == releases[0][1]
    assert releases[1][0] != releases[1][1]


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_servers_variate_is_the_mean_of_all_clients(backend: Backend, tmp_path: Path, weighting: str) -> None:
    """Under the updates' weights, those that have not come yet and those that failed included at what they had."""
    settings = ["partition.num_clients=4", "server.cohort_size=2", "server.num_rounds=3", "clients.dropout=0.3"]
    settings += [f"server.weighting={weighting}", "partition.scheme=quantity", *SGD]
    done = finished("scaffold", *settings, backend=backend, out=tmp_path / "run")
    sizes = [client["num_examples"] for client in json.loads((tmp_path / "run" / "partition.json").read_text())["clients"]]
    assert len(set(sizes)) > 1, "equal shards would not tell the weightings apart"
    weights = np.array(sizes if weighting == "examples" else [1] * 4) / (sum(sizes) if weighting == "examples" else 4)
    for num_rounds in (2, 3):
        control = server_arrays(tmp_path / "run", num_rounds)["control"]
        paths = (tmp_path / "run" / "state" / f"round-{num_rounds:05d}").glob("client-*.safetensors")
        own = {int(path.stem[-5:]): load_file(path)["control"] for path in paths}
        expected = sum(weights[k] * one.astype(np.float64) for k, one in own.items())
        np.testing.assert_allclose(control, expected, rtol=1e-4, atol=1e-6)
        assert np.abs(control).max() > 1e-4
    came = set().union(*(record["cohort"] for record in done.records))
    assert len(own) < 4 or any(record["num_failed"] for record in done.records), f"everyone came ({came}): nothing is tested"


def test_it_costs_two_vectors_each_way(backend: Backend, tmp_path: Path) -> None:
    cohort = ["partition.num_clients=4", "server.cohort_size=2", "server.num_rounds=1"]
    plain, twice = (finished(method, *cohort, backend=backend, out=tmp_path / method).summary for method in ("fedit", "scaffold"))
    assert plain["uplink_bytes"] == 2 * 4 * plain["num_parameters"]
    assert (twice["uplink_bytes"], twice["downlink_bytes"]) == (2 * plain["uplink_bytes"], 2 * plain["downlink_bytes"])
