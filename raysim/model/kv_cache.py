"""What a language model remembers of the text it has read: the keys and values of its layers, read, laid out and written in place.

Every cache of the package is made here: one block that rows come and go in (`BlockLayer`, for generation), the memory of a beginning that
rows share, and rows of different length that end at one column.
Left out: caches of models without plain attention, which transformers keeps itself.

Shapes: B rows, H key-value heads, C columns, D head size, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer."""
BLOCK_COLUMNS = 64
"""Columns by which the cache grows when it is full: one copy in so many steps."""


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


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask that attention adds to its scores: 0 where `allowed`, else the least number of `dtype`."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def last_place(tokens_BT: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The last position, as `logits_to_keep`: an index gathers the hidden states, where the number 1 would give the output layer a strided
    view, for which PyTorch copies the layer's weights once a row."""
    return torch.tensor([tokens_BT.shape[1] - 1], device=device)


def read_alone(model: Any, tokens: Sequence[int]) -> tuple[list[KeysValues], torch.Tensor]:
    """Keys and values of each layer, of shape HCD, after one text is read alone, and the logits (V,) of the token that follows it."""
    cache, tokens_1T = DynamicCache(), torch.tensor([tokens], device=model.device)
    keep = last_place(tokens_1T, model.device)
    output = model(input_ids=tokens_1T, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    computed: list[KeysValues] = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer), "a model without plain attention"
        assert layer.keys is not None
        assert layer.values is not None
        computed.append((layer.keys[0], layer.values[0]))
    return computed, output.logits[0, -1]


def common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with, less than the whole of any of them; nothing where there is no second prompt to share it."""
    if len(prompts) < 2:
        return []
    longest = min(len(prompt) for prompt in prompts) - 1
    first, last = list(min(prompts, key=list)), list(max(prompts, key=list))
    # What the first and the last in lexical order share, all between them share.
    differing = (index for index in range(longest) if first[index] != last[index])
    return first[: next(differing, longest)]


def cache_of(layers: Iterable[KeysValues]) -> DynamicCache:
    """A cache that holds these keys and values, of shape BHCD, and grows behind them."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def ending_together(texts: Iterable[tuple[list[int], list[KeysValues]]], *, num_rows: int, width: int) -> DynamicCache:
    """A cache of `width` columns in whose last one all rows end; each of `texts`, read alone, comes with the rows that it fills."""
    blocks: list[torch.Tensor] = []
    for rows, layers in texts:
        parts = [part for layer in layers for part in layer]
        # Zeros, since a masked column still enters a product: 0 times what lies there must be 0.
        blocks = blocks or [part.new_zeros((num_rows, part.shape[0], width, part.shape[2])) for part in parts]
        for block_BHCD, part_HCD in zip(blocks, parts, strict=True):
            block_BHCD[rows, :, width - part_HCD.shape[1] :] = part_HCD
    # A layer's blocks go as the cache takes its copy.
    return cache_of((blocks.pop(0), blocks.pop(0)) for _ in range(len(blocks) // 2))


@dataclass
class Window:
    """Where the forward pass at hand stands in the cache."""

    rows: slice
    """Its rows."""
    first: int
    """The first column it sees."""
    write: slice
    """The columns it writes; it sees no later ones."""
    prefix_starts: list[int]
    """In a prefill, the column at which the shared prefix of each row begins; otherwise empty."""


class BlockLayer(DynamicLayer):
    """Keys and values of one layer in one block of shape BHCD, written in place; attention reads views of it."""

    def __init__(self, window: Window, *, max_rows: int, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in transformers
        self.window = window
        self.max_rows = max_rows
        self.dtype = dtype
        self.prefix: KeysValues | None = None
        """What all rows begin with, each of shape HCD."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (self.max_rows, key_states.shape[1], self.window.write.stop + BLOCK_COLUMNS, key_states.shape[3])
        # Zeros, since a masked column still enters a product: 0 times what lies there must be 0.
        self.keys = torch.zeros(shape, dtype=self.dtype, device=key_states.device)
        self.values = torch.zeros((*shape[:3], value_states.shape[3]), dtype=self.dtype, device=key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, write, seen = self.window.rows, self.window.write, slice(self.window.first, self.window.write.stop)
        keys, values = self._blocks()
        assert write.stop <= keys.shape[2], (write, keys.shape)
        for block, states, prefix in zip((keys, values), (key_states, value_states), self.prefix or (None, None), strict=True):
            block[rows, :, write] = states
            if prefix is not None:
                # After the write, whose padding on the left reaches into the prefix of the shorter rows.
                for row, start in enumerate(self.window.prefix_starts, start=rows.start):
                    block[row, :, start : start + prefix.shape[1]] = prefix
        return keys[rows, :, seen], values[rows, :, seen]

    def move_rows(self, source: list[int], target: list[int], columns: slice) -> None:
        """Copies `columns` of the rows `source` over those of `target`."""
        for block in self._blocks():
            for old, new in zip(source, target, strict=True):
                block[new, :, columns] = block[old, :, columns]

    def relocate(self, *, num_rows: int, columns: slice) -> None:
        """Moves `columns` to the front of a new block that has `BLOCK_COLUMNS` free ones behind them."""
        length = columns.stop - columns.start
        moved = []
        for old in self._blocks():
            new = old.new_zeros((*old.shape[:2], length + BLOCK_COLUMNS, old.shape[3]))
            new[:num_rows, :, :length] = old[:num_rows, :, columns]
            moved.append(new)
        self.keys, self.values = moved

    def _blocks(self) -> KeysValues:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return int(self.window.write.start) - self.window.first
