"""What a sweep shows: a line for each event in a log, a table of its trials on a terminal."""

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from raysim.console.sweep_progress import SweepProgress


@pytest.fixture
def render() -> Callable[[Any], str]:
    """A function from what rich can show to its text on a terminal of 100 columns."""

    def draw(shown: Any) -> str:
        console = Console(width=100, force_terminal=False)
        with console.capture() as capture:
            console.print(shown)
        return capture.get()

    return draw


def test_a_log_of_a_sweep_has_a_line_for_each_event_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with SweepProgress("demo") as progress:
        progress.add("000-lora.rank=2", {"lora.rank": 2}, num_rounds=3)
        progress.add("001-lora.rank=4", {"lora.rank": 4}, num_rounds=3, status="done")
        progress.start("000-lora.rank=2")
        progress.round("000-lora.rank=2", {"heldout_nll": 1.25, "epsilon": 2.5}, round=1)
        assert progress.trials["000-lora.rank=2"].left_s() is not None
        assert progress.left_s() is None, "no trial has ended in this sitting"
        progress.end("000-lora.rank=2", "failed", error="round 1: no")
    printed = capsys.readouterr().out
    assert [line.split("  ")[2] for line in printed.splitlines()] == ["starts", "round 1/3", "failed in 0:00: round 1: no"]
    assert "nll 1.25  eps 2.5" in printed
    assert "2 of 2 trials over, 1 failed" in printed
    assert printed.replace("\n", "").isprintable()


def test_the_live_table_shows_each_trial_with_its_figures(render: Callable[[Any], str]) -> None:
    progress = SweepProgress("demo", enabled=False)
    progress.add("000-lora.rank=2", {"lora.rank": 2}, num_rounds=4)
    progress.add("001-lora.rank=4", {"lora.rank": 4}, num_rounds=4)
    progress.start("001-lora.rank=4")
    progress.round("001-lora.rank=4", {"heldout_nll": 1.25, "leakage": 0.5, "tokens_per_s": 1234.0}, round=2)
    shown = render(progress)
    assert "0 of 2 trials over, 1 running" in shown
    waiting, running = (next(line for line in shown.splitlines() if line.startswith(number)) for number in ("000", "001"))
    assert waiting.split()[:4] == ["000", "lora.rank=2", "waiting", "0/4"]
    assert running.split()[:7] == ["001", "lora.rank=4", "running", "2/4", "1.25", "0.50", "—"]
