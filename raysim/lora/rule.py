"""What a rule for combining LoRA adapters is: pure functions over named tensors, and the one sensitivity that goes with them.

A rule is a file `lora/rules/NAME.py` with a constant `RULE`; `lora.aggregation` lists the names, and `spec` what the rest may know of it.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from raysim.lora.factors import entries, gathered, layers
from raysim.lora.layout import Layout, Upload, Vector

Kept = Mapping[str, NDArray[Any]]
"""What a rule has a client keep from one round, or trip, to the next: arrays by name."""


@dataclass(frozen=True)
class Setting:
    """The run whose adapters are combined."""

    layout: Layout
    alpha: float
    """LoRA alpha: an update of rank r is scaled by alpha / r."""
    seed: int
    energy: float = 0.0
    """Share of the squared singular values that FLoRIST keeps."""
    oversampling: int = 0
    """Columns of FedASK's sketch beyond the rank."""
    pruned_share: float = 0.0
    """Share of its rank that a pruning client of HetLoRA keeps."""

    @property
    def rank(self) -> int:
        """The rank of the server's adapter, which no client's exceeds."""
        return layers(self.layout)[0].rank

    @property
    def scale(self) -> float:
        """By what the server's product B A is scaled."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Trips:
    """A round in which clients are asked once more: what the server makes of the first sums, and what clients answer."""

    relay: Callable[[Upload, Setting], dict[str, Vector]]
    """What is sent to the clients of the round after their first trip, from the mean of what they sent."""
    answer: Callable[[Kept, Upload, Setting], dict[str, Vector]]
    """What a client sends then, from what it kept and what it was sent."""


@dataclass(frozen=True)
class LoraRule:
    """How adapters start, which part of them clients train, what they send, and what the server makes of it."""

    form: Literal["sum", "stack"]
    """`sum`: uploads are added where the clients are, and only sums travel. `stack`: the server needs every client's own."""
    start: Callable[[Layout, int], dict[str, Vector]]
    """The server's tensors before the first round, from a layout and the run's seed; `adapter` is one of them."""
    trainable: Callable[[Layout, int | None], frozenset[str]]
    """The names of the layout's tensors that clients train in a turn (None: in any); the others stay as they were sent."""
    upload: Callable[[Vector, Vector], dict[str, Vector]]
    """What a client sends, from the adapter that it has trained and the one that it was given; of its `adapter` the entries alone that travel."""
    merge: Callable[[Sequence[Upload], Sequence[float]], Vector]
    """The averaged update of the adapter: from every client's upload and weight (`stack`), or from the noised mean of all, as one of weight 1."""
    release: Callable[[Mapping[str, Vector]], dict[str, Vector]]
    """What is released, from the server's tensors: the `adapter`, and a `delta` of the base where there is one."""
    sensitivity: Callable[[float], float]
    """How far one client more or less moves the sum of uploads that are clipped to the given norm, in L2."""
    sent: Callable[[Mapping[str, Vector], int, Setting], dict[str, Vector]]
    """What a client of some rank must be sent of the server's tensors: all that it cannot draw from the seed."""
    turn: Callable[[Mapping[str, Vector], Setting, int], int] | None = None
    """Which turn a round is, from the server's tensors and the round's index; None where every round is alike."""
    sends: Callable[[Layout, int], frozenset[str]] | None = None
    """The names of the tensors of which something goes up in a turn; None for those that are trained."""
    given: Callable[[Mapping[str, Vector], Kept, int, Setting], Vector] | None = None
    """The adapter that a client of some rank starts from; None for the server's."""
    kept: Callable[[Vector, Vector, int, Setting], Kept] | None = None
    """What a client keeps, from the adapter that it has trained, the one that it was given, and its rank."""
    settle: Callable[[Mapping[str, Vector], Setting], dict[str, Vector]] | None = None
    """The server's tensors once an averaged update has been added: other factors of the same product."""
    combine: Callable[[Mapping[str, Vector], Sequence[Upload], Sequence[float], Setting, int], dict[str, Vector]] | None = None
    """The server's next tensors from its own (and what it relayed), uploads, weights, and the round's index, where it makes them anew."""
    trips: Trips | None = None
    """The second trip of a round, where it takes two."""
    sketch: Callable[[Vector, Setting, int], dict[str, Vector]] | None = None
    """What goes up in the first of two trips, in place of the entries of `upload`, from the trained adapter and the round's index."""
    scale: Callable[[Setting, int], float] = lambda setting, rank: setting.alpha / rank
    """By what a client of some rank scales its product B A."""
    sketch_size: Callable[[Setting], int] | None = None
    """How many numbers go up in the first of two trips."""
    between: bool = False
    """Whether an r x r factor stands between A and B."""

    def sent_names(self, layout: Layout, turn: int) -> frozenset[str]:
        """The names of the tensors of which something goes up in a turn."""
        return self.trainable(layout, turn) if self.sends is None else self.sends(layout, turn)

    def mask(self, setting: Setting, turn: int, *, rank: int | None = None) -> NDArray[np.bool_] | None:
        """Which entries of the flat adapter a client of some rank sends in a turn; None for all."""
        return entries(setting.layout, self.sent_names(setting.layout, turn), setting.rank if rank is None else rank)

    def message(self, trained: Vector, given: Vector, *, rank: int, setting: Setting, round_index: int, turn: int = 0) -> dict[str, Vector]:
        """All that a client sends of its adapter on the first trip of a round; with a rank of its own, that too."""
        if self.sketch is not None:
            return self.sketch(trained, setting, round_index)
        mask = self.mask(setting, turn, rank=rank)
        tensors = {name: np.asarray(gathered(tensor, mask)) for name, tensor in self.upload(trained, given).items()}
        return tensors | ({"rank": np.array([rank], dtype=np.float32)} if self.form == "stack" and self.combine is not None else {})


def frozen_throughout(rule: LoraRule, layout: Layout) -> NDArray[np.bool_] | None:
    """Which entries of the flat adapter no round trains, bool of shape (P,); None for none."""
    trained = entries(layout, rule.trainable(layout, None), layers(layout)[0].rank)
    return None if trained is None else ~trained


@cache
def lora_rule(name: str) -> LoraRule:
    """The rule that `lora.aggregation` names."""
    rule: LoraRule = importlib.import_module(f"raysim.lora.rules.{name}").RULE
    return rule
