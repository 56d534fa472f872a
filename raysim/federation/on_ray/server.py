"""The server as an actor, whose process imports neither transformers nor PEFT: two seconds less, and half the memory."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from raysim.imports import uncollected

with uncollected():
    from raysim.federation.assignment import Assignment, LocalServer
    from raysim.federation.server import ServerState
    from raysim.privacy.cohort import Round


class Deaths:
    """What was begun and has not ended, by call and client."""

    def __init__(self) -> None:
        self._begun: dict[str, Counter[int]] = {}

    def begin(self, call: str, client_ids: Sequence[int]) -> None:
        """Notes that work is begun."""
        self._begun.setdefault(call, Counter()).update(client_ids)

    def end(self, call: str, client_ids: Sequence[int]) -> None:
        """Notes that it has ended, in whatever."""
        left = self._begun.pop(call, Counter())
        left.subtract(client_ids)
        if any(count > 0 for count in left.values()):
            self._begun[call] = left

    def counts(self, call: str) -> dict[int, int]:
        """How often a process died at the work of each client, and at the call as a whole."""
        return {client_id: count for client_id, count in self._begun.get(call, Counter()).items() if count > 0}


class ServerActor:
    """The server's transition in a process of its own. It keeps nothing that a result depends on: the state comes and goes with each call."""

    def __init__(self) -> None:
        self._deaths = Deaths()

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

    def deaths(self, call: str) -> dict[int, int]:
        """See `Deaths.counts`."""
        return self._deaths.counts(call)

    def note_begin(self, call: str, client_ids: Sequence[int]) -> None:
        """See `Deaths.begin`."""
        self._deaths.begin(call, client_ids)

    def note_end(self, call: str, client_ids: Sequence[int]) -> None:
        """See `Deaths.end`."""
        self._deaths.end(call, client_ids)

    def pid(self) -> int:
        """This actor's process id."""
        return os.getpid()
