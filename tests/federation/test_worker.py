"""A worker's chunk is the clipped sum of its clients' own calls, whatever the worker did before; failures name their client."""

from dataclasses import replace

import numpy as np
import pytest

from raysim.config import Config, load
from raysim.federation.worker import Assignment, Worker
from raysim.methods import METHODS
from raysim.methods.call import ClientCall, ClientResult, ClientState
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel
from raysim.privacy.clipping import clip_and_sum
from tests.conftest import SMALL
from tests.method_calls import make_call, some_adapter


def make_worker() -> Worker:
    return Worker(load_base_model("tiny"), device="cpu", num_threads=1)


def config_for(*overrides: str) -> Config:
    return load("", [*SMALL, *overrides])


@pytest.mark.parametrize(
    "overrides", [(), ("privacy.unit=client", "privacy.clip_norm=0.01"), ("method.name=dplora",), ("method.name=locit",)]
)
def test_a_chunk_is_the_sum_of_its_clients_calls(overrides: tuple[str, ...]) -> None:
    worker, config = make_worker(), config_for(*overrides)
    lm = worker.language_model(config.lora)
    call = make_call(lm, *overrides)
    weights = (1.0, 1.0, 1.0) if overrides and "client" in overrides[0] else (2.0, 5.0, 3.0)
    assignment = Assignment(config, call.mechanism, weights)
    calls = [replace(call, client_id=k) for k in (0, 2)]
    results = [METHODS[config.method.name](lm, one) for one in calls]
    expected = clip_and_sum([r.update for r in results], weights=[weights[0], weights[2]], clip_norm=call.mechanism.update_clip_norm)

    for fresh in (worker, make_worker()):
        total, reports, states = fresh.run_chunk(
            assignment, (0, 2), 0, call.adapter, [call.shard, call.shard], [None, None], clip_norm=call.mechanism.update_clip_norm
        )
        assert total.total.tobytes() == expected.total.tobytes()
        assert (total.weight, total.norms, total.num_clipped) == (expected.weight, expected.norms, expected.num_clipped)
        assert [report.client_id for report in reports] == [0, 2]
        assert [report.stats for report in reports] == [result.stats for result in results]
        for state, result in zip(states, results, strict=True):
            if result.state is None:
                assert state is None
            else:
                assert state is not None
                assert state.arrays["adapter"].tobytes() == result.state.arrays["adapter"].tobytes()
    if overrides and "client" in overrides[0]:
        assert expected.num_clipped == 2


def test_the_model_is_built_once_for_a_shape_and_again_for_another() -> None:
    worker = make_worker()
    small = config_for("lora.rank=2").lora
    first = worker.language_model(small)
    assert worker.language_model(config_for("lora.rank=2").lora) is first
    assert worker.language_model(config_for("lora.rank=3").lora).layout.shapes[0][0] == 3
    again = worker.language_model(small)
    assert again.layout == first.layout


def test_a_failure_names_round_and_client() -> None:
    worker, config = make_worker(), config_for("method.name=locit")
    call = make_call(worker.language_model(config.lora), "method.name=locit")
    assignment = Assignment(config, call.mechanism, (1.0, 1.0, 1.0))
    broken = ClientState(arrays={})  # a state that lacks the adapter
    with pytest.raises(RuntimeError, match=r"^round 4, client 2: KeyError: 'adapter'$"):
        worker.run_chunk(assignment, (0, 2), 4, call.adapter, [call.shard, call.shard], [None, broken], clip_norm=None)


def test_a_diverged_client_is_dropped_and_the_others_count() -> None:
    worker, config = make_worker(), config_for()
    lm = worker.language_model(config.lora)
    call = make_call(lm)
    assignment = Assignment(config, call.mechanism, (1.0, 1.0, 1.0))
    diverged = np.full_like(some_adapter(lm), np.inf)
    total, reports, _ = worker.run_chunk(assignment, (0,), 0, diverged, [call.shard], [None], clip_norm=None)
    assert (total.num_dropped, total.weight) == (1, 0.0)
    assert not total.total.any()
    assert reports[0].stats.loss is None


def test_an_upload_that_holds_more_than_the_adapter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not summed up to the length that fits, nor broadcast: an error that names round and client."""
    worker, config = make_worker(), config_for()
    call = make_call(worker.language_model(config.lora))
    assignment = Assignment(config, call.mechanism, (1.0, 1.0, 1.0))
    honest = METHODS["fedit"]

    def generous(lm: LanguageModel, one: ClientCall) -> ClientResult:
        result = honest(lm, one)
        return replace(result, update=np.append(result.update, np.float32(1)))

    monkeypatch.setitem(METHODS, "fedit", generous)
    with pytest.raises(RuntimeError, match=r"^round 0, client 1: ValueError: adapter: float32 of shape"):
        worker.run_chunk(assignment, (1,), 0, call.adapter, [call.shard], [None], clip_norm=None)
