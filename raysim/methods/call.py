"""What a client call is given and what it gives back: the seam between the simulation and the methods.

A method is a function `(LanguageModel, calls) -> results` for a group of clients that depends on its arguments only. It is the one
place where configuration becomes the plain values that algorithms take.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysim.config import Config
from raysim.data.tokens import Example
from raysim.lora.factors import gathered
from raysim.lora.layout import Upload, Vector
from raysim.lora.penalty import tail_start
from raysim.lora.rule import Kept, Setting, lora_rule
from raysim.model.language_model import LanguageModel
from raysim.model.private_train import PRIVATE_BATCH, PrivateSettings
from raysim.model.train import TrainSettings, TrainStats, scheduled_lr
from raysim.privacy.canaries import canary_coins, canary_directions, holders, scores_along
from raysim.privacy.cohort import Round
from raysim.privacy.mechanism import Mechanism
from raysim.rng import seed_for

OF_RULE = "lora."
"""How the arrays begin that a LoRA rule, and no method, has a client keep."""
CANARY_NOTES = "canary notes"
"""The array of a client's state in which an audit keeps what it saw of the client's messages."""


def gradient_holders(config: Config, mechanism: Mechanism) -> NDArray[np.int64]:
    """The client to which each gradient canary is dealt: to those whose records are drawn most often, whom the accountant counts."""
    probs = [mechanism.record_prob(k) for k in range(mechanism.num_clients)]
    return holders(config.audit.num_canaries, [k for k, prob in enumerate(probs) if prob == max(probs)])


@dataclass(frozen=True)
class ClientState:
    """What a client keeps for itself between rounds: arrays by name (an `adapter` is its private one) and records."""

    arrays: dict[str, np.ndarray]
    records: list[dict[str, Any]] = field(default_factory=list)


def split_state(state: ClientState | None) -> tuple[ClientState | None, Kept]:
    """The state of a client as its method has it, and what its LoRA rule has it keep."""
    kept = {} if state is None else {name: array for name, array in state.arrays.items() if name.startswith(OF_RULE)}
    if state is None or not kept:
        return state, {}
    arrays = {name: array for name, array in state.arrays.items() if name not in kept}
    own = ClientState(arrays, state.records) if arrays or state.records else None
    return own, {name.removeprefix(OF_RULE): array for name, array in kept.items()}


@dataclass(frozen=True)
class ClientCall:
    """All that a client's work in a round depends on."""

    config: Config
    mechanism: Mechanism
    round: Round
    """The round, with all that the server sends."""
    client_id: int
    adapter: Vector
    """The adapter that the work starts from, shape (P,): the released one."""
    shard: tuple[Example, ...]
    """The client's own examples."""
    state: ClientState | None
    """What it kept from its last round, if anything."""
    public: tuple[Example, ...] = ()
    """Public records from which synthetic ones are drawn, where they come from a file."""
    setting: Setting | None = None
    """What the run's LoRA rule is told; None where all of the difference is sent."""
    rank: int = 0
    """The rank of the client's adapter; 0 for that of the server's."""

    def seed(self, *key: str | int) -> int:
        """The seed of a random stream of this call."""
        return seed_for(self.config.seed, "client", self.client_id, "round", self.round.index, *key)

    def upload(self, trained: Vector) -> dict[str, Vector]:
        """What the run's LoRA rule sends of an adapter trained in this call."""
        rule = lora_rule(self.config.lora.aggregation)
        if self.setting is None:
            return rule.upload(trained, self.adapter)
        rank = self.rank or self.setting.rank
        return rule.message(trained, self.adapter, rank=rank, setting=self.setting, round_index=self.round.index, turn=self.round.turn)

    def result(self, trained: Vector, *, stats: TrainStats, further: Upload | None = None, **more: Any) -> "ClientResult":
        """What the work came to, as the run's LoRA rule has it: an adapter trained in this call, changes to other tensors, and what else there is."""
        rule = lora_rule(self.config.lora.aggregation)
        kept: Kept = {}
        rank = self.rank or (self.setting.rank if self.setting else 0)
        if self.setting is not None and rule.kept is not None:
            kept = rule.kept(trained, self.adapter, rank, self.setting)
        mask = None if self.setting is None else rule.mask(self.setting, self.round.turn)
        changes = {name: np.asarray(gathered(change, mask)) for name, change in (further or {}).items()}
        shown = (trained, rank) if self.config.evaluate.exactness_gap else None
        return ClientResult(upload=self.upload(trained) | changes, stats=stats, kept=kept, trained=shown, **more)

    def train_settings(self) -> TrainSettings:
        """Local training as configured, its learning rate scheduled for this round."""
        train = self.config.train
        return TrainSettings(
            num_epochs=train.num_epochs,
            max_steps=train.max_steps,
            batch_size=train.batch_size,
            lr=self._scheduled(train.lr),
            optimizer=train.optimizer,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            prox_mu=train.prox_mu,
            micro_batch_size=train.micro_batch_size,
            keep_activations=not train.gradient_checkpointing,
            **self._tail(),
        )

    def _tail(self) -> dict[str, Any]:
        """What HetLoRA has a client train under: a penalty on the directions that may be pruned."""
        lora = self.config.lora
        start = tail_start(self.rank or lora.rank, pruned_share=lora.pruned_share)
        return {"tail_weight": lora.tail_weight, "tail_start": start} if lora.spec.prunes and start else {}

    def private_settings(self) -> PrivateSettings:
        """Private local training; what the guarantee rests on comes from the mechanism that is accounted for."""
        return PrivateSettings(
            num_steps=self.mechanism.num_steps,
            batch_size=self.mechanism.batch_size,
            sampling_prob=self.mechanism.record_prob(self.client_id),
            lr=self._scheduled(self.config.dplora.lr),
            optimizer=self.config.dplora.optimizer,
            clip_norm=self.mechanism.clip_norm,
            noise_multiplier=self.mechanism.noise_multiplier,
            secure_noise=self.mechanism.secure_noise,
            micro_batch_size=self.config.train.micro_batch_size,
            keep_activations=not self.config.train.gradient_checkpointing,
            canaries=self._gradient_canaries(),
            num_canaries=self.config.audit.num_canaries,
            canary_seed=self.config.seed,
            canary_norm=self.config.audit.canary_scale * self.mechanism.clip_norm,
        )

    def _gradient_canaries(self) -> tuple[int, ...]:
        """Of the gradient canaries that are in the run, those dealt to this client."""
        if self.config.audit.canary != "gradient" or not self.config.audit.num_canaries:
            return ()
        holder_M, coin_M = (
            gradient_holders(self.config, self.mechanism),
            canary_coins(self.config.audit.num_canaries, seed=self.config.seed),
        )
        return tuple(np.flatnonzero(coin_M & (holder_M == self.client_id)).tolist())

    def noted(self, upload: Upload, *, frozen: NDArray[np.bool_] | None) -> ClientState | None:
        """What the audit notes of this client's messages so far: how far they went along each gradient canary, or None without such.

        A step goes against a gradient, so that the sign is turned. It is noted here, where the message is, and kept like a client's state.
        """
        audit, update = self.config.audit, upload["adapter"]
        if audit.canary != "gradient" or not audit.num_canaries:
            return self.state
        directions = canary_directions(audit.num_canaries, size=len(update), seed=self.config.seed, frozen=frozen)
        before = self.state.arrays[CANARY_NOTES] if self.state else np.zeros(audit.num_canaries)
        return ClientState({CANARY_NOTES: before - scores_along(directions, update)})

    def _scheduled(self, lr: float) -> float:
        train, num_rounds = self.config.train, self.config.server.num_rounds
        return scheduled_lr(train.lr_schedule, lr=lr, min_lr=train.min_lr, round_index=self.round.index, num_rounds=num_rounds)


@dataclass(frozen=True)
class ClientResult:
    """What a client's work in a round came to."""

    upload: Upload
    """All that leaves the client: its part of the `adapter` (see `ClientCall.upload`), and a change to each other tensor that it was sent."""
    stats: TrainStats
    state: ClientState | None = None
    """What it keeps; never sent to the server."""
    synthetic: tuple[dict[str, Any], ...] = ()
    """Records it generated, with verdicts and scores, for inspection by whoever simulates."""
    kept: Kept = field(default_factory=dict)
    """What the run's LoRA rule has it keep beside its state; never sent either."""
    trained: tuple[Vector, int] | None = None
    """The adapter that it trained and its rank, for inspection likewise, where `evaluate.exactness_gap` asks for it."""
    weight: float | None = None
    """The weight it asks for in place of the one assigned to it (`server.weighting: adaptive`, never under privacy)."""


Method = Callable[[LanguageModel, Sequence[ClientCall]], list[ClientResult]]
"""What the clients of a group do in a round, in order. They share a round; a method that can trains them in one pass."""


def examples_at_once(config: Config) -> int:
    """The examples that a step of a client has in memory at once."""
    asked = config.train.micro_batch_size
    if not config.method.spec.steps_privately:
        return min(asked or config.train.batch_size, config.train.batch_size)
    by_default = PRIVATE_BATCH if config.dplora.mode == "example" else config.dplora.batch_size
    return min(asked or by_default, config.dplora.batch_size)


def one_by_one(work: Callable[[LanguageModel, ClientCall], ClientResult]) -> Method:
    """The method that does the work of each client of a group by itself."""

    @functools.wraps(work)
    def method(lm: LanguageModel, calls: Sequence[ClientCall]) -> list[ClientResult]:
        return [work(lm, call) for call in calls]

    return method
