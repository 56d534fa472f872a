"""FedSA-LoRA: A is averaged, B stays with its client; Guo et al. (2025), arXiv 2410.01463.

There is no adapter of all: a client's is the shared A with its own B, and those are what is measured and written. A client that never came has a
B of zero. Left out: a classifier's head, which the paper keeps with the client as well.
"""

from collections.abc import Mapping
from dataclasses import replace

from raysim.lora.factors import entries, gathered, spread
from raysim.lora.layout import Layout, Vector
from raysim.lora.rule import Kept, Setting
from raysim.lora.rules import average

OWN = "own_B"
"""The array in which a client keeps its B."""


def sends(layout: Layout, turn: int) -> frozenset[str]:
    """A."""
    return average.factor(layout, "A")


def given(tensors: Mapping[str, Vector], kept: Kept, rank: int, setting: Setting) -> Vector:
    """The shared A with the client's own B."""
    if OWN not in kept:
        return tensors["adapter"]
    return spread(kept[OWN], entries(setting.layout, average.factor(setting.layout, "B"), rank), over=tensors["adapter"])


def kept(trained: Vector, before: Vector, rank: int, setting: Setting) -> Kept:
    """Its B."""
    return {OWN: gathered(trained, entries(setting.layout, average.factor(setting.layout, "B"), rank))}


def sent(tensors: Mapping[str, Vector], rank: int, setting: Setting) -> dict[str, Vector]:
    """A."""
    return {"adapter": tensors["adapter"][entries(setting.layout, average.factor(setting.layout, "A"), rank)]}


RULE = replace(average.RULE, sends=sends, given=given, kept=kept, sent=sent)
