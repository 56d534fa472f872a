"""FFA-LoRA: A stays as it was drawn, B is trained and averaged; Sun et al. (2024), arXiv 2403.12313.

The product is linear in B, so that the mean of the B is exact, and noise enters it once. Who has the run's seed has A, which never travels.
"""

from collections.abc import Mapping
from dataclasses import replace

from raysim.lora.factors import entries
from raysim.lora.layout import Layout, Vector
from raysim.lora.rule import Setting
from raysim.lora.rules import average


def trainable(layout: Layout, turn: int | None) -> frozenset[str]:
    """B."""
    return average.factor(layout, "B")


def sent(tensors: Mapping[str, Vector], rank: int, setting: Setting) -> dict[str, Vector]:
    """B."""
    return {"adapter": tensors["adapter"][entries(setting.layout, average.factor(setting.layout, "B"), rank)]}


RULE = replace(average.RULE, trainable=trainable, sent=sent)
