"""Gradient inversion: what a server that only looks reads out of one client's update.

DAGER, Petrov et al. (2024), arXiv 2405.15586, for LoRA. With q = W x + s B A x, the gradient of A is s B^T (sum over
positions of g x^T): its rows are combinations of the layer's inputs x. In a Llama-like model the first layer's x is
RMSNorm(embedding(token)), so that each token of the vocabulary can be tested against the span of those rows; the second
layer's x depends on all that stood before, so that the same test there puts the tokens in order.

What the attacker sees, and every function of the attack gets nothing else:
its `ServerView`, the base model and its tokenizer, the public beginning of the chat template, and the size of the noise that the
privacy mechanism adds, which is public. Not the examples, their number, or their lengths.

What bounds the attack. The span has at most as many dimensions as A has rows, the rank, times the projections that share
the input (q, k and v do, and their rows are stacked): more distinct tokens than that starve it. Noise on each coordinate
gives the gradient full rank. While B is zero, as in round 0, A's gradient is zero and shows nothing. That is no protection:
the rows of B's gradient are combinations of A x, which `factor="B"` tests in the same way, in as many dimensions as the rank.
The first position moves no query (a softmax over one key is constant) and the last one moves no loss at all: the last token
of each example is never seen, and the first only through k or v.
Several SGD steps on the client leave the first layer's span what it is, the span of all their tokens. Noise at the server
is added after the server has looked, and does not touch this attack; noise at the client does. A secure sum shows the server
the tokens of all its clients together, and not even those once they are too many.

Left out: bfloat16 (its gradients are too coarse for these thresholds), updates by Adam (dividing each coordinate by its own
root mean square destroys the span), dropout in the adapter, models in which the position enters the first layer's input, and
the attacks that optimise embeddings (LAMP and its kin). That this attack fails in those cases protects nobody from another.

Shape legend: V = vocabulary, D = hidden size, R = LoRA rank, M = D for factor A and R for factor B, K = dimensions of a
span, N = candidate tokens, W = prefixes followed at a time, T = tokens of a prefix, P = parameters of the adapter.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from raysim.attacks.views import ServerView
from raysim.data.chat import ChatFormat
from raysim.data.similarity import largest_rouge_l
from raysim.data.tokens import Example, encode_chat
from raysim.lora.layout import Layout, Vector, initial_adapter, unflatten
from raysim.model.kv_cache import additive_mask, has_plain_attention
from raysim.model.language_model import LanguageModel
from raysim.model.train import response_nll
from raysim.privacy.clipping import l2_norm
from raysim.privacy.noise import gaussian
from raysim.rng import numpy_rng, seed_for

PROJECTION = re.compile(r"(?P<module>.*\.layers\.(?P<layer>\d+)\..*[qkv]_proj)\.lora_A\.weight")
"""The factors A whose input is the attention's input: those of one layer have the same."""

VOCABULARY_CHUNK = 4096
"""Tokens of the vocabulary embedded at a time, which bounds the memory in use."""


@dataclass(frozen=True)
class InversionSettings:
    """How the attacker goes about it."""

    factor: str = "A"
    """Whose gradient is read: `A`, as in the paper, or `B`, which shows something while B is still zero."""
    entry_error: float = 0.0
    """Standard deviation of what was added to each coordinate of the update: the mechanism's noise, or rounding of the adapter."""
    rounding: float = 1e-6
    """Relative error of a gradient's coordinates (to their root mean square) by float32 arithmetic."""
    token_threshold: float = 5e-3
    """Largest distance of a token's unit first-layer input from the span. True ones lie within 1e-5 of an exact gradient's; false ones
    near sqrt(1 - K/M), but those whose embeddings hardly differ from a true token's (rare tokens, little trained) as near as 0.01."""
    sequence_threshold: float = 1e-3
    """Largest distance of a unit second-layer input from that layer's span."""
    max_candidates: int = 512
    """The nearest candidates that go into sequences."""
    beam_width: int = 16
    """Prefixes followed at a time: a batch has as many sequences as examples."""
    max_length: int = 256
    """Tokens at which a sequence is given up to be finished."""


@dataclass(frozen=True)
class Span:
    """What a gradient's rows span: an orthonormal `basis_KM`, float64, of vectors `map_MD` times an input (the input itself if None)."""

    basis_KM: torch.Tensor
    map_MD: torch.Tensor | None
    num_rows: int
    """Rows of the gradient: the most dimensions that the span can have."""

    @property
    def dimension(self) -> int:
        """K."""
        return self.basis_KM.shape[0]

    @property
    def is_informative(self) -> bool:
        """Whether there is something in it, and something outside it."""
        return 0 < self.dimension < self.basis_KM.shape[1]


@dataclass(frozen=True)
class Inversion:
    """What the attack made of an update."""

    span_dimension: int
    """Dimensions of the first layer's span, which is the number of distinct tokens where it is less than `num_rows`; for factor B the largest of its spans."""
    sequence_dimension: int
    """Dimensions of the second layer's span: distinct (token, what stood before) pairs where it is less than `num_rows`."""
    num_rows: int
    """The most dimensions that the first layer's span could have."""
    distance_V: torch.Tensor
    """Distance of every token of the vocabulary from the first layer's span, in [0, 1]; all 1 where nothing can be seen."""
    token_ids: tuple[int, ...]
    """Tokens within the threshold, nearest first."""
    sequences: tuple[tuple[int, ...], ...]
    """Sequences that could not be extended, the public beginning included, longest first."""

    @property
    def verdict(self) -> str:
        """What the attacker can say, in one line."""
        if self.span_dimension == 0:
            return "nothing to see in this factor: its gradient is zero or drowns in the noise"
        starved = "; starved: the span has all the dimensions that it can have" if self.span_dimension == self.num_rows else ""
        return f"{len(self.token_ids)} tokens and {len(self.sequences)} sequences from {self.span_dimension} dimensions{starved}"


def invert_update(lm: LanguageModel, view: ServerView, *, opening: Sequence[int], settings: InversionSettings) -> Inversion:
    """The tokens and sequences that a client trained on, from what the server has of it; `opening` is what every sequence starts with.

    Guarantees: depends on these arguments only, and leaves the model with the adapter that was sent loaded.
    Errors: ValueError if the update is not finite, the adapter has no projection of the attention's input in two layers, or the position
    enters the first layer's input.
    """
    adapter, update = view.sent, view.update
    if not np.isfinite(update).all():
        raise ValueError("update: holds a NaN or an infinity; a server drops such an update, and there is nothing to invert in it")
    first, second = projections(lm.layout)
    lm.set_adapter(adapter)
    lm.model.eval()
    _refuse_positions(lm, module=first[0])
    spans = gradient_spans(lm.layout, adapter, update, modules=first, settings=settings)
    later = gradient_spans(lm.layout, adapter, update, modules=second, settings=settings)
    distance_V = torch.cat([_distance(spans, x) for x in _vocabulary_inputs(lm, module=first[0])])
    order = distance_V.argsort(stable=True)
    token_ids = tuple(order[distance_V[order] < settings.token_threshold].tolist())
    return Inversion(
        span_dimension=max(span.dimension for span in spans),
        sequence_dimension=max(span.dimension for span in later),
        num_rows=max(span.num_rows for span in spans),
        distance_V=distance_V,
        token_ids=token_ids,
        sequences=_sequences(lm, later, token_ids[: settings.max_candidates], opening=opening, module=second[0], settings=settings),
    )


def check_model(lm: LanguageModel, *, longest: int) -> None:
    """Refuses a model that the attack cannot serve for texts of up to `longest` tokens, so that a run that asks for it does so before it starts.

    Errors: ValueError naming what is not served.
    """
    first = projections(lm.layout)[0]
    if not has_plain_attention(lm.model.get_base_model(), longest=longest):
        raise ValueError(
            f"model.name: the attack serves full attention only, and model_type={lm.model.config.model_type!r} has layers of another kind"
        )
    _refuse_positions(lm, module=first[0])


def projections(layout: Layout) -> tuple[list[str], list[str]]:
    """The modules of the first layer, and of the second, that have an A on the attention's input, in the layout's order.

    Errors: ValueError if either layer has none.
    """
    matches = [match for name in layout.names if (match := PROJECTION.fullmatch(name))]
    first, second = ([match["module"] for match in matches if int(match["layer"]) == layer] for layer in (0, 1))
    if not first or not second:
        raise ValueError("lora.target_modules: the attack needs q_proj, k_proj or v_proj in the first two layers; add one of them")
    return first, second


def gradient_spans(layout: Layout, adapter: Vector, update: Vector, *, modules: Sequence[str], settings: InversionSettings) -> list[Span]:
    """What the gradients of one layer's factors span: for A one span of all `modules` together, for B one for each.

    A direction counts if its singular value exceeds what errors of the stated size make on their own, e (sqrt(rows) + sqrt(columns)),
    with each module's rows divided by their e = `entry_error` + `rounding` times their root mean square.
    """
    tensors, factors = unflatten(update, layout), unflatten(adapter, layout)
    if settings.factor == "A":
        rows = [_whitened(tensors[f"{module}.lora_A.weight"], settings) for module in modules]
        return [_row_space(torch.cat(rows), map_MD=None)]
    if settings.factor == "B":
        return [
            _row_space(_whitened(tensors[f"{module}.lora_B.weight"], settings), map_MD=factors[f"{module}.lora_A.weight"].double())
            for module in modules
        ]
    raise ValueError(f"factor={settings.factor!r} must be 'A' or 'B'")


def _whitened(gradient: torch.Tensor, settings: InversionSettings) -> torch.Tensor:
    gradient = gradient.double()
    error = settings.entry_error + settings.rounding * float(gradient.square().mean().sqrt())
    return gradient / error if error > 0 else gradient


def _row_space(matrix: torch.Tensor, *, map_MD: torch.Tensor | None) -> Span:
    _, values, basis = torch.linalg.svd(matrix, full_matrices=False)
    edge = matrix.shape[0] ** 0.5 + matrix.shape[1] ** 0.5
    return Span(basis_KM=basis[: int((values > edge).sum())], map_MD=map_MD, num_rows=min(matrix.shape))


def _distance(spans: Sequence[Span], inputs: torch.Tensor) -> torch.Tensor:
    """How far each unit input, of shape (..., D), lies outside the nearest span that says anything.

    It is 1 if no span does, and for an input of zero (a padding token's), which leaves no trace anywhere. By Pythagoras in float64 it is
    good to 1e-7.
    """
    distance = torch.ones(inputs.shape[:-1], dtype=torch.float64)
    for span in spans:
        if not span.is_informative:
            continue
        x = inputs if span.map_MD is None else inputs @ span.map_MD.T
        square = x.square().sum(dim=-1)
        outside = (square - (x @ span.basis_KM.T).square().sum(dim=-1)).clamp(min=0.0)
        distance = torch.minimum(distance, torch.where(square > 0, (outside / square).sqrt(), 1.0))
    return distance


@dataclass(frozen=True)
class _Path:
    """A prefix, the largest distance on its way, and the unit second-layer inputs of all its tokens."""

    worst: float
    ids: tuple[int, ...]
    inputs_TD: torch.Tensor


def _sequences(
    lm: LanguageModel, spans: Sequence[Span], token_ids: Sequence[int], *, opening: Sequence[int], module: str, settings: InversionSettings
) -> tuple[tuple[int, ...], ...]:
    """Prefixes grown token by token while the second layer's input stays in its span; those that nothing extends, longest first."""
    if not token_ids or not any(span.is_informative for span in spans):
        return ()
    paths, finished = [_opening_path(lm, opening, module=module)], list[_Path]()
    while paths and len(paths[0].ids) < settings.max_length:
        prefix_WT = torch.tensor([path.ids for path in paths], dtype=torch.long)
        inputs_WND = continuation_inputs(lm, prefix_WT, torch.tensor(token_ids), module=module)
        extended = []
        for path, inputs_ND in zip(paths, inputs_WND, strict=True):
            longer = _extensions(path, inputs_ND, spans, token_ids, threshold=settings.sequence_threshold)
            extended += longer
            if not longer and len(path.ids) > len(opening):
                finished.append(path)
        paths = sorted(extended, key=lambda path: (path.worst, path.ids))[: settings.beam_width]
    return tuple(path.ids for path in sorted(finished + paths, key=lambda path: (-len(path.ids), path.worst)))


def _opening_path(lm: LanguageModel, opening: Sequence[int], *, module: str) -> _Path:
    length = len(opening)
    if not length:
        return _Path(0.0, (), torch.zeros(0, lm.model.config.hidden_size, dtype=torch.float64))
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    inputs = module_inputs(lm, torch.tensor([opening]), module=module, visible=visible, positions=torch.arange(length))[0]
    return _Path(0.0, tuple(opening), _unit(inputs))


def _extensions(path: _Path, inputs_ND: torch.Tensor, spans: Sequence[Span], token_ids: Sequence[int], *, threshold: float) -> list[_Path]:
    """The path with each candidate that lies in the span and is new to it: an input it has had already would extend it for ever."""
    unit_ND = _unit(inputs_ND)
    distance_N = _distance(spans, inputs_ND)
    repeated_N = (torch.cdist(unit_ND, path.inputs_TD) < threshold).any(dim=1)
    return [
        _Path(max(path.worst, float(distance_N[n])), (*path.ids, token_ids[n]), torch.cat([path.inputs_TD, unit_ND[n : n + 1]]))
        for n in ((distance_N < threshold) & ~repeated_N).nonzero().flatten().tolist()
    ]


def _unit(inputs: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(inputs, dim=-1)


def continuation_inputs(lm: LanguageModel, prefix_WT: torch.Tensor, candidate_N: torch.Tensor, *, module: str) -> torch.Tensor:
    """What `module` gets at each candidate token when it follows each prefix, float64 of shape (W, N, D).

    Equal to one forward pass for each prefix with each candidate. Here the candidates stand side by side behind the prefix, all at the
    position that follows it, and each sees the prefix and itself.
    """
    num_prefixes, length, num_candidates = *prefix_WT.shape, len(candidate_N)
    ids = torch.cat([prefix_WT, candidate_N.expand(num_prefixes, -1)], dim=1)
    visible = torch.ones(length + num_candidates, length + num_candidates, dtype=torch.bool).tril()
    visible[length:, length:] = torch.eye(num_candidates, dtype=torch.bool)
    positions = torch.cat([torch.arange(length), torch.full((num_candidates,), length)])
    return module_inputs(lm, ids, module=module, visible=visible, positions=positions)[:, length:]


class _Seen(Exception):
    """Ends a forward pass where nothing further is needed."""


@contextmanager
def _stopping_at(lm: LanguageModel, module: str, seen: list[torch.Tensor]) -> Iterator[None]:
    """While open, a forward pass ends before `module`, whose input is left in `seen`."""

    def stop(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Seen

    handle = lm.model.get_submodule(module).register_forward_pre_hook(stop)
    try:
        yield
    except _Seen:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def module_inputs(lm: LanguageModel, ids: torch.Tensor, *, module: str, visible: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The input of `module` for rows of token ids, float64, where `visible[i, j]` says that i sees j and `positions` where each stands."""
    mask = additive_mask(visible, torch.float32).to(lm.device)
    seen: list[torch.Tensor] = []
    with _stopping_at(lm, module, seen), lm.autocast():
        lm.model.get_base_model()(
            input_ids=ids.to(lm.device),
            attention_mask=mask.expand(len(ids), 1, -1, -1),
            position_ids=positions.expand(len(ids), -1).to(lm.device),
            use_cache=False,
        )
    return seen[0].double().cpu()


def _vocabulary_inputs(lm: LanguageModel, *, module: str) -> Iterator[torch.Tensor]:
    """The first layer's input for every token of the vocabulary, in chunks of shape (VOCABULARY_CHUNK, D)."""
    size = min(len(lm.tokenizer), lm.vocab_size)
    alone = torch.ones(1, 1, dtype=torch.bool)
    for start in range(0, size, VOCABULARY_CHUNK):
        ids = torch.arange(start, min(start + VOCABULARY_CHUNK, size)).unsqueeze(1)
        yield module_inputs(lm, ids, module=module, visible=alone, positions=torch.zeros(1, dtype=torch.long))[:, 0]


def _refuse_positions(lm: LanguageModel, *, module: str) -> None:
    """Raises if one token gives the first layer different inputs at two positions."""
    twice = torch.full((1, 2), (lm.pad_token_id + 1) % min(len(lm.tokenizer), lm.vocab_size))
    inputs = module_inputs(lm, twice, module=module, visible=torch.ones(2, 2, dtype=torch.bool).tril(), positions=torch.arange(2))[0]
    if float((inputs[0] - inputs[1]).norm()) > 1e-3 * float(inputs[0].norm()):
        raise ValueError("model.name: the position enters the first layer's input of this model; the attack serves rotary positions only")


def template_opening(tokenizer: Any, *, chat: ChatFormat) -> tuple[int, ...]:
    """The token ids that the chat template puts before every first instruction: public, as the template is."""
    one, other = (encode_chat(tokenizer, [("user", text)], chat=chat) for text in ("a", "1"))
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return tuple(token for token, _ in shared)


# --- the client, who is attacked


def client_gradient(lm: LanguageModel, adapter: Vector, examples: Sequence[Example]) -> Vector:
    """The gradient of the mean loss over response tokens at `adapter`, float32 of shape (P,): minus an SGD update over its learning rate."""
    lm.set_adapter(adapter)
    lm.model.eval()
    lm.flat_grad.zero_()
    nll_B, count_B = response_nll(lm, examples)
    (nll_B.sum() / count_B.sum()).backward()  # type: ignore[no-untyped-call]  # untyped in torch
    gradient = lm.flat_grad.detach().to("cpu", copy=True).numpy()
    lm.flat_grad.zero_()
    return gradient


def trained_looking_adapter(layout: Layout, *, b_std: float, seed: int) -> Vector:
    """A fresh adapter with B drawn from N(0, b_std^2) in place of zero, as B is no longer zero after the first round."""
    adapter = initial_adapter(layout, seed=seed)
    mask = layout.group_mask("B")
    adapter[mask] = b_std * numpy_rng(seed, "inversion", "B").standard_normal(int(mask.sum()))
    return adapter


# --- how much was recovered


@dataclass(frozen=True)
class InversionScore:
    """How much of the client's examples came back; what the public beginning holds counts for nothing."""

    token_recall: float
    """Share of the examples' distinct tokens that were named."""
    token_precision: float
    """Share of the named tokens that are in the examples; 0 where none was named."""
    nearest_recall: float
    """Share of the distinct tokens among as many nearest ones as there are of them, where the span tells tokens apart: it needs no threshold."""
    rouge_1: float
    """Overlap F-measure in tokens with the nearest recovered sequence, mean over the examples."""
    rouge_l: float
    """ROUGE-L of the text with the nearest recovered sequence's, mean over the examples."""
    exact_match: float
    """Share of the examples recovered whole, but for their last token, which no gradient holds."""


def score_inversion(inversion: Inversion, examples: Sequence[Example], *, opening: Sequence[int], tokenizer: Any) -> InversionScore:
    """The attack's figures against the true `examples`.

    Errors: ValueError if an example does not start with `opening`.
    """
    whole = [(*example.prompt_ids, *example.response_ids) for example in examples]
    if any(ids[: len(opening)] != tuple(opening) for ids in whole):
        raise ValueError(f"opening: an example does not start with these {len(opening)} tokens; give what all of them share")
    public = set(opening)
    truth = {token for ids in whole for token in ids} - public
    named = set(inversion.token_ids) - public
    ranked = [token for token in inversion.distance_V.argsort(stable=True).tolist() if token not in public]
    nearest = {token for token in ranked[: len(truth)] if inversion.distance_V[token] < 1.0}
    bodies = [ids[len(opening) :] for ids in whole]
    found = [sequence[len(opening) :] for sequence in inversion.sequences]
    texts = [_text(tokenizer, ids) for ids in found]
    return InversionScore(
        token_recall=len(named & truth) / max(len(truth), 1),
        token_precision=len(named & truth) / max(len(named), 1),
        nearest_recall=len(nearest & truth) / max(len(truth), 1),
        rouge_1=float(np.mean([max((_overlap(ids, body) for ids in found), default=0.0) for body in bodies])),
        rouge_l=float(np.mean([largest_rouge_l(_text(tokenizer, body), texts) for body in bodies])),
        exact_match=float(np.mean([body[:-1] in found for body in bodies])),
    )


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _overlap(candidate: Sequence[int], reference: Sequence[int]) -> float:
    common = sum((Counter(candidate) & Counter(reference)).values())
    return 2 * common / (len(candidate) + len(reference))


def inversion_sweep(
    build: Callable[[int], LanguageModel],
    examples: Sequence[Example],
    *,
    opening: Sequence[int],
    ranks: Sequence[int],
    batch_sizes: Sequence[int],
    noise_multipliers: Sequence[float],
    b_std: float,
    seed: int,
    settings: InversionSettings,
) -> list[dict[str, Any]]:
    """One row for each rank, batch size and noise multiplier: what the attack makes of one client's gradient.

    `build` gives the model with an adapter of a rank; a batch is the first so many examples. The update is the gradient at an adapter
    whose B is N(0, b_std^2), and zero where `b_std` is 0. The clip is the gradient's own norm, so that the update passes whole, which is
    the attacker's best case; noise of standard deviation multiplier times clip is added to each coordinate, and the attacker knows it.
    """
    rows: list[dict[str, Any]] = []
    for rank in ranks:
        lm = build(rank)
        adapter = trained_looking_adapter(lm.layout, b_std=b_std, seed=seed)
        for batch_size in batch_sizes:
            batch = examples[:batch_size]
            gradient = client_gradient(lm, adapter, batch)
            for multiplier in noise_multipliers:
                std = multiplier * l2_norm(gradient)
                noise = gaussian(len(gradient), std=std, seed=seed_for(seed, "inversion", "noise", rank, batch_size), secure=False)
                known = replace(settings, entry_error=settings.entry_error + std)
                inversion = invert_update(lm, ServerView(adapter, gradient + noise), opening=opening, settings=known)
                score = score_inversion(inversion, batch, opening=opening, tokenizer=lm.tokenizer)
                rows.append(_row(rank, batch, multiplier, settings.factor, inversion, score))
    return rows


def _row(
    rank: int, batch: Sequence[Example], multiplier: float, factor: str, inversion: Inversion, score: InversionScore
) -> dict[str, Any]:
    return {
        "rank": rank,
        "batch": len(batch),
        "noise": multiplier,
        "factor": factor,
        "distinct_tokens": len({token for example in batch for token in (*example.prompt_ids, *example.response_ids)}),
        "span_dim": inversion.span_dimension,
        "sequence_dim": inversion.sequence_dimension,
        "num_rows": inversion.num_rows,
        "num_candidates": len(inversion.token_ids),
        "num_sequences": len(inversion.sequences),
        **{name: float(value) for name, value in vars(score).items()},
    }
