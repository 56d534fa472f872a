"""What a sweep shows while it works: a live table of its trials on a terminal, plain lines without control characters elsewhere.

Left out: progress inside a round. A trial reports after each round, which is what Ray Tune hears of.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.text import Text

from raysim.console.screen import Screen
from raysim.console.tables import plain_table
from raysim.console.words import MISSING, clock, settings_text

STYLES = {"waiting": "dim", "running": "cyan", "done": "green", "stopped": "yellow", "failed": "red"}
SPARE_LINES = 8
"""Lines of the terminal that the table leaves to its heading, its note and the prompt."""
FIGURES = (("heldout_nll", "nll", ".2f"), ("leakage", "leak", ".2f"), ("epsilon", "eps", ".3g"), ("tokens_per_s", "tok/s", ",.0f"))


@dataclass
class TrialView:
    """What is known of a trial."""

    settings: str
    num_rounds: int
    status: str = "waiting"
    round: int = 0
    """Rounds done."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    started: float | None = None
    first_round: int = 0
    """Rounds done when it started here (it may continue an earlier run)."""
    ended: float | None = None

    def left_s(self) -> float | None:
        """Seconds left, from the rounds it has done since it started; None before the first."""
        if self.started is None or self.status != "running" or self.round <= self.first_round:
            return None
        return (self._last - self.started) / (self.round - self.first_round) * (self.num_rounds - self.round)

    _last: float = 0.0

    def heard(self, figures: Mapping[str, Any], *, round: int) -> None:
        """Takes in the figures of a round."""
        if not self.round and round > 1:
            self.first_round = round - 1
        self.figures, self.round, self._last = figures, round, time.monotonic()


class SweepProgress(Screen):
    """The display of one sweep, around it; `enabled` as in `Screen`."""

    def __init__(self, title: str, *, enabled: bool | None = None) -> None:
        super().__init__(title, enabled=enabled, refresh_per_second=2)
        self._already_over = 0
        self._expected = 0
        self.trials: dict[str, TrialView] = {}

    def expect(self, num_trials: int) -> None:
        """How many trials there will be, where they are not all known beforehand."""
        self._expected = num_trials

    def add(self, name: str, settings: Mapping[str, Any], *, num_rounds: int, status: str = "waiting") -> None:
        """Shows a trial; with another status than `waiting` it ended in an earlier sitting of the sweep."""
        self.trials = {**self.trials, name: TrialView(settings=settings_text(settings), num_rounds=num_rounds, status=status)}
        self._already_over += status != "waiting"

    def start(self, name: str) -> None:
        """A trial starts, or starts again."""
        view = self.trials[name]
        view.status, view.started = "running", time.monotonic()
        view.first_round = view.round
        self._line(name, "starts")

    def round(self, name: str, figures: Mapping[str, Any], *, round: int) -> None:
        """A trial has finished a round (counted from 1)."""
        view = self.trials[name]
        view.heard(figures, round=round)
        self._line(name, f"round {round}/{view.num_rounds}  {_figures_text(figures)}")

    def end(self, name: str, status: str, *, error: str = "") -> None:
        """A trial is over: `done`, `stopped` or `failed` with the first line of its error."""
        view = self.trials[name]
        view.status, view.error, view.ended = status, error, time.monotonic()
        took = f" in {clock(view.ended - view.started)}" if view.started is not None else ""
        self._line(name, f"{status}{took}{f': {error}' if error else ''}  ({self._counts()})")

    def left_s(self) -> float | None:
        """Seconds left, from the trials that ended since the sweep was started; None before the first."""
        over, total = self._over(), max(self._expected, len(self.trials))
        here = over - self._already_over
        return (time.monotonic() - self.started) / here * (total - over) if here else None

    def __rich__(self) -> Group:
        """The table as it stands at this moment."""
        table = plain_table(padding=(0, 1, 0, 0), header_style="bold")
        for heading in ("trial", "", "round", "NLL", "leakage", "epsilon", "tokens/s", "left"):
            table.add_column(heading, justify="left" if heading in ("trial", "") else "right", no_wrap=True, overflow="ellipsis")
        for name, view in self._shown():
            label = Text(f"{name.split('-')[0]} {view.settings}", no_wrap=True, overflow="ellipsis")
            left = view.left_s()
            cells = [f"{view.round}/{view.num_rounds}", *(_figure(view.figures, key, form) for key, _, form in FIGURES)]
            table.add_row(label, Text(view.status, style=STYLES[view.status]), *cells, MISSING if left is None else clock(left))
        left = self.left_s()
        when = f"about {clock(left)} left" if left is not None else "time left: known after the first trial"
        head = Text(self.title, style="bold")
        head.append(f"  {self._counts()}  ·  elapsed {clock(time.monotonic() - self.started)}  ·  {when}", style="dim")
        return Group(head, table)

    def _shown(self) -> Sequence[tuple[str, TrialView]]:
        """The trials that fit on the screen: those that run, then the latest to end, then those that wait; in their own order."""
        rank = {"running": 0, "failed": 1, "done": 1, "stopped": 1, "waiting": 2}
        room = max(4, self.console.height - SPARE_LINES)
        chosen = sorted(self.trials.items(), key=lambda item: (rank[item[1].status], -(item[1].ended or 0.0)))[:room]
        return sorted(chosen)

    def _over(self) -> int:
        return sum(view.status in ("done", "stopped", "failed") for view in self.trials.values())

    def _counts(self) -> str:
        total = max(self._expected, len(self.trials))
        parts = [f"{self._over()} of {total} trials over"]
        for status in ("running", "stopped", "failed"):
            count = sum(view.status == status for view in self.trials.values())
            parts += [f"{count} {status}"] if count else []
        return ", ".join(parts)

    def _line(self, name: str, text: str) -> None:
        """A line of a log; on a terminal the table says it."""
        if not self.is_live:
            self.note(f"{name}  {text}")


def _figure(figures: Mapping[str, Any], key: str, form: str) -> str:
    value = figures.get(key)
    return MISSING if value is None else format(value, form)


def _figures_text(figures: Mapping[str, Any]) -> str:
    return "  ".join(f"{label} {_figure(figures, key, form)}" for key, label, form in FIGURES if figures.get(key) is not None)
