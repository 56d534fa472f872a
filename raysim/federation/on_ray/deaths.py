"""How often a process died at a call, so that what kills its process each time is given up, and not tried for ever.

Ray gives a call again to the process that stands in for a dead one, and does not say how often it has. So such a process notes with the server's
actor what it begins and what it ends: what was begun and has not ended was a death. A first process notes nothing: an undisturbed run pays nothing
for this, and the first death is not counted.
Left out: notes that a lost server takes with it. What they were about is then tried so often again.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raysim.imports import uncollected

with uncollected():
    import ray
    from ray.exceptions import RayError
    from torch import distributed

    from raysim.federation.worker import MOST_DEATHS

WHOLE = -1
"""What stands, where a client's number does, for a call as a whole."""
ANSWER_S = 60.0
"""How long the server may take to note something, before it is left."""


class Notes:
    """What one process has noted of its calls; `server` is the name of the actor that keeps it."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._stands_in = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        self._watch: CallWatch | None = None

    def watch(self, meet: Callable[[], None] = lambda: None) -> "CallWatch | None":
        """The watch over the call that this process is at; None for its first process. `meet` returns once every rank is there."""
        if not self._stands_in:
            return None
        call = call_number()
        known = self._asked("deaths", call) or {}
        self._watch = CallWatch(known, lambda done, client_ids: self._asked(f"note_{done}", call, client_ids), meet)
        return self._watch

    def blame(self, client_ids: Sequence[int], call: str) -> None:
        """Notes clients at whose work in a call this process is about to end, unless that is noted already."""
        noted = [] if self._watch is None else [WHOLE, *self._watch.at]
        self._asked("note_begin", call, [k for k in client_ids if k not in noted])

    def _asked(self, what: str, *arguments: Any) -> Any:
        with contextlib.suppress(RayError, ValueError):  # a server that is lost, or is no more
            server = ray.get_actor(self._server)
            methods = {"deaths": server.deaths, "note_begin": server.note_begin, "note_end": server.note_end}
            return ray.get(methods[what].remote(*arguments), timeout=ANSWER_S)
        return None


class CallWatch:
    """See `worker.Watch`: with the deaths that were known when the call came, and where to note what is begun and ended."""

    def __init__(self, deaths: Mapping[int, int], note: Callable[[str, Sequence[int]], Any], meet: Callable[[], None]) -> None:
        self.known = dict(deaths)
        self.at: Sequence[int] = ()
        """The clients that were begun last."""
        self.note, self._meet = note, meet

    def deaths(self, client_id: int) -> int:
        """See `worker.Watch`."""
        return self.known.get(client_id, 0)

    @contextlib.contextmanager
    def at_work(self, client_ids: Sequence[int]) -> Iterator[None]:
        """See `worker.Watch`; what was before has ended once every rank has come here, and none goes on before the new work is noted."""
        self._meet()
        self.note("end", self.at)
        self.note("begin", client_ids)
        self.at = client_ids
        self._meet()
        yield


@contextlib.contextmanager
def whole(watch: CallWatch | None, *, num_clients: int) -> Iterator[None]:
    """While open, a call of a process that stands in for a dead one is noted as a whole, so that it ends though no client's work is why.

    Errors: RuntimeError where more processes died at it than its clients explain.
    """
    if watch is None:
        yield
        return
    if watch.deaths(WHOLE) >= MOST_DEATHS * (num_clients + 1):
        raise RuntimeError(f"a client actor's process died {watch.deaths(WHOLE)} times at the same work; it may need more memory")
    watch.note("begin", [WHOLE])
    try:
        yield
    finally:
        watch.note("end", [WHOLE, *watch.at])


def met() -> None:
    """Returns once every rank of this process's group has come here; where one does not come, this process ends."""
    try:
        if distributed.is_initialized():
            distributed.barrier()
    except RuntimeError:
        os._exit(1)


def call_number() -> str:
    """The number of the call that this process is at, the same each time that it is given."""
    return str(ray.get_runtime_context().get_task_id())
