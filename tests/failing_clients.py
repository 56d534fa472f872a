"""Clients whose data make their work fail: by an error, for want of memory, or by the end of the process that does it."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from raysim.data.tokens import Example
from raysim.federation.assignment import Assignment
from raysim.federation.loop import Clients
from raysim.federation.setup import Experiment
from raysim.runs.run import Backend

FAILS = 2
"""The client that does."""


@dataclasses.dataclass
class Failing(Backend):
    """A backend of which one client's data make its work fail, as the function `spoil` has it."""

    spoil: Callable[[Experiment], Experiment]

    def clients(self, assignment: Assignment, experiment: Experiment) -> Clients:
        """The clients of a run."""
        return super().clients(assignment, self.spoil(experiment))


@dataclasses.dataclass(frozen=True)
class Deadly(Example):
    """An example that ends each process but one in which its tokens are read."""

    home: int = 0
    """The process that may."""

    def __getattribute__(self, name: str) -> Any:
        """An attribute, if the process is still there."""
        if name == "response_ids" and os.getpid() != object.__getattribute__(self, "home"):
            os._exit(1)
        return object.__getattribute__(self, name)


@dataclasses.dataclass(frozen=True)
class FailsAtOneRank(Example):
    """An example whose tokens the second rank of a group never can read."""

    def __getattribute__(self, name: str) -> Any:
        """An attribute, but at that rank for the tokens."""
        if name == "response_ids" and os.environ.get("RANK") == "1":
            raise ValueError("this rank has no tokens")
        return object.__getattribute__(self, name)


@dataclasses.dataclass(frozen=True)
class Hungry(Example):
    """An example that never finds room for its tokens."""

    def __getattribute__(self, name: str) -> Any:
        """An attribute, but for the tokens."""
        if name == "response_ids":
            raise MemoryError("no room for a client's tokens")
        return object.__getattribute__(self, name)


def broken(experiment: Experiment) -> Experiment:
    """The experiment with a token in the client's shard that the model does not know."""
    return _with(experiment, dataclasses.replace(experiment.shards[FAILS][0], response_ids=(10**6,)))


def deadly(experiment: Experiment) -> Experiment:
    """The experiment with a client whose work ends every process but this one."""
    example = experiment.shards[FAILS][0]
    return _with(experiment, Deadly(example.record, example.prompt_ids, example.response_ids, home=os.getpid()))


def failing_at_one_rank(experiment: Experiment) -> Experiment:
    """The experiment with a client at whose work the second rank of a group fails."""
    example = experiment.shards[FAILS][0]
    return _with(experiment, FailsAtOneRank(example.record, example.prompt_ids, example.response_ids))


def _with(experiment: Experiment, example: Example) -> Experiment:
    shards = [(example,) if k == FAILS else shard for k, shard in enumerate(experiment.shards)]
    return dataclasses.replace(experiment, shards=tuple(shards))
