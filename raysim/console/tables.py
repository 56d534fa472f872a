"""The tables that commands end with: formatted on a terminal, plain aligned text elsewhere."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from raysim.console.screen import is_terminal, make_console, print_plain
from raysim.console.words import MISSING, NO_GUARANTEE

# The columns of a comparison: key of a figure, heading (two lines at most), heading in plain text.
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("label", "method", "method"),
    ("heldout_nll", "held-out\nNLL", "held-out NLL"),
    ("label_accuracy", "label\naccuracy", "accuracy"),
    ("heldout_rouge_l", "held-out\nROUGE-L", "held-out ROUGE-L"),
    ("memory", "memory\nbits/record", "memory, bits/record"),
    ("memory_auc", "member\nAUC", "AUC"),
    ("leakage", "leakage\ntrain/control", "leakage train/control"),
    ("train_details_rate", "details\nfound", "details found"),
    ("epsilon", "epsilon", "epsilon"),
    ("uplink_bytes", "uplink", "uplink"),
    ("tokens_per_s", "tokens/s", "tokens/s"),
)
SHORT_HEADINGS = {
    "train/control": "tr./ctrl",
    "held-out": "held",
    "ROUGE-L": "ROUGE",
    "bits/record": "bits",
    "member\n": "\n",
    "tokens/s": "tok/s",
    "details": "det.",
    "epsilon": "eps",
    "accuracy": "acc.",
}
"""What stands in headings where there is little room."""
OPTIONAL_COLUMNS = ("label_accuracy", "memory", "memory_auc")
"""Columns that are left out where no run has the figure."""
MEMORY_NOTE = (
    "memory: bits by which a training record became likelier than held-out records of its kind, with its 95% interval;\n"
    "AUC: how well that tells training records from held-out ones (0.5: not at all)."
)
TABLE_NOTE = "leakage: ROUGE-L on training prompts / on held-out ones (control: skill)."


@dataclass(frozen=True)
class Compared:
    """A run as it stands in a comparison."""

    label: str
    values: Mapping[str, float | None]
    """Its figures by the keys of `COLUMNS`, and the control of its leakage."""
    text: Mapping[str, str]
    """Its cells by the keys of `COLUMNS`."""
    private_text: Mapping[str, str] | None = None
    """The cells of the adapters that its clients keep for themselves, where there are any."""
    best: frozenset[str] = frozenset()
    """The columns in which it is the best."""


def columns_of(rows: Sequence[Compared]) -> tuple[tuple[str, str, str], ...]:
    """The columns of `COLUMNS` that a table of these runs has."""
    return tuple(column for column in COLUMNS if column[0] not in OPTIONAL_COLUMNS or any(row.text[column[0]] != MISSING for row in rows))


def print_comparison(rows: Sequence[Compared]) -> None:
    """Prints a comparison: a table on a terminal, plain aligned text elsewhere."""
    if not rows:
        print("no runs to compare")
    elif is_terminal():
        console = make_console()
        wide = console.measure(comparison_table(rows, wide=True), options=console.options.update(max_width=1000)).maximum <= console.width
        console.print(comparison_table(rows, wide=wide))
        console.print(Text(_table_note(rows, wide=wide), style="dim"))
    else:
        print_plain("\n" + comparison_text(rows))


def print_rows(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a small table: the first column is a name, the others are figures; plain aligned text where there is no terminal."""
    if is_terminal():
        table = plain_table(title=title, title_justify="left", title_style="bold")
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        make_console().print(table, "", sep="\n")
        return
    head, *body = _aligned([headings, *rows], gap="  ")
    print_plain("\n".join([title, head, "-" * max(map(len, [head, *body])), *body, ""]))


def plain_table(**options: Any) -> Table:
    """A table with a line under its headings and no other."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, **options)


def comparison_table(rows: Sequence[Compared], *, wide: bool) -> Table:
    """The comparison as a table; a narrow one shortens the cells and the headings, never drops a column."""
    table = plain_table(padding=(0, 1, 0, 0) if wide else 0, header_style="bold")
    columns = columns_of(rows)
    for key, heading, _ in columns:
        if key == "label":
            table.add_column(heading, justify="left", overflow="fold", min_width=14)
        else:
            table.add_column(heading if wide else _short_heading(heading), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_cell(row.text, key, wide=wide), style=_style(row, key)) for key, _, _ in columns))
        if row.private_text:
            table.add_row(*(Text(_cell(row.private_text, key, wide=wide), style="dim") for key, _, _ in columns))
    return table


def comparison_text(rows: Sequence[Compared]) -> str:
    """The comparison as plain aligned text, the best value of a column marked with an asterisk."""
    columns = columns_of(rows)
    lines = [[heading + " " for _, _, heading in columns]]
    for row in rows:
        lines.append([row.text[key] + ("*" if key in row.best else " ") for key, _, _ in columns])
        if row.private_text:
            lines.append([row.private_text[key] + " " for key, _, _ in columns])
    head, *body = _aligned(lines, gap=" ")
    rule = " ".join("-" * (max(map(len, column)) - 1) + " " for column in zip(*lines, strict=True)).rstrip()
    starred = ["*: best of the trained runs."] if any(row.best for row in rows) else []
    return "\n".join([head, rule, *body, "", *_notes(rows), *starred])


def _aligned(lines: Sequence[Sequence[str]], *, gap: str) -> list[str]:
    """The cells one below the other: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        gap.join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))).rstrip()
        for cells in lines
    ]


def _short_heading(heading: str) -> str:
    for long, short in SHORT_HEADINGS.items():
        heading = heading.replace(long, short)
    return heading


def _cell(text: Mapping[str, str], key: str, *, wide: bool) -> str:
    return text[key] if wide else short_text(text[key])


def short_text(text: str) -> str:
    """A cell where there is little room: no blanks around signs, and two decimals for three."""
    for long, short in ((" / ", "/"), (" ± ", "±"), (NO_GUARANTEE, "none"), ("not sent", MISSING)):
        text = text.replace(long, short)
    return re.sub(r"\b\d\.\d{3}\b", lambda number: f"{float(number[0]):.2f}", text)


def _style(row: Compared, key: str) -> str:
    return "bold" if key == "label" else "bold green" if key in row.best else ""


def _table_note(rows: Sequence[Compared], *, wide: bool) -> str:
    words = ["Bold: best of the trained runs."] if any(row.best for row in rows) else []
    words += [] if wide else [f"epsilon none: {NO_GUARANTEE}."]
    return "\n".join(["", *_notes(rows), *filter(None, [" ".join(words)])])


def _notes(rows: Sequence[Compared]) -> list[str]:
    """What the columns mean that these runs have."""
    return [*([MEMORY_NOTE] if any(key == "memory" for key, _, _ in columns_of(rows)) else []), TABLE_NOTE]
