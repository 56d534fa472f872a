"""FedEx-LoRA: A and B averaged, and what that loses added to the base model; Singhal et al. (2025), arXiv 2410.09432, equations 5 to 7.

The residual is (alpha / r) (mean of B_k A_k - mean B mean A), outputs by inputs as the product is, whichever way the base keeps its weight.
It is kept beside the base as a full-weight `delta`, which travels with the means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from raysim.lora.factors import deltas, on_one_thread, pairs
from raysim.lora.layout import Upload, Vector
from raysim.lora.rule import Setting
from raysim.lora.rules import average, flora


@on_one_thread
def combine(
    tensors: Mapping[str, Vector], uploads: Sequence[Upload], weights: Sequence[float], setting: Setting, round_index: int
) -> dict[str, Vector]:
    """The means of the factors, and the residual added to the delta."""
    adapter, delta = average.merge(uploads, weights), tensors["delta"].copy()
    means = pairs(adapter, setting.layout)
    for base, (left, right), (b, a) in zip(deltas(delta, setting.layout), flora.stacks(uploads, weights, setting), means, strict=True):
        base += np.concatenate([left, -setting.scale * b], axis=1) @ np.concatenate([right, a])
    return {"adapter": adapter, "delta": delta}


def sent(tensors: Mapping[str, Vector], rank: int, setting: Setting) -> dict[str, Vector]:
    """The means and the delta."""
    return flora.release(tensors)


RULE = replace(flora.RULE, given=None, combine=combine, sent=sent)
