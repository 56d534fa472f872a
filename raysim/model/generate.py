"""Batched generation from a causal language model: left-padded, longest prompt first, greedy or sampled.

A request's tokens depend on its prompt and its seed, not on its neighbours: every row has its own positions, mask and
stream of random numbers. In float32 a batch therefore gives, token for token, what each prompt alone gives (sums are
taken in another order, so only a tie of the last few bits could tell them apart).

The fast path differs from `model.generate` in four ways. Rows that have ended leave the batch, and waiting prompts
take their place. Keys and values live in preallocated blocks that are written in place instead of being concatenated at
every step. Prompts are prefilled in groups of like length, and what all of them begin with (a system prompt) is computed
once. On a processor, float32 products of few rows go to oneDNN.

A model whose attention does not allow that (see `base.has_plain_attention`: windows shorter than the text, ALiBi, recurrent layers) is
answered by transformers' own `generate`, prompts of one length at a time, so that no row has padding: slower, and the same tokens.

Left out: beam search, sampling from a nucleus (top-p), and kernels that take no mask (flash attention 2).

Shapes: B rows, T new tokens of a row, C columns of the cache, V vocabulary, H key-value heads, D head size.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache

from raysim.model.kv_cache import (
    BLOCK_COLUMNS,
    BlockLayer,
    Window,
    additive_mask,
    common_prefix,
    has_plain_attention,
    last_place,
    read_alone,
)
from raysim.model.language_model import LanguageModel, context_length
from raysim.rng import numpy_rng

MAX_PREFILL_TOKENS = 4096
"""Most tokens, padding included, of one prefill: bounds its activations."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy unless `temperature` is set."""

    max_new_tokens: int
    """Most tokens produced for a prompt."""
    temperature: float = 0.0
    """Logits are divided by it before a token is drawn; 0 takes the most likely token."""
    repetition_penalty: float = 1.0
    """Logits of tokens already produced are divided by it where positive, multiplied where negative. The prompt's tokens do not count, as they do
    in transformers' processor of that name: the same number is weaker here."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a row besides the end-of-sequence tokens; not returned either."""
    top_k: int = 0
    """With a temperature, a token is drawn among this many of the largest logits (see `drawn_logits`); 0 for all."""

    def __post_init__(self) -> None:
        assert self.max_new_tokens >= 1, self
        assert 0 <= self.temperature < math.inf, self
        assert 0 < self.repetition_penalty < math.inf, self
        assert self.top_k >= 0, self


def generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    seeds: Sequence[int] | None = None,
    batch_size: int = 32,
    autocast_dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """The new token ids for each prompt, in the order of the prompts, without the token that ended them.

    Guarantees: `batch_size`, the other prompts and their order change no token (in float32); with a temperature, a row is a
    function of its prompt and its seed, and a larger `max_new_tokens` only continues it; the modes of the model's modules
    and its gradients are left as they were.

    Errors: ValueError for an empty prompt, or a prompt that does not fit the context together with `max_new_tokens`.
    """
    if not prompts:
        return []
    assert batch_size >= 1, batch_size
    assert len(prompts) == len(seeds) if seeds is not None else sampling.temperature == 0, "one seed for each prompt, unless greedy"
    _check_prompts(prompts, context=context_length(model.config.to_dict()), max_new_tokens=sampling.max_new_tokens)
    requests = [_Request(prompt=prompt, noise=None if seeds is None else numpy_rng(seeds[i], "tokens")) for i, prompt in enumerate(prompts)]
    waiting = deque(sorted(requests, key=lambda request: -len(request.prompt)))
    stop = frozenset(eos_token_ids) | frozenset(sampling.stop_token_ids)
    dtype = autocast_dtype or model.dtype
    autocast = torch.autocast(model.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
    if not has_plain_attention(_core(model), longest=len(waiting[0].prompt) + sampling.max_new_tokens):
        with _eval_mode(model), _without_gradients(), autocast:
            _generate_by_library(model, waiting, sampling=sampling, stop=stop, pad_token_id=pad_token_id, max_rows=batch_size)
        return [request.produced for request in requests]
    batch = _Batch(model, max_rows=min(batch_size, len(requests)), pad_token_id=pad_token_id, dtype=dtype)
    with _eval_mode(model), _without_gradients(), autocast, _linear_kernel(model, batch.dtype):
        batch.share_prefix(common_prefix(prompts))
        while waiting or batch.requests:
            group = batch.next_group(waiting)
            logits_BV = batch.prefill(group) if group else batch.step()
            _append_tokens(logits_BV, group or batch.requests, sampling=sampling, stop=stop)
            batch.drop_finished()
    return [request.produced for request in requests]


def write_texts(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], *, sampling: Sampling, seeds: Sequence[int] | None = None, batch_size: int = 32
) -> list[list[int]]:
    """What a language model, with the adapter that it holds, writes after each prompt, as token ids (see `generate`)."""
    return generate(
        lm.model,
        prompts,
        sampling=sampling,
        eos_token_ids=lm.eos_token_ids,
        pad_token_id=lm.pad_token_id,
        seeds=seeds,
        batch_size=batch_size,
        autocast_dtype=None if lm.is_float32 else lm.compute_dtype,
    )


@dataclass
class _Request:
    prompt: Sequence[int]
    noise: np.random.Generator | None
    produced: list[int] = field(default_factory=list)
    finished: bool = False


def _check_prompts(prompts: Sequence[Sequence[int]], *, context: int, max_new_tokens: int) -> None:
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{index}] is empty; a prompt needs at least 1 token")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompts[{index}] has {len(prompt)} tokens but at most {context - max_new_tokens} fit: the context is "
                f"max_position_embeddings={context} and max_new_tokens={max_new_tokens}; shorten the prompt or lower max_new_tokens"
            )


def _core(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _generate_by_library(
    model: PreTrainedModel | PeftModel,
    waiting: Sequence[_Request],
    *,
    sampling: Sampling,
    stop: frozenset[int],
    pad_token_id: int,
    max_rows: int,
) -> None:
    """Lets transformers write what follows the prompts, `max_rows` of one length at a time; tokens are chosen as in `_append_tokens`."""
    settings = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers has no type here
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=sorted(stop), pad_token_id=pad_token_id, use_cache=True
    )
    by_length: dict[int, list[_Request]] = {}
    for request in waiting:
        by_length.setdefault(len(request.prompt), []).append(request)
    for alike in by_length.values():
        for first in range(0, len(alike), max_rows):
            group = alike[first : first + max_rows]
            prompts_BT = torch.tensor([list(request.prompt) for request in group], device=model.device)
            chooser = LogitsProcessorList([_Chooser(group, sampling=sampling, stop=stop)])
            model.generate(  # type: ignore[operator]  # torch types any attribute as a tensor
                input_ids=prompts_BT,
                attention_mask=torch.ones_like(prompts_BT),
                generation_config=settings,
                logits_processor=chooser,
            )


class _Chooser(LogitsProcessor):
    """Chooses every row's token and writes it down; leaves the library's greedy search that token alone, and what ends a row to a row that has ended."""

    def __init__(self, requests: Sequence[_Request], *, sampling: Sampling, stop: frozenset[int]) -> None:
        self.requests = requests
        self.sampling = sampling
        self.stop = stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows = [row for row, request in enumerate(self.requests) if not request.finished]
        chosen = [min(self.stop)] * len(self.requests)
        live = [self.requests[row] for row in rows]
        tokens = _append_tokens(scores[rows].float(), live, sampling=self.sampling, stop=self.stop)
        for row, token in zip(rows, tokens, strict=True):
            chosen[row] = token
        only = torch.full_like(scores, -torch.inf)
        only[torch.arange(len(chosen)), torch.tensor(chosen)] = 0.0
        return only  # type: ignore[return-value]  # torch's own functions return plain tensors


def _without_gradients() -> AbstractContextManager[Any]:
    """Inference mode; among ranks only no gradient, since what they gather of a base in parts there may be kept for training."""
    return torch.no_grad() if torch.distributed.is_initialized() else torch.inference_mode()


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _OneDnnLinear(TorchFunctionMode):
    """Sends linear layers to oneDNN, which multiplies a few rows by a large float32 matrix 2 to 3 times as fast as MKL on AMD processors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            bias = args[2] if len(args) == 3 else None
            return torch.ops.mkldnn._linear_pointwise(args[0], args[1], bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _linear_kernel(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> AbstractContextManager[object]:
    usable = model.device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
    return _OneDnnLinear() if usable else contextlib.nullcontext()


class _Batch:
    """The rows being generated and their cache: all rows end at column `end`, and row b begins at `starts[b]`.

    Prompts come longest first, so a newcomer is never longer than a row that is there, and fits left of `end`.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, max_rows: int, pad_token_id: int, dtype: torch.dtype) -> None:
        self.model = model
        self.max_rows = max_rows
        self.pad_token_id = pad_token_id
        self.dtype = dtype
        self.window = Window(slice(0, 0), 0, slice(0, 0), [])
        self.layers = [BlockLayer(self.window, max_rows=max_rows, dtype=dtype) for _ in range(model.config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self.requests: list[_Request] = []
        self.starts: list[int] = []
        self.end = 0
        self.capacity = 0
        self.num_shared = 0

    def share_prefix(self, prefix: list[int]) -> None:
        """Computes the keys and values of what all prompts begin with; every row then gets a copy."""
        if not prefix:
            return
        computed, _ = read_alone(self.model, prefix)
        for layer, (keys, values) in zip(self.layers, computed, strict=True):
            layer.prefix = keys.to(self.dtype), values.to(self.dtype)
        self.num_shared = len(prefix)

    def next_group(self, waiting: deque[_Request]) -> list[_Request]:
        """The waiting prompts to prefill now (taken from `waiting`), or none while too few rows are free to be worth a pass."""
        num_free = self.max_rows - len(self.requests)
        if not waiting or (self.requests and num_free < max(1, min(self.max_rows // 8, len(waiting)))):
            return []
        longest = len(waiting[0].prompt)
        shortest = self.num_shared + 0.8 * (longest - self.num_shared)
        num_rows = min(num_free, max(1, MAX_PREFILL_TOKENS // longest))
        group: list[_Request] = []
        while waiting and len(group) < num_rows and len(waiting[0].prompt) >= shortest:
            group.append(waiting.popleft())
        return group

    def prefill(self, group: list[_Request]) -> torch.Tensor:
        """Adds rows for `group` and returns the float32 logits BV of their first new tokens."""
        longest, num_rows = len(group[0].prompt), len(self.requests)
        if not self.requests:
            self.end = longest
        first = self.end - longest
        assert first >= min(self.starts, default=0), (first, self.starts)
        starts = [self.end - len(request.prompt) for request in group]
        own = [list(request.prompt[self.num_shared :]) for request in group]
        tokens_BT = torch.tensor([[self.pad_token_id] * (len(own[0]) - len(tokens)) + tokens for tokens in own])
        starts_B1 = torch.tensor(starts)[:, None]
        column_C = torch.arange(first, self.end)
        query_T1 = column_C[self.num_shared :, None]
        # A padding position sees itself, so that no row of the mask is empty.
        allowed_BTC = ((column_C <= query_T1) & (column_C >= starts_B1)[:, None]) | (column_C == query_T1)
        self.window.rows = slice(num_rows, num_rows + len(group))
        self.window.first = first
        self.window.write = slice(first + self.num_shared, self.end)
        self.window.prefix_starts = starts
        self.requests.extend(group)
        self.starts.extend(starts)
        self.capacity = self.capacity or self.end + BLOCK_COLUMNS
        return self._forward(tokens_BT, (query_T1.T - starts_B1).clamp_min(0), allowed_BTC)

    def step(self) -> torch.Tensor:
        """Feeds every row its last token and returns the float32 logits BV of the next ones."""
        if self.end == self.capacity:
            self._make_room()
        first = min(self.starts)
        starts_B1 = torch.tensor(self.starts)[:, None]
        tokens_B1 = torch.tensor([request.produced[-1:] for request in self.requests])
        self.window.rows = slice(0, len(self.requests))
        self.window.first = first
        self.window.write = slice(self.end, self.end + 1)
        self.window.prefix_starts = []
        self.end += 1
        allowed_BC = torch.arange(first, self.end) >= starts_B1
        return self._forward(tokens_B1, self.end - 1 - starts_B1, allowed_BC[:, None])

    def drop_finished(self) -> None:
        """Takes the finished rows out; rows from the back move into the gaps."""
        live = [row for row, request in enumerate(self.requests) if not request.finished]
        if len(live) == len(self.requests):
            return
        gaps = sorted(set(range(len(live))) - set(live))
        movers = live[len(live) - len(gaps) :]
        if gaps:
            columns = slice(min(self.starts[row] for row in movers), self.end)
            for layer in self.layers:
                layer.move_rows(movers, gaps, columns)
        for old, new in zip(movers, gaps, strict=True):
            self.requests[new], self.starts[new] = self.requests[old], self.starts[old]
        del self.requests[len(live) :], self.starts[len(live) :]

    def _make_room(self) -> None:
        first = min(self.starts)
        for layer in self.layers:
            layer.relocate(num_rows=len(self.requests), columns=slice(first, self.end))
        self.starts = [start - first for start in self.starts]
        self.end -= first
        self.capacity = self.end + BLOCK_COLUMNS

    def _forward(self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor, allowed_BTC: torch.Tensor) -> torch.Tensor:
        device = self.model.device
        # An additive mask, made once here: a boolean one would be converted again in every layer.
        mask_B1TC = additive_mask(allowed_BTC, self.dtype)[:, None]
        output = self.model(
            input_ids=tokens_BT.to(device),
            attention_mask=mask_B1TC.to(device),
            position_ids=positions_BT.to(device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last_place(tokens_BT, device),
        )
        logits_BV: torch.Tensor = output.logits[:, -1].float()
        return logits_BV


def _append_tokens(logits_BV: torch.Tensor, requests: list[_Request], *, sampling: Sampling, stop: frozenset[int]) -> list[int]:
    """Chooses the next token of each row, notes it and whether the row has ended with it, and returns the tokens."""
    if sampling.repetition_penalty != 1:
        logits_BV = _penalise(logits_BV, [request.produced for request in requests], penalty=sampling.repetition_penalty)
    logits_BV = drawn_logits(logits_BV, temperature=sampling.temperature, top_k=sampling.top_k)
    if sampling.temperature > 0:
        # The largest of logit + Gumbel noise is distributed as softmax(logits); unlike an inverse of the cumulative distribution, it
        # changes only where two sums tie, so that rounding elsewhere in the vocabulary does not move it.
        logits_BV = logits_BV + torch.from_numpy(_gumbel_noise(requests, logits_BV.shape[1])).to(logits_BV.device)
    tokens: list[int] = logits_BV.argmax(-1).tolist()
    for request, token in zip(requests, tokens, strict=True):
        if token not in stop:
            request.produced.append(token)
        request.finished = token in stop or len(request.produced) == sampling.max_new_tokens
    return tokens


def drawn_logits(logits_BV: torch.Tensor, *, temperature: float, top_k: int) -> torch.Tensor:
    """Logits BV whose softmax is the distribution that a row's next token is drawn from.

    Logits below the `top_k`-th largest (0: none) count as -inf, so that all that tie with it stay; the others are divided by the
    temperature. At temperature 0 all but the first of the largest logits count as -inf, whatever `top_k`: the point mass of greedy decoding.
    """
    if temperature == 0:
        return torch.full_like(logits_BV, -torch.inf).scatter_(-1, logits_BV.argmax(-1, keepdim=True), 0.0)
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(top_k).values[..., -1:], -torch.inf)
    return logits_BV / temperature


def drawn_log_probs(logits_NV: torch.Tensor, tokens_N: torch.Tensor, *, temperature: float, top_k: int) -> torch.Tensor:
    """The log-probability (nats) that each row draws its token of `tokens_N`, shape (N,); -inf where it never does."""
    logits_NV = drawn_logits(logits_NV, temperature=temperature, top_k=top_k)
    return logits_NV.gather(-1, tokens_N[:, None])[:, 0] - logits_NV.logsumexp(-1)


def _penalise(logits_BV: torch.Tensor, produced: list[list[int]], *, penalty: float) -> torch.Tensor:
    rows = torch.tensor([row for row, tokens in enumerate(produced) for _ in tokens], dtype=torch.long, device=logits_BV.device)
    columns = torch.tensor([token for tokens in produced for token in tokens], dtype=torch.long, device=logits_BV.device)
    values = logits_BV[rows, columns]
    penalised = logits_BV.clone()
    penalised[rows, columns] = torch.where(values > 0, values / penalty, values * penalty)
    return penalised


def _gumbel_noise(requests: list[_Request], num_tokens: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """One Gumbel variate for each row and token, each row from its own stream.

    Drawn in float64: float32 would give an exponential of exactly 0 about once in 2**23 draws, that is, a token of
    no probability at all about once in 200 steps.
    """
    noise_BV = np.empty((len(requests), num_tokens), dtype=np.float32)
    for row, request in enumerate(requests):
        assert request.noise is not None
        noise_BV[row] = request.noise.standard_exponential(num_tokens)
    return -np.log(noise_BV)
