"""The headline of a report: how good, what leaks, at what epsilon, at what cost, each as a question with a short answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from raysim.console.tables import Compared
from raysim.console.words import MISSING, NO_GUARANTEE, figure_text, human_bytes
from raysim.reports.named import NamedRun
from raysim.reports.tables import comparison_rows
from raysim.results.contents import Details, Memory

MOST_NAMED = 4
"""Runs that a card names: of more it says how many."""
SMALL_GAP = 0.03  # of ROUGE-L between training and held-out prompts; a few dozen prompts scatter by about as much


@dataclass(frozen=True)
class Card:
    """A question with its answer in large letters, and a sentence or two on it."""

    question: str
    value: str
    text: str
    command: str = ""
    """What gives this answer again, where that is one run."""


def cards(named: Sequence[NamedRun]) -> list[Card]:
    """The four answers of the headline."""
    rows = comparison_rows([one.summary for one in named])
    base = next((row for row, one in zip(rows, named, strict=True) if one.is_base), None)
    trained = [row for row, one in zip(rows, named, strict=True) if not one.is_base] or rows
    leakage = _memory_card(named) or _leakage_card(trained, base)
    return [_utility_card(trained, base, named), leakage, _guarantee_card(named), _cost_card(named)]


def _ranked(rows: Sequence[Compared], key: str, *, reverse: bool = False) -> list[tuple[float, Compared]]:
    """The rows that have a figure, with it, the smallest first."""
    found = [(value, row) for row in rows if (value := row.values[key]) is not None]
    return sorted(found, key=lambda pair: pair[0], reverse=reverse)


def _utility_card(trained: Sequence[Compared], base: Compared | None, named: Sequence[NamedRun]) -> Card:
    question = "How good is it?"
    ranked = _ranked(trained, "heldout_nll")
    if not ranked:
        return Card(question, MISSING, "Utility was not measured.")
    (lowest, best), *others = ranked
    interval = next((found.heldout_nll_interval for one in named if one.label == best.label and (found := one.summary.eval)), None)
    text = f"{best.label} has the lowest loss on held-out records" if others else "Loss a token on held-out records"
    text += f" (95% interval over records: {interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    if base is not None and base.values["heldout_nll"] is not None and base is not best:
        text += f"; the base model without training has {base.values['heldout_nll']:.2f}"
    following = ", ".join(f"{row.label} {value:.2f}" for value, row in others[:3])
    return Card(question, f"NLL {lowest:.2f}", text + "." + (f" Next: {following}." if following else "") + _accuracy_text(named))


def _accuracy_text(named: Sequence[NamedRun]) -> str:
    """What the runs make of labels, with their intervals and what knowing nothing would give; empty where none was asked for."""
    parts = [
        f"{one.label} {found.label_accuracy:.0%}" + _between(found.label_accuracy_interval, "{:.0%}")
        for one in named
        if (found := one.summary.eval) and found.label_accuracy is not None
    ]
    return f" Right labels: {_first_of(parts)}." if parts else ""


def _first_of(names: Sequence[str]) -> str:
    """The names, or as many of them as a card has room for."""
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def _between(ends: tuple[float, float] | None, form: str) -> str:
    """An interval in brackets, with a blank before it; nothing where there is none."""
    return f" ({form.format(ends[0])} to {form.format(ends[1])})" if ends else ""


def _memory_card(named: Sequence[NamedRun]) -> Card | None:
    """What leaks by likelihood: bits a record of memory, with ROUGE-L beside; None where no trained run measured it."""
    found = [
        (memory.bits_per_record, one.label, memory, attack)
        for one in named
        if not one.is_base and (attack := one.summary.attack) and (memory := attack.memory)
    ]
    if not found:
        return None
    (most, label, memory, attack), *others = sorted(found, key=lambda one: one[0], reverse=True)
    parts = [f"{label} remembers {_bits(memory)} of a training record beyond what records like it gained: {_meaning(memory)}."]
    if memory.auc is not None:
        auc = f"{memory.auc:.2f}{_between(memory.auc_interval, '{:.2f}')}"
        parts.append(f"Its likelihoods tell training records from held-out ones with AUC {auc}; 0.5 is not at all.")
    parts += [f"{other}: {_bits(theirs)}, {_meaning(theirs)}." for _, other, theirs, _ in others[:3]]
    if attack.extraction is not None:
        queries, shares = attack.extraction.queries[-1], attack.extraction
        parts.append(
            f"Within {queries:,} samples a record, {shares.members[-1]:.0%} come out word by word ({shares.heldout[-1]:.0%} of held-out ones)."
        )
    parts += [_details_text(attack.details)] if attack.details is not None else []
    parts.append(f"Greedy answers: ROUGE-L {attack.train_rouge_l:.2f} on training prompts, {attack.heldout_rouge_l:.2f} on held-out ones.")
    return Card("What leaks?", f"{most:.1f} bits a record", " ".join(parts))


def _details_text(details: Details) -> str:
    """What training added to names, dates and values, beside the same of held-out records."""
    text = f"Its private details (names, dates, values) gained {details.gain_bits_members:.1f} bits each, those of held-out records "
    text += f"{details.gain_bits_control:.1f}"
    if details.exposure is None or details.max is None:
        return text + "."
    interval = _between(details.exposure_interval, "{:.1f}")
    return (
        text
        + f"; ranked among others like them they are exposed by {details.exposure:.1f} bits more{interval}, of {details.max:.0f} at most."
    )


def _bits(memory: Memory) -> str:
    return f"{memory.bits_per_record:.1f} bits{_between(memory.bits_per_record_interval, '{:.1f}')}"


def _meaning(memory: Memory) -> str:
    """What the interval decides, in words."""
    ends = memory.bits_per_record_interval
    if ends is None:
        return "without an interval, so nothing is decided"
    if ends[0] > 0:
        return "it shows memory"
    return "training records are less likely than others" if ends[1] < 0 else "no memory shows"


def _leakage_card(trained: Sequence[Compared], base: Compared | None) -> Card:
    question = "What leaks?"
    ranked = _ranked(trained, "leakage", reverse=True)
    if not ranked:
        return Card(question, MISSING, "Extraction was not tried.")
    (most, worst), (fewest, least) = ranked[0], ranked[-1]
    same = f"{most:.2f}" == f"{fewest:.2f}"
    if not same:
        parts = [f"{worst.label} repeats its training answers the most."]
    elif len(ranked) > 1:
        parts = ["No run repeats its training answers more than another."]
    else:
        parts = ["How close extracted answers come to the training records."]
    control, details = worst.values["control"], worst.values["train_details_rate"]
    if control is not None:
        gap = most - control
        meaning = "the gap is memory" if gap > SMALL_GAP else "so small a gap can be chance" if gap > 0 else "no memory shows"
        parts.append(f"On held-out prompts it scores {control:.2f}: {meaning}.")
    parts += [f"{figure_text('details_rate', details)} of the private details come out."] if details is not None else []
    parts += [f"Least: {least.label} {fewest:.2f}."] if not same else []
    if base is not None and base.values["leakage"] is not None and base is not worst:
        parts.append(f"Base model: {base.values['leakage']:.2f}.")
    return Card(question, f"ROUGE-L {most:.2f}", " ".join(parts))


def _guarantee_card(named: Sequence[NamedRun]) -> Card:
    question, given, without = "At what epsilon?", list[tuple[str, str]](), list[str]()
    for one in [one for one in named if not one.is_base]:
        summary = one.summary
        epsilon = figure_text("epsilon", summary.epsilon)
        if epsilon != NO_GUARANTEE:
            unit = f" for one {summary.unit}" if summary.unit else ""
            delta = f" at δ = {summary.delta:g}" if summary.delta is not None else ""
            given.append((epsilon, f"{one.label}: ε = {epsilon}{delta}{unit}."))
        else:
            without.append(one.label)
    if not given:
        return Card(question, NO_GUARANTEE.capitalize(), "What is measured here is one attack; a better one may find more.")
    value = "ε = " + " · ".join(epsilon for epsilon, _ in given) if len(given) <= 3 else f"{len(given)} runs with ε"
    tail = [f"{_first_of(without)}: {NO_GUARANTEE}."] if without else []
    more = [f"And {len(given) - MOST_NAMED} more."] if len(given) > MOST_NAMED else []
    return Card(question, value, " ".join([*(text for _, text in given[:MOST_NAMED]), *more, *tail]))


def _cost_card(named: Sequence[NamedRun]) -> Card:
    question, trained = "At what cost?", [one for one in named if not one.is_base]
    took = _duration(sum(one.summary.wall_s for one in named))
    if not trained:
        return Card(question, took, "No training, nothing sent.")
    senders: dict[str, list[str]] = {}
    for one in trained:
        senders.setdefault(human_bytes(one.summary.uplink_bytes), []).append(one.label)
    sent = "; ".join(f"{_first_of(names)} {amount}{' each' if len(names) > 1 else ''}" for amount, names in senders.items())
    rates = [one.summary.tokens_per_s for one in trained if one.summary.tokens_per_s]
    range_of_rates = [f"{rate:,.0f}" for rate in (dict.fromkeys((min(rates), max(rates))) if rates else ())]
    speed = f" Speed: {' to '.join(range_of_rates)} tokens/s." if rates else ""
    return Card(question, took, f"{'All runs together. ' if len(named) > 1 else ''}Sent to the server: {sent}.{speed}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
