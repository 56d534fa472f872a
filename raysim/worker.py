"""Whoever does a client's work: one base model in one process, asked to run chunks of clients and evaluation jobs.

A worker keeps nothing between calls that a result depends on, so any worker can do any call, again if need be.
Plain Python: `LocalClients` holds one, `actors.py` makes Ray actors of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raysim.adapter import Vector, check_adapter
from raysim.base import BaseModel, LanguageModel, build_language_model
from raysim.config import Config, LoraConfig
from raysim.data.tokens import Example
from raysim.evaluate import Job, run_job
from raysim.methods import METHODS
from raysim.methods.call import ClientCall, ClientState
from raysim.privacy.aggregation import MaskedSum, sum_chunk
from raysim.privacy.clipping import ChunkSum
from raysim.privacy.mechanism import Mechanism
from raysim.train import TrainStats


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
        adapter: Vector,
        shards: Sequence[tuple[Example, ...]],
        states: Sequence[ClientState | None],
        *,
        clip_norm: float | None,
    ) -> tuple[ChunkSum | MaskedSum, list[ClientReport], list[ClientState | None]]:
        """The clipped, weighted sum of the chunk's updates (masked under secure aggregation), a report and the new state of each client.

        `clip_norm` is the round's bound on updates, None for none.

        Errors: RuntimeError naming the round and the client in which something failed.
        """
        config, mechanism = assignment.config, assignment.mechanism
        lm = self.language_model(config.lora)
        method = METHODS[config.method.name]
        updates, reports, new_states = [], [], []
        for client_id, shard, state in zip(client_ids, shards, states, strict=True):
            call = ClientCall(config, mechanism, client_id, round_index, adapter, shard, state)
            try:
                result = method(lm, call)
                check_adapter(result.update, lm.layout)
            except Exception as error:
                raise RuntimeError(f"round {round_index}, client {client_id}: {type(error).__name__}: {error}") from error
            updates.append(result.update)
            reports.append(ClientReport(client_id, result.stats, result.synthetic))
            new_states.append(result.state)
        weights = [assignment.weights[client_id] for client_id in client_ids]
        total = sum_chunk(
            updates, client_ids=client_ids, weights=weights, clip_norm=clip_norm, mechanism=mechanism, round_index=round_index
        )
        return total, reports, new_states

    def run_job(self, lora: LoraConfig, adapter: Vector, job: Job) -> list[Any]:
        """The results of one evaluation job on one adapter."""
        return run_job(self.language_model(lora), adapter, job)
