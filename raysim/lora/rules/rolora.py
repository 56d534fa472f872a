"""RoLoRA: B and A are trained in turn, the other stays; Chen et al. (2025), arXiv 2502.01755, algorithm 1.

Each round is linear in what it trains, so that every mean is exact. B comes first: while it is zero, A has no gradient. Clients are sent both
factors, since one that was not in the round before lacks what that moved.
"""

from dataclasses import replace

from raysim.lora.layout import Layout
from raysim.lora.rules import average


def trainable(layout: Layout, round_index: int | None) -> frozenset[str]:
    """B in rounds 0, 2, 4 and so on, A in the others."""
    if round_index is None:
        return frozenset(layout.names)
    return average.factor(layout, "A" if round_index % 2 else "B")


RULE = replace(average.RULE, trainable=trainable)
