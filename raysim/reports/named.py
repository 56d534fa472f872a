"""The runs of a page, each with a name that no other there has, and with its colour and marker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysim.measure.audits import verdict
from raysim.methods.spec import spec_of
from raysim.reports.figures import colours_of, markers_of
from raysim.results.contents import Audit, Summary
from raysim.results.folders import RunSoFar


@dataclass(frozen=True)
class NamedRun:
    """A run as a page has it."""

    label: str
    run: RunSoFar
    settings: Mapping[str, Any]
    """Its configuration by dotted keys."""
    colour: str
    marker: str

    @property
    def summary(self) -> Summary:
        """What it came to, or came to so far."""
        return self.run.summary

    @property
    def audit(self) -> Audit:
        """What attacks on its release found."""
        return self.run.folder.audit

    @property
    def is_base(self) -> bool:
        """Whether it is the model as it was, which has seen no record."""
        return is_base(self.summary)

    @property
    def verdict(self) -> str | None:
        """What was claimed and what an audit found, in one line; None where none was made."""
        return verdict(dict(self.audit.one_run)) if self.audit.one_run else None


def named_runs(runs: Sequence[RunSoFar]) -> list[NamedRun]:
    """The runs as a page has them."""
    methods = [run.summary.method for run in runs]
    parts = zip(labels_of([run.summary for run in runs]), runs, colours_of(methods), markers_of(methods), strict=True)
    return [NamedRun(label, run, run.folder.settings, colour, marker) for label, run, colour, marker in parts]


def is_base(summary: Summary) -> bool:
    """Whether a summary is of the model as it was, which has seen no record."""
    return not spec_of(summary.method).trains


def labels_of(summaries: Sequence[Summary]) -> list[str]:
    """A name for each run that no other has: its method, else its name, else with its seed, else with its number."""
    choices = (
        [spec_of(summary.method).label for summary in summaries],
        [summary.name for summary in summaries],
        [f"{summary.name} seed {summary.seed}" for summary in summaries],
        [f"{summary.name} #{number}" for number, summary in enumerate(summaries, start=1)],
    )
    labels = [next(column[i] for column in choices if column.count(column[i]) == 1) for i in range(len(summaries))]
    return [label + (" (simulated)" if summary.simulated else "") for label, summary in zip(labels, summaries, strict=True)]
