"""A round, fixed before it begins: who was drawn, who stays, how updates are bounded, and what everybody is sent."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from raysim.lora.layout import Upload


@dataclass(frozen=True)
class Round:
    """All that a round is, made once by the server and handed to whoever takes part, so that nothing about it is derived twice."""

    index: int
    cohort: tuple[int, ...]
    """The clients that were drawn, in ascending order."""
    survivors: tuple[int, ...]
    """Those of them whose updates count in this round, unless their work fails."""
    clip_norm: float | None
    """The bound on an update's L2 norm; None where updates are not clipped."""
    broadcast: Upload
    """What the server sends to each client: the released `adapter`, and what else the method's server keeps (SCAFFOLD's `control`)."""
    late: tuple[int, ...] = ()
    """Those who send after the deadline, and count in the next round."""
    absent: Mapping[int, str] = field(default_factory=dict)
    """Of all others why they do not count, by client."""
    simulated_s: float = 0.0
    """Seconds of simulated time that the server waits."""
    turn: int = 0
    """Which kind of round this is to a LoRA rule whose rounds differ in what they train."""
    trip: int = 0
    """0 where clients train; 1 where a LoRA rule asks them once more."""
