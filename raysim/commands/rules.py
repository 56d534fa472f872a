"""`raysim rules`: what each rule for combining adapters trains, sends, loses and protects, found out from the rules and the configuration themselves."""

import argparse
import textwrap
from dataclasses import dataclass

from raysim.config import load
from raysim.lora import properties
from raysim.lora.rule import lora_rule
from raysim.lora.spec import RULES, RuleSpec
from raysim.methods.spec import METHODS

EXACT = 1e-5
"""A share of the mean below which nothing but rounding is lost."""
WIDTH = 120
HEADINGS = ("rule", "paper", "name", "trains", "sends", "exact", "own ranks", "client", "record")


@dataclass(frozen=True)
class Row:
    """A rule in the table."""

    cells: tuple[str, ...]
    reason: str
    """Why something is refused; empty where nothing is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes none."""


def main(arguments: argparse.Namespace) -> int:
    """Prints the table and returns 0."""
    print("\n".join(table()))
    return 0


def table() -> list[str]:
    """The lines of the table: a row for each rule, then the reasons of what is refused."""
    rows = [row(spec) for spec in RULES.values()]
    widths = [max(len(cells[i]) for cells in (HEADINGS, *(one.cells for one in rows))) for i in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in _all_cells(rows)]
    reasons = dict.fromkeys(one.reason for one in rows if one.reason)
    notes = [f"no client with {', '.join(one.cells[0] for one in rows if one.reason == reason)}: {reason}." for reason in reasons]
    legend = (
        "exact: whether the weights after the server are the mean of the clients' (else what is lost of it, on random clients); own ranks: "
        "lora.client_ranks; client, record: whether privacy.unit=client (fedit) and example (dplora) are allowed."
    )
    return [*lines, "", *textwrap.wrap(legend, WIDTH), "", *(line for note in notes for line in textwrap.wrap(note, WIDTH))]


def _all_cells(rows: list[Row]) -> list[tuple[str, ...]]:
    return [HEADINGS, *(one.cells for one in rows)]


def row(spec: RuleSpec) -> Row:
    """The row of a rule."""
    rule = lora_rule(spec.name)
    client, reason = _allowed(spec, "client")
    record, _ = _allowed(spec, "example")
    cells = (
        spec.name,
        spec.paper,
        spec.label,
        properties.trained(rule),
        properties.sent(rule),
        _exactness(spec),
        "yes" if spec.own_ranks else "no",
        client,
        record,
    )
    return Row(cells, reason)


def _allowed(spec: RuleSpec, unit: str) -> tuple[str, str]:
    """Whether a unit of privacy is allowed with a method that has it, and if not, what the refusal says."""
    method = next(one.name for one in METHODS.values() if unit in one.units and (one.steps_privately or unit == "client"))
    try:
        load("", [f"method.name={method}", f"privacy.unit={unit}", f"lora.aggregation={spec.name}"])
    except ValueError as error:
        return "no", str(error).partition(": ")[2].partition(";")[0]
    return "yes", ""


def _exactness(spec: RuleSpec) -> str:
    if spec.personal:
        return "personal"
    lost, best = properties.losses(lora_rule(spec.name))
    if lost < EXACT:
        return "yes"
    return f"to its rank ({lost:.2f})" if abs(lost - best) < EXACT else f"no ({lost:.2f})"
