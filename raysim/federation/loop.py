"""The loop over rounds, and the two seams it runs through (`Clients`, `Server`).

A round is: draw the cohort, let each chunk of it train, sum and send, step the server, measure, record, save. Because a
client call depends on its arguments only, the same loop gives the same bits over any `Clients`.
"""

import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from raysim.attacks.cross_client import CrossClientSettings, score_across
from raysim.attacks.memory import SamplingAttack
from raysim.config import FLAT_DEFAULTS, Config, asks_for_labels, result_key
from raysim.console.progress import Progress
from raysim.data.configured import chat_format
from raysim.data.tokens import Example
from raysim.federation import checkpoint
from raysim.federation.adversary import canary_sums, success
from raysim.federation.assignment import ranks_of, setting_of
from raysim.federation.checkpoint import Snapshot
from raysim.federation.faults import Outcome, check_outcomes, failures, may_fail
from raysim.federation.server import ServerState, begin
from raysim.federation.setup import Experiment, labelled_heldout
from raysim.lora.factors import gathered
from raysim.lora.layout import Layout, Released, Vector, adapter_sha256, by_name
from raysim.lora.properties import exactness_gap
from raysim.lora.rule import Setting, frozen_throughout, lora_rule
from raysim.measure.audits import exposure_jobs, exposure_record
from raysim.measure.evaluate import Job, MemoryPlan, Plan, base_likelihoods, batches, loss_is_finite, mean_of, measure, plan, record_rows
from raysim.methods.call import CANARY_NOTES, OF_RULE, ClientState, split_state
from raysim.privacy.clipping import ChunkSum
from raysim.privacy.cohort import Round
from raysim.privacy.mechanism import Mechanism
from raysim.rng import seed_for

LATE, LATE_WEIGHT = "late", "late_weight"
"""The server's arrays, in a checkpoint, of what came late."""
OnDone = Callable[[Sequence[Outcome]], None]


class Clients(Protocol):
    """Whoever runs the clients of a round. What `run_round` returns goes to `Server.step` unopened."""

    def run_round(self, round: Round, chunks: Sequence[tuple[int, ...]], on_done: OnDone) -> list[Any]:
        """What the chunks send, in the order of `chunks`; `on_done` hears of the outcomes of each chunk as it ends, and may raise."""

    def states(self, client_ids: Sequence[int]) -> dict[int, ClientState]:
        """What these clients keep; those that keep nothing are left out."""

    def restore(self, states: dict[int, ClientState]) -> None:
        """Gives clients back what they kept."""

    def evaluate(self, work: Sequence[tuple[Released, Job]], on_done: Callable[[], None]) -> list[list[Any]]:
        """The results of evaluation jobs, each on its adapter, in order."""


class Server(Protocol):
    """Whoever steps the server's state."""

    def step(self, state: ServerState, round: Round, parts: Sequence[Any], late: Sequence[Any] = ()) -> tuple[ServerState, dict[str, Any]]:
        """The next state, and the server's part of the round's record; what came `late` counts in the next round."""

    def relay(self, round: Round, parts: Sequence[Any]) -> Round:
        """The second trip of a round whose first brought these parts, for a LoRA rule that takes two."""


@dataclass
class Simulation:
    """A run in memory: its inputs, where it runs, and how far it is."""

    config: Config
    experiment: Experiment
    clients: Clients
    server: Server
    tokenizer: Any
    progress: Progress
    state: ServerState
    num_rounds: int
    """Rounds to run: those configured, or as many as `privacy.max_epsilon` allows."""
    records: list[dict[str, Any]] = field(default_factory=list)
    synthetic: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    """What was measured of each record, after each measured round (see `evaluate.record_rows`)."""
    kept: dict[int, ClientState] = field(default_factory=dict)
    """What each client keeps, as of the last checkpoint."""
    of_base: dict[str, list[Any]] = field(default_factory=dict)
    """Likelihoods under the base model that were computed before, by what decides them (see `_base_key`); several runs may share it."""
    layout: Layout | None = None
    """How the server's adapter is laid out, which LoRA rules but the first must know."""
    first: Released = field(init=False)
    """The release before round 0, which writes as the base model does."""

    def __post_init__(self) -> None:
        self.first = released(self)


def start(config: Config, experiment: Experiment, *, layout: Layout) -> ServerState:
    """The state before the first round."""
    tensors: dict[str, Any] = lora_rule(config.lora.aggregation).start(layout, config.seed)
    further = {name: np.zeros(len(tensors["adapter"])) for name in config.method.spec.tensors}
    return ServerState(round_index=0, tensors=tensors | further)


def released(simulation: Simulation) -> Released:
    """What leaves the server, as the LoRA rule makes it of the server's tensors: an adapter, and where the rule moves the base, that too."""
    tensors = lora_rule(simulation.config.lora.aggregation).release(simulation.state.tensors)
    return tensors if simulation.config.lora.spec.moves_base else tensors["adapter"]


def owned(simulation: Simulation) -> dict[int, Vector]:
    """The adapters that clients keep, by client: their method's, or those of a LoRA rule that leaves a part of the shared one with them."""
    kept = sorted(simulation.kept.items())
    if not simulation.config.lora.spec.personal:
        return {k: state.arrays["adapter"] for k, state in kept if "adapter" in state.arrays}
    rule, setting = lora_rule(simulation.config.lora.aggregation), _setting(simulation)
    assert rule.given is not None, "a part that stays is put to the part that is shared"
    return {k: rule.given(simulation.state.tensors, split_state(state)[1], setting.rank, setting) for k, state in kept}


def _setting(simulation: Simulation) -> Setting:
    assert simulation.layout is not None, f"lora.aggregation={simulation.config.lora.aggregation!r} needs a layout"
    return setting_of(simulation.config, simulation.layout)


def simulate(simulation: Simulation, *, state_dir: Path, after_round: Callable[[Simulation], None]) -> Simulation:
    """Runs the rounds that are left, resuming from `state_dir` if it holds a checkpoint; `after_round` follows each save.

    Errors: RuntimeError naming round and client; ValueError if the checkpoint belongs to another configuration.
    """
    state_dir.parent.mkdir(parents=True, exist_ok=True)
    _resume(simulation, state_dir)
    if not simulation.config.method.spec.trains:
        return _measure_base(simulation)
    for round_index in range(simulation.state.round_index, simulation.num_rounds):
        run_round(simulation, round_index)
        _save(simulation, state_dir)
        after_round(simulation)
    return simulation


def run_round(simulation: Simulation, round_index: int) -> None:
    """Runs one round and appends its record."""
    experiment, progress = simulation.experiment, simulation.progress
    started = time.perf_counter()
    mechanism = experiment.mechanism
    round = _begun(simulation, mechanism)
    outcomes: list[Outcome] = []

    def on_done(chunk: Sequence[Outcome]) -> None:
        if not may_fail(mechanism):
            check_outcomes(chunk, round_index=round_index)
        outcomes.extend(chunk)
        for outcome in chunk:
            progress.client_done(outcome.client_id, outcome.stats.num_tokens if outcome.stats else 0)

    working = sorted([*round.survivors, *round.late])
    progress.round(round_index, working)
    traffic = _Traffic(simulation, round)
    parts = simulation.clients.run_round(round, _chunks(round.survivors, mechanism.chunk_size), on_done)
    late = simulation.clients.run_round(round, _chunks(round.late, mechanism.chunk_size), on_done) if round.late else []
    if _all_failed(outcomes, mechanism):
        check_outcomes(outcomes, round_index=round_index)
    traffic.up(outcomes)
    if lora_rule(simulation.config.lora.aggregation).trips:
        round, parts = _second_trip(simulation, round, parts, traffic, failed={one.client_id for one in outcomes if one.stats is None})
    parts += _canaries(simulation, round)
    trained_s = time.perf_counter() - started
    before = simulation.state
    simulation.state, server_record = simulation.server.step(before, round, parts, late)
    simulation.kept |= simulation.clients.states(working)

    outcomes.sort(key=lambda outcome: outcome.client_id)
    failed = failures(outcomes, round.absent)
    record = {"round_index": round_index, "cohort": list(round.cohort), "num_failed": len(failed), "failures": failed}
    record |= {"num_late": len(round.late), "simulated_s": round.simulated_s}
    record |= {**_client_record(outcomes, trained_s), **server_record}
    if record["clip_fraction"] is None:  # clipped per example at the clients, not per update at the server
        record["clip_fraction"] = record.pop("client_clip_fraction")
    record |= traffic.record() | _exactness(simulation, before, outcomes)
    simulation.synthetic += [
        {"client_id": outcome.client_id, "round_index": round_index, **row} for outcome in outcomes for row in outcome.synthetic
    ]
    record |= _measurements(simulation, round_index)
    record["wall_s"] = time.perf_counter() - started
    simulation.records.append(record)
    progress.record(record)
    _tell(progress, record, outcomes)


def _tell(progress: Progress, record: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Says what of a round did not go as planned."""
    title = f"round {record['round_index']}"
    for outcome in outcomes:
        if outcome.failure:
            progress.note(f"{title}, client {outcome.client_id}: {outcome.failure.splitlines()[0]}; its update does not count")
    if record["aborted"]:
        progress.note(f"{title}: {record['num_contributed']} clients sent, too few: nothing is released")
    elif record["empty_round"] and record["cohort"]:
        progress.note(f"{title}: no client's update counts: {'noise alone' if record['noise_std'] else 'nothing'} is released")
    fate: Any = record.get("synthetic")
    if fate and not fate["num_kept"]:
        progress.note("no synthetic record passed the filters in this round: see synthetic.jsonl for the reasons")


def _exactness(simulation: Simulation, before: ServerState, outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """How far the round's release is from the mean of what its clients trained, where that is measured."""
    clients = [outcome.trained for outcome in outcomes if outcome.trained is not None and not outcome.failure]
    if not clients:
        return {}
    rule, setting = lora_rule(simulation.config.lora.aggregation), _setting(simulation)
    return {"exactness_gap": exactness_gap(before.tensors, simulation.state.tensors, clients, rule=rule, setting=setting)}


def _all_failed(outcomes: Sequence[Outcome], mechanism: Mechanism) -> bool:
    """Whether all the clients that there are took part and failed, so that the next round would come to no more.

    Never where a client is protected: that the run ends would tell of its data, and no noise covers that.
    """
    return mechanism.kind != "client" and len(outcomes) == mechanism.num_clients and all(outcome.stats is None for outcome in outcomes)


def _chunks(client_ids: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return [client_ids[i : i + size] for i in range(0, len(client_ids), size)]


def _begun(simulation: Simulation, mechanism: Mechanism) -> Round:
    """The state's next round, and which turn it is to the LoRA rule."""
    round, rule = begin(simulation.state, mechanism, simulation.experiment.fleet), lora_rule(simulation.config.lora.aggregation)
    if rule.turn is None:
        return round
    return dataclasses.replace(round, turn=rule.turn(simulation.state.tensors, _setting(simulation), round.index))


def _second_trip(
    simulation: Simulation, round: Round, parts: Sequence[Any], traffic: "_Traffic", *, failed: Set[int]
) -> tuple[Round, list[Any]]:
    """The round as those of its clients that have not `failed` are asked once more, and what they send then.

    One that fails only then ends the run: what was relayed is made of what it sent before, so that the answers of the others alone would be
    those to a question about other updates than theirs (of FedASK, the mean without it laid into a basis of the mean with it).
    Errors: RuntimeError naming the round and the client.
    """
    again, outcomes = simulation.server.relay(round, parts), list[Outcome]()
    again = dataclasses.replace(again, survivors=tuple(k for k in again.survivors if k not in failed))

    def on_done(chunk: Sequence[Outcome]) -> None:
        why = "on the second trip, of which the first one already counts its update: "
        check_outcomes([dataclasses.replace(one, failure=why + one.failure) for one in chunk], round_index=round.index)
        outcomes.extend(chunk)

    answers = simulation.clients.run_round(again, _chunks(again.survivors, simulation.experiment.mechanism.chunk_size), on_done)
    traffic.again(again, outcomes)
    return again, answers


def _canaries(simulation: Simulation, round: Round) -> list[Any]:
    """The update canaries of an audit that take part in a round."""
    experiment, config = simulation.experiment, simulation.config
    rule, num_updates = lora_rule(config.lora.aggregation), experiment.canaries.num_updates
    if not num_updates:
        return []
    mask = None if simulation.layout is None else rule.mask(_setting(simulation), round.turn)
    return list(
        canary_sums(
            num_updates,
            mechanism=experiment.mechanism,
            scale=config.audit.canary_scale,
            round=round,
            sent=mask,
            frozen=None if simulation.layout is None else frozen_throughout(rule, simulation.layout),
        )
    )


def measure_adapters(
    simulation: Simulation, plans: Sequence[tuple[Released, Plan]], *, owners: Sequence[int | None], round_index: int
) -> list[tuple[Any, Any]]:
    """The `eval` and `attack` objects of several adapters, their jobs spread over all workers at once; keeps what they are the means of.

    `owners` are the clients that keep the adapters, None for the release.
    """
    jobs = [[(adapter, job) for job in plan_.jobs] for adapter, plan_ in plans]
    jobs += [[(simulation.first, job) for job in plan_.likelihood_jobs] for _, plan_ in plans]
    found = iter(_evaluate(simulation, [item for items in jobs for item in items]))
    results = [[next(found) for _ in items] for items in jobs]
    measured = []
    for owner, (_, plan_), own, of_base in zip(owners, plans, results[: len(plans)], results[len(plans) :], strict=True):
        if not loss_is_finite(plan_, own):
            whose = "the new adapter" if owner is None else f"the adapter that client {owner} keeps"
            raise RuntimeError(f"round {round_index}: the held-out loss of {whose} is not finite; lower train.lr or server.lr")
        base = base_likelihoods(plan_, of_base)
        measured.append(measure(plan_, own, tokenizer=simulation.tokenizer, base=base))
        rows = record_rows(plan_, own, tokenizer=simulation.tokenizer, base=base)
        simulation.answers += [{"round_index": round_index, "owner": owner, **row} for row in rows]
    return measured


def _evaluate(simulation: Simulation, work: Sequence[tuple[Released, Job]]) -> list[list[Any]]:
    """The results of evaluation jobs in order; the base model's likelihoods are computed once, by whichever run or round asks first."""
    first, known = simulation.first, simulation.of_base
    digest = adapter_sha256(by_name(first).values())
    keys = [
        _base_key(simulation.config, digest, job) if adapter is first and job.kind == "likelihood" else str(number)
        for number, (adapter, job) in enumerate(work)
    ]
    waiting = {key: item for key, item in zip(keys, work, strict=True) if key not in known}
    found = dict(zip(waiting, simulation.clients.evaluate(list(waiting.values()), lambda: None), strict=True))
    known |= {key: found[key] for key in found if not key.isdecimal()}
    return [found[key] if key in found else known[key] for key in keys]


def _base_key(config: Config, digest: str, job: Job) -> str:
    """What decides the results of a `likelihood` job with the adapter of that digest: the model and how it computes, the tokens, the target."""
    tokens = [(example.prompt_ids, example.response_ids, example.earlier) for example in job.examples]
    computed = (config.model.name, config.train.dtype, config.resources.num_threads, config.resources.client.num_gpus > 0, config.lora)
    return f"base-{hashlib.sha256(repr((computed, digest, tokens, job.sampling, job.spans)).encode()).hexdigest()}"


def due(every: int, *, round_index: int, num_rounds: int) -> bool:
    """Whether something done `every` so many rounds (0 only after the last, -1 never) is due after this one."""
    last = round_index == num_rounds - 1
    return every >= 0 and (last or (every > 0 and (round_index + 1) % every == 0))


def _measurements(simulation: Simulation, round_index: int) -> dict[str, Any]:
    config, experiment = simulation.config, simulation.experiment
    num_rounds = simulation.num_rounds
    with_eval = due(config.evaluate.every, round_index=round_index, num_rounds=num_rounds)
    with_attack = due(config.attack.every, round_index=round_index, num_rounds=num_rounds)
    if not (with_eval or with_attack):
        return {"eval": None, "attack": None}
    simulation.progress.phase("evaluating and attacking" if with_eval and with_attack else "evaluating" if with_eval else "attacking")
    last = round_index == num_rounds - 1
    private = _private_plans(simulation, round_index, with_eval=with_eval, with_attack=with_attack)
    separates = config.method.spec.separates or config.lora.spec.personal
    of_release = [] if separates else [_plan(simulation, None, with_eval=with_eval, with_attack=with_attack, exposed=last)]
    owners = [None for _ in of_release] + [k for k, _, _ in private]
    plans: list[tuple[Released, Plan]] = [(released(simulation), plan_) for plan_ in of_release]
    plans += [(adapter, plan_) for _, adapter, plan_ in private]
    measured = measure_adapters(simulation, plans, owners=owners, round_index=round_index)
    own = _mean_private(measured[len(of_release) :])
    if not of_release:
        return {"eval": own["eval"] if own else None, "attack": own["attack"] if own else None}
    utility, attack = measured[0]
    exposure = _exposure(simulation) if with_attack and experiment.canaries.secrets else None
    across = _across(simulation) if last else None
    backdoor = _backdoor(simulation, round_index) if with_eval and experiment.triggered else None
    further = {"private": own, "exposure": exposure, "cross_client": across, "backdoor": backdoor}
    return {"eval": utility, "attack": attack, **{key: value for key, value in further.items() if value}}


def _backdoor(simulation: Simulation, round_index: int) -> dict[str, Any]:
    """How often the release gives a backdoor's answer to held-out prompts, with the trigger and, as the control, without it."""
    config, examples = simulation.config, simulation.experiment.triggered
    jobs = [
        Job("answer", batch, max_new_tokens=config.evaluate.max_new_tokens, chat=chat_format(config.data))
        for batch in batches(examples, config.evaluate.batch_size)
    ]
    results = simulation.clients.evaluate([(released(simulation), job) for job in jobs], lambda: None)
    rows = [row for row in simulation.answers if row["round_index"] == round_index and row["owner"] is None and row["side"] == "heldout"]
    target = config.adversary.target
    return {
        "success_rate": success([answer for answers in results for answer in answers], target=target),
        "control_rate": success([row["answer"] for row in rows if row.get("answer") is not None], target=target),
        "num_prompts": len(examples),
    }


def _exposure(simulation: Simulation) -> dict[str, Any]:
    """How exposed the Secret Sharer canaries are in the release."""
    plan_, config = simulation.experiment.canaries, simulation.config
    jobs = exposure_jobs(plan_, config)
    results = simulation.clients.evaluate([(released(simulation), job) for job in jobs], lambda: None)
    return exposure_record(plan_, results, num_references=config.audit.num_references)


def _across(simulation: Simulation) -> dict[str, Any] | None:
    """What each client draws out of the release of the others' private details, and the mean; None where it is not asked for.

    Pooled data have one owner, so that there is nobody to attack.
    """
    config, experiment = simulation.config, simulation.experiment
    if not config.attack.cross_prefixes or len(experiment.shards) < 2:
        return None
    simulation.progress.phase("clients attacking each other")
    settings = CrossClientSettings(
        num_prefixes=config.attack.cross_prefixes,
        num_samples=config.attack.cross_samples,
        max_new_tokens=config.attack.cross_tokens,
        batch_size=config.evaluate.batch_size,
    )
    jobs = [
        Job("across", shard, 0, 0, seed=seed_for(config.seed, "across", k), chat=chat_format(config.data), across=settings)
        for k, shard in enumerate(experiment.shards)
    ]
    results = simulation.clients.evaluate([(released(simulation), job) for job in jobs], lambda: None)
    details = [[detail for example in shard for detail in example.record.details] for shard in experiment.shards]
    nobodys = [detail for example in experiment.heldout for detail in example.record.details]
    rows = []
    for k, (texts, own) in enumerate(zip(results, details, strict=True)):
        others = [detail for other, theirs in enumerate(details) if other != k for detail in theirs]
        rows.append({"client_id": k, **vars(score_across(texts, own=own, others=others, nobodys=nobodys))})
    means = mean_of([{key: row[key] for key in ("coverage", "heldout_coverage", "efficiency")} for row in rows])
    assert means is not None
    return {**means, "num_queries": sum(row["num_queries"] for row in rows), "by_attacker": rows}


def _private_plans(simulation: Simulation, round_index: int, *, with_eval: bool, with_attack: bool) -> list[tuple[int, Vector, Plan]]:
    """Plans for the adapters that clients keep, with their owners: after every measured round where they are the product, else after the last, if asked for."""
    at_the_end = round_index == simulation.num_rounds - 1 and simulation.config.evaluate.private
    if not (at_the_end or simulation.config.method.spec.separates or simulation.config.lora.spec.personal):
        return []
    return [
        (k, adapter, _plan(simulation, k, with_eval=with_eval, with_attack=with_attack)) for k, adapter in sorted(owned(simulation).items())
    ]


def _plan(simulation: Simulation, owner: int | None, *, with_eval: bool, with_attack: bool, exposed: bool = False) -> Plan:
    """The plan for the release, or for the adapter that client `owner` keeps (attacked on its own examples only)."""
    config, experiment = simulation.config, simulation.experiment
    attacked: list[Example] = [example for k, example in experiment.attacked if owner is None or k == owner]
    questions, labels = labelled_heldout(experiment) if asks_for_labels(config) else ([], ())
    return plan(
        heldout=experiment.heldout,
        answered=experiment.answered,
        attacked=attacked,
        prefix_tokens=config.attack.prefix_tokens,
        max_new_tokens=config.evaluate.max_new_tokens,
        batch_size=config.evaluate.batch_size,
        with_eval=with_eval,
        with_attack=with_attack and bool(attacked),
        questions=questions,
        labels=labels,
        chat=chat_format(config.data),
        long_prefix_tokens=config.attack.long_prefix_tokens,
        choices=experiment.questions,
        memory=_memory_plan(simulation, owner, exposed=exposed),
    )


def _memory_plan(simulation: Simulation, owner: int | None, *, exposed: bool) -> MemoryPlan | None:
    """Whose likelihoods are compared for the release, or for the adapter that client `owner` keeps (its own records alone); None for none.

    Details are ranked among references where `exposed`.
    """
    attack, experiment = simulation.config.attack, simulation.experiment
    if not experiment.compared:
        return None
    sampling = SamplingAttack(attack.prefix_tokens, attack.target_tokens, attack.temperature, attack.top_k)
    members = tuple((k, example) for k, example in experiment.members if owner is None or k == owner)
    details = experiment.details if exposed else dataclasses.replace(experiment.details, queries={})
    return MemoryPlan(members, experiment.compared, sampling, simulation.config.seed, details)


def _mean_private(measured: Sequence[tuple[Any, Any]]) -> dict[str, Any] | None:
    if not measured:
        return None
    return {
        "eval": mean_of([utility for utility, _ in measured if utility is not None]),
        "attack": mean_of([attack for _, attack in measured if attack is not None]),
    }


def _measure_base(simulation: Simulation) -> Simulation:
    """The record of the untouched model, with round_index -1."""
    if simulation.records:
        return simulation
    started = time.perf_counter()
    simulation.progress.phase("measuring the base model")
    with_attack = simulation.config.attack.every >= 0
    [(utility, attack)] = measure_adapters(
        simulation,
        [(released(simulation), _plan(simulation, None, with_eval=True, with_attack=with_attack))],
        owners=[None],
        round_index=-1,
    )
    nothing: dict[str, Any] = dict.fromkeys(
        ("train_loss", "update_norm_median", "clip_fraction", "signal_to_noise", "epsilon", "epsilon_rdp", "tokens_per_s")
    )
    record = nothing | {
        "round_index": -1,
        "cohort": [],
        "simulated_s": 0.0,
        "num_tokens": 0,
        "num_dropped": 0,
        "noise_std": 0.0,
        "uplink_bytes": 0,
        "downlink_bytes": 0,
        "wall_s": time.perf_counter() - started,
        "eval": utility,
        "attack": attack,
    }
    across = _across(simulation)
    record |= {"cross_client": across} if across else {}
    simulation.records.append(record)
    simulation.progress.record(record)
    return simulation


def _client_record(outcomes: Sequence[Outcome], wall_s: float) -> dict[str, Any]:
    """What the record says of the clients: tokens trained on, mean loss by tokens, speed, and the fate of synthetic records."""
    trained = [outcome.stats for outcome in outcomes if outcome.stats]
    num_tokens = sum(stats.num_tokens for stats in trained)
    all_losses = [(stats.loss, stats.num_tokens) for stats in trained if stats.loss is not None]
    losses = [(loss, tokens) for loss, tokens in all_losses if math.isfinite(loss)]  # of a diverged client, whose update is dropped
    weight = sum(tokens for _, tokens in losses)
    clipped = [stats.clip_fraction for stats in trained if stats.clip_fraction is not None]
    record: dict[str, Any] = {
        "num_tokens": num_tokens,
        "train_loss": sum(loss * tokens for loss, tokens in losses) / weight if weight else None,
        "num_steps": sum(stats.num_steps for stats in trained),
        "client_clip_fraction": sum(clipped) / len(clipped) if clipped else None,
        "client_s": wall_s,
        "tokens_per_s": num_tokens / wall_s,
    }
    rows = [row for outcome in outcomes for row in outcome.synthetic]
    return record | ({"synthetic": _fate(rows)} if rows else {})


def _fate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rejected: dict[str, int] = {}
    for row in rows:
        if not row["kept"]:
            rejected[row["verdict"]] = rejected.get(row["verdict"], 0) + 1
    texts = [row["instruction"] for row in rows]
    nearest = sorted(row["response_rouge_l"] for row in rows if row["kept"] and row["response_rouge_l"] is not None)
    return {
        "num_candidates": len(rows),
        "num_kept": sum(row["kept"] for row in rows),
        "num_rejected": rejected,
        "duplicate_rate": 1 - len(set(texts)) / len(texts),
        "response_rouge_l": {"median": statistics.median(nearest), "max": nearest[-1]} if nearest else None,
    }


class _Traffic:
    """Bytes up and down in a round, of the tensors that travel; raw records, once, where data are pooled; else none where nothing is shared."""

    def __init__(self, simulation: Simulation, round: Round) -> None:
        config = simulation.config
        self._pooled = _pooled_bytes(simulation) if config.method.spec.pools and round.index == 0 else 0
        self._shares = not (config.method.spec.pools or config.method.spec.separates)
        ranks = ranks_of(config, num_clients=simulation.experiment.mechanism.num_clients)
        self._up, self._down = [0], [sum(_bytes_down(simulation, round, k, rank=ranks[k]) for k in round.cohort) if self._shares else 0]

    def up(self, outcomes: Sequence[Outcome]) -> None:
        """Counts what clients sent on the first trip."""
        self._up[0] = self._pooled + sum(outcome.uplink_bytes for outcome in outcomes) * self._shares

    def again(self, round: Round, outcomes: Sequence[Outcome]) -> None:
        """Counts what a second trip brought its clients, and what they sent."""
        self._up.append(sum(outcome.uplink_bytes for outcome in outcomes) * self._shares)
        self._down.append(sum(tensor.nbytes for tensor in round.broadcast.values()) * len(round.survivors) * self._shares)

    def record(self) -> dict[str, Any]:
        """What the round's record says: all bytes each way, and those of each trip where there are two."""
        found: dict[str, Any] = {"uplink_bytes": sum(self._up), "downlink_bytes": sum(self._down)}
        return found | ({"uplink_bytes_by_trip": self._up, "downlink_bytes_by_trip": self._down} if len(self._up) > 1 else {})


def _bytes_down(simulation: Simulation, round: Round, client_id: int, *, rank: int) -> int:
    """Bytes that a client, dealt this rank, is sent of the server's tensors: its LoRA rule's, and the entries of its method's own that travel."""
    config, rule = simulation.config, lora_rule(simulation.config.lora.aggregation)
    if simulation.layout is None:
        return sum(tensor.nbytes for tensor in round.broadcast.values())
    setting = _setting(simulation)
    kept = split_state(simulation.kept.get(client_id))[1]
    rank = int(kept["rank"][0]) if "rank" in kept else rank
    tensors = rule.sent(round.broadcast, rank, setting)
    mask = rule.mask(setting, round.turn)
    return sum(tensor.nbytes for tensor in tensors.values()) + sum(
        gathered(round.broadcast[name], mask).nbytes for name in config.method.spec.tensors
    )


def _pooled_bytes(simulation: Simulation) -> int:
    records = [example.record for shard in simulation.experiment.shards for example in shard]
    return sum(len(text.encode()) for r in records for text in (*(said for _, said in r.history), *(r.instruction, r.response)))


def _misfit(simulation: Simulation, found: Snapshot) -> str:
    """Why a checkpoint cannot be of this run, whatever its checksums say; empty for nothing. Other settings are told apart by `_resume`."""
    if found.config_key != result_key(simulation.config):
        return ""
    arrays = {"adapter": found.adapter} | found.server_arrays
    begun = {name: np.shape(tensor) for name, tensor in simulation.state.tensors.items()}
    late = {LATE_WEIGHT: (1,), LATE: begun["adapter"]} if LATE_WEIGHT in arrays else {}
    shapes = dict.fromkeys(arrays, begun["adapter"]) | begun | late
    odd = [name for name in shapes if name not in arrays or arrays[name].shape != shapes[name]]
    if odd or not all(np.isfinite(array).all() for array in arrays.values()):
        return f"the server's {odd[0]} has another shape than the run's" if odd else "the server's tensors are not finite"
    done = [record.get("round_index") for record in found.records]
    if found.num_rounds > simulation.num_rounds or done != list(range(found.num_rounds)):
        return f"it says {found.num_rounds} rounds of {simulation.num_rounds}, and holds the records of {len(done)}"
    clip_norm, adaptive = found.clip_norm, simulation.experiment.mechanism.clipping == "adaptive"
    if clip_norm is not None and not (adaptive and math.isfinite(clip_norm) and clip_norm > 0):
        return f"clip_norm={clip_norm:g} is no bound of this run's"
    ranks = ranks_of(simulation.config, num_clients=len(simulation.experiment.shards))
    by_rank = {rank: _shapes_kept(simulation, rank) for rank in set(ranks)}
    diverged = {failure.get("client_id") for record in found.records for failure in record.get("failures", ())}
    for client_id, own in found.client_arrays.items():
        if client_id >= len(ranks):
            odd_one = "there is no such client"
        else:
            odd_one = _odd_array(simulation, own, by_rank[ranks[client_id]], diverged=client_id in diverged)
        if odd_one:
            return f"the state of client {client_id} is none of this run's: {odd_one}"
    return ""


def _odd_array(simulation: Simulation, own: Mapping[str, np.ndarray], by_rule: Mapping[str, tuple[int, ...]], *, diverged: bool) -> str:
    """The name of an array that a client cannot have kept: of another shape, or not finite though its updates always counted; empty for none."""
    size, audit = np.shape(simulation.state.tensors["adapter"]), simulation.config.audit
    for name, array in own.items():
        shape = by_rule.get(name) if name.startswith(OF_RULE) else (audit.num_canaries,) if name == CANARY_NOTES else size
        if array.shape != shape or not (diverged or np.isfinite(array).all()):
            return name
    return ""


def _shapes_kept(simulation: Simulation, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays that the LoRA rule has a client of some rank keep, by their names in its state."""
    rule = lora_rule(simulation.config.lora.aggregation)
    if rule.kept is None or simulation.layout is None:
        return {}
    nothing = np.zeros_like(simulation.state.tensors["adapter"])
    return {f"{OF_RULE}{name}": array.shape for name, array in rule.kept(nothing, nothing, rank, _setting(simulation)).items()}


def _resume(simulation: Simulation, state_dir: Path) -> None:
    snapshot, problems = checkpoint.load_latest(state_dir, misfit=lambda found: _misfit(simulation, found))
    for problem in problems:
        simulation.progress.note(problem)
    if snapshot is None:
        return
    ours, theirs = result_key(simulation.config), snapshot.config_key
    different = [key for key in ours | theirs if ours.get(key) != theirs.get(key, FLAT_DEFAULTS.get(key))]
    if different:
        raise ValueError(
            f"out={str(state_dir.parent)!r} holds a run with other settings ({', '.join(different[:3])}); choose another folder"
        )
    arrays = {"adapter": np.asarray(snapshot.adapter, dtype=np.float32)} | snapshot.server_arrays
    tensors = {name: arrays.pop(name) for name in simulation.state.tensors}
    weight = arrays.pop(LATE_WEIGHT, None)
    late = None if weight is None else ChunkSum(arrays.pop(LATE), float(weight[0]), (), 0, 0, None)
    simulation.state = ServerState(snapshot.num_rounds, tensors, snapshot.clip_norm, arrays, late)
    simulation.records, simulation.synthetic, simulation.answers = snapshot.records, snapshot.synthetic, snapshot.answers
    simulation.kept = {k: ClientState(arrays=arrays, records=snapshot.client_records[k]) for k, arrays in snapshot.client_arrays.items()}
    simulation.clients.restore(simulation.kept)
    simulation.progress.note(f"resuming after round {snapshot.num_rounds} of {simulation.num_rounds}")


def _save(simulation: Simulation, state_dir: Path) -> None:
    state = simulation.state
    late = {LATE: state.late.total, LATE_WEIGHT: np.array([state.late.weight])} if state.late else {}
    snapshot = Snapshot(
        num_rounds=state.round_index,
        config_key=result_key(simulation.config),
        adapter=state.adapter,
        clip_norm=state.clip_norm,
        server_arrays={name: array for name, array in {**state.tensors, **state.memory, **late}.items() if name != "adapter"},
        client_arrays={k: state.arrays for k, state in simulation.kept.items()},
        client_records={k: state.records for k, state in simulation.kept.items()},
        records=simulation.records,
        synthetic=simulation.synthetic,
        answers=simulation.answers,
    )
    checkpoint.save(state_dir, snapshot)
