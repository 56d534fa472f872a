"""The tables of a report: runs side by side, where their settings differ, what they answered, who attacked them, and where they ran.

Left out: judging whether a difference matters; the control stands beside each leakage, and the conclusion is the reader's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raysim import config as configuration
from raysim.attacks.views import ATTACKS, SEES
from raysim.console.tables import COLUMNS, Compared
from raysim.console.words import MISSING, figure_text, is_number, value_text
from raysim.reports.named import NamedRun, is_base, labels_of
from raysim.results.contents import Private, Summary
from raysim.results.files import ENVIRONMENT

UNINTERESTING_KEYS = ("name", "out", "compare", "compare_seeds", "claims")
LOWER_IS_BETTER = ("heldout_nll", "leakage", "train_details_rate", "epsilon", "uplink_bytes")
MOST_FAILED = 200
"""Lines about clients whose updates did not count."""
HIGHER_IS_BETTER = ("label_accuracy", "heldout_rouge_l", "tokens_per_s")


def comparison_rows(summaries: Sequence[Summary]) -> list[Compared]:
    """The runs as they stand in a comparison.

    The best is taken among trained runs, by the printed value, and only where those differ; epsilons of different privacy
    units or deltas are not ranked. A run whose clients keep private adapters also has their figures, as `private_text`.
    """
    values = [_values(summary) for summary in summaries]
    # The base model has seen no record, so there is nothing to guarantee.
    texts = [
        _texts(of, summary) | ({"epsilon": MISSING} if is_base(summary) else {}) for of, summary in zip(values, summaries, strict=True)
    ]
    best = _best(summaries, values, texts)
    return [
        Compared(
            label=label,
            values=values[i],
            text={"label": label + ("" if summary.finished else " (unfinished)"), **texts[i]},
            private_text=_private_text(summary.private) if summary.private else None,
            best=frozenset(key for key, members in best.items() if i in members),
        )
        for i, (label, summary) in enumerate(zip(labels_of(summaries), summaries, strict=True))
    ]


def _values(summary: Summary) -> dict[str, float | None]:
    epsilon = summary.epsilon if is_number(summary.epsilon) else None
    return measured(summary) | {"epsilon": epsilon, "uplink_bytes": summary.uplink_bytes, "tokens_per_s": summary.tokens_per_s}


def measured(release: Summary | Private) -> dict[str, float | None]:
    """Utility and leakage of a release; None for what was not measured."""
    evaluation, attack = release.eval, release.attack
    memory = attack.memory if attack else None
    return {
        "heldout_nll": evaluation.heldout_nll if evaluation else None,
        "label_accuracy": evaluation.label_accuracy if evaluation else None,
        "heldout_rouge_l": evaluation.heldout_rouge_l if evaluation else None,
        "memory": memory.bits_per_record if memory else None,
        "memory_auc": memory.auc if memory else None,
        "leakage": attack.train_rouge_l if attack else None,
        "control": attack.heldout_rouge_l if attack else None,
        "train_exact_match": attack.train_exact_match if attack else None,
        "train_details_rate": attack.train_details_rate if attack else None,
    }


def _texts(values: Mapping[str, float | None], release: Summary | Private) -> dict[str, str]:
    texts = {key: figure_text(key, values.get(key)) for key, _, _ in COLUMNS if key != "label"}
    if values["leakage"] is not None and values["control"] is not None:
        texts["leakage"] += f" / {figure_text('control', values['control'])}"
    if ends := interval_of(release):
        texts["memory"] += f" ± {figure_text('memory', (ends[1] - ends[0]) / 2)}"
    return texts


def interval_of(release: Summary | Private) -> tuple[float, float] | None:
    """The 95% interval of memory in bits a record; None where there is none."""
    memory = release.attack.memory if release.attack else None
    return memory.bits_per_record_interval if memory else None


def _private_text(private: Private) -> dict[str, str]:
    return {"label": "└ kept private", **_texts(measured(private), private), "epsilon": "not sent"}


def _best(
    summaries: Sequence[Summary], values: Sequence[Mapping[str, float | None]], texts: Sequence[Mapping[str, str]]
) -> dict[str, set[int]]:
    """The places of the best runs in each column that ranks them."""
    guarantees = {(summary.unit, summary.delta) for summary in summaries if summary.epsilon is not None}
    comparable = len(guarantees) == 1 and all(unit is not None for unit, _ in guarantees)  # a run whose unit is unknown is not ranked
    best = {}
    for key in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER):
        ranked = {i: value for i, of in enumerate(values) if not is_base(summaries[i]) and (value := of[key]) is not None}
        printed = {i: texts[i][key].split(" / ")[0] for i in ranked}  # of a leakage, without its control
        if len(set(printed.values())) > 1 and (key != "epsilon" or comparable):
            first = (max if key in HIGHER_IS_BETTER else min)(ranked, key=ranked.__getitem__)
            best[key] = {i for i in ranked if printed[i] == printed[first]}
    return best


def accuracies(named: Sequence[NamedRun]) -> list[tuple[str, str, list[str]]]:
    """(run, questions, cells) of what the runs answer by likelihood: labels of held-out records, and multiple choice."""
    rows = []
    for one in named:
        found = one.summary.eval
        if found and found.label_accuracy is not None:
            *cells, guessed = map(_share, (found.label_accuracy, found.label_macro_f1, None, found.label_accuracy_of_commonest))
            rows.append((one.label, "labels of held-out records", [*cells, f"{guessed} (the commonest label)"]))
        if found and found.choice_accuracy is not None:
            *cells, guessed = map(_share, (found.choice_accuracy, None, found.choice_accuracy_per_byte, found.choice_accuracy_by_chance))
            rows.append((one.label, f"{found.choice_num_questions} multiple-choice questions", [*cells, f"{guessed} (by chance)"]))
    return rows


def _share(value: float | None) -> str:
    return figure_text("accuracy", value)


ATTACK_SIGNS: dict[str, Callable[[NamedRun], Any]] = {
    "extraction": lambda one: one.summary.attack,
    "extraction across clients": lambda one: one.summary.cross_client,
    "gradient inversion": lambda one: one.audit.inversion,
    "membership inference": lambda one: one.audit.membership,
    "canaries": lambda one: one.audit.one_run or one.audit.exposure or any(record.exposure for record in one.run.records),
}
"""What shows that a run was put to an attack."""


def attacks_made(named: Sequence[NamedRun]) -> list[tuple[str, str, str, str]]:
    """(attack, whose, what it does, what that party sees) of the attacks that one of the runs was put to."""
    made = {attack for attack, sign in ATTACK_SIGNS.items() if any(map(sign, named))}
    return [(attack, party, does, "; ".join(SEES[party])) for attack, party, does in ATTACKS if attack in made]


def settings_table(named: Sequence[NamedRun]) -> list[tuple[str, list[str], str]]:
    """(key, value in each run, default) of the settings that differ between runs; of a single run, from its own method's defaults."""
    method = [f"method.name={named[0].summary.method}"] if len(named) == 1 else []
    defaults = configuration.flatten_keys(configuration.to_dict(configuration.load("", method)))
    rows = []
    for key in sorted({key for one in named for key in one.settings} - set(UNINTERESTING_KEYS)):
        values, default = [value_text(one.settings.get(key)) for one in named], value_text(defaults.get(key))
        if len(set(values)) > 1 or (len(named) == 1 and values[0] != default):
            rows.append((key, values, default))
    return rows


def environments(named: Sequence[NamedRun]) -> list[tuple[str, list[str]]]:
    """(key, values) of environment.json: one value where all runs agree, else one for each run."""
    flat = [configuration.flatten_keys(one.run.folder.json(ENVIRONMENT)) for one in named if one.run.environment]
    keys = dict.fromkeys(key for environment in flat for key in environment)
    return [(key, list(dict.fromkeys(value_text(environment.get(key)) for environment in flat))) for key in keys]


def failed_clients(named: Sequence[NamedRun]) -> list[tuple[str, int, str, str]]:
    """Of each run whose updates did not count: the client, in which rounds (counted from 1), and why (the first reason of its kind), `MOST_FAILED` at most."""
    found: dict[tuple[str, int, str], tuple[list[int], str]] = {}
    for one in named:
        for record in one.run.records:
            for failure in record.failures:
                kind = failure.reason.partition(":")[0]
                rounds, _ = found.setdefault((one.label, failure.client_id, kind), ([], failure.reason))
                rounds.append(record.round_index + 1)
    rows = [(label, k, ", ".join(map(str, rounds)), reason) for (label, k, _), (rounds, reason) in found.items()]
    return rows[:MOST_FAILED]


def exactness(named: Sequence[NamedRun]) -> tuple[int, list[tuple[str, list[str]]]] | None:
    """How many rounds there are, and of each run that measured it the exactness gap of each; None where none did."""
    found = [(one.label, [record.exactness_gap for record in one.run.records if record.round_index >= 0]) for one in named]
    rows = [
        (label, [MISSING if gap is None else f"{gap:.2g}" for gap in gaps]) for label, gaps in found if any(gap is not None for gap in gaps)
    ]
    return (max(len(gaps) for _, gaps in rows), rows) if rows else None


def robustness(named: Sequence[NamedRun]) -> tuple[list[str], list[tuple[str, list[str]]]] | None:
    """The held-out loss by attack (the columns) and server rule (the rows), a backdoor's with how often its answer
    comes with the trigger and without; None for a single run without one, and where nobody is hostile."""
    cells: dict[tuple[str, str], str] = {}
    for one in named:
        config, measured = one.run.folder.config, one.run.summary.eval
        backdoor = next((record.backdoor for record in reversed(one.run.records) if record.backdoor), None)
        figure = MISSING if measured is None else f"{measured.heldout_nll:.3f}"
        cells[config.server.rule, config.adversary.attack] = figure + (
            f" ({backdoor.success_rate:.0%} / {backdoor.control_rate:.0%})" if backdoor else ""
        )
    rules, attacks = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    if attacks == ["none"] or (len(cells) == 1 and "(" not in next(iter(cells.values()))):
        return None
    return attacks, [(rule, [cells.get((rule, attack), MISSING) for attack in attacks]) for rule in rules]
