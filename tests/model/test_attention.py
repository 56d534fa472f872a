"""Attention in bfloat16 by plain products: against PyTorch's fused kernel in float32, no further from it than the kernel's own bfloat16."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from raysim.model import attention
from raysim.model.attention import NAME, attend, use_short_attention

Tensors = tuple[torch.Tensor, ...]


class Heads(torch.nn.Module):
    """A layer with three query heads behind each key head."""

    num_key_value_groups = 3
    is_causal = True


def inputs(num_rows: int, num_queries: int, num_columns: int) -> Tensors:
    """Queries of nine heads, keys and values of three, as a projection lays them out."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((num_queries, 9), (num_columns, 3), (num_columns, 3))
    return tuple(torch.randn(num_rows, length, heads, 64, generator=generator).transpose(1, 2).bfloat16() * 2 for length, heads in sizes)


def by_definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v in the type of its arguments, of shape BTHD."""
    keys, values = (one.repeat_interleave(3, dim=1) for one in (key, value))
    scores = (query @ keys.transpose(2, 3) / 8).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


def with_gradients(function: object, tensors: Tensors) -> Tensors:
    leaves = [one.detach().clone().requires_grad_() for one in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=tensors[0].dtype == torch.bfloat16):
        out = function(*leaves)  # type: ignore[operator]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)).sum().backward()
    return (out.detach(), *(leaf.grad for leaf in leaves))  # type: ignore[arg-type]


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


@pytest.mark.parametrize(("num_rows", "length"), [(3, 40), (5, 100), (2, 170)])
def test_a_causal_pass_and_its_gradients_are_as_near_as_the_kernels(num_rows: int, length: int) -> None:
    tensors = inputs(num_rows, length, length)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    right = with_gradients(lambda *t: by_definition(*t, allowed), tuple(one.double() for one in tensors))
    found = with_gradients(lambda *t: attend(Heads(), *t, None)[0], tensors)
    kernel = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2), tensors
    )
    for one, other, truth in zip(found, kernel, right, strict=True):
        assert error(one, truth) < max(0.003, error(other, truth)), (error(one, truth), error(other, truth))


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize(("num_queries", "bound"), [(1, 0.004), (2, 0.004), (30, 0.004)])
def test_masked_columns_are_not_seen(num_queries: int, bound: float, kind: str) -> None:
    tensors = inputs(4, num_queries, 90)
    allowed = torch.rand(4, 1, num_queries, 90, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed[..., 0] = True
    mask = allowed if kind == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.bfloat16).min).bfloat16()
    found = attend(Heads(), *tensors, mask)[0]
    assert error(found, by_definition(*(one.double() for one in tensors), allowed)) < bound
    query, key, value = tensors
    key, value = (torch.where(allowed.any(2)[:, 0, None, :, None], one, 1e4) for one in (key, value))
    assert torch.equal(attend(Heads(), query, key.bfloat16(), value.bfloat16(), mask)[0], found) or num_queries > 1


def test_a_row_has_the_same_bits_alone_and_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(7, 60, 60)
    together = with_gradients(lambda *t: attend(Heads(), *t, None)[0], tensors)
    monkeypatch.setattr(attention, "MAX_SCORES", 1)
    for one, other in zip(with_gradients(lambda *t: attend(Heads(), *t, None)[0], tensors), together, strict=True):
        assert torch.equal(one, other)


def test_what_it_does_not_know_goes_transformers_own_way() -> None:
    query, key, value = inputs(2, 20, 20)
    with pytest.raises(ValueError, match="softcap"):
        attend(Heads(), query, key, value, None, softcap=30.0)
    bias = torch.randn(1, 9, 20, 20).bfloat16()
    kernel = F.scaled_dot_product_attention(
        *(query, key.repeat_interleave(3, dim=1), value.repeat_interleave(3, dim=1)),
        attn_mask=torch.where(torch.ones(20, 20, dtype=torch.bool).tril(), bias, torch.finfo(torch.bfloat16).min),
    )
    assert torch.equal(attend(Heads(), query, key, value, None, position_bias=bias)[0], kernel.transpose(1, 2))


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig])
def test_a_bfloat16_model_uses_it_and_a_float32_one_does_not(config: type) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    own = config(**sizes, num_key_value_heads=2, **({"sliding_window": 8} if config is MistralConfig else {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(own, dtype=torch.float32).eval()
    use_short_attention(model, device="cpu")
    assert model.config._attn_implementation == "sdpa"
    ids = torch.arange(60).view(2, 30)
    right = model(input_ids=ids).logits
    short = model.bfloat16()
    use_short_attention(short, device="cpu")
    assert short.config._attn_implementation == NAME
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for found in (short(input_ids=ids).logits, short(input_ids=ids, attention_mask=mask).logits):
        assert error(found[1], right[1]) < 0.02
