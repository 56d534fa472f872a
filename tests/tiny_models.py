"""Small real Llamas whose behaviour is known beforehand: one that spells given texts, one that can learn texts by heart."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from transformers import LlamaConfig

from raysim.data.chat import ChatFormat
from raysim.data.records import Record
from raysim.data.tokens import Example, encode_records
from raysim.lora.layout import Vector, initial_adapter
from raysim.model.base_model import BaseModel, load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainSettings, train_adapter

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama_config(*, hidden_size: int, num_layers: int, num_heads: int) -> LlamaConfig:
    """Of a Llama that has the tiny model's tokens, its inner layer about three times as wide."""
    return LlamaConfig(
        vocab_size=261,
        hidden_size=hidden_size,
        intermediate_size=11 * hidden_size // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def build(base: BaseModel, *, rank: int = 4) -> LanguageModel:
    """The base with an adapter on every linear layer, so that there is much to train."""
    return build_language_model(base, rank=rank, alpha=2.0 * rank, dropout=0.0, target_modules=ALL_LINEAR)


def sharp_base(*, seed: int = 0) -> BaseModel:
    """The tiny model with an output layer of its own and unit scale: its choices are clear, and an adapter can turn them."""
    base = load_base_model("tiny")
    head = np.random.default_rng(seed).standard_normal(base.tensors["model.embed_tokens.weight"].shape).astype(np.float32)
    return replace(base, tensors=base.tensors | {"lm_head.weight": head}, config=base.config | {"tie_word_embeddings": False})


def spelling_base(*chains: Sequence[str]) -> BaseModel:
    """A model that follows every token of a chain by the next one, whatever stood before (no layer adds to the embedding).

    No token may occur twice in all chains but as the last of one.
    """
    base = sharp_base()
    vocabulary = build(base).tokenizer.get_vocab()
    rng = np.random.default_rng(0)
    embedding = rng.choice([-1.0, 1.0], size=base.tensors["model.embed_tokens.weight"].shape).astype(np.float32)
    head = np.zeros_like(embedding)
    followed: set[str] = set()
    for chain in chains:
        for token, successor in pairwise(chain):
            assert token not in followed, f"{token!r} occurs twice"
            followed.add(token)
            head[vocabulary[successor]] += embedding[vocabulary[token]]
    silent = {name: np.zeros_like(t) for name, t in base.tensors.items() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    return replace(base, tensors=base.tensors | silent | {"model.embed_tokens.weight": embedding, "lm_head.weight": head})


def encode(lm: LanguageModel, records: Sequence[Record]) -> list[Example]:
    """The records as examples, none of them cut."""
    examples, num_cut = encode_records(records, tokenizer=lm.tokenizer, eos_token_id=1, max_length=2000, chat=ChatFormat())
    assert num_cut == 0
    return examples


def learn_by_heart(lm: LanguageModel, examples: Sequence[Example]) -> Vector:
    """An adapter trained on the examples until they are known."""
    settings = TrainSettings(
        num_epochs=250, max_steps=0, batch_size=8, lr=0.01, optimizer="adamw", weight_decay=0.0, max_grad_norm=1.0, prox_mu=0.0
    )
    adapter, stats = train_adapter(lm, initial_adapter(lm.layout, seed=0), examples, settings=settings, seed=0)
    assert stats.loss is not None
    return adapter
