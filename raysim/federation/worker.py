"""Whoever does a client's work: one base model in one process, asked to run chunks of clients and evaluation jobs.

A worker keeps nothing between calls that a result depends on, so any worker can do any call, again if need be.
Plain Python: `in_process.py` holds one, `on_ray/clients.py` makes actors of it.
"""

import dataclasses
import gc
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from raysim.config import Config, LoraConfig, with_values
from raysim.data.tokens import Example
from raysim.federation.adversary import hostile_clients, hostile_upload
from raysim.federation.assignment import Assignment, ranks_of, setting_of
from raysim.federation.faults import Outcome
from raysim.lora.layout import Released, Upload, Vector, by_name, check_vector
from raysim.lora.properties import Trained
from raysim.lora.rule import LoraRule, Setting, lora_rule
from raysim.measure.evaluate import Job, run_job
from raysim.methods.call import OF_RULE, ClientCall, ClientResult, ClientState, examples_at_once, split_state
from raysim.methods.registry import method_of
from raysim.model.base_model import BaseModel
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.sharded import Group
from raysim.model.train import TrainStats, is_out_of_memory
from raysim.privacy.aggregation import Part, Sent, sum_sent
from raysim.privacy.cohort import Round

logger = logging.getLogger(__name__)

Member = tuple[int, tuple[Example, ...], ClientState | None]
"""A client of a chunk: its id, its examples, and what it keeps."""
MOST_DEATHS = 3
"""Processes that die at a client's work, beside the first, before it is given up."""


class Watch(Protocol):
    """Who counts the processes that died at a client's work."""

    def deaths(self, client_id: int) -> int:
        """How many did, as far as is known."""

    def at_work(self, client_ids: Sequence[int]) -> AbstractContextManager[None]:
        """While open, these clients are at work."""


class Worker:
    """A base model at work, on `device`, with `num_threads` threads (the number changes the last bits of a matmul)."""

    def __init__(self, base: BaseModel, *, device: str, num_threads: int, group: Group | None = None) -> None:
        torch.set_num_threads(num_threads)
        self._base, self._group = base, group
        self._device = device
        self._lora: LoraConfig | None = None
        self._lm: LanguageModel | None = None
        self._ready: tuple[tuple[LoraRule, int, int, float], Vector | None] | None = None

    def language_model(self, lora: LoraConfig) -> LanguageModel:
        """The model with an adapter of this shape, built once and rebuilt only when the shape changes."""
        if self._lm is None or self._lora != lora:
            rule = lora_rule(lora.aggregation)
            self._lm = build_language_model(
                self._base,
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
                target_modules=list(lora.target_modules),
                device=self._device,
                between=rule.between,
                group=self._group,
            )
            self._lm.train_only(rule.trainable(self._lm.layout, None))
            self._lora, self._ready = lora, None
        return self._lm

    @property
    def num_base_parameters(self) -> int:
        """Parameters of the base model."""
        return self._base.num_parameters

    @property
    def last(self) -> LanguageModel:
        """The model that was asked for last."""
        assert self._lm is not None, "no model has been asked for"
        return self._lm

    def run_chunk(
        self,
        assignment: Assignment,
        client_ids: Sequence[int],
        round: Round,
        shards: Sequence[tuple[Example, ...]],
        states: Sequence[ClientState | None],
        watch: Watch | None = None,
    ) -> tuple[Part | None, list[Outcome], list[ClientState | None]]:
        """What the chunk sends to the server (None if every client failed), and the outcome and new state of each client.

        On a second trip nobody trains: clients answer what the server relayed, from what they kept. Where clients add noise of their own, one that
        failed sends an update of zero, with its noise: nobody sees that it failed. A client at whose work one process after the other died has failed.
        """
        setting = setting_of(assignment.config, self.language_model(assignment.config.lora).layout)
        outcomes: list[Outcome] = []
        new_states = dict(zip(client_ids, states, strict=True))
        members = list(zip(client_ids, shards, states, strict=True))

        def sent() -> Iterator[Sent]:
            for group in groups(members, size=group_size(assignment.config)):
                for client_id, outcome, result in self._watched(assignment, round, group, setting, watch):
                    outcomes.append(outcome)
                    if result is not None:
                        new_states[client_id] = _with_kept(result)
                        yield client_id, result.upload, _weight(result, client_id, assignment)
                    elif assignment.mechanism.update_noise_multiplier(len(round.cohort)):  # whether noise comes must not depend on the data
                        yield client_id, _nothing(assignment, round, client_id, setting), assignment.weights[client_id]

        own = assignment.config.server.rule != "mean"
        form = "stack" if own else lora_rule(assignment.config.lora.aggregation).form
        part = sum_sent(sent(), round=round, mechanism=assignment.mechanism, form=form)
        return part, outcomes, list(new_states.values())

    def _watched(
        self, assignment: Assignment, round: Round, group: Sequence[Member], setting: Setting, watch: Watch | None
    ) -> Iterator[tuple[int, Outcome, ClientResult | None]]:
        """See `_tried`; where a process died at a group's work, each client is tried alone, and given up if that goes on."""
        if watch is None:
            yield from self._tried(assignment, round, group, setting)
            return
        ids = [client_id for client_id, _, _ in group]
        deaths = max(watch.deaths(client_id) for client_id in ids)
        if deaths and len(group) > 1:
            for member in group:
                yield from self._watched(assignment, round, [member], setting, watch)
        elif deaths >= MOST_DEATHS:
            yield ids[0], Outcome(ids[0], None, failure=f"its process died {deaths} times"), None
        else:
            with watch.at_work(ids):
                found = list(self._tried(assignment, round, group, setting))
            yield from found

    def _tried(
        self, assignment: Assignment, round: Round, group: Sequence[Member], setting: Setting
    ) -> Iterator[tuple[int, Outcome, ClientResult | None]]:
        """Each client of a group with its outcome and, unless its work failed, what came of it."""
        try:
            if round.trip:
                results = [_answer(assignment, round, state, setting) for _, _, state in group]
            else:
                results = self._within_memory(assignment, round, group, setting)
        except Exception as error:
            if len(group) > 1:  # so that who fails is told from the others, who are done again without
                for member in group:
                    yield from self._tried(assignment, round, [member], setting)
                return
            failure, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()  # for who comes next
            [(client_id, _, _)] = group
            yield client_id, Outcome(client_id, None, failure=failure, trace=trace), None
            return
        for (client_id, _, _), result in zip(group, results, strict=True):
            size = sum(tensor.nbytes for tensor in result.upload.values()) * (2 if assignment.mechanism.is_masked else 1)
            trained = Trained(*result.trained, _weight(result, client_id, assignment)) if result.trained else None
            yield (
                client_id,
                Outcome(client_id, result.stats, result.synthetic, failure=_not_finite(result), uplink_bytes=size, trained=trained),
                result,
            )

    def _within_memory(self, assignment: Assignment, round: Round, group: Sequence[Member], setting: Setting) -> list[ClientResult]:
        """What the method makes of a group of clients; where memory runs out, each alone and begun anew with half the micro-batch.

        Guarantees: the bits are those of a run in which that had been the client's `train.micro_batch_size`.
        """
        try:
            return self._trained(assignment, round, group, setting)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fewer = smaller_micro_batch(assignment.config)
            if len(group) == 1 and fewer is None:
                raise
        self._forget_gradients()
        config = assignment.config if len(group) > 1 or fewer is None else with_values(assignment.config, {"train.micro_batch_size": fewer})
        logger.warning(
            "round %d: out of memory; clients %s again, train.micro_batch_size=%d", round.index, [k for k, _, _ in group], fewer or 0
        )
        alone = dataclasses.replace(assignment, config=config)
        return [result for member in group for result in self._within_memory(alone, round, [member], setting)]

    def _trained(self, assignment: Assignment, round: Round, group: Sequence[Member], setting: Setting) -> list[ClientResult]:
        """What the method makes of a group of clients, each with the part of the adapter that the LoRA rule gives it."""
        config, lm = assignment.config, self.language_model(assignment.config.lora)
        rule, ranks = lora_rule(config.lora.aggregation), ranks_of(config, num_clients=assignment.mechanism.num_clients)
        calls = []
        for client_id, shard, state in group:
            own, kept = split_state(state)
            rank = int(kept["rank"][0]) if "rank" in kept else ranks[client_id]
            given = round.broadcast["adapter"] if rule.given is None else rule.given(round.broadcast, kept, rank, setting)
            call = ClientCall(config, assignment.mechanism, round, client_id, given, shard, own, assignment.public, setting, rank)
            calls.append(call)
        [rank] = {call.rank for call in calls}  # a group is one client, or clients of one rank
        self._set_up(rule, round, rank=rank, scale=rule.scale(setting, rank))
        honest = method_of(config.method.name)(lm, calls)
        hostile = hostile_clients(assignment.mechanism.num_clients, adversary=config.adversary, seed=config.seed)
        results = [_sent_by(call, result) if call.client_id in hostile else result for call, result in zip(calls, honest, strict=True)]
        for call, result in zip(calls, results, strict=True):
            check_upload(result.upload, expected_sizes(config, rule, setting, turn=round.turn, rank=call.rank))
        return results

    def _forget_gradients(self) -> None:
        """Gives back what the attempt that failed had: it is collected once its error is forgotten."""
        gc.collect()
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()

    def _set_up(self, rule: LoraRule, round: Round, *, rank: int, scale: float) -> None:
        """Has the model train and compute as a round wants it of clients of some rank; nothing to do where the client before was such a one."""
        assert self._lm is not None, "the chunk's model is built"
        wanted, delta = (rule, round.turn, rank, scale), round.broadcast.get("delta")
        if self._ready is not None and self._ready[0] == wanted and self._ready[1] is delta:
            return
        self._ready = None
        self._lm.train_only(rule.trainable(self._lm.layout, round.turn), rank=rank)
        self._lm.set_scale(scale)
        self._lm.set_delta(delta)
        self._ready = wanted, delta

    def run_job(self, lora: LoraConfig, adapter: Released, job: Job) -> list[Any]:
        """The results of one evaluation job on one adapter, and the delta of the base that it stands on."""
        lm, rule, tensors = self.language_model(lora), lora_rule(lora.aggregation), by_name(adapter)
        self._ready = None
        lm.train_only(rule.trainable(lm.layout, None))
        lm.set_scale(lora.alpha / lora.rank)
        lm.set_delta(tensors.get("delta"))
        return run_job(lm, tensors["adapter"], job)


def group_size(config: Config) -> int:
    """Clients that a method is given at once: a matter of speed, where the chunk, over which updates are summed, is one of bits.

    One where ranks differ, or where clients do more than train.
    """
    assert config.clients.batched != "auto", "the size of a group is decided before the first round"
    one_rank = not (config.lora.client_ranks or config.lora.rank_shares or config.lora.spec.prunes)
    return int(config.clients.batched) if config.method.spec.only_trains and one_rank else 1


def groups(members: Sequence[Member], *, size: int) -> list[Sequence[Member]]:
    """The members in order, so many at once."""
    return [members[i : i + size] for i in range(0, len(members), size)]


def smaller_micro_batch(config: Config) -> int | None:
    """Half of the examples that a step has in memory at once; None where it has one."""
    return examples_at_once(config) // 2 or None


def _not_finite(result: ClientResult) -> str:
    """Why a result's update will be left out; empty where it counts."""
    with np.errstate(over="ignore", invalid="ignore"):  # of what is not finite no sum is
        odd = [name for name, tensor in result.upload.items() if not (np.isfinite(tensor.sum()) or np.isfinite(tensor).all())]
    return f"its update is not finite ({odd[0]}); lower train.lr" if odd else ""


def _sent_by(call: ClientCall, result: ClientResult) -> ClientResult:
    """The result with what a hostile client really sends."""
    upload = hostile_upload(result.upload, adversary=call.config.adversary, seed=call.seed("adversary"))
    return dataclasses.replace(result, upload=upload)


def _weight(result: ClientResult, client_id: int, assignment: Assignment) -> float:
    """The weight of what a client sends: the one that it asks for, or that assigned to it."""
    assert assignment.mechanism.kind == "none" or result.weight is None, "a weight that the data decide bounds no client"
    return assignment.weights[client_id] if result.weight is None else result.weight


def _nothing(assignment: Assignment, round: Round, client_id: int, setting: Setting) -> Upload:
    """An update of zero, of the size that this client sends."""
    config = assignment.config
    rank = ranks_of(config, num_clients=assignment.mechanism.num_clients)[client_id]
    sizes = expected_sizes(config, lora_rule(config.lora.aggregation), setting, turn=round.turn, rank=rank)
    return {name: np.zeros(size, dtype=np.float32) for name, size in sizes.items()}


def _answer(assignment: Assignment, round: Round, state: ClientState | None, setting: Setting) -> ClientResult:
    """What a client sends on its second trip; what it kept for that, it keeps no longer."""
    rule, (own, kept) = lora_rule(assignment.config.lora.aggregation), split_state(state)
    assert rule.trips is not None, "nobody asks again but a rule of two trips"
    upload = rule.trips.answer(kept, round.broadcast, setting)
    return ClientResult(upload=upload, stats=TrainStats(num_tokens=0, num_steps=0, loss=None), state=own or ClientState(arrays={}))


def _with_kept(result: ClientResult) -> ClientState | None:
    """A client's new state: its method's, and what its LoRA rule has it keep."""
    if not result.kept:
        return result.state
    arrays = {f"{OF_RULE}{name}": array for name, array in result.kept.items()}
    own = result.state or ClientState(arrays={})
    return ClientState(arrays={**own.arrays, **arrays}, records=own.records)


def expected_sizes(config: Config, rule: LoraRule, setting: Setting, *, turn: int, rank: int) -> dict[str, int]:
    """The names and sizes of what a client of some rank sends on the first trip of a round."""
    mask = rule.mask(setting, turn, rank=rank)
    size = setting.layout.num_parameters if mask is None else int(mask.sum())
    if rule.sketch_size is not None:
        size = rule.sketch_size(setting)
    ranked = {"rank": 1} if rule.form == "stack" and rule.combine is not None else {}
    return {"adapter": size} | dict.fromkeys(config.method.spec.tensors, size) | ranked


def check_upload(upload: Upload, sizes: Mapping[str, int]) -> None:
    """Passes if the upload holds each tensor that is expected, float32 and of its size, and nothing more.

    Errors: ValueError naming what is missing or wrong.
    """
    if set(upload) != set(sizes):
        raise ValueError(f"upload: {sorted(upload)} came where {sorted(sizes)} had been sent")
    for name, tensor in upload.items():
        check_vector(tensor, sizes[name])
