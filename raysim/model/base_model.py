"""A base model as plain data, numpy arrays and bytes, so that it crosses process borders without a copy.

Left out: one copy of the weights per GPU that processes share.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from raysim.model.find import find_model, named_line, quiet_transformers
from raysim.model.quantize import quantizable, quantized_parts, quantized_shapes
from raysim.model.weights import DTYPES, empty_model, matching, places, read_all, unused
from raysim.rng import seed_for

logger = logging.getLogger(__name__)

Keep = Callable[[np.ndarray], np.ndarray]
"""Puts an array where it is to stay, such as memory that processes share, and returns it as it lies there."""
Named = tuple[str, torch.Tensor]

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
    attention: str = "auto"
    """The implementation of attention: `auto` for transformers' choice, else its name there."""
    quantization: str = "none"
    """How linear layers are stored: `none`, `int8` or `nf4`."""
    quantized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The weights that are stored so, each with its shape; what else belongs to one lies in `tensors` under its name and a suffix."""

    @property
    def num_parameters(self) -> int:
        """Parameters of the base model."""
        whole = (tensor.size for name, tensor in self.tensors.items() if name.rpartition(".")[0] not in self.quantized)
        return sum(whole) - self._stored_size() + sum(math.prod(shape) for shape in self.quantized.values())

    def _stored_size(self) -> int:
        return sum(self.tensors[name].size for name in self.quantized)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights as they lie in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def resolve_dtype(name: str, *, on_gpu: bool) -> str:
    """`auto` as `bfloat16` where the processor has bfloat16 arithmetic, else `float32`; other names unchanged."""
    if name != "auto":
        return name
    has_bfloat16 = on_gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if has_bfloat16 else "float32"


def load_base_model(
    name: str,
    *,
    dtype: str = "float32",
    cache_dir: str = "",
    attention: str = "auto",
    quantization: str = "none",
    keep: Keep = lambda array: array,
) -> BaseModel:
    """The base model called `name`, its weights in `dtype` (`float32` or `bfloat16`), or its linear layers quantised (`int8`, `nf4`).

    `name` is `tiny`, a packaged model, `package:DIST`, a local folder, a .gguf file, or a Hub id; GGUF files are converted
    to safetensors once, under `cache_dir`. Each array is handed to `keep` as it is read, so that the weights are never here and there at once.

    Errors: ValueError that says what was looked for and the remedy.
    """
    if name == "tiny":
        config, tokenizer, named = _tiny()
        stop: tuple[int, ...] = ()
    else:
        config, tokenizer, named, stop = _read(name, Path(find_model(name, cache_dir=cache_dir)), dtype=dtype, attention=attention)
    tensors, quantized = _stored(named, dtype=dtype, quantization=quantization, targets=_targets(config, quantization), keep=keep)
    return BaseModel(
        name,
        config=config,
        tensors=tensors,
        dtype=dtype,
        tokenizer_files=_files_of(tokenizer),
        stop_token_ids=stop,
        attention=attention,
        quantization=quantization,
        quantized=quantized,
    )


def empty_base_model(name: str, *, dtype: str, cache_dir: str = "", attention: str = "auto", quantization: str = "none") -> BaseModel:
    """The base model called `name` without its weights: in their place arrays whose memory is never used unless they are read.

    Errors: as `load_base_model`.
    """
    if name == "tiny":
        settings, tokenizer, _ = _tiny()
    else:
        folder = Path(find_model(name, cache_dir=cache_dir))
        try:
            with quiet_transformers():
                settings = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for a folder that is not whole
            raise ValueError(f"model.name={name!r}: no causal language model can be read from {folder} ({named_line(error)})") from error
    return emptied(settings, tokenizer=tokenizer, name=name, dtype=dtype, attention=attention, quantization=quantization)


def emptied(settings: dict[str, Any], *, tokenizer: Any, name: str, dtype: str, attention: str, quantization: str) -> BaseModel:
    """What `empty_base_model` makes of a model's configuration and tokenizer."""
    core = empty_model(AutoConfig.for_model(**settings), dtype=dtype, attention=attention)
    core.tie_weights()
    targets = quantizable(core, quantization) if quantization != "none" else frozenset()
    tensors: dict[str, np.ndarray] = {}
    quantized: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for key, tensor in core.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        parts = {"": (tuple(tensor.shape), np.dtype(np.uint16 if tensor.dtype == torch.bfloat16 else np.float32))}
        if not tensor.is_floating_point():
            parts = {"": (tuple(tensor.shape), torch.empty(0, dtype=tensor.dtype).numpy().dtype)}
        if key in targets:
            quantized[key] = tuple(tensor.shape)
            parts = quantized_shapes(tuple(tensor.shape), quantization)
        tensors |= {f"{key}{suffix}": unused(shape, kind) for suffix, (shape, kind) in parts.items()}
    files = _files_of(tokenizer)
    return BaseModel(name, settings, tensors, dtype, files, attention=attention, quantization=quantization, quantized=quantized)


def _read(name: str, folder: Path, *, dtype: str, attention: str) -> tuple[dict[str, Any], Any, Iterable[Named], tuple[int, ...]]:
    """A folder's configuration, tokenizer, weights, and the end tokens of its generation settings."""
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            core = empty_model(config, dtype=dtype, attention=attention)
            found = matching(core, places(folder))
            if found is not None:
                generation = _generation(core, folder)
                return core.config.to_dict(), tokenizer, read_all(found), () if generation is None else token_ids(generation.eos_token_id)
            model, report = _by_transformers(folder, config, dtype=dtype)
    except Exception as error:  # transformers raises many kinds for a folder that is not whole
        raise ValueError(f"model.name={name!r}: no causal language model can be read from {folder} ({named_line(error)})") from error
    if report["missing_keys"]:  # transformers would draw them at random
        raise ValueError(f"model.name={name!r}: {folder} lacks weights of the model, such as {min(report['missing_keys'])}")
    if report["unexpected_keys"]:
        num, first = len(report["unexpected_keys"]), min(report["unexpected_keys"])
        logger.warning("model.name=%s: %d tensors of the folder are no part of the model and are left out, such as %s", name, num, first)
    stop = () if model.generation_config is None else token_ids(model.generation_config.eos_token_id)
    return model.config.to_dict(), tokenizer, _untied(model.state_dict()), stop


def _by_transformers(folder: Path, config: Any, *, dtype: str) -> Any:
    """The model as transformers reads it, whole, and what it says of the reading."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, trust_remote_code=False, weights_only=True, dtype=DTYPES[dtype], output_loading_info=True
    )
    return loaded


def _generation(core: Any, folder: Path) -> Any:
    """The generation settings of a folder, else those that its model has by itself."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return core.generation_config


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """End tokens as a configuration gives them: one, several, or none."""
    return tuple(value) if isinstance(value, list) else () if value is None else (int(value),)


def _tiny() -> tuple[dict[str, Any], Any, Iterable[Named]]:
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
    return config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, tokenizer, _untied(state)


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


def _untied(state: dict[str, torch.Tensor]) -> Iterator[Named]:
    """The tensors of a model, without those that are tied to one that was there already, as they will be in the model."""
    seen: set[tuple[int, torch.Size]] = set()
    for key, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen or not tensor.numel():
            yield key, tensor.detach()
        seen.add(place)


def _targets(config: dict[str, Any], quantization: str) -> frozenset[str]:
    """The weights that are to be quantised."""
    return (
        frozenset() if quantization == "none" else quantizable(empty_model(AutoConfig.for_model(**config), dtype="float32"), quantization)
    )


def _stored(
    named: Iterable[Named], *, dtype: str, quantization: str, targets: frozenset[str], keep: Keep
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    """The tensors as arrays, and the shapes of those that are quantised."""
    tensors: dict[str, np.ndarray] = {}
    quantized: dict[str, tuple[int, ...]] = {}
    for key, tensor in named:
        if key in targets:
            quantized[key] = tuple(tensor.shape)
            tensors |= {f"{key}{suffix}": keep(part.numpy()) for suffix, part in quantized_parts(tensor, quantization).items()}
            continue
        # Whole numbers and flags, such as a mask that is stored with the weights, are no weights and stay what they are.
        kept = tensor.to(DTYPES[dtype]).contiguous() if tensor.is_floating_point() else tensor.contiguous()
        tensors[key] = keep((kept.view(torch.uint16) if kept.dtype == torch.bfloat16 else kept).numpy())
    return tensors, quantized


def _files_of(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}
