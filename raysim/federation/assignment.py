"""What stays the same over a run's calls, and the server's step under it.

Apart from the worker, so that the process of a server loads no language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysim.config import Config
from raysim.data.tokens import Example
from raysim.federation.robust import RuleSettings, rule_of
from raysim.federation.server import ServerState, step
from raysim.federation.server_optimizer import ServerOptimizer
from raysim.lora.rule import lora_rule
from raysim.privacy.cohort import Round
from raysim.privacy.mechanism import Mechanism
from raysim.rng import seed_for


@dataclass(frozen=True)
class Assignment:
    """What stays the same over a run's calls."""

    config: Config
    mechanism: Mechanism
    weights: tuple[float, ...]
    """The weight of each client's update."""
    public: tuple[Example, ...] = ()
    """Public records that stand in for synthetic ones, where they come from a file."""


@dataclass(frozen=True)
class LocalServer:
    """The server in this process."""

    assignment: Assignment

    def step(self, state: ServerState, round: Round, parts: Sequence[Any], late: Sequence[Any] = ()) -> tuple[ServerState, dict[str, Any]]:
        """See `Server`."""
        config = self.assignment.config
        server, rule = config.server, lora_rule(config.lora.aggregation)
        optimizer = ServerOptimizer(name=server.optimizer, beta1=server.beta1, beta2=server.beta2, tau=server.tau)
        mechanism = self.assignment.mechanism
        noise_seed = seed_for(config.seed, "rule noise", round.index)
        settings = RuleSettings(hostile_share=server.hostile_share, norm_bound=server.norm_bound, seed=noise_seed)
        return step(
            state,
            round,
            parts,
            mechanism=mechanism,
            lr=server.lr,
            seed=config.seed,
            optimizer=optimizer,
            rule=rule,
            late=late,
            min_clients=server.min_clients,
            combine=rule_of(server.rule, settings),
        )
