"""Conversations of chat sets: a list of turns as `messages` (`role`, `content`) or as ShareGPT writes them (`from`, `value`).

A conversation is one record, since a record is what privacy protects, and not one for each of its turns.
Left out: calls of tools, pictures and sounds, and thoughts kept beside the content; they are refused by name.
"""

from dataclasses import dataclass
from typing import Any

from raysim.data.values import MAX_CHARACTERS, kind_of, listed, named, text_of

Turn = tuple[str, str]

CHAT_FIELDS = ("messages", "conversations")
"""Names under which chat sets keep their conversations."""

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
"""What the sets call those who speak."""

KEYS = (("role", "content"), ("from", "value"))
NOT_READ = ("tool_calls", "function_call", "reasoning_content", "thinking", "images", "audio")
"""What stands beside a turn's content in some sets and would be lost."""


@dataclass(frozen=True)
class Conversation:
    """A conversation as a record has it: the last turn of the user, its answer, and the turns before."""

    history: tuple[Turn, ...]
    instruction: str
    response: str
    num_cut: int
    """Turns left out: the assistant's before the user first speaks, and the user's after the last answer."""


def read_conversation(value: Any, *, at: str) -> Conversation | None:
    """The conversation in the field that `at` names; None if no question in it is answered, or a turn of the user or the assistant is empty.

    Neighbouring turns of one role become one, with a blank line between them. An empty system turn is none.
    Errors: ValueError naming the field and the turn for a form or a role that is not known, a system turn that is not the first,
    anything but texts, and more than `MAX_CHARACTERS` in all.
    """
    turns = [_turn(turn, at=f"{at}: turn {number}") for number, turn in enumerate(_turns(value, at=at), 1)]
    turns = [(role, text) for role, text in turns if text or role != "system"]
    if not all(text for _, text in turns):
        return None
    turns = _merged(turns)
    if sum(len(text) for _, text in turns) > MAX_CHARACTERS:
        raise ValueError(f"{at} has more than {MAX_CHARACTERS:,} characters in all; shorten or remove the record")
    system, spoken = (turns[:1], turns[1:]) if turns and turns[0][0] == "system" else ([], turns)
    if any(role == "system" for role, _ in spoken):
        raise ValueError(f"{at} has a system turn that is not the first; move it there or remove the record")
    answered = spoken[1:] if spoken and spoken[0][0] == "assistant" else spoken
    answered = answered[: len(answered) - len(answered) % 2]  # merged turns alternate, so that an odd one is a last question
    if not answered:
        return None
    return Conversation((*system, *answered[:-2]), answered[-2][1], answered[-1][1], num_cut=len(spoken) - len(answered))


def _turns(value: Any, *, at: str) -> list[Any]:
    """The turns of a list, or of an object of equally long lists (as tables keep a list of objects)."""
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return value
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    raise ValueError(f"{at} holds {kind_of(value)}, not a list of turns")


def _turn(turn: Any, *, at: str) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError(f"{at} is {kind_of(turn)}, not an object with role and content (or from and value)")
    keys = next(((who, text) for who, text in KEYS if turn.get(who) is not None), None)
    if keys is None or keys[1] not in turn:
        raise ValueError(f"{at} lacks role and content (or from and value); it has {listed(turn) or 'nothing'}")
    for name in NOT_READ:
        if turn.get(name):
            raise ValueError(f"{at} has {name!r}, which is not read; remove it, or remove the record")
    name = text_of(turn[keys[0]], field=keys[0], at=at)
    if ROLES.get(name.lower()) == "assistant" and turn.get("weight") == 0:
        raise ValueError(f"{at} is the assistant's and has the weight 0, which is not read; remove the weight, or remove the record")
    if name.lower() not in ROLES:
        raise ValueError(f"{at} has the role {name!r}, which is none of {', '.join(ROLES)}; rename it, or remove the record")
    return ROLES[name.lower()], _content(turn[keys[1]], field=keys[1], at=at)


def _content(content: Any, *, field: str, at: str) -> str:
    """The text of a turn; of a content in parts, the texts of all, a line each."""
    if not isinstance(content, list):
        return text_of(content, field=field, at=at)
    texts = []
    for part in content:
        kind = part.get("type") or "text" if isinstance(part, dict) else "text"
        if kind != "text":
            raise ValueError(f"{named(field, at)} has a part of type {kind!r}, and only texts are read; remove it, or remove the record")
        texts.append(text_of(part.get("text") if isinstance(part, dict) else part, field=field, at=at))
    return "\n".join(text for text in texts if text)


def _merged(turns: list[Turn]) -> list[Turn]:
    merged: list[Turn] = []
    for role, text in turns:
        if merged and merged[-1][0] == role:
            merged[-1] = (role, f"{merged[-1][1]}\n\n{text}")
        else:
            merged.append((role, text))
    return merged
