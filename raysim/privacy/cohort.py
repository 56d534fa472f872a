"""A round, fixed before it begins: who was drawn, who stays, how updates are bounded, and what everybody is sent."""

from dataclasses import dataclass

from raysim.lora.layout import Upload


@dataclass(frozen=True)
class Round:
    """All that a round is, made once by the server and handed to whoever takes part, so that nothing about it is derived twice."""

    index: int
    cohort: tuple[int, ...]
    """The clients that were drawn, in ascending order."""
    survivors: tuple[int, ...]
    """Those of them that do not fail before they send anything."""
    clip_norm: float | None
    """The bound on an update's L2 norm; None where updates are not clipped."""
    broadcast: Upload
    """What the server sends to each client: the released `adapter`, and what else the method's server keeps (SCAFFOLD's `control`)."""
    turn: int = 0
    """Which kind of round this is to a LoRA rule whose rounds differ in what they train."""
    trip: int = 0
    """0 where clients train; 1 where a LoRA rule asks them once more."""
