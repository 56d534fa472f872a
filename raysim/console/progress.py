"""What a run shows while it works: on a terminal one live block (round, clients, tokens/s, time left) under one permanent line a round.

Anywhere else (a file, CI, a job's log, a notebook) there are plain lines without a single control character.
Left out: progress inside a client's work. A client is one call, so what can be known is which clients are done.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from raysim.console.screen import Screen
from raysim.console.words import MISSING, clock

LONGEST_CHIPS = 12
HEARTBEAT_S = 30.0


class Progress(Screen):
    """The display of one run, around its loop; `enabled` as in `Screen`."""

    def __init__(self, total_rounds: int, title: str, *, enabled: bool | None = None) -> None:
        super().__init__(title, enabled=enabled, refresh_per_second=4)
        self._total_rounds = total_rounds
        self._spinner = Spinner("dots", style="cyan")
        self._round_started = self._phase_started = self._last_line = self.started
        self._round_durations: list[float] = []
        self._round_index = -1
        self._cohort: list[int] = []
        self._done: set[int] = set()
        self._clients_shown = False
        self._phase = "preparing"
        self._phase_tokens = 0
        self._last_tokens_per_s: float | None = None

    def round(self, round_index: int, cohort: Sequence[int]) -> None:
        """Starts a round: its clients are shown as running and its clock starts."""
        self._round_index, self._cohort = round_index, list(cohort)
        self._round_started = time.monotonic()
        self._begin_phase("training")
        self._clients_shown = True
        self._heartbeat()

    def client_done(self, client_id: int, num_tokens: int, phase: str = "") -> None:
        """Marks a client as done with `phase` (by default the current one), in which it processed `num_tokens`."""
        if phase and phase != self._phase:
            self._begin_phase(phase)
        self._clients_shown = True
        self._done.add(client_id)
        self._phase_tokens += num_tokens
        self._heartbeat()

    def phase(self, text: str) -> None:
        """Says what happens now, such as `evaluating` or `attacking`."""
        self._begin_phase(text)
        self._clients_shown = False
        self._heartbeat()

    def record(self, record: Mapping[str, Any]) -> None:
        """Ends a round: prints one permanent line of its record, and learns how long a round takes."""
        self._last_tokens_per_s = record.get("tokens_per_s") or self._last_tokens_per_s
        if record["round_index"] >= 0:
            self._round_durations.append(time.monotonic() - self._round_started)
        self._round_index = record["round_index"] + 1
        self._round_started = time.monotonic()
        self._begin_phase("waiting for the next round" if self._round_index < self._total_rounds else "finishing")
        self._clients_shown, self._cohort = False, []
        left_s = None if self.is_live else self.left_s()  # the live block has a clock of its own
        self.print(record_line(record, title=self.title, total_rounds=self._total_rounds, left_s=left_s))

    def left_s(self) -> float | None:
        """Seconds left, from the median of the rounds so far; None before the first has ended."""
        if not self._round_durations or self._total_rounds <= 0:
            return None
        rounds_left = self._total_rounds - self._round_index
        typical = statistics.median(self._round_durations)
        spent = min(typical, time.monotonic() - self._round_started)
        return max(0.0, typical * rounds_left - spent) if rounds_left > 0 else 0.0

    def tokens_per_s(self) -> float | None:
        """Tokens a second in the current phase, or those of the last round while nothing has been counted."""
        elapsed = time.monotonic() - self._phase_started
        return self._phase_tokens / elapsed if self._phase_tokens and elapsed > 0 else self._last_tokens_per_s

    def __rich__(self) -> Group:
        """The live block as it stands at this moment."""
        heading = Table.grid(padding=(0, 1))
        finished = min(self._total_rounds, len(self._done_rounds()))
        bar = ProgressBar(total=max(1, self._total_rounds), completed=finished, width=24, style="grey37", complete_style="cyan")
        heading.add_row(self._spinner, Text(self.title, style="bold"), Text(self._round_text()), bar, Text(self._phase, style="cyan"))
        lines: list[Any] = [heading]
        if self._clients_shown and self._cohort:
            lines.append(self._clients_text())
        lines.append(Text("  " + "  ·  ".join(self._clock_fields()), style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def _done_rounds(self) -> range:
        return range(max(0, self._round_index))

    def _round_text(self) -> str:
        if self._total_rounds <= 0:
            return "no training"
        return f"round {min(self._total_rounds, max(0, self._round_index) + 1)}/{self._total_rounds}"

    def _clients_text(self) -> Text:
        running = [client_id for client_id in self._cohort if client_id not in self._done]
        text = Text("  clients ", no_wrap=True, overflow="ellipsis")
        if len(self._cohort) > LONGEST_CHIPS:
            text.append(f"✓ {len(self._cohort) - len(running)}", style="green")
            text.append(f" of {len(self._cohort)}")
            rest = len(running) - LONGEST_CHIPS
            text.append(
                f"   … {' '.join(map(str, running[:LONGEST_CHIPS]))}{f' and {rest} more' if rest > 0 else ''}" if running else "",
                style="yellow",
            )
            return text
        for client_id in self._cohort:
            done = client_id in self._done
            text.append(f" {'✓' if done else '…'} {client_id} ", style="green" if done else "yellow")
        return text

    def _clock_fields(self) -> list[str]:
        now, rate, left = time.monotonic(), self.tokens_per_s(), self.left_s()
        fields = [f"{rate:,.0f} tokens/s"] if rate else []
        fields.append(f"elapsed {clock(now - self.started)}")
        if self._total_rounds > 0:
            fields.append(f"this round {clock(now - self._round_started)}")
            fields.append(f"about {clock(left)} left" if left is not None else "time left: known after this round")
        return fields

    def _begin_phase(self, text: str) -> None:
        self._phase, self._phase_tokens, self._phase_started = text, 0, time.monotonic()
        self._done = set()

    def _heartbeat(self) -> None:
        """In a log, a sign of life where no round has ended for a while."""
        if self.is_live or time.monotonic() - self._last_line < HEARTBEAT_S:
            return
        fields = [self.title, self._round_text(), self._phase]
        if self._clients_shown:
            fields.append(f"{len(self._done)} of {len(self._cohort)} clients done")
        self.print("  ".join([*fields, f"elapsed {clock(time.monotonic() - self.started)}"]))

    def print(self, line: str) -> None:
        """Writes one permanent line, which also is a sign of life."""
        self._last_line = time.monotonic()
        super().print(line)


def record_line(record: Mapping[str, Any], *, title: str, total_rounds: int, left_s: float | None = None) -> str:
    """One round as one compact line; values that the round does not have are left out, and a missing epsilon is a dash."""
    evaluation, attack = record.get("eval") or {}, record.get("attack") or {}
    fields = [title, f"round {record['round_index'] + 1}/{total_rounds}" if record["round_index"] >= 0 else "before training"]
    if record.get("train_loss") is not None:
        fields.append(f"loss {record['train_loss']:.2f}")
    if evaluation.get("heldout_nll") is not None:
        fields.append(f"nll {evaluation['heldout_nll']:.2f}")
    if attack.get("memory"):
        fields.append(f"memory {attack['memory']['bits_per_record']:.1f} bits")
    if attack.get("train_rouge_l") is not None:
        control = attack.get("heldout_rouge_l")
        fields.append(f"leak {attack['train_rouge_l']:.2f}" + (f"/{control:.2f}" if control is not None else ""))
    if record.get("tokens_per_s"):
        fields.append(f"{record['tokens_per_s']:.0f} tok/s")
    fields.append(f"eps {MISSING if record.get('epsilon') is None else format(record['epsilon'], '.3g')}")
    if record.get("num_failed"):
        fields.append(f"{record['num_failed']} of {len(record['cohort'])} failed")
    if record.get("num_dropped"):
        fields.append(f"{record['num_dropped']} dropped")
    if left_s:
        fields.append(f"left {clock(left_s)}")
    return "  ".join(fields)


def run_line(number: int, total: int, *, name: str, seed: int, left_s: float | None) -> str:
    """What announces a run of many: which it is, and how long all that are left will take if they take as long as those before."""
    left = "" if left_s is None else f", all of them done in about {clock(left_s)}"
    return f"run {number} of {total}: {name}, seed {seed}{left}"
