"""RoLoRA: B and A are trained in turn, the other stays; Chen et al. (2025), arXiv 2502.01755, algorithm 1.

Each round is linear in what it trains, so that every mean is exact. B comes first: while it is zero, A has no gradient. Clients are sent both
factors, since one that was not in the round before lacks what that moved.
"""

from collections.abc import Mapping
from dataclasses import replace

from raysim.lora.factors import entries
from raysim.lora.layout import Layout, Vector
from raysim.lora.rule import Setting
from raysim.lora.rules import average

TURN_OF_B, TURN_OF_A = 0, 1


def turn(tensors: Mapping[str, Vector], setting: Setting, round_index: int) -> int:
    """B's in rounds 0, 2, 4 and so on, and as long as B is zero, as where nobody came; else A's."""
    b = tensors["adapter"][entries(setting.layout, average.factor(setting.layout, "B"), setting.rank)]
    return TURN_OF_A if round_index % 2 and b.any() else TURN_OF_B


def trainable(layout: Layout, turn: int | None) -> frozenset[str]:
    """B or A."""
    if turn is None:
        return frozenset(layout.names)
    return average.factor(layout, "A" if turn == TURN_OF_A else "B")


RULE = replace(average.RULE, trainable=trainable, turn=turn)
