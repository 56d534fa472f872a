"""A worker's chunk is the clipped sum of its clients' own calls, whatever the worker did before; failures name their client."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raysim.config import Config, load
from raysim.federation.assignment import Assignment
from raysim.federation.faults import check_outcomes
from raysim.federation.worker import Worker
from raysim.methods.call import ClientCall, ClientResult, ClientState
from raysim.methods.registry import method_of
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel
from raysim.privacy.clipping import ChunkSum, clip_and_sum
from tests.conftest import SMALL
from tests.method_calls import alone, in_round, make_call, some_adapter
from tests.rounds import make_round


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
    results = [alone(method_of(config.method.name))(lm, one) for one in calls]
    expected = clip_and_sum(
        [r.upload["adapter"] for r in results], weights=[weights[0], weights[2]], clip_norm=call.mechanism.update_clip_norm
    )

    for fresh in (worker, make_worker()):
        total, reports, states = fresh.run_chunk(assignment, (0, 2), call.round, [call.shard, call.shard], [None, None])
        assert isinstance(total, ChunkSum)
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
    call = in_round(call, 4)
    part, outcomes, states = worker.run_chunk(assignment, (0, 2), call.round, [call.shard, call.shard], [None, broken])
    assert [(one.client_id, one.failure, one.stats is None) for one in outcomes] == [(0, "", False), (2, "KeyError: 'adapter'", True)]
    assert isinstance(part, ChunkSum)
    assert part.weight == 1.0, "the other client's upload stands by itself"
    assert states[1] is broken, "who fails keeps what it had"
    with pytest.raises(RuntimeError, match=r"^round 4, client 2: KeyError: 'adapter'") as raised:
        check_outcomes(outcomes, round_index=4)
    assert "in locit" in "".join(raised.value.__notes__), "where it happened is told to who looks"
    nobody, outcomes, _ = worker.run_chunk(assignment, (2,), call.round, [call.shard], [broken])
    assert nobody is None
    check_outcomes(worker.run_chunk(assignment, (0,), call.round, [call.shard], [None])[1], round_index=4)


def test_a_diverged_client_is_dropped_and_the_others_count() -> None:
    worker, config = make_worker(), config_for()
    lm = worker.language_model(config.lora)
    call = make_call(lm)
    assignment = Assignment(config, call.mechanism, (1.0, 1.0, 1.0))
    diverged = np.full_like(some_adapter(lm), np.inf)
    round = make_round(call.mechanism, {"adapter": diverged})
    total, reports, _ = worker.run_chunk(assignment, (0,), round, [call.shard], [None])
    assert isinstance(total, ChunkSum)
    assert (total.num_dropped, total.weight) == (1, 0.0)
    assert not total.total.any()
    assert reports[0].stats is not None
    assert reports[0].stats.loss is None


def test_an_upload_that_holds_more_than_the_adapter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not summed up to the length that fits, nor broadcast: an error that names round and client."""
    worker, config = make_worker(), config_for()
    call = make_call(worker.language_model(config.lora))
    assignment = Assignment(config, call.mechanism, (1.0, 1.0, 1.0))
    honest = method_of("fedit")

    longer = {"adapter": np.append(call.adapter, np.float32(1))}
    another = {"adapter": call.adapter, "control": call.adapter}
    for sent, reason in ((longer, "adapter: float32 of shape"), (another, r"upload: \['adapter', 'control'\] came where \['adapter'\]")):

        def generous(lm: LanguageModel, calls: Sequence[ClientCall], sent: dict[str, Any] = sent) -> list[ClientResult]:
            return [replace(result, upload=sent) for result in honest(lm, calls)]

        monkeypatch.setattr("raysim.methods.fedit.fedit", generous)
        _, outcomes, _ = worker.run_chunk(assignment, (1,), call.round, [call.shard], [None])
        with pytest.raises(RuntimeError, match=f"^round 0, client 1: ValueError: {reason}"):
            check_outcomes(outcomes, round_index=0)
