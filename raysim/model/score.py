"""What a language model makes of several continuations of one prompt, with the prompt read once for all of them.

A row is a prompt and its branches, laid out behind one another: every branch takes the positions that follow the prompt, and sees
the prompt and itself, so that its tokens are scored as if the other branches were not there. What all prompts begin with is read once too.
Where a model's attention does not allow that (see `base.has_plain_attention`), each branch is scored behind a copy of its prompt.
Left out: gradients.

Shapes: B rows of a batch, T columns (what is left of a prompt, then its branches), S columns of the shared beginning, C = S + T,
V vocabulary, N scored positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from raysim.model.kv_cache import KeysValues, additive_mask, cache_of, common_prefix, has_plain_attention, read_alone
from raysim.model.language_model import LanguageModel

Found = tuple[int, int, int]


class Pick(Protocol):
    """Which columns of a branch are looked at."""

    def __call__(self, branch: tuple[int, ...], *, last_of_prompt: int, start: int) -> list[int]:
        """Columns, for a branch that starts at `start` behind a prompt that ends at `last_of_prompt`."""


MIN_SHARED = 16
"""A shorter common beginning is not worth a pass of its own."""


@dataclass(frozen=True)
class Branches:
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
def branch_nlls(lm: LanguageModel, rows: Sequence[Branches], *, batch_size: int) -> list[list[float]]:
    """The negative log-likelihood (nats) of each branch after its row's prompt, summed over its tokens, in order.

    Guarantees: in float32 equal, up to last bits, to scoring each prompt and branch alone; no other row and no batch size changes more.
    Errors: ValueError for a row that does not fit the context, or an empty prompt or branch.
    """
    results = [[0.0] * len(row.branches) for row in rows]
    for found, logits_NV in _passes(lm, rows, batch_size=batch_size, pick=_scored_places):
        tokens = [rows[index].branches[number][place] for index, number, place in found]
        nll_N = F.cross_entropy(logits_NV, torch.tensor(tokens, device=lm.device), reduction="none")
        for (index, number, _), nll in zip(found, nll_N.double().tolist(), strict=True):
            results[index][number] += nll
    return results


@torch.no_grad()
def next_token_logprobs(
    lm: LanguageModel, rows: Sequence[Branches], token_ids: Sequence[int], *, batch_size: int
) -> list[NDArray[np.float64]]:
    """The log-probabilities (nats) of `token_ids` as the next token after each branch: for each row one array (branches, tokens).

    Guarantees and errors as of `branch_nlls`.
    """
    results = [np.empty((len(row.branches), len(token_ids))) for row in rows]
    for found, logits_NV in _passes(lm, rows, batch_size=batch_size, pick=_last_places):
        logprobs_NK = logits_NV.double().log_softmax(-1)[:, list(token_ids)].cpu().numpy()
        for (index, number, _), logprobs_K in zip(found, logprobs_NK, strict=True):
            results[index][number] = logprobs_K
    return results


def _scored_places(branch: tuple[int, ...], *, last_of_prompt: int, start: int) -> list[int]:
    """The columns whose next token is each of the branch's, for a branch that starts at the column `start`."""
    return [last_of_prompt, *range(start, start + len(branch) - 1)]


def _last_places(branch: tuple[int, ...], *, last_of_prompt: int, start: int) -> list[int]:
    """The column of the branch's last token."""
    return [start + len(branch) - 1]


def _passes(lm: LanguageModel, rows: Sequence[Branches], *, batch_size: int, pick: Pick) -> Iterator[tuple[list[Found], torch.Tensor]]:
    """For each batch what was looked at, `(row, branch, which of the branch's picked columns)`, and the float32 logits NV there."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    _check(lm, rows)
    lm.model.eval()
    parts = [(index, 0, row) for index, row in enumerate(rows)]
    if plain := has_plain_attention(lm.model.get_base_model(), longest=max((row.longest for row in rows), default=0)):
        shared = _common_beginning(rows)
        with lm.autocast():
            memory = read_alone(lm.model, shared)[0] if shared else []
    else:
        parts = [
            (index, number, Branches(row.prompt_ids, (branch,))) for index, _, row in parts for number, branch in enumerate(row.branches)
        ]
        shared, memory = (), []
    parts.sort(key=lambda part: part[2].num_tokens)
    for start in range(0, len(parts), batch_size):
        batch = parts[start : start + batch_size]
        layouts = [_lay_out(row, num_shared=len(shared)) for _, _, row in batch]
        found: list[Found] = []
        places: list[tuple[int, int]] = []
        for b, ((index, first, row), layout) in enumerate(zip(batch, layouts, strict=True)):
            for number, (branch, column) in enumerate(zip(row.branches, layout.starts, strict=True), start=first):
                columns = pick(branch, last_of_prompt=layout.starts[0] - 1, start=column)
                places += [(b, column) for column in columns]
                found += [(index, number, place) for place in range(len(columns))]
        yield found, _forward(lm, layouts, places, shared=len(shared), memory=memory, plain=plain)


def _check(lm: LanguageModel, rows: Sequence[Branches]) -> None:
    for index, row in enumerate(rows):
        if not row.prompt_ids or not row.branches or not all(row.branches):
            raise ValueError(f"rows[{index}] has an empty prompt or branch, or no branch; each needs at least 1 token")
        if row.longest > lm.max_positions:
            raise ValueError(
                f"rows[{index}] takes {row.longest} tokens, but the model's context is max_position_embeddings={lm.max_positions}; "
                "shorten the texts or take a model with a longer context"
            )


def _common_beginning(rows: Sequence[Branches]) -> tuple[int, ...]:
    """What all prompts begin with, less than the whole of any of them; empty where it is short or there is one row only."""
    shared = common_prefix([row.prompt_ids for row in rows])
    return tuple(shared) if len(shared) >= MIN_SHARED else ()


@dataclass(frozen=True)
class _Layout:
    """A row less the shared beginning: its tokens, their positions, the branch each belongs to (0: the prompt), and where branches start."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    starts: list[int]


def _lay_out(row: Branches, *, num_shared: int) -> _Layout:
    ids, length = list(row.prompt_ids[num_shared:]), len(row.prompt_ids)
    positions, segments, starts = list(range(num_shared, length)), [0] * len(ids), []
    for number, branch in enumerate(row.branches, start=1):
        starts.append(len(ids))
        ids += branch
        positions += range(length, length + len(branch))
        segments += [number] * len(branch)
    return _Layout(ids, positions, segments, starts)


def _forward(
    lm: LanguageModel,
    layouts: Sequence[_Layout],
    places: Sequence[tuple[int, int]],
    *,
    shared: int,
    memory: list[KeysValues],
    plain: bool,
) -> torch.Tensor:
    """Float32 logits NV of the next token at `places`, each a row of the batch and a column, of a batch padded on the right.

    Without `plain` attention a row is a text as any model reads it, and the model's own mask and positions serve.
    """
    width = max(len(layout.ids) for layout in layouts)

    def padded(name: str, filler: int) -> torch.Tensor:
        rows = [getattr(layout, name) for layout in layouts]
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=lm.device)

    ids_BT, positions_BT, segments_BT = padded("ids", lm.pad_token_id), padded("positions", 0), padded("segments", -1)
    row_N, column_N = torch.tensor(places, device=lm.device).T
    inputs: dict[str, Any] = {"use_cache": bool(memory)}
    if plain:
        inputs |= {"attention_mask": _mask(segments_BT, shared=shared, dtype=lm.compute_dtype), "position_ids": positions_BT}
    if memory:
        num_rows = len(layouts)
        inputs["past_key_values"] = cache_of(
            (keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1)) for keys, values in memory
        )
    return lm.logits_at(ids_BT, row_N, column_N, **inputs).float()


def _mask(segments_BT: torch.Tensor, *, shared: int, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask B1TC: a token sees the shared beginning, and of what is not after it the prompt and its own branch."""
    earlier_TT = torch.ones(segments_BT.shape[1], segments_BT.shape[1], dtype=torch.bool, device=segments_BT.device).tril()
    seen_B1T, seeing_BT1 = segments_BT[:, None, :], segments_BT[:, :, None]
    allowed_BTT = earlier_TT & ((seen_B1T == 0) | (seen_B1T == seeing_BT1))
    return additive_mask(F.pad(allowed_BTT, (shared, 0), value=True), dtype)[:, None]
