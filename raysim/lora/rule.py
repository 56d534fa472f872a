"""What a rule for combining LoRA adapters is: pure functions over named tensors, and the one sensitivity that goes with them.

A rule is a file `lora/rules/NAME.py` with a constant `RULE`; `lora.aggregation` lists the names.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from raysim.lora.layout import Layout, Upload, Vector


@dataclass(frozen=True)
class LoraRule:
    """How adapters start, which part of them clients train, what they send, and what the server makes of it."""

    form: Literal["sum", "stack"]
    """`sum`: uploads are added where the clients are, and only sums travel. `stack`: the server needs every client's own."""
    start: Callable[[Layout, int], dict[str, Vector]]
    """The server's tensors before the first round, from a layout and the run's seed; `adapter` is one of them."""
    trainable: Callable[[Layout], frozenset[str]]
    """The names of the layout's tensors that clients train; the others stay as they were sent."""
    upload: Callable[[Vector, Vector], dict[str, Vector]]
    """What a client sends, from the adapter that it has trained and the one that it was given."""
    merge: Callable[[Sequence[Upload], Sequence[float]], Vector]
    """The averaged update of the adapter: from every client's upload and weight (`stack`), or from the noised mean of all, as one of weight 1."""
    release: Callable[[Mapping[str, Vector]], Vector]
    """The adapter that is released, from the server's tensors."""
    sensitivity: Callable[[float], float]
    """How far one client more or less moves the sum of uploads that are clipped to the given norm, in L2."""


@cache
def lora_rule(name: str) -> LoraRule:
    """The rule that `lora.aggregation` names."""
    rule: LoraRule = importlib.import_module(f"raysim.lora.rules.{name}").RULE
    return rule
