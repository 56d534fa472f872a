"""Audits that would turn on us: with the noise or the clip taken out of the real code they contradict the ledger, else never.

Every audit runs through what a run uses: canaries, bounded sums and the server's step for clients, the method and its private
steps for records, and `final_audit` for the bound that stands beside the ledger's epsilon. At a confidence of 0.999, 20 audits
of a mechanism that keeps its promise contradict it with a probability of 2% at most; the seeds are fixed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from raysim.config import Config, load
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.federation.adversary import canary_sums
from raysim.federation.server import begin
from raysim.lora.layout import Vector, initial_adapter
from raysim.measure.audits import Audited, CanaryPlan, final_audit, plan_canaries, verdict
from raysim.measure.evaluate import Job
from raysim.methods.call import CANARY_NOTES, ClientCall
from raysim.methods.dplora import dplora as dplora_group
from raysim.model import private_train
from raysim.model.language_model import LanguageModel
from raysim.privacy import clipping
from raysim.privacy.aggregation import sum_chunk
from raysim.privacy.ledger import ledger_of
from raysim.privacy.mechanism import Mechanism
from raysim.rng import numpy_rng
from tests.method_calls import alone
from tests.rounds import make_round, next_step, state_of
from tests.tiny_models import build, encode, sharp_base

dplora = alone(dplora_group)

SEEDS = range(20)
SIZE = 2048
"""Parameters of an adapter, so many that random directions hardly meet."""
AUDIT = ["audit.num_canaries=200", "audit.confidence=0.999", "privacy.delta=1e-5"]


def nothing_to_evaluate(work: Sequence[tuple[Vector, Job]]) -> list[list[Any]]:
    """What stands in for the model: these canaries are vectors, and nobody may ask a model about them."""
    raise AssertionError(f"{len(work)} jobs for an audit that needs no model")


def audited(
    config: Config,
    plan: CanaryPlan,
    mechanism: Mechanism,
    *,
    first: Vector,
    last: Vector,
    notes: Mapping[int, Any] | None = None,
    frozen: Any = None,
) -> dict[str, Any]:
    """The bound on epsilon beside the ledger's epsilon, as at the end of a run."""
    ledger = ledger_of(mechanism, mechanism.num_rounds)
    run = Audited(config, members=(), nonmembers=(), first=first, last=last, evaluate=nothing_to_evaluate, notes=notes or {}, frozen=frozen)
    found = final_audit(plan, run, tokenizer=None, ledger=ledger, mechanism=mechanism)
    assert found is not None
    one_run: dict[str, Any] = found["one_run"]
    assert 1.0 <= one_run["epsilon_claimed"] <= 2.0
    assert one_run["num_canaries"] == 200
    return one_run


def contradicted(results: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each bound exceeds the epsilon that was claimed, as the verdict must say."""
    found = [result["epsilon_lower"] > result["epsilon_claimed"] for result in results]
    assert [": contradicted" in verdict(result) for result in results] == found
    return found


# --- clients: canary updates beside those of simulated clients ---

CLIENTS = {
    "every client": ["privacy.noise_multiplier=3", "server.num_rounds=1"],
    "poisson cohorts": ["privacy.noise_multiplier=4", "server.num_rounds=4", "partition.num_clients=8", "server.cohort_size=5"],
    "fixed order, correlated noise": [
        "privacy.noise_multiplier=3",
        "server.num_rounds=4",
        "partition.num_clients=8",
        "server.cohort_size=4",
        "privacy.sampler=cyclic",
        "privacy.num_bands=2",
    ],
    "adaptive clipping": ["privacy.noise_multiplier=4", "server.num_rounds=2", "privacy.clipping=adaptive"],
    "noise at the client": ["privacy.noise_multiplier=3", "server.num_rounds=1", "privacy.noise_at=client"],
    "simulated cohort": ["privacy.noise_multiplier=3", "server.num_rounds=1", "privacy.noise_cohort_size=12"],
}


def audit_of_clients(*settings: str, seed: int) -> dict[str, Any]:
    """The audit of rounds as `loop.run_round` makes them, with random updates, some of them beyond the bound, for training."""
    config = load("", ["method.name=fedit", "privacy.unit=client", *AUDIT, *settings, f"seed={seed}"])
    mechanism = Mechanism.from_config(config, shard_sizes=[4] * config.partition.num_clients)
    plan = plan_canaries(config, first_record_id=0)
    first = (0.1 * numpy_rng(seed, "first").standard_normal(SIZE)).astype(np.float32)
    state = state_of(0, first)
    for round_index in range(config.server.num_rounds):
        round = begin(state, mechanism)
        parts: list[Any] = []
        for k in round.survivors:
            update = ((0.5 + k) * numpy_rng(seed, round_index, k).standard_normal(SIZE) / SIZE**0.5).astype(np.float32)
            parts.append(sum_chunk([{"adapter": update}], client_ids=[k], weights=[1.0], round=round, mechanism=mechanism))
        parts += canary_sums(plan.num_updates, mechanism=mechanism, scale=config.audit.canary_scale, round=round)
        state, _ = next_step(state, parts, mechanism=mechanism, lr=config.server.lr, seed=seed)
    return audited(config, plan, mechanism, first=first, last=state.adapter)


def without_noise_on_updates(patch: pytest.MonkeyPatch) -> None:
    """Neither server nor client adds noise to updates; the accountant knows nothing of it."""
    patch.setattr(Mechanism, "sum_noise_multiplier", property(lambda self: 0.0))
    patch.setattr(Mechanism, "update_noise_multiplier", lambda self, cohort_size: 0.0)


def without_clip_on_updates(patch: pytest.MonkeyPatch) -> None:
    """Every update enters a sum as it is."""
    patch.setattr(clipping, "clip", lambda update, *, clip_norm, norm=None: update)


@pytest.mark.parametrize("case", CLIENTS)
def test_clients_who_are_protected_are_never_found_out(case: str) -> None:
    results = [audit_of_clients(*CLIENTS[case], seed=seed) for seed in SEEDS]
    assert not any(contradicted(results))
    assert all(result["unit"] == "client" and result["canary"] == "update" for result in results)


@pytest.mark.parametrize("mutant", [without_noise_on_updates, without_clip_on_updates])
@pytest.mark.parametrize("case", CLIENTS)
def test_clients_without_noise_or_clip_are_found_out(monkeypatch: pytest.MonkeyPatch, case: str, mutant: Any) -> None:
    mutant(monkeypatch)
    assert all(contradicted([audit_of_clients(*CLIENTS[case], seed=seed) for seed in SEEDS]))


def test_a_canary_that_cannot_be_in_a_secure_sum_is_refused() -> None:
    with pytest.raises(ValueError, match=r"audit.canary='update' needs .* updates that reach the server one by one"):
        load("", ["method.name=fedit", "privacy.unit=client", "privacy.noise_at=distributed", *AUDIT])


# --- records: canary gradients in the private steps of a real client ---

RECORDS = [Record(record_id=i, instruction=f"Is {i} odd?", response="Yes" if i % 2 else "No") for i in range(8)]
STEPS = {
    "one whole batch": ["privacy.noise_multiplier=3", "dplora.num_steps=1", "dplora.batch_size=8"],
    "poisson batches": ["privacy.noise_multiplier=4", "dplora.num_steps=4", "dplora.batch_size=5"],
}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    built = build(sharp_base(), rank=2)
    assert built.layout.num_parameters == SIZE
    return built


@pytest.fixture(scope="module")
def shard(lm: LanguageModel) -> tuple[Example, ...]:
    return tuple(encode(lm, RECORDS))


def audit_of_records(lm: LanguageModel, shard: tuple[Example, ...], *settings: str, seed: int) -> dict[str, Any]:
    """The audit of a client's private training with canary gradients in it; one client is all there are."""
    client = ["partition.num_clients=1", "data.num_train=8", "server.num_rounds=1", "dplora.optimizer=sgd", "dplora.lr=0.01"]
    config = load("", ["method.name=dplora", "audit.canary=gradient", *client, *AUDIT, *settings, f"seed={seed}"])
    mechanism = Mechanism.from_config(config, shard_sizes=[len(shard)])
    first = initial_adapter(lm.layout, seed=seed)
    round = make_round(mechanism, {"adapter": first})
    result = dplora(lm, ClientCall(config, mechanism, round, client_id=0, adapter=first, shard=shard, state=None))
    assert result.state is not None
    plan, last = plan_canaries(config, first_record_id=8), first + result.upload["adapter"]
    return audited(config, plan, mechanism, first=first, last=last, notes={0: result.state.arrays[CANARY_NOTES]})


def without_noise_on_gradients(patch: pytest.MonkeyPatch) -> None:
    """Private steps get zeros for noise."""
    patch.setattr(private_train, "gaussian", lambda size, *, std, seed, secure: np.zeros(size, dtype=np.float32))


def without_clip_on_gradients(patch: pytest.MonkeyPatch) -> None:
    """Every gradient enters a step's sum as it is."""
    patch.setattr(private_train, "clip_factors", lambda norm_B, *, clip_norm: torch.ones_like(norm_B))


@pytest.mark.parametrize("case", STEPS)
def test_records_that_are_protected_are_never_found_out(lm: LanguageModel, shard: tuple[Example, ...], case: str) -> None:
    results = [audit_of_records(lm, shard, *STEPS[case], seed=seed) for seed in SEEDS]
    assert not any(contradicted(results))
    assert all(result["unit"] == "example" and result["canary"] == "gradient" for result in results)


@pytest.mark.parametrize("mutant", [without_noise_on_gradients, without_clip_on_gradients])
@pytest.mark.parametrize("case", STEPS)
def test_records_without_noise_or_clip_are_found_out(
    monkeypatch: pytest.MonkeyPatch, lm: LanguageModel, shard: tuple[Example, ...], case: str, mutant: Any
) -> None:
    mutant(monkeypatch)
    assert all(contradicted([audit_of_records(lm, shard, *STEPS[case], seed=seed) for seed in SEEDS]))
