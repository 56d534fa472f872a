"""What a value of a data file is as a text or as a label, whatever type the file gave it.

Left out: guessing what a list or an object means. Only a conversation and a list of details have a form of their own.
"""

import math
import unicodedata
from collections.abc import Collection
from datetime import date, time
from decimal import Decimal
from typing import Any

MAX_CHARACTERS = 1_000_000
"""Longest text of a record: far more than any context holds, and little enough to be tokenised in seconds."""

NUM_NAMED = 20
"""Field names that an error lists."""

KINDS = {
    "list": "a list",
    "bytes": "bytes",
    "bool": "true or false",
    "int": "a number",
    "float": "a number",
    "str": "a text",
    "NoneType": "null",
}


def text_of(value: Any, *, field: str, at: str = "") -> str:
    """A value as a text without blanks around it; empty for null, for a number that is none (NaN, infinity) and for blanks.

    Numbers and truth values are written as JSON writes them, dates as ISO 8601 does.
    Errors: ValueError naming the field (and the record, `at`) for a list, an object or bytes, for more than `MAX_CHARACTERS`, and for half a character.
    """
    if isinstance(value, str):
        text = value.strip()
    elif value is None or (isinstance(value, (float, Decimal)) and not math.isfinite(value)):
        text = ""
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, (int, float, Decimal)):
        text = str(value)
    elif isinstance(value, (date, time)):
        text = value.isoformat()
    else:
        raise ValueError(f"{named(field, at)} holds {kind_of(value)}, not a text{_remedy(value, field)}")
    _check_characters(text, name=named(field, at))
    return text


def label_of(value: Any, *, field: str, at: str = "") -> str:
    """A value as a label: its text with single blanks, in one form for each (Unicode's NFC; 1 for the number 1.0).

    A label that a file spells as a text keeps its spelling: "1.0" is not "1", since codes are spelled so.
    Errors: as `text_of`.
    """
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        value = int(value)
    return " ".join(unicodedata.normalize("NFC", text_of(value, field=field, at=at)).split())


def kind_of(value: Any) -> str:
    """What a value is, in the words of a data file."""
    if isinstance(value, dict):
        return f"an object with {listed(value) or 'nothing'}"
    return KINDS.get(type(value).__name__, f"a {type(value).__name__}")


def named(field: str, at: str) -> str:
    """How errors name a field: after the place of its record, where that is given."""
    return f"{at}: the field {field!r}" if at else f"the field {field!r}"


def listed(names: Collection[str]) -> str:
    """Names in one line, the first `NUM_NAMED` of many."""
    shown = [" ".join(str(name).encode(errors="backslashreplace").decode().split()) for name in names][:NUM_NAMED]
    return ", ".join(shown) + (f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else "")


def _check_characters(text: str, *, name: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} has {len(text):,} characters, and {MAX_CHARACTERS:,} are the most; shorten it or remove the record")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{name} has half a character, {half}, at position {error.start} (a lone surrogate, which no text can hold); remove it"
        ) from None


def _remedy(value: Any, field: str) -> str:
    if isinstance(value, dict) and value:
        return f"; name the field inside it, such as {field + '.' + next(iter(value))!r}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "; set data.chat_field if it is a conversation, or write it as a text"
    return "; write it as a text"
