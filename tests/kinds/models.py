"""Tiny models with random weights of many architectures, in the shapes in which checkpoints come: folders that transformers writes and reads."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raysim.model.base_model import _byte_tokenizer

VOCABULARY = 261
"""Tokens of the byte tokenizer."""
WINDOW = 16
"""Shorter than the texts of the tests, so that a local layer does not see them whole."""


@dataclass(frozen=True)
class Kind:
    """An architecture: the name under which transformers knows it, its settings, and what an adapter may be put on."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("all-linear",)
    is_private: bool = True
    """Whether private training can adapt these layers; it is refused otherwise."""
    is_fast: bool = True
    """Whether answers are written by our own loop, and not by transformers'."""


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MHA = LLAMA | {"num_key_value_heads": 4}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}

MIXTRAL = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}

KINDS: dict[str, Kind] = {
    "llama": Kind("llama", LLAMA),
    "llama-tied": Kind("llama", LLAMA | {"tie_word_embeddings": True}),
    "llama-lm_head": Kind("llama", LLAMA, targets=("q_proj", "lm_head")),
    "llama-tied-lm_head": Kind("llama", LLAMA | {"tie_word_embeddings": True}, targets=("q_proj", "lm_head")),
    "mistral-long-window": Kind("mistral", LLAMA | {"sliding_window": 400}),
    "mistral-short-window": Kind("mistral", LLAMA | {"sliding_window": WINDOW}, is_fast=False),
    "qwen2": Kind("qwen2", LLAMA),
    "qwen2-window": Kind("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, is_fast=False),
    "qwen3": Kind("qwen3", LLAMA | {"head_dim": 8}),
    "qwen2_moe": Kind("qwen2_moe", LLAMA | EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": Kind("qwen3_moe", LLAMA | EXPERTS | {"head_dim": 8}, is_private=False),
    "qwen3_moe-attention": Kind("qwen3_moe", LLAMA | EXPERTS | {"head_dim": 8}, targets=("q_proj", "o_proj")),
    "mixtral": Kind("mixtral", MIXTRAL, is_private=False),
    "mixtral-attention": Kind("mixtral", MIXTRAL, targets=("q_proj", "v_proj")),
    "olmo2": Kind("olmo2", LLAMA),
    "gemma": Kind("gemma", LLAMA | {"head_dim": 8}),
    "gemma2": Kind("gemma2", LLAMA | {"head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 3.0}, is_fast=False),
    "gemma2-long-window": Kind("gemma2", LLAMA | {"head_dim": 8, "sliding_window": 400, "final_logit_softcapping": 3.0}),
    "gemma3_text": Kind("gemma3_text", LLAMA | {"head_dim": 8, "sliding_window": WINDOW}, is_fast=False),
    "granite": Kind(
        "granite",
        LLAMA | {"logits_scaling": 8.0, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.0156},
    ),
    "granitemoe": Kind("granitemoe", LLAMA | {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": Kind("cohere", LLAMA | {"logit_scale": 0.0625}),
    "nemotron": Kind("nemotron", LLAMA | {"head_dim": 8}),
    "glm": Kind("glm", LLAMA | {"head_dim": 8, "pad_token_id": 0}),
    "phi": Kind("phi", MHA),
    "phi3": Kind("phi3", LLAMA | {"pad_token_id": 0, "sliding_window": None}),
    "phi3-window": Kind("phi3", LLAMA | {"pad_token_id": 0, "sliding_window": WINDOW}, is_fast=False),
    "starcoder2": Kind("starcoder2", LLAMA | {"sliding_window": None}),
    "stablelm": Kind("stablelm", LLAMA, is_fast=False),
    "gpt_neox": Kind("gpt_neox", MHA | {"rotary_pct": 0.25}),
    "gpt2": Kind("gpt2", GPT),
    "gpt2-c_attn": Kind("gpt2", GPT, targets=("c_attn",)),
    "gptj": Kind("gptj", GPT | {"rotary_dim": 4}, is_fast=False),
    "codegen": Kind("codegen", GPT | {"rotary_dim": 4}, is_fast=False),
    "gpt_neo": Kind(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 512,
        },
        is_fast=False,
    ),
    "opt": Kind(
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 512,
        },
    ),
    "falcon": Kind("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True}, is_fast=False),
    "falcon-alibi": Kind(
        "falcon",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": False, "alibi": True},
        is_fast=False,
    ),
    "bloom": Kind("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, is_fast=False),
    "mpt": Kind("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 2}, is_fast=False),
    "biogpt": Kind(
        "biogpt",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
        is_fast=False,
    ),
    "mamba": Kind("mamba", {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}, targets=("in_proj", "x_proj"), is_fast=False),
}


def build(kind: Kind) -> PreTrainedModel:
    """A model of the kind with random weights, the same at every call, whose choices are clear and whose biases are not zero."""
    config = AutoConfig.for_model(
        kind.model_type, **({"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0} | kind.settings)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif "norm" not in name:
                    parameter.normal_(0.0, 0.25)
    return model


def save(folder: Path, model: PreTrainedModel, **settings: Any) -> Path:
    """The folder of the model and a byte tokenizer, as transformers writes it."""
    model.save_pretrained(folder, **settings)
    _byte_tokenizer().save_pretrained(folder)
    return folder
