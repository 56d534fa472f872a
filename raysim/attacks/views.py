"""Who sees what: the curious parties of a federation, and the views that their attacks are given.

All follow the protocol and look at what passes through their hands (honest but curious). `SEES` is that threat model in words, for
reports. The classes carry it for the client and the server: their attacks take that view and what is public, and nothing else of a run.
Left out: parties that send false messages, coalitions of several, and what timing or sizes of messages tell.
"""

from dataclasses import dataclass

from raysim.data.tokens import Example
from raysim.lora.layout import Vector

PUBLIC = "the base model with its tokenizer and chat template, and the settings of the run"
"""What everyone knows."""
SEES: dict[str, tuple[str, ...]] = {
    "client": ("its own records", "the release that the server sends it"),
    "server": (
        "the adapter that it sent",
        "each client's message as it arrives: with noise where clients add it, and only the sum of a chunk where sums are masked",
    ),
    "insider": ("the last release", "the true prompts of training records, and any prefix of the responses that it is given"),
    "auditor": (
        "the first and the last release",
        "the canaries and the candidate records, whole",
        "what a client with gradient canaries sends in every round, as the server that its guarantee holds against sees it",
    ),
}
"""What each party sees beside what is public. An insider knows what was asked of a client; an auditor is given everything a test needs."""
ATTACKS: tuple[tuple[str, str, str], ...] = (
    ("extraction", "insider", "asks for the responses of training records by their prompts"),
    ("extraction across clients", "client", "asks for what follows the words that stand before its own private details"),
    ("gradient inversion", "server", "reads the tokens of a client's records out of its message"),
    ("membership inference", "auditor", "tells training records from others by their loss"),
    ("canaries", "auditor", "ranks secrets that were put into shards, or tells which canaries took part"),
)
"""Each attack, whose it is, and what it does."""


@dataclass(frozen=True)
class ClientView:
    """What a client that attacks has."""

    own: tuple[Example, ...]
    """Its own training examples."""
    release: Vector
    """The adapter that the server sent, float32 of shape (parameters,)."""


@dataclass(frozen=True)
class ServerView:
    """What a server that only looks has of one message."""

    sent: Vector
    """The adapter that the client started from, float32 of shape (parameters,)."""
    update: Vector
    """What came back less what was sent, or a gradient of the factors in any scale, of the same shape."""
