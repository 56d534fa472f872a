"""What becomes of a client's work: an `Outcome`, which is its part of the round or a failure with its reason; and who drops out.

Left out: carrying on without a client whose work failed by itself. A run ends there and says so, since such a failure may depend on the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raysim.privacy.mechanism import Mechanism
from raysim.rng import numpy_rng

if TYPE_CHECKING:  # the process of a server needs no language model
    from raysim.model.train import TrainStats


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


def survivors(cohort: Sequence[int], *, mechanism: Mechanism, round_index: int) -> tuple[int, ...]:
    """The clients of a round's cohort that do not drop out, whatever their data."""
    if mechanism.dropout_prob == 0.0:
        return tuple(cohort)
    draws = numpy_rng(mechanism.seed, "dropout", round_index).random(mechanism.num_clients)
    return tuple(k for k in cohort if draws[k] >= mechanism.dropout_prob)


def check_outcomes(outcomes: Sequence[Outcome], *, round_index: int) -> None:
    """Ends the round for a client that failed by itself.

    Errors: RuntimeError naming the round, the client and the reason.
    """
    for outcome in outcomes:
        if outcome.failure:
            error = RuntimeError(f"round {round_index}, client {outcome.client_id}: {outcome.failure}")
            error.add_note(outcome.trace)
            raise error
