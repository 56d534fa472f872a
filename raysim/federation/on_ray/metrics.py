"""What a run on Ray tells a monitor after each round: gauges that every node's metrics port shows, with the run's name as the tag `run`.

Told once a round is on disk, so that nothing waits for it. `grafana.json` draws them. Ray puts `ray_` before the names. Left out: what Ray itself
tells of nodes, actors and memory.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import ray
from ray.util.metrics import Gauge

Records = Sequence[Mapping[str, Any]]
REPEAT_S = 5.0
"""How often values are said again: Ray forgets a gauge that nobody set for two of its reports (20 s), and a round may take longer."""


def _clients_per_s(records: Records) -> float:
    """Clients whose updates count, per second in which the last round's clients were at work."""
    last = records[-1]
    return (len(last["cohort"]) - last["num_failed"]) / last["client_s"]


METRICS: dict[str, tuple[str, Callable[[Records], float | None]]] = {
    "raysim_round": ("Rounds that the run has finished", lambda records: records[-1]["round_index"] + 1),
    "raysim_clients_per_s": ("Clients of the last round whose updates count, per second", _clients_per_s),
    "raysim_tokens_per_s": ("Tokens trained on in the last round, per second", lambda records: records[-1]["tokens_per_s"]),
    "raysim_epsilon": ("Epsilon spent so far; no value where nothing is promised", lambda records: records[-1]["epsilon"]),
    "raysim_failed_clients": (
        "Clients so far that dropped out, came too late, failed or sent what is not finite",
        lambda records: sum(record["num_failed"] for record in records),
    ),
}
"""Each metric's description, and its value after these rounds of a run; None for no value."""


@contextlib.contextmanager
def monitored(run: str) -> Iterator[Callable[[Records], None]]:
    """Inside, what is returned tells a run's metrics after each round, and they stay until the next; nothing is told without a connection to Ray."""
    values: dict[str, float] = {}
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(REPEAT_S):
            _set(run, dict(values))

    def tell(records: Records) -> None:
        found = {name: value_of(records) for name, (_, value_of) in METRICS.items()}
        values.update({name: value for name, value in found.items() if value is not None})
        _set(run, values)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        is_over.set()
        thread.join()


def _set(run: str, values: Mapping[str, float]) -> None:
    for name, value in values.items() if ray.is_initialized() else ():
        _gauge(name).set(value, tags={"run": run})


@cache
def _gauge(name: str) -> Gauge:
    return Gauge(name, description=METRICS[name][0], tag_keys=("run",))
