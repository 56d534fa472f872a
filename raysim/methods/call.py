"""What a client call is given and what it gives back: the seam between the simulation and the methods.

A method is a function `(LanguageModel, ClientCall) -> ClientResult` that depends on its arguments only. It is the one
place where configuration becomes the plain values that algorithms take.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raysim.config import Config
from raysim.data.tokens import Example
from raysim.lora.layout import Vector
from raysim.model.language_model import LanguageModel
from raysim.model.private_train import PrivateSettings
from raysim.model.train import TrainSettings, TrainStats, scheduled_lr
from raysim.privacy.canaries import canary_coins, canary_seed
from raysim.privacy.mechanism import Mechanism
from raysim.rng import seed_for


@dataclass(frozen=True)
class ClientState:
    """What a client keeps for itself between rounds: arrays by name (an `adapter` is its private one) and records."""

    arrays: dict[str, np.ndarray]
    records: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ClientCall:
    """All that a client's work in a round depends on."""

    config: Config
    mechanism: Mechanism
    client_id: int
    round_index: int
    adapter: Vector
    """The released adapter of the round before, shape (P,)."""
    shard: tuple[Example, ...]
    """The client's own examples."""
    state: ClientState | None
    """What it kept from its last round, if anything."""
    control: Vector | None = None
    """The server's control variate, shape (P,), where the method has one."""
    public: tuple[Example, ...] = ()
    """Public records from which synthetic ones are drawn, where they come from a file."""

    def seed(self, *key: str | int) -> int:
        """The seed of a random stream of this call."""
        return seed_for(self.config.seed, "client", self.client_id, "round", self.round_index, *key)

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
        )

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
            canary_seeds=self._canary_seeds(),
            canary_norm=self.config.audit.canary_scale * self.mechanism.clip_norm,
        )

    def _canary_seeds(self) -> tuple[int, ...]:
        """Of the gradient canaries that are in the run, those dealt to this client (one after another, in turn)."""
        audit, num_clients = self.config.audit, self.mechanism.num_clients
        if audit.canary != "gradient":
            return ()
        coins = canary_coins(audit.num_canaries, seed=self.config.seed)
        dealt = range(self.client_id, audit.num_canaries, num_clients)
        return tuple(canary_seed(i, seed=self.config.seed) for i in dealt if coins[i])

    def _scheduled(self, lr: float) -> float:
        train, num_rounds = self.config.train, self.config.server.num_rounds
        return scheduled_lr(train.lr_schedule, lr=lr, min_lr=train.min_lr, round_index=self.round_index, num_rounds=num_rounds)


@dataclass(frozen=True)
class ClientResult:
    """What a client's work in a round came to."""

    update: Vector
    """Its adapter minus the one it was given: all that leaves the client, but for `control_change`."""
    stats: TrainStats
    state: ClientState | None = None
    """What it keeps; never sent to the server."""
    synthetic: tuple[dict[str, Any], ...] = ()
    """Records it generated, with verdicts and scores, for inspection by whoever simulates."""
    control_change: Vector | None = None
    """What changed in its control variate, shape (P,); sent with the update by methods that have one."""
    weight: float | None = None
    """The weight it asks for in place of the one assigned to it (`server.weighting: adaptive`, never under privacy)."""


Method = Callable[[LanguageModel, ClientCall], ClientResult]
