"""Rounds and server states for the tests of what happens in a round: nobody drops out unless a test says so."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raysim.federation.server import ServerState, begin, step
from raysim.lora.layout import Upload, Vector
from raysim.privacy.aggregation import Part
from raysim.privacy.cohort import Round
from raysim.privacy.mechanism import Mechanism


def make_round(mechanism: Mechanism, broadcast: Upload | None = None, *, index: int = 0, clip_norm: float | None = None) -> Round:
    """A round of the mechanism's cohort, its bound that of the mechanism unless one is given."""
    cohort = mechanism.sample_cohort(index)
    bound = mechanism.update_clip_norm if clip_norm is None else clip_norm
    return Round(index, cohort, cohort, bound, broadcast or {"adapter": np.zeros(1, dtype=np.float32)})


def state_of(
    round_index: int, adapter: Vector, clip_norm: float | None = None, memory: Mapping[str, Any] | None = None, **further: Any
) -> ServerState:
    """The server's state with this adapter, and with `further` tensors beside it."""
    return ServerState(round_index, {"adapter": adapter, **further}, clip_norm, memory or {})


def next_step(state: ServerState, parts: Sequence[Part], *, mechanism: Mechanism, **settings: Any) -> tuple[ServerState, dict[str, Any]]:
    """`server.step` of the state's next round."""
    return step(state, begin(state, mechanism), parts, mechanism=mechanism, **settings)
