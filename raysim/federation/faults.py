"""What becomes of a client's work: an `Outcome`, which is its part of the round or a failure with its reason; who drops out, and who comes late.

Who takes part is decided before a round begins, by named streams and by what a client's machine takes for its tokens: so neither actors nor
their speed change a result. A client whose work fails by itself sends nothing, and the round goes on without it, unless records are protected:
then whether it fails may depend on one record, and no noise covers that.
Left out: machines that change speed from round to round, and the time that messages take on their way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raysim.config import Config
from raysim.privacy.mechanism import Mechanism
from raysim.rng import numpy_rng

if TYPE_CHECKING:  # the process of a server needs no language model
    from raysim.data.tokens import Example
    from raysim.lora.properties import Trained
    from raysim.model.train import TrainStats

LONGEST_REASON = 300
"""Characters of a reason that the records keep."""


@dataclass(frozen=True)
class Outcome:
    """What the record of a round says of one client (the simulation's own view: a real server would not see it)."""

    client_id: int
    stats: "TrainStats | None"
    """What its training came to; None where it failed."""
    synthetic: tuple[dict[str, Any], ...] = ()
    """Records it generated, with verdicts and scores."""
    failure: str = ""
    """Why nothing came of it; empty where something did."""
    trace: str = ""
    """Where that happened, for who has to mend it."""
    uplink_bytes: int = 0
    """Of what it sent on this trip."""
    trained: "Trained | None" = None
    """The adapter that it trained, where the gap to the mean of all is measured."""


@dataclass(frozen=True)
class Fleet:
    """The machines of a run's clients: how reliable and how fast they are, and how long the server waits for them."""

    dropout: tuple[float, ...]
    """Of each client the probability that it drops out of a round."""
    times_s: tuple[float, ...]
    """Seconds of simulated time that each client's work of a round takes."""
    seed: int
    deadline_s: float = 0.0
    """When the server ends a round; 0 for never."""
    num_wanted: int = 0
    """Clients whose updates the server takes, the first to come; 0 for all."""
    keeps_late: bool = False
    """Whether what comes after the deadline counts in the next round."""

    @staticmethod
    def of(config: Config, shards: "Sequence[Sequence[Example]]") -> "Fleet":
        """The fleet that `clients.*` describes, for clients with these shards."""
        clients, num_clients = config.clients, len(shards)
        token_s = [_token_s(config, k) for k in range(num_clients)]
        return Fleet(
            dropout=tuple(clients.dropout_by_client if len(clients.dropout_by_client) == num_clients else [clients.dropout] * num_clients),
            times_s=tuple(each * num_tokens(shard, config) for each, shard in zip(token_s, shards, strict=True)),
            seed=config.seed,
            deadline_s=clients.deadline_s,
            num_wanted=config.server.cohort_size if clients.overselect > 1 else 0,
            keeps_late=clients.late == "stale",
        )


@dataclass(frozen=True)
class Attendance:
    """Who of a cohort counts."""

    survivors: tuple[int, ...]
    late: tuple[int, ...]
    """Who counts in the next round."""
    absent: Mapping[int, str]
    """Why the others do not, by client."""
    simulated_s: float
    """Seconds of simulated time that the server waits for them."""


def attendance(cohort: Sequence[int], *, fleet: Fleet, round_index: int) -> Attendance:
    """Who of a round's cohort counts, in ascending order, whatever their updates.

    The server waits for all who have not dropped out (it is told of those), until it has as many as it wants, or for the deadline.
    """
    draws = numpy_rng(fleet.seed, "dropout", round_index).random(len(fleet.dropout)) if any(fleet.dropout) else None
    absent = {k: "dropped out" for k in cohort if draws is not None and draws[k] < fleet.dropout[k]}
    coming = sorted((fleet.times_s[k], k) for k in cohort if k not in absent)
    limit = fleet.deadline_s or math.inf
    in_time = [(time_s, k) for time_s, k in coming if time_s <= limit]
    late = [(time_s, k) for time_s, k in coming if time_s > limit]
    counted = in_time[: fleet.num_wanted or None]
    absent |= {k: "not among the first to send" for _, k in in_time[len(counted) :]}
    waited_s = counted[-1][0] if counted else 0.0
    if late and (not fleet.num_wanted or len(counted) < fleet.num_wanted):
        waited_s = fleet.deadline_s
    absent |= {} if fleet.keeps_late else {k: f"late: {time_s:.4g} s of {fleet.deadline_s:g} s" for time_s, k in late}
    return Attendance(
        survivors=tuple(sorted(k for _, k in counted)),
        late=tuple(sorted(k for _, k in late)) if fleet.keeps_late else (),
        absent=dict(sorted(absent.items())),
        simulated_s=waited_s,
    )


def num_tokens(shard: "Sequence[Example]", config: Config) -> float:
    """Tokens that a client's machine works through in a round: those of its passes, or of its steps where they are bounded or private."""
    total, train = sum(example.num_tokens for example in shard), config.train
    mean = total / len(shard) if shard else 0.0
    if config.method.spec.steps_privately:
        return config.dplora.batch_size * mean * (config.dplora.num_steps if config.dplora.mode == "example" else 1)
    passes = float(train.num_epochs * total)
    return min(passes, train.max_steps * train.batch_size * mean) if train.max_steps else passes


def _token_s(config: Config, client_id: int) -> float:
    """Seconds of simulated time that a client's machine takes for a token."""
    clients, rng = config.clients, numpy_rng(config.seed, "speed", client_id)
    if clients.speed == "lognormal":
        return clients.token_s * math.exp(clients.spread * rng.standard_normal())
    return clients.token_s * (rng.standard_exponential() if clients.speed == "exponential" else 1.0)


def may_fail(mechanism: Mechanism) -> bool:
    """Whether a round can go on without a client whose work failed: not where one record of its, which is protected, may be why."""
    return mechanism.kind in ("none", "client")


def check_outcomes(outcomes: Sequence[Outcome], *, round_index: int) -> None:
    """Ends the run for a client that failed by itself.

    Errors: RuntimeError naming the round, the client and the reason.
    """
    for outcome in outcomes:
        if outcome.stats is None:
            error = RuntimeError(f"round {round_index}, client {outcome.client_id}: {outcome.failure}")
            error.add_note(outcome.trace)
            raise error


def failures(outcomes: Sequence[Outcome], absent: Mapping[int, str]) -> list[dict[str, Any]]:
    """What a round's record says of each client whose update did not count: its number and why, in the order of the numbers."""
    reasons = {**absent, **{outcome.client_id: outcome.failure for outcome in outcomes if outcome.failure}}
    return [{"client_id": k, "reason": " ".join(reasons[k].split())[:LONGEST_REASON]} for k in sorted(reasons)]
