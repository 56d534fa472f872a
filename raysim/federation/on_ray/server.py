"""The server as an actor, whose process imports neither transformers nor PEFT: two seconds less, and half the memory."""

import os
from typing import Any

from raysim.imports import uncollected

with uncollected():
    from raysim.federation.assignment import Assignment, LocalServer
    from raysim.federation.server import ServerState
    from raysim.privacy.cohort import Round


class ServerActor:
    """The server's transition in a process of its own. It keeps nothing: the state comes and goes with each call."""

    def step(
        self, assignment: Assignment, state: ServerState, round: Round, num_late: int, *parts: Any
    ) -> tuple[ServerState, dict[str, Any]]:
        """See `LocalServer.step`; the last `num_late` of the parts are those that came late."""
        in_time, late = parts[: len(parts) - num_late], parts[len(parts) - num_late :]
        sent, too_late = ([part for part in some if part is not None] for some in (in_time, late))
        return LocalServer(assignment).step(state, round, sent, too_late)

    def relay(self, assignment: Assignment, round: Round, *parts: Any) -> Round:
        """See `LocalServer.relay`."""
        return LocalServer(assignment).relay(round, [part for part in parts if part is not None])

    def pid(self) -> int:
        """This actor's process id."""
        return os.getpid()
