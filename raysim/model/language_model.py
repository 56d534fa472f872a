"""A base model at work in one process: its hidden states and logits, and the LoRA adapter that goes in and out.

The adapter's parameters are views into one flat tensor, so that loading, clipping, noise and an optimizer step are one pass over it.
"""

import contextlib
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from raysim.data.tokens import end_of_turn
from raysim.lora.factors import delta_size, deltas, entries, layers
from raysim.lora.layout import Layout, Vector, check_adapter
from raysim.model.attention import use_short_attention
from raysim.model.base_model import BaseModel, token_ids
from raysim.model.find import quiet_transformers
from raysim.model.guards import Walked, walked
from raysim.model.quantize import put_quantized
from raysim.model.sharded import Group, ShardedOptimizer, partition
from raysim.model.weights import DTYPES, empty_model

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
"""Under which of these a model's configuration names its context, differs."""
UNLIMITED = 2**31 - 1
"""The context of models that have no limit, such as recurrent ones."""
ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output layer."""


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
    frozen: torch.Tensor | None = None
    """Which entries of `flat` training leaves as they are, bool of shape (P,); None for none."""
    keeps_activations: bool = True
    """Whether training keeps what layers computed (see `keep_activations`)."""
    group: Group | None = None
    """This process's place among the ranks of a client; None for a client of one process."""
    sharded: dict[str, ShardedOptimizer] = field(default_factory=dict)
    """The optimizers of such a group, by name."""
    moved: list[RemovableHandle] = field(default_factory=list)
    """What adds a delta of the base to the outputs of adapted layers."""
    found: Walked | None = None
    """The model as it was when it was last walked through."""
    proven: set[str] = field(default_factory=set)
    """LoRA tensors that a gradient has reached since the model's layers last changed."""

    def set_adapter(self, vector: Vector) -> None:
        """Loads an adapter, float32 of shape (P,).

        Errors: ValueError if it has another shape or type; RuntimeError naming a LoRA tensor that it would not reach.
        """
        check_adapter(vector, self.layout)
        if not self.parts().is_loaded_into(self.flat):
            for place in self.parts(anew=True).places:
                if place.parameter.data_ptr() != self.flat[place.start :].data_ptr():
                    raise RuntimeError(f"model: LoRA tensor {place.name} is no view into the flat adapter, which loading would not reach")
        with torch.no_grad():
            self.flat.copy_(torch.tensor(vector))

    def keep_activations(self, kept: bool) -> None:
        """Whether training keeps what layers computed for the backward pass, or computes it again there (Chen et al. 2016, arXiv 1604.06174).

        Errors: ValueError if the model cannot compute it again.
        """
        core = self.model.get_base_model()
        if not kept and not core.supports_gradient_checkpointing:
            raise ValueError(f"train.gradient_checkpointing=true: {type(core).__name__} cannot compute its activations again; leave it out")
        if kept and not self.keeps_activations:
            core.activation_checkpointing_disable()  # type: ignore[operator]  # torch types any attribute as a tensor
        if not kept and self.keeps_activations:
            settings = {"use_reentrant": False}
            core.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)  # type: ignore[operator]  # as above
        self.keeps_activations = kept

    def get_adapter(self) -> Vector:
        """A copy of the adapter, float32 of shape (P,)."""
        return self.flat.detach().to("cpu", copy=True).numpy()

    def train_only(self, names: Collection[str], *, rank: int = 2**31 - 1) -> None:
        """Freezes all tensors of the layout but these, and of these what lies beyond a rank, for every training to come."""
        trained = entries(self.layout, frozenset(names), rank)
        self.frozen = None if trained is None else torch.from_numpy(~trained).to(self.device)
        self.proven.clear()

    def set_scale(self, scale: float) -> None:
        """Scales the product of A and B by this number, in place of alpha / rank."""
        for module in self._adapted():
            module.scaling["default"] = scale

    def set_delta(self, delta: Vector | None) -> None:
        """Has every adapted layer use its weight and a delta, float32 as `factors.deltas` has it; None for the base as it is.

        The base's own weights are read by every worker of a node and stay as they are. A disabled adapter takes the delta with it.
        Errors: ValueError if it has another length or type.
        """
        self.proven.clear()
        while self.moved:
            self.moved.pop().remove()
        if delta is None or not delta.any():
            return
        if delta.dtype != np.float32 or delta.shape != (delta_size(self.layout),):
            raise ValueError(f"delta: {delta.dtype} of shape {delta.shape}, expected float32 of shape ({delta_size(self.layout)},)")
        for module, part in zip(self._adapted(), deltas(delta, self.layout), strict=True):
            self.moved.append(module.register_forward_hook(_adds(torch.tensor(part, device=self.device))))

    def _adapted(self) -> list[Any]:
        """The adapted layers, in the order of the layout."""
        modules: dict[str, Any] = dict(self.model.named_modules())
        return [modules[layer.module] for layer in layers(self.layout)]

    def check_trainable(self) -> None:
        """Refuses a model in which a LoRA tensor is frozen, or its gradient would not reach `flat_grad`.

        Errors: RuntimeError naming the tensor.
        """
        if self.parts().trains_into(self.flat_grad):
            return
        for place in self.parts(anew=True).places:
            name, gradient = place.name, place.parameter.grad
            if not place.parameter.requires_grad:
                raise RuntimeError(f"model: LoRA tensor {name} is frozen")
            if gradient is None or gradient.data_ptr() != self.flat_grad[place.start :].data_ptr():
                raise RuntimeError(f"model: the gradient of LoRA tensor {name} is no view into the flat gradient, which it would not reach")

    def parts(self, *, anew: bool = False) -> Walked:
        """The model as it was when it was last walked through; `anew` walks again.

        Errors: RuntimeError naming a LoRA tensor that is in the model or in its layout, but not in both.
        """
        if self.found is None or anew:
            self.found = walked(self.model, self.layout, dict(_lora_parameters(self.model)), adapter="default")
            self.proven.clear()
        return self.found

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


def _adds(delta: torch.Tensor) -> Callable[..., torch.Tensor | None]:
    def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        return None if module.disable_adapters else output + F.linear(inputs[0].to(delta.dtype), delta).to(output.dtype)

    return hook


def build_language_model(
    base: BaseModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str],
    device: str = "cpu",
    between: bool = False,
    group: Group | None = None,
) -> LanguageModel:
    """A `LanguageModel` over the weights of `base`, which are not copied on the CPU and never written; `between` puts an R between A and B,
    and a `group` of ranks partitions them.

    Errors: ValueError if a target module matches no linear layer, naming those there are.
    """
    core = _core_model(base, device=device if group is None else "cpu")
    vocab_size = int(core.get_input_embeddings().weight.shape[0])  # type: ignore[operator]  # torch types any attribute as a tensor
    if group is not None:
        core = partition(core, group, dtype=DTYPES[base.dtype]).to(device)
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
    if between:
        _put_between(model, rank=rank)
    tokenizer = _unpack_tokenizer(base)
    layout, flat, flat_grad = _flat_parameters(model, device=device)
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
        group=group,
    )


def _put_between(model: PeftModel, *, rank: int) -> None:
    """Has every adapted layer multiply by an r x r matrix R, `lora_R`, between its A and its B."""
    for module in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        between = torch.nn.Linear(rank, rank, bias=False, device=module.lora_B["default"].weight.device)
        module.lora_R = torch.nn.ModuleDict({"default": between})
        module.lora_B["default"].register_forward_pre_hook(lambda _, inputs, between=between: (between(inputs[0]),))


def _end_tokens(base: BaseModel, tokenizer: Any, *, vocab_size: int) -> tuple[int, ...]:
    """Every token that ends what the model says, each once: those of its config, its tokenizer, its generation settings and its chat template.

    The first one ends a response where the chat template has no token for it.
    Errors: ValueError if there is none.
    """
    known = token_ids(base.config.get("eos_token_id"))
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
    core = empty_model(AutoConfig.for_model(**base.config), dtype=base.dtype, attention=base.attention)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # read-only is what we want: nothing writes to the base
        state = {name: torch.from_numpy(array) for name, array in base.tensors.items()}
    if base.dtype == "bfloat16":
        state = {name: tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor for name, tensor in state.items()}
    whole = {name: tensor for name, tensor in state.items() if name not in base.quantized and name.rpartition(".")[0] not in base.quantized}
    missing, unexpected = core.load_state_dict(whole, strict=False, assign=True)
    if base.quantized:
        put_quantized(core, state, kind=base.quantization, shapes=base.quantized)
    core.tie_weights()
    left = [name for name, parameter in core.named_parameters() if parameter.is_meta]
    if unexpected or left:
        raise ValueError(
            f"model.name={base.name!r}: weights do not fit the model (missing {left[:3] or missing[:3]}, unexpected {unexpected[:3]})"
        )
    core.requires_grad_(False)
    core.eval()
    if base.attention == "auto":
        use_short_attention(core, device=device)
    return core.to(device)  # type: ignore[no-any-return]  # transformers has no type here


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
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
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
    assert all(re.search(r"\.lora_[ABR]\.", name) for name, _ in named), [name for name, _ in named][:3]
    if trainable != [name for name, _ in named]:
        raise RuntimeError(f"model: {min({*trainable} ^ {name for name, _ in named})} is a frozen LoRA tensor, or trains and is none")
    layout = Layout(names=tuple(name for name, _ in named), shapes=tuple(tuple(parameter.shape) for _, parameter in named))
    flat = torch.zeros(layout.num_parameters, dtype=torch.float32, device=device)
    flat_grad = torch.zeros_like(flat)
    for (_, parameter), shape, (start, end) in zip(named, layout.shapes, layout.spans(), strict=True):
        parameter.data = flat[start:end].view(shape)
        parameter.grad = flat_grad[start:end].view(shape)
    return layout, flat, flat_grad
