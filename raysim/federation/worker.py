"""Whoever does a client's work: one base model in one process, asked to run chunks of clients and evaluation jobs.

A worker keeps nothing between calls that a result depends on, so any worker can do any call, again if need be.
Plain Python: `in_process.py` holds one, `on_ray/clients.py` makes actors of it.
"""

import dataclasses
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from raysim.config import LoraConfig
from raysim.data.tokens import Example
from raysim.federation.adversary import hostile_clients, hostile_upload
from raysim.federation.assignment import Assignment
from raysim.federation.faults import Outcome
from raysim.lora.layout import Layout, Upload, Vector, check_adapter
from raysim.lora.rule import lora_rule
from raysim.measure.evaluate import Job, run_job
from raysim.methods.call import ClientCall, ClientResult, ClientState
from raysim.methods.registry import method_of
from raysim.model.base_model import BaseModel
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.privacy.aggregation import Part, sum_chunk
from raysim.privacy.cohort import Round

GROUP_SIZE = 1
"""Clients that a method is given at once: a matter of speed, where the chunk, over which updates are summed, is one of bits."""


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
            self._lm.train_only(lora_rule(lora.aggregation).trainable(self._lm.layout))
            self._lora = lora
        return self._lm

    def run_chunk(
        self,
        assignment: Assignment,
        client_ids: Sequence[int],
        round: Round,
        shards: Sequence[tuple[Example, ...]],
        states: Sequence[ClientState | None],
    ) -> tuple[Part | None, list[Outcome], list[ClientState | None]]:
        """What the chunk sends to the server (None if every client failed), and the outcome and new state of each client.

        Where clients add noise of their own, one that failed sends an update of zero, with its noise: nobody sees that it failed.
        """
        config, mechanism = assignment.config, assignment.mechanism
        lm = self.language_model(config.lora)
        calls = [
            ClientCall(config, mechanism, round, client_id, round.broadcast["adapter"], shard, state, assignment.public)
            for client_id, shard, state in zip(client_ids, shards, states, strict=True)
        ]
        done: dict[int, ClientResult] = {}
        outcomes: list[Outcome] = []
        for group in (calls[i : i + GROUP_SIZE] for i in range(0, len(calls), GROUP_SIZE)):
            try:
                results = method_of(config.method.name)(lm, group)
                results = [self._sent_by(call, result) for call, result in zip(group, results, strict=True)]
                for result in results:
                    check_upload(result.upload, lm.layout, broadcast=round.broadcast)
                for call, result in zip(group, results, strict=True):
                    done[call.client_id] = result
                    outcomes.append(Outcome(call.client_id, result.stats, result.synthetic, failure=_not_finite(result)))
            except Exception as error:
                failure, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
                outcomes += [Outcome(call.client_id, None, failure=failure, trace=trace) for call in group]
                if isinstance(error, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()  # for who comes next
        new_states = [done[k].state if k in done else state for k, state in zip(client_ids, states, strict=True)]
        sent = {k: (done[k].upload, done[k].weight) for k in client_ids if k in done}
        if mechanism.update_noise_multiplier(len(round.cohort)):  # whether noise comes must not depend on the data
            nothing = {name: np.zeros(len(tensor), dtype=np.float32) for name, tensor in round.broadcast.items()}
            sent = {k: sent.get(k, (nothing, None)) for k in client_ids}
        return self._sent(sent, assignment, round) if sent else None, outcomes, new_states

    def _sent_by(self, call: ClientCall, result: ClientResult) -> ClientResult:
        """The result with what the client really sends, if it is hostile."""
        adversary = call.config.adversary
        if call.client_id not in hostile_clients(call.mechanism.num_clients, adversary=adversary, seed=call.config.seed):
            return result
        return dataclasses.replace(result, upload=hostile_upload(result.upload, adversary=adversary, seed=call.seed("adversary")))

    def _sent(self, sent: Mapping[int, tuple[Upload, float | None]], assignment: Assignment, round: Round) -> Part:
        mechanism = assignment.mechanism
        assert mechanism.kind == "none" or all(w is None for _, w in sent.values()), "a weight that the data decide bounds no client"
        return sum_chunk(
            [upload for upload, _ in sent.values()],
            client_ids=list(sent),
            weights=[assignment.weights[k] if weight is None else weight for k, (_, weight) in sent.items()],
            round=round,
            mechanism=mechanism,
            form="stack" if assignment.config.server.rule != "mean" else lora_rule(assignment.config.lora.aggregation).form,
        )

    def run_job(self, lora: LoraConfig, adapter: Vector, job: Job) -> list[Any]:
        """The results of one evaluation job on one adapter."""
        return run_job(self.language_model(lora), adapter, job)


def _not_finite(result: ClientResult) -> str:
    """Why a result's update will be left out; empty where it counts."""
    odd = [name for name, tensor in result.upload.items() if not np.isfinite(tensor).all()]
    return f"its update is not finite ({odd[0]}); lower train.lr" if odd else ""


def check_upload(upload: Upload, layout: Layout, *, broadcast: Upload) -> None:
    """Passes if the upload holds an update for each tensor that was sent, float32 and of its shape, and nothing more.

    Errors: ValueError naming what is missing or wrong.
    """
    if set(upload) != set(broadcast):
        raise ValueError(f"upload: {sorted(upload)} came where {sorted(broadcast)} had been sent")
    for tensor in upload.values():
        check_adapter(tensor, layout)
