"""Attention in bfloat16 on a processor, by plain matrix products where these are faster than PyTorch's fused kernel.

The fused kernel for processors is made for long texts. On texts as short as instructions and answers it takes several times what its
products take: in training most of that in the backward pass, in generation for every new token. Here the heads that share a key head
are rows of one product, scores are float32 as in the fused kernel, and the backward pass computes
them again, so that nothing of the size of the scores is kept. Figures in docs/performance.md.
Left out: float32, where the fused kernel is as fast, and other devices; both take transformers' own way, as do scores that leave the cache.

Shapes: B rows, H heads, K key heads of G = H / K heads each, T queries, C columns, D head size.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "raysim_short"
"""What transformers calls this attention by."""
MAX_SCORES = 300_000
"""Most scores at once, where there are several rows: what a core keeps near it."""
MAX_ROW = 400_000
"""Of a row with more scores the fused kernel is as fast."""
UNKNOWN = ("softcap", "position_bias", "cache", "s_aux", "output_attentions")
"""Arguments of the interface that change what attention is, and are left to transformers."""


def use_short_attention(model: PreTrainedModel, *, device: str) -> None:
    """Has a bfloat16 model on a processor attend by `attend`, if it goes through transformers' interface and would take PyTorch's kernel."""
    if device != "cpu" or model.dtype != torch.bfloat16 or not model._supports_attention_backend:
        return
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' `sdpa_attention_forward` gives, of shape BTHD, for queries BHTD and keys and values BKCD.

    Guarantees: equal to it but for roundings of bfloat16; no row's result depends on the other rows.
    """
    num_scores = query.shape[1] * query.shape[2] * key.shape[2]
    causal = is_causal if is_causal is not None else bool(vars(module).get("is_causal", True))
    ours = query.dtype == torch.bfloat16 and query.device.type == "cpu" and dropout == 0.0 and num_scores <= MAX_ROW
    grouped = key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0
    plain = all(not kwargs.get(name) if name == "output_attentions" else kwargs.get(name) is None for name in UNKNOWN)
    if not (ours and grouped and plain) or _is_odd(query, key, attention_mask, causal=causal):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    bias = _bias(query, key, attention_mask, causal=causal)
    with torch.autocast("cpu", enabled=False):  # which would round the scores
        out_BHTD: torch.Tensor = _Attention.apply(query, key, value, bias, scale)  # type: ignore[no-untyped-call]  # untyped in torch
    return out_BHTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _is_odd(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, *, causal: bool) -> bool:
    """Whether the mask is none that is added here: of several heads, or implied by queries that are not the columns."""
    if mask is not None:
        return mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != query.shape[2] or mask.shape[3] != key.shape[2]
    return causal and query.shape[2] not in (1, key.shape[2])


def _bias(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, *, causal: bool) -> torch.Tensor | None:
    """What is added to the scores: float32 of shape B11TC or 111TC, None for nothing."""
    if mask is None:
        if not causal or query.shape[2] == 1:
            return None
        return torch.full((query.shape[2], key.shape[2]), -torch.inf).triu_(1)[None, None, None]
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)[:, :, None]
    return mask.float()[:, :, None]


class _Attention(torch.autograd.Function):
    """Rows a few at a time, so that their scores stay in the cache; see `attend`. Its backward pass has no gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, bias)
        ctx.scale = scale
        parts = [
            torch.matmul(_weights(q, k, b, scale=scale).to(v.dtype), v).view_as(q_BHTD)
            for q, k, v, b, q_BHTD in _parts(query, key, value, bias, (query,))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, bias = ctx.saved_tensors
        grads: list[tuple[torch.Tensor, ...]] = []
        for q, k, v, b, q_BHTD, grad_BHTD in _parts(query, key, value, bias, (query, grad)):
            weights = _weights(q, k, b, scale=ctx.scale)
            grad_out = grad_BHTD.reshape(q.shape)
            grad_v = torch.matmul(weights.to(v.dtype).transpose(2, 3), grad_out)
            grad_weights = torch.matmul(grad_out, v.transpose(2, 3)).float()
            grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * ctx.scale
            grad_scores = grad_scores.to(q.dtype)
            grads.append((torch.matmul(grad_scores, k).view_as(q_BHTD), torch.matmul(grad_scores.transpose(2, 3), q), grad_v))
        return *(torch.cat(parts) for parts in zip(*grads, strict=True)), None, None


def _parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, beside: tuple[torch.Tensor, ...]
) -> list[tuple[Any, ...]]:
    """The rows in parts of at most MAX_SCORES scores: queries of shape (B, K, G T, D), keys and values BKCD, the bias, and `beside`."""
    num_rows, num_heads, num_queries, size = query.shape
    at_once = max(1, MAX_SCORES // (num_heads * num_queries * key.shape[2]))
    parts: list[tuple[Any, ...]] = []
    for first in range(0, num_rows, at_once):
        rows = slice(first, first + at_once)
        q_BKGTD = query[rows].reshape(-1, key.shape[1], num_heads // key.shape[1] * num_queries, size)
        own_bias = bias if bias is None or len(bias) == 1 else bias[rows]
        parts.append((q_BKGTD, key[rows], value[rows], own_bias, *(one[rows] for one in beside)))
    return parts


def _weights(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, *, scale: float) -> torch.Tensor:
    """The attention weights, float32 of shape (B, K, G T, C)."""
    scores = torch.matmul(query.float(), key.float().transpose(2, 3)).mul_(scale)
    if bias is not None:
        num_queries, num_columns = bias.shape[3:]
        scores.view(*scores.shape[:2], -1, num_queries, num_columns).add_(bias)
    return scores.softmax(-1)
