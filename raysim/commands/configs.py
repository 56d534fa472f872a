"""`raysim configs`: shipped configurations, every key with its default and what it takes, and the page of one key or section.

All of it is read from the fields and the rules themselves. Left out: which data, models and clusters fit, which only a run finds out.
"""

import argparse
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator

from raysim.config import (
    KEYS,
    RULES,
    UNUSED_RULES,
    Key,
    Rule,
    bounds_in_words,
    concerns,
    exactly,
    needs_in_words,
    needs_key,
    said,
    sections,
    shipped_configs,
    statement,
    unknown,
)
from raysim.config.schema import LARGEST, LARGEST_RATE, MOST
from raysim.sweeps.space import SELECTION_RULES, SWEEP_RULES

NARROWEST, USUAL, WIDEST = 100, 120, 140
"""Columns of what is printed: the terminal's within these bounds, the usual ones into a file or pipe."""
DESCRIPTION_COLUMN, VALUE_COLUMN = 24, 48
"""Where the right column begins, of shipped configurations and of keys; a left one that is longer has a line of its own."""
TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `raysim configs` takes to its parser."""
    parser.add_argument("key", nargs="?", default="", help="a key such as lora.rank, or a section such as lora; all of them without one")


def main(arguments: argparse.Namespace) -> int:
    """Prints what was asked for.

    Errors: ValueError for what is neither key nor section, with the nearest of them.
    """
    asked = arguments.key
    if not asked:
        lines = [*_shipped(), *_listing(KEYS.values())]
    elif asked in KEYS:
        lines = list(_page(KEYS[asked]))
    elif asked in sections():
        lines = list(_listing(key for key in KEYS.values() if key.name.startswith(f"{asked}.")))
    else:
        said_of_it = unknown(asked, also=sections())
        raise ValueError(f"{said_of_it}{' ' if said_of_it.endswith('?') else '; '}`raysim configs` lists all")
    print("\n".join(lines))
    return 0


def _width() -> int:
    return min(max(shutil.get_terminal_size((USUAL, 0)).columns, NARROWEST), WIDEST)


def _shipped() -> Iterator[str]:
    yield "shipped configurations:"
    for path in sorted(shipped_configs().glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
        yield from _lines(f"  {path.stem}", first, column=DESCRIPTION_COLUMN)
    yield ""
    yield "keys with their defaults and what they take (`raysim configs KEY` explains one):"


def _listing(keys: Iterable[Key]) -> Iterator[str]:
    """The keys by section, a line or more each."""
    by_section: dict[str, list[Key]] = defaultdict(list)
    for key in keys:
        by_section[key.name.rpartition(".")[0]].append(key)
    for name, some in by_section.items():
        yield ""
        yield name or "the run"
        for key in some:
            yield from _lines(f"  {key.name}={said(key.default)}", takes(key))


def _lines(left: str, right: str, *, column: int = VALUE_COLUMN) -> list[str]:
    """Two columns, the right one wrapped, and on lines of its own where the left one is long."""
    beside = len(left) < column
    wrapped = textwrap.wrap(
        right,
        _width(),
        initial_indent=f"{left:<{column}}" if beside else " " * column,
        subsequent_indent=" " * column,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapped if beside else [left, *wrapped]


def takes(key: Key) -> str:
    """What a key takes, in few words."""
    if key.choices:
        return ", ".join(map(said, key.choices))
    if key.bounds is None or isinstance(key.default, list):
        return _type(key)
    low, high, inclusive = key.bounds
    text = f"0, or at least {key.nonzero:g}" if key.nonzero else f"{'at least' if inclusive else 'more than'} {low:g}"
    return text if high in (MOST, LARGEST, LARGEST_RATE) else f"{text}, at most {exactly(high)}"


def _type(key: Key) -> str:
    if key.is_path:
        return "path"
    return next((word for kind, word in TYPES.items() if isinstance(key.default, kind)), "text, or null")


def _takes_exactly(key: Key) -> str:
    """Type, and bounds or choices, as a refusal says them."""
    if key.choices:
        return f"one of {', '.join(map(said, key.choices))}"
    if key.bounds is None:
        return _type(key)
    of = " of whole numbers, all" if isinstance(key.default, list) else ","
    bounds = f"0, or at least {key.nonzero:g} and at most {exactly(key.bounds[1])}" if key.nonzero else bounds_in_words(key)
    return f"{_type(key)}{of} {bounds}"


def _page(key: Key) -> Iterator[str]:
    """All that is known of one key."""
    yield f"{key.name}={said(key.default)}"
    yield from _paragraph(key.doc)
    yield ""
    yield from _paragraph(f"takes     {_takes_exactly(key)}", hanging=10)
    yield from _paragraph(f"default   {said(key.default)}", hanging=10)
    for needs in key.needs:
        elsewhere = "; setting it elsewhere is refused" if needs == key.only else ""
        yield from _paragraph(f"counts    where {needs_in_words(needs)}{elsewhere}", hanging=10)
    if needing := [other.name for other in KEYS.values() if any(needs_key(needs, key.name) for needs in other.needs)]:
        yield from _paragraph(f"needed by {', '.join(needing)}", hanging=10)
    if key.neutral:
        yield from _paragraph("results   do not depend on it: it says where, how fast, or of what else")
    if refused := [statement(rule) for rule in _rules(key) if concerns(rule, key.name)]:
        yield from ["", "refused:"]
        for text in dict.fromkeys(refused):
            yield from _paragraph(f"- {text}", hanging=2)


def _rules(key: Key) -> Iterator[Rule]:
    """The rules that can concern a key; of the many that other keys need `privacy.unit`, `needed by` tells."""
    for rule in (*RULES, *SWEEP_RULES, *SELECTION_RULES):
        if rule not in UNUSED_RULES or rule.key == key.name:
            yield rule


def _paragraph(text: str, *, hanging: int = 0) -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent="  ", subsequent_indent=" " * (2 + hanging), break_long_words=False)
