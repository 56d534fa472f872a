"""The two forms of an upload: what is averaged from a stack is what is averaged from sums, and a stack is never private."""

import dataclasses

import numpy as np
import pytest

from raysim.config import CHOICES, load
from raysim.federation import setup
from raysim.federation.setup import prepare
from raysim.lora.layout import Layout, Vector
from raysim.lora.rule import lora_rule
from raysim.model.base_model import load_base_model
from raysim.privacy.aggregation import Part, sum_chunk
from raysim.privacy.mechanism import Mechanism
from tests.conftest import SMALL
from tests.rounds import make_round, next_step, state_of
from tests.tiny_models import build

SIZE, WEIGHTS = 50, [3.0, 1.0, 6.0]
AVERAGE = lora_rule("average")
STACKED = dataclasses.replace(AVERAGE, form="stack")


def mechanism_of(*overrides: str) -> Mechanism:
    return Mechanism.from_config(load("", ["method.name=fedit", *overrides]), shard_sizes=[10, 10, 10])


def sent(updates: list[Vector], *, form: str, mechanism: Mechanism, chunks: list[list[int]]) -> list[Part]:
    round = make_round(mechanism, {"adapter": updates[0]})
    return [
        sum_chunk(
            [{"adapter": updates[k]} for k in chunk],
            client_ids=chunk,
            weights=[WEIGHTS[k] for k in chunk],
            round=round,
            mechanism=mechanism,
            form="stack" if form == "stack" else "sum",
        )
        for chunk in chunks
    ]


def test_every_choice_is_a_rule_and_starts_trains_and_releases_all_of_an_adapter() -> None:
    layout = Layout(("q.lora_A.weight", "q.lora_B.weight"), ((2, 5), (5, 2)))
    for name in CHOICES["lora.aggregation"]:
        rule = lora_rule(str(name))
        between = Layout((*layout.names, "q.lora_R.weight"), (*layout.shapes, (2, 2)))
        own = between if rule.between else layout
        tensors = rule.start(own, 3)
        assert rule.release(tensors)["adapter"].shape == (own.num_parameters,)
        assert rule.trainable(own, None) <= set(own.names)
        assert rule.trainable(own, 0) <= rule.trainable(own, None)
        assert set(rule.upload(tensors["adapter"], tensors["adapter"])) == {"adapter"} <= set(tensors)


@pytest.mark.parametrize("chunks", [[[0, 1, 2]], [[0], [1, 2]]])
def test_a_stack_averages_as_sums_do_and_leaves_out_what_is_not_finite(chunks: list[list[int]]) -> None:
    mechanism, rng = mechanism_of(), np.random.default_rng(0)
    updates = list(rng.standard_normal((3, SIZE)).astype(np.float32))
    state = state_of(0, rng.standard_normal(SIZE).astype(np.float32))
    for broken in (None, 1):
        given = [np.full_like(update, np.inf) if k == broken else update for k, update in enumerate(updates)]
        steps = {
            rule.form: next_step(
                state, sent(given, form=rule.form, mechanism=mechanism, chunks=chunks), mechanism=mechanism, lr=0.5, seed=0, rule=rule
            )
            for rule in (AVERAGE, STACKED)
        }
        (summed, record), (stacked, other) = steps["sum"], steps["stack"]
        np.testing.assert_allclose(stacked.adapter, summed.adapter, rtol=1e-6, atol=1e-7)
        assert (stacked.adapter != state.adapter).all()
        assert other == record, "and the record says the same of both"
        assert record["num_dropped"] == (broken is not None)


def test_what_stands_beside_the_adapter_comes_through_a_stack_as_through_sums_and_whole() -> None:
    mechanism, rng = mechanism_of(), np.random.default_rng(1)
    state = state_of(0, rng.standard_normal(SIZE).astype(np.float32), control=rng.standard_normal(SIZE))
    uploads = [{name: rng.standard_normal(SIZE).astype(np.float32) for name in ("adapter", "control")} for _ in range(3)]
    round = make_round(mechanism, {"adapter": uploads[0]["adapter"], "control": uploads[0]["control"]})
    after = {}
    for rule in (AVERAGE, STACKED):
        part = sum_chunk(uploads, client_ids=[0, 1, 2], weights=WEIGHTS, round=round, mechanism=mechanism, form=rule.form)
        after[rule.form] = next_step(state, [part], mechanism=mechanism, lr=1.0, seed=0, rule=rule)[0].tensors["control"]
    assert after["stack"].tobytes() == after["sum"].tobytes()
    assert (after["sum"] != state.tensors["control"]).all()
    short = sum_chunk([{"adapter": uploads[0]["adapter"]}], client_ids=[0], weights=[1.0], round=round, mechanism=mechanism, form="stack")
    with pytest.raises(RuntimeError, match="an upload holds more, or less"):
        next_step(state, [short], mechanism=mechanism, lr=1.0, seed=0, rule=STACKED)


def test_a_stack_is_refused_where_sums_are_promised_to_be_private(monkeypatch: pytest.MonkeyPatch) -> None:
    private = mechanism_of("privacy.unit=client", "privacy.noise_multiplier=1", "privacy.delta=1e-5")
    with pytest.raises(AssertionError, match="a stack opens every upload"):
        sent([np.ones(SIZE, dtype=np.float32)] * 3, form="stack", mechanism=private, chunks=[[0]])
    monkeypatch.setattr(setup, "lora_rule", lambda name: STACKED)
    config = load("", [*SMALL, "method.name=fedit", "privacy.unit=client", "privacy.delta=1e-5"])
    with pytest.raises(ValueError, match=r"lora\.aggregation='average' needs each client's own upload"):
        prepare(config, build(load_base_model("tiny")))
