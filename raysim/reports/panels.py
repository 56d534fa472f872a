"""Which figures a report of runs has, and the words around each. A figure for which the runs have no numbers is left out."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysim.console.words import is_number
from raysim.data.configured import responses_are_labels
from raysim.reports import figures
from raysim.reports.named import NamedRun
from raysim.reports.rendering import Panel
from raysim.reports.tables import interval_of, measured
from raysim.results.contents import Partition, Private, RoundRecord, Synthetic

MOST_CLIENTS = 20
"""Clients in a picture that has a bar or a row for each of them: no page has room for ten thousand."""
MOST_RUNS = 16
"""Runs in a figure that has a line for each of them: more cannot be told apart, and their legend leaves no room."""
Place = tuple[str, ...]
"""Section and keys of a figure in a round's record."""


@dataclass(frozen=True)
class ByRound:
    """A figure by rounds: what is drawn solid, dashed (`control`) and dotted (`kept` by the clients), and what is said about it."""

    name: str
    title: str
    note: str
    axis: str
    figure: Place
    control: Place | None = None
    kept: Place | None = None
    interval: Place | None = None
    """Drawn pale around the figure."""
    least_span: float = 0.1
    percent: bool = False
    legend: str = ""


BY_ROUND = (
    ByRound(
        "memory",
        "Memory by round",
        "By how many bits a training record became likelier than held-out records of its kind did, over the base model: what the release holds of a record beyond "
        "what it learned of such records. Pale: the 95% interval over records. 0 is no memory. ",
        "Memory (bits a record)",
        ("attack", "memory", "bits_per_record"),
        interval=("attack", "memory", "bits_per_record_interval"),
        kept=("attack", "memory", "bits_per_record"),
        least_span=4.0,
        legend="0: no memory; pale: 95% interval",
    ),
    ByRound(
        "leakage",
        "Leakage by round",
        "The attacker has the released adapter and true training prompts, and asks for the answers. Solid: how close the answers come "
        "to the training records (ROUGE-L, 1 is word for word). Dashed: the same for records the model never saw. Only the gap between the two is memory.",
        "Extraction ROUGE-L",
        ("attack", "train_rouge_l"),
        control=("attack", "heldout_rouge_l"),
        legend="solid: training prompts, dashed: held-out control",
    ),
    ByRound(
        "utility",
        "Utility by round",
        "Mean loss a token (negative log-likelihood) on held-out records: lower is better. ",
        "Held-out NLL",
        ("eval", "heldout_nll"),
        kept=("eval", "heldout_nll"),
    ),
    ByRound(
        "details",
        "Private details recovered by round",
        "Of the names, dates and values in the attacked records, how many appear in the extracted answers. Dashed: by chance, on held-out records.",
        "Private details recovered",
        ("attack", "train_details_rate"),
        control=("attack", "heldout_details_rate"),
        least_span=0.05,
        percent=True,
        legend="dashed: held-out control",
    ),
    ByRound(
        "prefixed",
        "Leakage by round, with a prefix",
        "The same attack by someone who knows the first {given} tokens of the true response too, and asks for the rest. "
        "Dashed: on held-out records. Only the gap between the two is memory.",
        "Extraction ROUGE-L of the rest",
        ("attack", "prefixed_train_rouge_l"),
        control=("attack", "prefixed_heldout_rouge_l"),
        legend="solid: training prompts, dashed: held-out control",
    ),
)


def panels(named: Sequence[NamedRun]) -> list[Panel]:
    """The figures that the runs have numbers for, in reading order; none of more runs than one can tell apart."""
    if len(named) > MOST_RUNS:
        return []
    kinds = (
        _round_panels,
        _extraction_panel,
        _trade_off_panel,
        _epsilon_panel,
        _exposure_panels,
        _roc_panels,
        _partition_panels,
        _traffic_panel,
        _candidate_panels,
        _nearness_panels,
    )
    return [panel for kind in kinds for panel in kind(named)]


def _round_panels(named: Sequence[NamedRun]) -> Iterator[Panel]:
    given = sorted({one.settings["attack.long_prefix_tokens"] for one in named if one.settings["attack.long_prefix_tokens"]})
    for kind in BY_ROUND:
        lines = _lines(named, kind)
        if not lines:
            continue
        note, legend = kind.note.format(given=", ".join(map(str, given))), kind.legend
        if kind.kept:
            note += "Round 0 is the base model. " if any(line.values[0][0] == 0 for line in lines) else ""
        if any(line.kept for line in lines):
            note, legend = note + "Dotted: the adapters that clients keep for themselves and never send.", "dotted: kept by the clients"
        figure = figures.by_round(lines, axis=kind.axis, least_span=kind.least_span, percent=kind.percent, note=legend)
        yield Panel(kind.name, kind.title, note, figure)


def _lines(named: Sequence[NamedRun], kind: ByRound) -> list[figures.Line]:
    """A line for each run that has values; where there is a base run, every line starts from it at 0 completed rounds."""
    base = next((_completed(one) for one in named if one.is_base), [])
    lines = []
    for one in named:
        own = _completed(one)
        private = [(x, record.private) for x, record in own if record.private]
        if _series(own, kind.figure):
            whole = own if one.is_base else [*base, *own]
            values, control, kept = _series(whole, kind.figure), _series(whole, kind.control), _series(private, kind.kept)
            band = [(x, float(low), float(high)) for x, (low, high) in _found(whole, kind.interval)]
            lines.append(figures.Line(one.label, one.colour, one.marker, values, control, kept, band))
    return lines


def _completed(one: NamedRun) -> list[tuple[int, RoundRecord]]:
    """(rounds completed, record) of a run."""
    return [(record.round_index + 1, record) for record in one.run.records]


def _series(releases: Sequence[tuple[int, RoundRecord | Private]], place: Place | None) -> list[tuple[int, float]]:
    """(rounds completed, value) of the releases that have the value."""
    return [(x, float(value)) for x, value in _found(releases, place)]


def _found(releases: Sequence[tuple[int, RoundRecord | Private]], place: Place | None) -> list[tuple[int, Any]]:
    """(rounds completed, what stands at the place) of the releases that have it."""
    found: list[tuple[int, Any]] = [(x, release) for x, release in releases if place]
    for name in place or ():
        found = [(x, value) for x, part in found if (value := getattr(part, name)) is not None]
    return found


def _extraction_panel(named: Sequence[NamedRun]) -> Iterator[Panel]:
    lines, scheme = [], set()
    for one in named:
        if (found := one.summary.attack) and (extraction := found.extraction):
            powers = [round(math.log10(queries)) for queries in extraction.queries]
            values, control = list(zip(powers, extraction.members, strict=True)), list(zip(powers, extraction.heldout, strict=True))
            lines.append(figures.Line(one.label, one.colour, one.marker, values, control))
            words = f"temperature {extraction.temperature:g}" + (f", top-k {extraction.top_k}" if extraction.top_k else "")
            tokens = f"the next {extraction.target_tokens} tokens at most" if extraction.target_tokens else "the whole response"
            scheme.add(
                f"{words if extraction.temperature else 'greedy'}; {tokens}; a record counts where at least half of such attempts succeed"
            )
    if lines:
        note = (
            "Hayes et al. (2024): how many training records come out word by word when somebody draws so many samples for each prompt, "
            f"computed from the probability of the true response ({'; '.join(sorted(scheme))}). Dashed: held-out records."
        )
        figure = figures.by_queries(lines, axis="Records extracted", note="dashed: held-out control")
        yield Panel("extraction", "Extraction by number of samples", note, figure)


def _trade_off_panel(named: Sequence[NamedRun]) -> Iterator[Panel]:
    ends = [(one, measured(one.summary)) for one in named]
    known = [(one, values) for one, values in ends if values["memory"] is not None and values["heldout_nll"] is not None]
    if len(known) > 1:
        points = [
            figures.RunEnd(
                one.label, one.colour, one.marker, values["heldout_nll"] or 0.0, values["memory"] or 0.0, None, interval_of(one.summary)
            )
            for one, values in known
        ]
        note = "Each run at its end. Left is better at the task, lower remembers less of the training records; the bar is the 95% interval over records."
        yield Panel("tradeoff", "Utility against memory", note, figures.trade_off(points, axis="Memory (bits a record)", least_span=4.0))
        return
    points = []
    for one, values in ends:
        nll, leakage = values["heldout_nll"], values["leakage"]
        if nll is not None and leakage is not None:
            points.append(figures.RunEnd(one.label, one.colour, one.marker, nll, leakage, values["control"]))
    if len(points) > 1:
        note = "Each run at its end. Left is better at the task; the longer the bar between the two marks, the more of the training records comes out."
        axis = "Extraction ROUGE-L (filled: training prompts, hollow: control)"
        yield Panel("tradeoff", "Utility against leakage", note, figures.trade_off(points, axis=axis, least_span=0.1))


def _epsilon_panel(named: Sequence[NamedRun]) -> Iterator[Panel]:
    lines = []
    for one in named:
        values = [(x, float(record.epsilon)) for x, record in _completed(one) if is_number(record.epsilon)]
        lines += [figures.Line(one.label, one.colour, one.marker, [(0, 0.0), *values])] if values else []
    if lines:
        note = "What the guarantee costs so far: each round is another release, and epsilon grows. Smaller is stronger. Epsilons of different units do not compare."
        figure = figures.by_round(lines, axis="Epsilon spent", least_span=0.1, note="nothing released at 0")
        yield Panel("epsilon", "Epsilon by round", note, figure)


def _exposure_panels(named: Sequence[NamedRun]) -> Iterator[Panel]:
    """One picture for each run that had Secret Sharer canaries: a line for each number of copies."""
    for index, one in enumerate(named):
        own = [(x, record.exposure) for x, record in _completed(one) if record.exposure]
        again = [((row.round_index or 0) + 1, row) for row in one.audit.exposure.by_round] if one.audit.exposure else []
        measured = own or again
        if not measured:
            continue
        counts, most = list(measured[0][1].by_multiplicity), measured[0][1].max
        lines = [
            figures.Line(
                f"{count} cop{'y' if count == '1' else 'ies'}", colour, "o", [(x, row.by_multiplicity[count]) for x, row in measured]
            )
            for count, colour in zip(counts, figures.colours_of([f"{count} copies" for count in counts]), strict=True)
        ]
        note = (
            f"Invented records with random secrets, put into the shards once or several times: how far up each secret ranks among others, in bits. "
            f"1 is what chance gives on average, {most:.1f} the most that can be seen here."
        )
        note += "" if own else " From the run made again with canaries for the audit."
        figure = figures.by_round(lines, axis="Exposure (bits)", least_span=2.0, note=f"at most {most:.1f}")
        yield Panel(f"exposure-{index}", f"Exposure of canaries, {one.label}", note, figure)


ROC_KINDS = (("canaries", "canaries", "orange"), ("membership", "records", "blue"))
"""Entry of `roc` in audit.json, what it is called and drawn in."""


def _roc_panels(named: Sequence[NamedRun]) -> Iterator[Panel]:
    """One picture for each audited run: its attacks at every threshold, under what its ledger allows at each false-positive rate."""
    for number, one in enumerate(named, start=1):
        found = one.audit.roc or {}
        curves = [
            figures.Roc(
                f"{name}, {found[kind]['num_in']:,} in and {found[kind]['num_out']:,} out", figures.COLOURS[colour][0], _points(found[kind])
            )
            for kind, name, colour in ROC_KINDS
            if kind in found
        ]
        if not curves:
            continue
        bound = next((_points(found[kind]["bound"]) for kind, _, _ in ROC_KINDS if kind in found and found[kind]["bound"]), [])
        note = "How many of those that were in are found (upwards), if so many that were not are wrongly named (to the right): to the left is what counts. "
        note += (
            "The whole guarantee, every epsilon with its delta, allows no attack to run above the dashed line, but for the chance of a finite sample."
            if bound
            else "No guarantee bounds these curves."
        )
        title = f"Attacks against what the ledger allows, {one.label}"
        yield Panel(_numbered("roc", number), title, note, figures.roc(curves, bound=bound))


def _points(entry: Mapping[str, Any]) -> list[tuple[float, float]]:
    return list(zip(entry["fpr"], entry["tpr"], strict=True))


def _partition_panels(named: Sequence[NamedRun]) -> Iterator[Panel]:
    """One picture for each different split."""
    split = [(one, one.run.partition) for one in named if one.run.partition and one.run.partition.clients]
    splits: dict[str, tuple[Partition, list[str]]] = {}
    for one, partition in [(one, partition) for one, partition in split if not one.is_base] or split:
        splits.setdefault(partition.sha256, (partition, []))[1].append(one.label)
    for number, (partition, members) in enumerate(splits.values(), start=1):
        tokens = sum(client.num_tokens for client in partition.clients)
        who = "" if len(splits) == 1 else f" of {', '.join(members)}"
        note = (
            f"Each bar is a client's training records by label; {tokens:,} tokens in all. Uneven colours are what makes federation hard. "
            f"Split {partition.sha256[:12]}."
        )
        shown = partition.clients[:MOST_CLIENTS]
        note += f" The first {len(shown)} of {len(partition.clients):,} clients." if len(shown) < len(partition.clients) else ""
        bars = [(f"client {client.client_id}", client.label_counts) for client in shown]
        yield Panel(_numbered("partition", number), f"The partition{who}", note, figures.partition(bars))


def _numbered(name: str, number: int) -> str:
    """The name of the first, second, ... figure of a kind."""
    return name if number == 1 else f"{name}-{number}"


def _traffic_panel(named: Sequence[NamedRun]) -> Iterator[Panel]:
    trained = [(one, one.summary) for one in named if not one.is_base]
    rows = [(one.label, one.colour, float(summary.uplink_bytes), float(summary.downlink_bytes)) for one, summary in trained]
    if any(up or down for _, _, up, down in rows):
        note = "What all clients together sent to the server (solid) and received from it (pale) over the whole run."
        yield Panel("bytes", "Bytes sent", note, figures.traffic(rows))


def _candidate_panels(named: Sequence[NamedRun]) -> Iterator[Panel]:
    found = [(one, fates) for one in named if (fates := _fates(one))]
    for number, (one, fates) in enumerate(found, start=1):
        note = "Clients ask the shared model for new records; filters drop those that break the format, repeat one another, or copy a local record."
        rates = [record.synthetic.duplicate_rate for record in one.run.records if record.synthetic]
        note += f" Candidates that repeat another one, in the last round: {rates[-1]:.1%}." if rates else ""
        yield Panel(_numbered("candidates", number), f"Synthetic candidates of {one.label}", note, figures.candidates(fates))


def _fates(one: NamedRun) -> list[tuple[str, dict[str, int]]]:
    """(round, how many candidates were kept and dropped for which reason), from the records or else from the texts."""
    recorded = [(record.round_index, record.synthetic) for record in one.run.records if record.synthetic]
    fates = {index: Counter({"kept": fate.num_kept, **fate.num_rejected}) for index, fate in recorded}
    for text in [] if recorded else one.run.synthetic:
        fates.setdefault(text.round_index, Counter())["kept" if text.kept else text.verdict] += 1
    return [(f"round {index + 1}", fates[index]) for index in sorted(fates)]


def _nearness_panels(named: Sequence[NamedRun]) -> Iterator[Panel]:
    """One picture for each run whose synthetic records were held against the private ones."""
    found = [(one, rows) for one in named if (rows := _nearest(one.run.synthetic))]
    for number, (one, rows) in enumerate(found, start=1):
        shown, config = rows[:MOST_CLIENTS], one.run.folder.config
        writes = config.method.spec.writes
        part = "instruction" if writes and responses_are_labels(config.data) else "response"  # see `synthesis.nearest_to_private`
        # There is no such filter where nothing is dropped, and private self-generation may not look at private records for that.
        bound = config.fedpit.max_rouge_l if writes and config.privacy.unit != "example" else None
        note = f"Each mark is a kept synthetic record, at its largest ROUGE-L with one of its client's private {part}s; the tall mark is the median."
        note += " Responses are labels, which everybody has, so instructions are compared." if part == "instruction" else ""
        note += f" The first {len(shown)} of {len(rows)} clients." if len(shown) < len(rows) else ""
        figure = figures.nearness(shown, bound=bound, part=part)
        yield Panel(_numbered("nearness", number), f"How near synthetic records of {one.label} come to private ones", note, figure)


def _nearest(synthetic: Sequence[Synthetic]) -> list[tuple[str, list[float]]]:
    """(client, largest ROUGE-L with a private record of each kept record)."""
    by_client: dict[int, list[float]] = {}
    for text in synthetic:
        if text.kept and text.response_rouge_l is not None:
            by_client.setdefault(text.client_id, []).append(text.response_rouge_l)
    return [(f"client {client_id}", values) for client_id, values in sorted(by_client.items())]
