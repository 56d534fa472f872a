"""HetLoRA's penalty on the last directions of an adapter; Cho et al. (2024), arXiv 2401.06432, section 3.2."""

import torch

from raysim.lora.factors import layers
from raysim.lora.layout import Layout


def tail_start(rank: int, *, pruned_share: float) -> int:
    """Where the directions begin that a client of some rank might do without: none of a rank of 1."""
    return int(pruned_share * rank)


def tail_gradient(flat: torch.Tensor, layout: Layout, *, start: int) -> torch.Tensor:
    """The gradient of the sum over layers of ||B[:, start:]|| ||A[start:]||, of shape (P,); zero where a norm is."""
    gradient = torch.zeros_like(flat)
    for layer in layers(layout):
        a, b = (flat[slice(*span)] for span in (layer.a, layer.b))
        tail_a, tail_b = a.view(layer.rank, -1)[start:], b.view(-1, layer.rank)[:, start:]
        norm_a, norm_b = tail_a.norm(), tail_b.norm()
        if norm_a > 0 and norm_b > 0:
            gradient[slice(*layer.a)].view(layer.rank, -1)[start:] = norm_b / norm_a * tail_a
            gradient[slice(*layer.b)].view(-1, layer.rank)[:, start:] = norm_a / norm_b * tail_b
    return gradient
