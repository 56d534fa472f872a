"""What stays the same over a run's calls, and the server's step under it.

Apart from the worker, so that the process of a server loads no language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysim.config import Config
from raysim.data.tokens import Example
from raysim.federation.robust import RuleSettings, rule_of
from raysim.federation.server import ServerState, relay, step
from raysim.federation.server_optimizer import ServerOptimizer
from raysim.lora.layout import Layout
from raysim.lora.ranks import dealt_ranks
from raysim.lora.rule import Setting, lora_rule
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
    layout: Layout | None = None
    """How the server's adapter is laid out, which most LoRA rules must know; None where clients' updates are averaged."""

    @property
    def setting(self) -> Setting | None:
        """What a LoRA rule is told at the server."""
        return None if self.layout is None else setting_of(self.config, self.layout)


def setting_of(config: Config, layout: Layout) -> Setting:
    """What the LoRA rule of a run is told of it."""
    lora = config.lora
    return Setting(
        layout=layout,
        alpha=lora.alpha,
        seed=config.seed,
        energy=lora.energy,
        oversampling=lora.oversampling,
        pruned_share=lora.pruned_share,
    )


def ranks_of(config: Config, *, num_clients: int) -> tuple[int, ...]:
    """The rank of each client of a run, as dealt before the first round."""
    lora = config.lora
    return dealt_ranks(lora.client_ranks, lora.rank_shares, num_clients=num_clients, rank=lora.rank, seed=config.seed)


@dataclass(frozen=True)
class LocalServer:
    """The server in this process."""

    assignment: Assignment

    def step(self, state: ServerState, round: Round, parts: Sequence[Any], late: Sequence[Any] = ()) -> tuple[ServerState, dict[str, Any]]:
        """See `Server`."""
        config, server = self.assignment.config, self.assignment.config.server
        noise_seed = seed_for(config.seed, "rule noise", round.index)
        settings = RuleSettings(hostile_share=server.hostile_share, norm_bound=server.norm_bound, seed=noise_seed)
        return step(
            state,
            round,
            parts,
            mechanism=self.assignment.mechanism,
            lr=server.lr,
            seed=config.seed,
            optimizer=ServerOptimizer(name=server.optimizer, beta1=server.beta1, beta2=server.beta2, tau=server.tau),
            rule=lora_rule(config.lora.aggregation),
            setting=self.assignment.setting,
            late=late,
            min_clients=server.min_clients,
            robust=rule_of(server.rule, settings),
        )

    def relay(self, round: Round, parts: Sequence[Any]) -> Round:
        """See `Server`."""
        assert self.assignment.setting is not None, "a rule of two trips knows its layout"
        rule = lora_rule(self.assignment.config.lora.aggregation)
        return relay(round, parts, mechanism=self.assignment.mechanism, rule=rule, setting=self.assignment.setting)
