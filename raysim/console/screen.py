"""Where displays write: one live block under permanent lines on a terminal, plain lines without a control character elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live

_ASCII = str.maketrans({"—": "-", "✓": "+", "…": "...", "·": "|", "└": " "})


class Screen:
    """A display on standard output, as a context manager around what it shows.

    `enabled` is None for a live block on a terminal and plain lines elsewhere, False for silence, and True for the live
    block even where standard output does not say that it is a terminal.
    """

    def __init__(self, title: str, *, enabled: bool | None, refresh_per_second: float) -> None:
        self.title = title
        self.started = time.monotonic()
        self._silent = enabled is False
        self.console = make_console(force_terminal=enabled is True)
        self._live: Live | None = None
        if not self._silent and (enabled or is_terminal()):
            # Errors keep their own stream where that leads somewhere else than the terminal.
            options: Any = {"transient": True, "redirect_stderr": sys.stderr.isatty()}
            self._live = Live(self, console=self.console, refresh_per_second=refresh_per_second, **options)

    @property
    def is_live(self) -> bool:
        """Whether there is a live block."""
        return self._live is not None

    def __rich__(self) -> Group:
        """The live block as it stands at this moment."""
        return Group(self.title)

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Prints one permanent line, for what a user must not miss."""
        self.print(f"{self.title}  {text}")

    def print(self, line: str) -> None:
        """Writes one permanent line."""
        if self._live is not None:
            self.console.print(line, soft_wrap=True, markup=False)
        elif not self._silent:
            print_plain(line)


def is_terminal() -> bool:
    """Whether standard output is a terminal that can move its cursor (the environment's colour switches do not count)."""
    return sys.stdout.isatty() and not Console(file=sys.stdout, force_jupyter=False).is_dumb_terminal


def make_console(*, force_terminal: bool = False) -> Console:
    """Standard output as rich writes to it."""
    return Console(file=sys.stdout, force_jupyter=False, force_terminal=True if force_terminal else None, highlight=False)


def print_plain(text: str) -> None:
    """Writes `text` at once, in characters that standard output can encode."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    print(text, flush=True)
