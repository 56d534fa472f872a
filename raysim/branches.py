"""What a language model makes of several continuations of one prompt, with the prompt read once for all of them.

A row is a prompt and its branches, laid out behind one another: every branch takes the positions that follow the prompt, and sees
the prompt and itself, so that its tokens are scored as if the other branches were not there. What all prompts begin with is read once too.
Left out: layers with other than full attention (refused), and gradients.

Shapes: B rows of a batch, T columns (what is left of a prompt, then its branches), S columns of the shared beginning, C = S + T,
D hidden size, V vocabulary, N scored positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers.cache_utils import DynamicCache, DynamicLayer

from raysim.base import LanguageModel

MIN_SHARED = 16
"""A shorter common beginning is not worth a pass of its own."""


@dataclass(frozen=True)
class Row:
    """A prompt and the token sequences that may follow it; none of them is empty."""

    prompt_ids: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Columns that the row takes."""
        return len(self.prompt_ids) + sum(map(len, self.branches))

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest branch: what the model's context must hold."""
        return len(self.prompt_ids) + max(map(len, self.branches))


@torch.no_grad()
def branch_nlls(lm: LanguageModel, rows: Sequence[Row], *, batch_size: int) -> list[list[float]]:
    """The negative log-likelihood (nats) of each branch after its row's prompt, summed over its tokens, in order.

    Guarantees: in float32 equal, up to last bits, to scoring each prompt and branch alone; no other row and no batch size changes more.
    Errors: ValueError for a row that does not fit the context, an empty prompt or branch, or a model with other than full attention.
    """
    results: list[list[float]] = [[] for _ in rows]
    for batch, hidden_BTD, starts in _passes(lm, rows, batch_size=batch_size):
        places: list[tuple[int, int]] = []
        tokens: list[int] = []
        owners: list[tuple[int, int]] = []
        for b, index in enumerate(batch):
            for branch, start in zip(rows[index].branches, starts[b], strict=True):
                before = [_last_of_prompt(starts[b]), *range(start, start + len(branch) - 1)]
                places += [(b, column) for column in before]
                tokens += branch
                owners += [(index, len(results[index]))] * len(branch)
                results[index].append(0.0)
        nll_N = F.cross_entropy(_logits(lm, hidden_BTD, places), torch.tensor(tokens, device=lm.device), reduction="none")
        for (index, number), nll in zip(owners, nll_N.double().tolist(), strict=True):
            results[index][number] += nll
    return results


@torch.no_grad()
def next_token_logprobs(lm: LanguageModel, rows: Sequence[Row], token_ids: Sequence[int], *, batch_size: int) -> list[NDArray[np.float64]]:
    """The log-probabilities (nats) of `token_ids` as the next token after each branch: for each row one array (branches, tokens).

    Guarantees and errors as of `branch_nlls`.
    """
    results: list[NDArray[np.float64]] = [np.empty((0, len(token_ids)))] * len(rows)
    for batch, hidden_BTD, starts in _passes(lm, rows, batch_size=batch_size):
        for b, index in enumerate(batch):
            ends = [start + len(branch) - 1 for branch, start in zip(rows[index].branches, starts[b], strict=True)]
            logprobs_NV = _logits(lm, hidden_BTD, [(b, column) for column in ends]).double().log_softmax(-1)
            results[index] = logprobs_NV[:, list(token_ids)].cpu().numpy()
    return results


def _passes(lm: LanguageModel, rows: Sequence[Row], *, batch_size: int) -> Iterator[tuple[list[int], torch.Tensor, list[list[int]]]]:
    """For each batch: the indices of its rows, their last hidden states BTD, and the columns at which each row's branches start."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    _check(lm, rows)
    lm.model.eval()
    shared = _common_beginning(rows)
    memory = _read_shared(lm, shared)
    order = sorted(range(len(rows)), key=lambda i: rows[i].num_tokens)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        layouts = [_lay_out(rows[index], num_shared=len(shared)) for index in batch]
        hidden_BTD = _forward(lm, layouts, shared=len(shared), memory=memory)
        yield batch, hidden_BTD, [layout.starts for layout in layouts]


def _check(lm: LanguageModel, rows: Sequence[Row]) -> None:
    for index, row in enumerate(rows):
        if not row.prompt_ids or not row.branches or not all(row.branches):
            raise ValueError(f"rows[{index}] has an empty prompt or branch, or no branch; each needs at least 1 token")
        if row.longest > lm.max_positions:
            raise ValueError(
                f"rows[{index}] takes {row.longest} tokens, but the model's context is max_position_embeddings={lm.max_positions}; "
                "shorten the texts or take a model with a longer context"
            )
    others = {type(layer).__name__ for layer in DynamicCache(config=lm.model.config).layers if type(layer) is not DynamicLayer}
    if others:
        raise ValueError(
            f"model_type={lm.model.config.model_type!r} has layers that need {', '.join(sorted(others))}; only full attention is supported"
        )


def _common_beginning(rows: Sequence[Row]) -> tuple[int, ...]:
    """What all prompts begin with, less than the whole of any of them; empty where it is short or there is one row only."""
    if len(rows) < 2:
        return ()
    prompts = [row.prompt_ids[:-1] for row in rows]
    # What the first and the last in lexical order share, all between them share.
    shared = tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts), strict=False)))
    return shared if len(shared) >= MIN_SHARED else ()


def _read_shared(lm: LanguageModel, shared: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values (1, heads, S, head size) of each layer for the shared beginning."""
    if not shared:
        return []
    cache = DynamicCache(config=lm.model.config)
    with lm.autocast():
        lm.model.get_base_model().get_decoder()(  # type: ignore[operator]  # torch types any attribute as a tensor
            input_ids=torch.tensor([shared], device=lm.device), past_key_values=cache, use_cache=True
        )
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc, union-attr]  # `_check` has seen that every layer is a plain one


@dataclass(frozen=True)
class _Layout:
    """A row less the shared beginning: its tokens, their positions, the branch each belongs to (0: the prompt), and where branches start."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    starts: list[int]


def _lay_out(row: Row, *, num_shared: int) -> _Layout:
    ids, length = list(row.prompt_ids[num_shared:]), len(row.prompt_ids)
    positions, segments, starts = list(range(num_shared, length)), [0] * len(ids), []
    for number, branch in enumerate(row.branches, start=1):
        starts.append(len(ids))
        ids += branch
        positions += range(length, length + len(branch))
        segments += [number] * len(branch)
    return _Layout(ids, positions, segments, starts)


def _last_of_prompt(starts: list[int]) -> int:
    return starts[0] - 1


def _forward(
    lm: LanguageModel, layouts: Sequence[_Layout], *, shared: int, memory: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """The last hidden states BTD of a batch, padded on the right."""
    width = max(len(layout.ids) for layout in layouts)

    def padded(name: str, filler: int) -> torch.Tensor:
        rows = [getattr(layout, name) for layout in layouts]
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=lm.device)

    ids_BT, positions_BT, segments_BT = padded("ids", lm.pad_token_id), padded("positions", 0), padded("segments", -1)
    cache = DynamicCache(config=lm.model.config)
    for number, (keys, values) in enumerate(memory):
        cache.update(keys.expand(len(layouts), -1, -1, -1), values.expand(len(layouts), -1, -1, -1), number)
    with lm.autocast():
        output = lm.model.get_base_model().get_decoder()(  # type: ignore[operator]  # torch types any attribute as a tensor
            input_ids=ids_BT,
            attention_mask=_mask(segments_BT, shared=shared, dtype=lm.compute_dtype),
            position_ids=positions_BT,
            past_key_values=cache if memory else None,
            use_cache=bool(memory),
        )
    hidden_BTD: torch.Tensor = output.last_hidden_state
    return hidden_BTD


def _mask(segments_BT: torch.Tensor, *, shared: int, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask B1TC: a token sees the shared beginning, and of what is not after it the prompt and its own branch."""
    earlier_TT = torch.ones(segments_BT.shape[1], segments_BT.shape[1], dtype=torch.bool, device=segments_BT.device).tril()
    seen_B1T, seeing_BT1 = segments_BT[:, None, :], segments_BT[:, :, None]
    allowed_BTT = earlier_TT & ((seen_B1T == 0) | (seen_B1T == seeing_BT1))
    allowed_BTC = F.pad(allowed_BTT, (shared, 0), value=True)
    return torch.zeros(allowed_BTC.shape, dtype=dtype, device=segments_BT.device).masked_fill_(~allowed_BTC, torch.finfo(dtype).min)[
        :, None
    ]


def _logits(lm: LanguageModel, hidden_BTD: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Float32 logits NV of the next token at `places`, each a row of the batch and a column."""
    rows_N, columns_N = torch.tensor(places, device=lm.device).T
    with lm.autocast():
        logits_NV = lm.model.get_base_model().get_output_embeddings()(hidden_BTD[rows_N, columns_N])  # type: ignore[operator]  # as above
    return logits_NV.float()  # type: ignore[no-any-return]  # untyped in torch
