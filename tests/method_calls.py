"""Client calls for the tests of methods: a small configuration, its mechanism, and a shard."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from raysim.config import load
from raysim.data.records import Record
from raysim.lora.layout import Vector
from raysim.methods.call import ClientCall, ClientResult, Method
from raysim.model.language_model import LanguageModel
from raysim.privacy.mechanism import Mechanism
from tests.conftest import SMALL
from tests.rounds import make_round
from tests.tiny_models import encode

RECORDS = [
    Record(record_id=i, instruction=f"Question {i} of many, with {i * i} words?", response=f"The answer is {i * 37} or {'no ' * i}then")
    for i in range(6)
]


def some_adapter(lm: LanguageModel, *, seed: int = 0) -> Vector:
    """An adapter in which B is not zero."""
    return (0.1 * np.random.default_rng(seed).standard_normal(lm.layout.num_parameters)).astype(np.float32)


def make_call(
    lm: LanguageModel, *overrides: str, records: Sequence[Record] = tuple(RECORDS), client_id: int = 0, public: Sequence[Record] = ()
) -> ClientCall:
    """A call in round 0 to a client with these records, one of three clients of that size, and with these public records."""
    config = load("", [*SMALL, *overrides])
    mechanism = Mechanism.from_config(config, shard_sizes=[max(1, len(records))] * 3)
    adapter = some_adapter(lm)
    further = {"control": np.zeros_like(adapter)} if config.method.name == "scaffold" else {}
    return ClientCall(
        config=config,
        mechanism=mechanism,
        round=make_round(mechanism, {"adapter": adapter} | further),
        client_id=client_id,
        adapter=adapter,
        shard=tuple(encode(lm, records)),
        state=None,
        public=tuple(encode(lm, public)),
    )


def in_round(call: ClientCall, index: int) -> ClientCall:
    """The same call in another round."""
    return replace(call, round=replace(call.round, index=index))


def alone(method: Method) -> Callable[[LanguageModel, ClientCall], ClientResult]:
    """What the method does for a group of one client."""

    def one(lm: LanguageModel, call: ClientCall) -> ClientResult:
        [result] = method(lm, [call])
        return result

    return one


def other_responses(records: Sequence[Record]) -> list[Record]:
    """The same questions with other answers."""
    return [replace(record, response=f"Quite another reply, number {record.record_id}") for record in records]
