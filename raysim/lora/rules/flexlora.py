"""FlexLoRA: singular values of the mean product; Bai et al. (2024), arXiv 2402.11505, section 3.2.

The weighted mean of (alpha / r_k) B_k A_k, never formed where it is wider than the stacks, is cut to the rank of the server's adapter, and a
client of rank q is sent its first q directions: B = U S / (alpha / q), A = V^T. What the cut loses is the least that any of that rank can lose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from raysim.lora.factors import entries, leading, on_one_thread, refactored
from raysim.lora.layout import Upload, Vector
from raysim.lora.rule import Setting
from raysim.lora.rules import average, flora
from raysim.rng import seed_for


@on_one_thread
def combine(
    tensors: Mapping[str, Vector], uploads: Sequence[Upload], weights: Sequence[float], setting: Setting, round_index: int
) -> dict[str, Vector]:
    """U S / (alpha / r) and V^T of each layer's mean product, cut to rank r."""
    found = []
    for left, right in flora.stacks(uploads, weights, setting):
        u, values, vt, _ = leading(left, right, rank=setting.rank)
        found.append((u * values / setting.scale, vt))
    return {"adapter": refactored(found, setting.layout, seed=seed_for(setting.seed, "fresh adapter", round_index + 1))}


def sent(tensors: Mapping[str, Vector], rank: int, setting: Setting) -> dict[str, Vector]:
    """The client's own directions of both factors."""
    mask = entries(setting.layout, frozenset(setting.layout.names), rank)
    return {"adapter": tensors["adapter"] if mask is None else tensors["adapter"][mask]}


RULE = replace(flora.RULE, start=average.start, combine=combine, release=average.release, sent=sent)
