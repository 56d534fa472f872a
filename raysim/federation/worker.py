"""Whoever does a client's work: one base model in one process, asked to run chunks of clients and evaluation jobs.

A worker keeps nothing between calls that a result depends on, so any worker can do any call, again if need be.
Plain Python: `LocalClients` holds one, `actors.py` makes Ray actors of it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raysim.config import Config, LoraConfig
from raysim.data.tokens import Example
from raysim.lora.layout import Vector, check_adapter
from raysim.measure.evaluate import Job, run_job
from raysim.methods import METHODS
from raysim.methods.call import ClientCall, ClientResult, ClientState
from raysim.model.base_model import BaseModel
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainStats
from raysim.privacy.aggregation import MaskedSum, sum_chunk
from raysim.privacy.clipping import ChunkSum, Total
from raysim.privacy.mechanism import Mechanism


@dataclass(frozen=True)
class ClientReport:
    """What the record of a round says of one client (the simulation's own view: a real server would not see it)."""

    client_id: int
    stats: TrainStats
    synthetic: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Assignment:
    """What stays the same over a run's calls."""

    config: Config
    mechanism: Mechanism
    weights: tuple[float, ...]
    """The weight of each client's update."""
    public: tuple[Example, ...] = ()
    """Public records that stand in for synthetic ones, where they come from a file."""


class Worker:
    """A base model at work, on `device`, with `num_threads` threads (the number changes the last bits of a matmul)."""

    def __init__(self, base: BaseModel, *, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._base = base
        self._device = device
        self._lora: LoraConfig | None = None
        self._lm: LanguageModel | None = None

    def language_model(self, lora: LoraConfig) -> LanguageModel:
        """The model with an adapter of this shape, built once and rebuilt only when the shape changes."""
        if self._lm is None or self._lora != lora:
            self._lm = build_language_model(
                self._base,
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
                target_modules=list(lora.target_modules),
                device=self._device,
            )
            self._lora = lora
        return self._lm

    def run_chunk(
        self,
        assignment: Assignment,
        client_ids: Sequence[int],
        round_index: int,
        broadcast: Vector,
        shards: Sequence[tuple[Example, ...]],
        states: Sequence[ClientState | None],
        *,
        clip_norm: float | None,
    ) -> tuple[ChunkSum | MaskedSum, list[ClientReport], list[ClientState | None]]:
        """The clipped, weighted sum of the chunk's updates (masked under secure aggregation), a report and the new state of each client.

        `broadcast` is what the server sends (see `server.broadcast`); `clip_norm` is the round's bound on updates, None for none.

        Errors: RuntimeError naming the round and the client in which something failed.
        """
        config, mechanism = assignment.config, assignment.mechanism
        lm = self.language_model(config.lora)
        method = METHODS[config.method.name]
        adapter, control = split_broadcast(broadcast, size=lm.layout.num_parameters)
        results: list[ClientResult] = []
        for client_id, shard, state in zip(client_ids, shards, states, strict=True):
            call = ClientCall(config, mechanism, client_id, round_index, adapter, shard, state, control, assignment.public)
            try:
                result = method(lm, call)
                check_adapter(result.update, lm.layout)
                if result.control_change is not None:
                    check_adapter(result.control_change, lm.layout)
            except Exception as error:
                raise RuntimeError(f"round {round_index}, client {client_id}: {type(error).__name__}: {error}") from error
            results.append(result)
        weights = [assignment.weights[k] if r.weight is None else r.weight for k, r in zip(client_ids, results, strict=True)]
        assert mechanism.kind == "none" or all(r.weight is None for r in results), "a weight that the data decide bounds no client"
        updates = [result.update for result in results]
        total = sum_chunk(
            updates, client_ids=client_ids, weights=weights, clip_norm=clip_norm, mechanism=mechanism, round_index=round_index
        )
        if control is not None:
            assert isinstance(total, ChunkSum), "control variates are not masked"
            total = dataclasses.replace(total, control=_control_sum(results, weights))
        reports = [ClientReport(k, result.stats, result.synthetic) for k, result in zip(client_ids, results, strict=True)]
        return total, reports, [result.state for result in results]

    def run_job(self, lora: LoraConfig, adapter: Vector, job: Job) -> list[Any]:
        """The results of one evaluation job on one adapter."""
        return run_job(self.language_model(lora), adapter, job)


def split_broadcast(broadcast: Vector, *, size: int) -> tuple[Vector, Vector | None]:
    """The adapter of `size` parameters and, if one follows it, the server's control variate."""
    return (broadcast[:size], broadcast[size:]) if len(broadcast) == 2 * size else (broadcast, None)


def _control_sum(results: Sequence[ClientResult], weights: Sequence[float]) -> Total:
    """The weighted sum of what changed in the clients' control variates, in float64."""
    total = np.zeros(len(results[0].update), dtype=np.float64)
    for result, weight in zip(results, weights, strict=True):
        assert result.control_change is not None, "the method sends no change of a control variate"
        total += weight * result.control_change.astype(np.float64)
    return total
