"""A base model as plain data, numpy arrays and bytes, so that it crosses process borders without a copy.

Left out: one copy of the weights per GPU that processes share.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from raysim.model.find import find_model, named_line, quiet_transformers
from raysim.rng import seed_for

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


TINY_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class BaseModel:
    """A base model as data: `tensors` by name (bfloat16 stored as its uint16 bits), the model's config, the tokenizer's files."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    dtype: str
    tokenizer_files: dict[str, bytes]
    stop_token_ids: tuple[int, ...] = ()
    """End tokens that stand in the model's generation settings, beside those of `config`."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the base model."""
        return sum(tensor.size for tensor in self.tensors.values())


def resolve_dtype(name: str, *, on_gpu: bool) -> str:
    """`auto` as `bfloat16` where the processor has bfloat16 arithmetic, else `float32`; other names unchanged."""
    if name != "auto":
        return name
    has_bfloat16 = on_gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_bfloat16 else "float32"


def load_base_model(name: str, *, dtype: str = "float32", cache_dir: str = "") -> BaseModel:
    """The base model called `name`, its weights in `dtype` (`float32` or `bfloat16`).

    `name` is `tiny`, a packaged model, `package:DIST`, a local folder, a .gguf file, or a Hub id; GGUF files are converted
    to safetensors once, under `cache_dir`.

    Errors: ValueError that says what was looked for and the remedy.
    """
    if name == "tiny":
        return _tiny_base_model(dtype=dtype)
    folder = Path(find_model(name, cache_dir=cache_dir))
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, trust_remote_code=False, dtype=DTYPES[dtype], output_loading_info=True
            )
    except Exception as error:  # transformers raises many kinds for a folder that is not whole
        raise ValueError(f"model.name={name!r}: no causal language model can be read from {folder} ({named_line(error)})") from error
    model, found = loaded
    if found["missing_keys"]:  # transformers would draw them at random
        raise ValueError(f"model.name={name!r}: {folder} lacks weights of the model, such as {min(found['missing_keys'])}")
    if found["unexpected_keys"]:
        num, first = len(found["unexpected_keys"]), min(found["unexpected_keys"])
        logger.warning("model.name=%s: %d tensors of the folder are no part of the model and are left out, such as %s", name, num, first)
    stop = () if model.generation_config is None else token_ids(model.generation_config.eos_token_id)
    return _pack(name, config=model.config.to_dict(), state=model.state_dict(), dtype=dtype, tokenizer=tokenizer, stop_token_ids=stop)


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """End tokens as a configuration gives them: one, several, or none."""
    return tuple(value) if isinstance(value, list) else () if value is None else (int(value),)


def _tiny_base_model(*, dtype: str) -> BaseModel:
    """A random two-layer Llama over bytes, the same on every machine, for unit tests."""
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(0, "tiny"))  # transformers initialises from the default generator
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]  # transformers has no type here
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    return _pack("tiny", config=config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, state=state, dtype=dtype, tokenizer=tokenizer)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers has no type here
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=specials[2:]
    )
    fast.chat_template = TINY_TEMPLATE
    return fast


def _pack(
    name: str, *, config: dict[str, Any], state: dict[str, torch.Tensor], dtype: str, tokenizer: Any, stop_token_ids: tuple[int, ...] = ()
) -> BaseModel:
    tensors: dict[str, np.ndarray] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for key, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place in seen and tensor.numel():  # tied to one that is here already, as it will be in the model
            continue
        seen.add(place)
        # Whole numbers and flags, such as a mask that is stored with the weights, are no weights and stay what they are.
        kept = tensor.detach().to(DTYPES[dtype]).contiguous() if tensor.is_floating_point() else tensor.detach().contiguous()
        tensors[key] = (kept.view(torch.uint16) if kept.dtype == torch.bfloat16 else kept).numpy()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}
    return BaseModel(name, config=config, tensors=tensors, dtype=dtype, tokenizer_files=files, stop_token_ids=stop_token_ids)
