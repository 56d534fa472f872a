"""What a model wrote, as text: a limit on tokens can end it within a character, since one may take several tokens."""

from collections.abc import Sequence
from typing import Any

CUT = "\ufffd"
"""What tokenizers write for bytes that are no whole character."""
LONGEST = 4
"""Bytes of a character, at most."""


def written_text(tokenizer: Any, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
    """The text of the tokens `ids`, which continue those of `after`, without special tokens and without a character that is cut at the end.

    A character that begins in `after` and ends in `ids` counts to `ids`: what was given away ends before it.
    """
    if _decoded(tokenizer, after).endswith(CUT):
        given, both = _whole(tokenizer, after), _whole(tokenizer, [*after, *ids])
        if both.startswith(given):
            return both[len(given) :]
    return _whole(tokenizer, ids)


def _whole(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text without a cut character; where its bytes spoil the whole characters before them, as in Llama's tokenizers, those are kept."""
    text = _decoded(tokenizer, ids)
    if not text.endswith(CUT):
        return text
    shorter = (_decoded(tokenizer, ids[: max(len(ids) - dropped, 0)]) for dropped in range(1, LONGEST))
    return max((one.rstrip(CUT) for one in (text, *shorter)), key=len)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""
