"""The record: one instruction with its reference response, and what partition, split and attack need to know about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One instruction-response pair."""

    record_id: int
    """Position in the source, from 0."""
    instruction: str
    """What is asked, with any further input after a blank line."""
    response: str
    """Reference response."""
    label: str = ""
    """Label by which partitions split; empty where the source has none."""
    details: tuple[str, ...] = ()
    """Private strings that the response has and the instruction has not."""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns of a conversation, each `(role, text)` with the role `system`, `user` or `assistant`; a system turn comes first.
    `instruction` is the last turn of the user, and `response` the assistant's answer to it."""
    group: str = ""
    """Records of one group stay on one side of the train/held-out split; empty for a group of its own."""

    @property
    def answers(self) -> list[str]:
        """All that the assistant says: its earlier turns, then the response."""
        return [*(text for role, text in self.history if role == "assistant"), self.response]
