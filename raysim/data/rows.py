"""A row of a data file as a record: which field is what, what is optional, and what cannot be read.

Left out: fields that no configuration names, whatever they hold.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from raysim.data.conversations import CHAT_FIELDS, Turn, read_conversation
from raysim.data.files import parse_json
from raysim.data.presets import Preset
from raysim.data.records import Record
from raysim.data.similarity import place_of
from raysim.data.values import kind_of, label_of, listed, text_of

OPTIONAL = ("input", "label", "details", "group")
"""What a record may have beside its instruction and its response."""


@dataclass(frozen=True)
class Reading:
    """What was read of a row."""

    at: str
    """Where the row stands."""
    record: Record | None
    missing: str = ""
    """Where and why there is nothing to learn, if there is no record."""
    found: frozenset[str] = frozenset()
    """Which of `OPTIONAL` the row has a field for."""
    num_turns_cut: int = 0
    num_details_left_out: int = 0


class _Said(NamedTuple):
    """What the user and the assistant say; `missing` names an empty field."""

    instruction: str = ""
    response: str = ""
    history: tuple[Turn, ...] = ()
    num_cut: int = 0
    missing: str = ""


def read_row(index: int, values: dict[str, Any], *, at: str, fields: Preset, chat_field: str = "") -> Reading:
    """The record of the row with that position.

    A row without an instruction is a conversation if it has one of `CHAT_FIELDS`, and so is every row if `chat_field` names its field.
    Details are kept where a response has them and nothing that the assistant was told.
    Errors: ValueError naming the row and the field.
    """
    chat = _conversation_field(values, fields=fields, chat_field=chat_field, at=at)
    said = _from_turns(values, chat, fields=fields, at=at) if chat else _from_fields(values, fields=fields, at=at)
    found = frozenset(role for role in OPTIONAL if find(values, fields.names(role)))
    if said.missing:
        return Reading(at, None, missing=f"{at}: {said.missing}", found=found)
    given = _details(values, fields.details, at=at)
    told = [said.instruction, *(text for role, text in said.history if role != "assistant")]
    answers = [said.response, *(text for role, text in said.history if role == "assistant")]
    details = [detail for detail in given if _stands_in(detail, answers) and not _stands_in(detail, told)]
    record = Record(
        index,
        said.instruction,
        said.response,
        label=said.response if fields.labelled else _text(values, fields.label, at=at, read=label_of),
        details=tuple(details),
        history=said.history,
        group=_text(values, fields.group, at=at, read=label_of),
    )
    return Reading(at, record, found=found, num_turns_cut=said.num_cut, num_details_left_out=len(given) - len(details))


def find(values: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any] | None:
    """The first of the alternative fields that a row fills, or else has, with its name; a name with dots is looked up inside objects too."""
    has = [(name, values[name]) if name in values else (name, _inside(values, name)) for name in names]
    filled = [(name, value) for name, value in has if value is not None]
    empty = [(name, None) for name in names if name in values]
    return next(iter([*filled, *empty]), None)


def _inside(values: dict[str, Any], name: str) -> Any:
    value: Any = values
    for part in name.split("."):
        value = value[part] if isinstance(value, dict) and part in value else None
    return value


def lacks(values: dict[str, Any], names: tuple[str, ...], *, at: str, remedy: str = "") -> ValueError:
    """The error of a row that has none of the alternative fields, with those that it has."""
    has = [f"{name}.{inner}" for name, value in values.items() for inner in (value if isinstance(value, dict) else [])]
    own = [name for name, value in values.items() if not isinstance(value, dict)]
    wanted = " or ".join(repr(name) for name in names)
    return ValueError(f"{at} lacks the field {wanted}; it has {listed([*own, *has]) or 'none'}" + (f" ({remedy})" if remedy else ""))


def _stands_in(detail: str, texts: Sequence[str]) -> bool:
    """Whether any of the texts holds the detail, however it is written."""
    return any(place_of(detail, text) is not None for text in texts)


def _conversation_field(values: dict[str, Any], *, fields: Preset, chat_field: str, at: str) -> str:
    """The field that holds the row's conversation; empty if it is not one."""
    if chat_field:
        return chat_field
    asked = find(values, fields.instruction)
    if fields.labelled or (asked and asked[1] is not None):
        return ""
    found = [name for name in CHAT_FIELDS if values.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f"{at}: the fields {' and '.join(map(repr, found))} both hold a conversation; name one in data.chat_field")
    if not asked:
        found += [name for name in CHAT_FIELDS if name in values]
    return found[0] if found else ""


def _from_turns(values: dict[str, Any], name: str, *, fields: Preset, at: str) -> _Said:
    named = find(values, (name,))
    if not named:
        raise lacks(values, (name,), at=at, remedy="set data.chat_field")
    if _text(values, fields.input, at=at):
        raise ValueError(f"{at}: the field {fields.input[0]!r} cannot be added to a conversation; set no input field")
    value = named[1]
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = parse_json(value, at=f"{at}: the field {name!r}")
    conversation = read_conversation(value, at=f"{at}: the field {name!r}")
    if conversation is None:
        return _Said(missing=f"the field {name!r} has no answer, or an empty turn")
    return _Said(conversation.instruction, conversation.response, conversation.history, conversation.num_cut)


def _from_fields(values: dict[str, Any], *, fields: Preset, at: str) -> _Said:
    texts = []
    for names in (fields.instruction, fields.response):
        named = find(values, names)
        if not named:
            raise lacks(values, names, at=at, remedy=fields.remedy)
        is_label = fields.labelled and names == fields.response
        texts.append((named[0], (label_of if is_label else text_of)(named[1], field=named[0], at=at)))
    (asked, instruction), (answered, response) = texts
    extra = _text(values, fields.input, at=at)
    extra = "" if extra in fields.empty_input else extra
    if not response or not (instruction or extra):
        return _Said(missing=f"the field {answered if instruction or extra else asked!r} is empty")
    try:
        return _Said(
            "\n\n".join(filter(None, [fields.ask.format(instruction) if instruction else "", extra])), fields.read_response(response)
        )
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None


def _text(values: dict[str, Any], names: tuple[str, ...], *, at: str, read: Callable[..., str] = text_of) -> str:
    named = find(values, names)
    return read(named[1], field=named[0], at=at) if named else ""


def _details(values: dict[str, Any], names: tuple[str, ...], *, at: str) -> list[str]:
    """A list of strings; in a csv cell, a JSON list or strings between semicolons."""
    name, value = find(values, names) or ("", None)
    if isinstance(value, float) and value != value:
        value = None
    if isinstance(value, str):
        text = text_of(value, field=name, at=at)
        value = parse_json(text, at=f"{at}: the field {name!r}") if text.startswith("[") else re.split("[;\uff1b]", text)
    if not isinstance(value or [], list):
        raise ValueError(f"{at}: the field {name!r} must be a list of strings, not {kind_of(value)}")
    details = [text_of(detail, field=name, at=at) for detail in value or []]
    return [detail for detail in details if detail]
