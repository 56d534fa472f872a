"""Utility and leakage of a given adapter, cut into jobs that any worker can do in any order with the same result.

Utility: held-out NLL (nats a response token, over all held-out records) and ROUGE-L of greedy answers. Leakage: the extraction
attack on training records, with the held-out records as its control, by prompts and, if asked for, once more with more of the
response given away. Answers to held-out prompts serve both. Memory: training records against held-out ones by likelihood, in the pass
that reads the held-out NLL, and their private details by that and by their exposure. For sets with labels: accuracy and macro-F1 by the likelihood of the labels' words; for multiple-choice
questions: accuracy by that of the options. `record_rows` keeps what each figure is the mean of.
Left out: judges that compare answers (`judged.py` reads the answers that a run keeps).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from raysim.attacks.canaries import Canary, exposures
from raysim.attacks.cross_client import CrossClientSettings, attack_across
from raysim.attacks.details import DetailPool, DetailSpan, detail_exposures, detail_rows, details_report, untrained_rows
from raysim.attacks.extraction import attack_prompt, attackable, score_extraction
from raysim.attacks.membership import token_nlls
from raysim.attacks.memory import Gains, Likelihood, SamplingAttack, extraction_report, level_interval, likelihoods, memory_report
from raysim.attacks.views import ClientView
from raysim.data.chat import DEFAULT_CHAT, ChatFormat
from raysim.data.choices import ChoiceQuestion
from raysim.data.similarity import details_found, place_of, rouge_l
from raysim.data.tokens import Example
from raysim.data.written import written_text
from raysim.lora.layout import Vector
from raysim.measure.options import choice_figures, choose, label_figures, option_nlls
from raysim.model.generate import Sampling, write_texts
from raysim.model.language_model import LanguageModel
from raysim.model.score import Branches
from raysim.model.train import TrainSettings, mean_nll, train_adapter
from raysim.privacy.audit_bounds import clopper_pearson

T = TypeVar("T")

CANARY_TOKENS = 8
"""Tokens of a canary's secret, about."""
TOKENS_A_QUESTION = 100
"""Tokens of a question with its options, about."""
CANARY_BATCH = 64
"""Secrets scored at once."""


@dataclass(frozen=True)
class Job:
    """A piece of evaluation: the `nll` of examples, their `likelihood` and that of their targets under `sampling` and of their details at `spans`,
    the exposure of each `detail` by `queries`, the `token_nll` of each of their tokens, the `answer` to each prompt plus `prefix_tokens` of its response, the `options` of each of its questions by likelihood, the
    `exposure` of canaries among `num_references` other secrets, a `shadow` trained on examples, or what a client with these examples draws
    `across` from the others."""

    kind: str
    examples: tuple[Example, ...] = ()
    prefix_tokens: int = 0
    max_new_tokens: int = 0
    canaries: tuple[Canary, ...] = ()
    num_references: int = 0
    seed: int = 0
    chat: ChatFormat = DEFAULT_CHAT
    settings: TrainSettings | None = None
    questions: tuple[ChoiceQuestion, ...] = ()
    across: CrossClientSettings | None = None
    sampling: SamplingAttack | None = None
    spans: tuple[tuple[DetailSpan, ...], ...] = ()
    queries: tuple[Branches, ...] = ()

    @property
    def cost(self) -> int:
        """Roughly how long it takes, for ordering: answering costs more than scoring."""
        tokens = sum(one.num_tokens for one in self.examples) + sum(query.num_tokens for query in self.queries)
        tokens += TOKENS_A_QUESTION * len(self.questions)
        if self.kind in ("answer", "shadow", "across"):
            return 10 * tokens
        return tokens + CANARY_TOKENS * self.num_references * len(self.canaries)


@dataclass(frozen=True)
class DetailPlan:
    """The private details of compared records."""

    spans: Mapping[int, tuple[DetailSpan, ...]]
    """By record id, where they stand."""
    queries: Mapping[int, tuple[Branches, ...]]
    """By record id, for those whose details are compared with references: a query for each of its spans (see `details.detail_queries`)."""
    pool: DetailPool


@dataclass(frozen=True)
class MemoryPlan:
    """The records whose likelihoods are compared, and what sampling is to write of them."""

    members: tuple[tuple[int, Example], ...]
    """Training records, each with the client that holds it."""
    heldout: tuple[Example, ...]
    sampling: SamplingAttack
    seed: int
    """Of the intervals."""
    details: DetailPlan


@dataclass(frozen=True)
class Plan:
    """What to measure of one adapter: lists of jobs by name, each empty where it is not asked for. A run expects results in their order.

    `nll`: of held-out records, those that memory compares first. `heldout`: answers to their prompts. `train`: answers to those of attacked
    records, and `control` to held-out ones with the attack's prefix (empty where that is empty: then `heldout` serves). `label`: held-out
    prompts as questions whose options are the set's labels. `prefixed_train` and `prefixed_control`: the attack once more, with a longer
    prefix. `choice`: multiple-choice questions. `member`: likelihoods of training records, and `compared` of held-out ones where `nll` has
    none (where utility is measured too, they are read once, for both). `member_detail` and `compared_detail`: exposures of their details.
    """

    groups: dict[str, tuple[Job, ...]]
    labels: tuple[str, ...] = ()
    """Of the questions of `label`, the labels in the options' order."""
    memory: MemoryPlan | None = None

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All jobs in the order in which `measure` expects their results."""
        return tuple(job for jobs in self.groups.values() for job in jobs)

    @property
    def likelihood_jobs(self) -> tuple[Job, ...]:
        """The jobs that are done with the base model as well."""
        return tuple(job for job in self.jobs if job.kind == "likelihood")

    def examples(self, name: str) -> list[Example]:
        """The examples of the jobs of that name, in order."""
        return [example for job in self.groups[name] for example in job.examples]

    def questions(self, name: str) -> list[ChoiceQuestion]:
        """The questions of the jobs of that name, in order."""
        return [question for job in self.groups[name] for question in job.questions]


def batches(items: Sequence[T], size: int) -> list[tuple[T, ...]]:
    """The items in order, `size` at a time."""
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def plan(
    *,
    heldout: Sequence[Example],
    answered: Sequence[Example],
    attacked: Sequence[Example],
    prefix_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    with_eval: bool,
    with_attack: bool,
    questions: Sequence[ChoiceQuestion] = (),
    labels: tuple[str, ...] = (),
    chat: ChatFormat = DEFAULT_CHAT,
    long_prefix_tokens: int = 0,
    choices: Sequence[ChoiceQuestion] = (),
    memory: MemoryPlan | None = None,
) -> Plan:
    """The jobs that measure one adapter, `batch_size` examples each (the batch is part of a result's last bits).

    `answered` are the held-out examples whose answers are asked for, the control of the attacks on `attacked`.
    `questions` are the held-out records as questions for their label, in the same order, or none; `choices` are multiple-choice questions.
    An attack leaves out records of which its prefix leaves nothing, and is not made where either side has no others. `memory` goes with the
    attack; the held-out records that it compares are batches of their own whether or not it is due, so that their NLL has the same bits.
    """

    def cut(kind: str, examples: Sequence[Example], prefix: int = 0) -> tuple[Job, ...]:
        return tuple(Job(kind, batch, prefix, max_new_tokens) for batch in batches(examples, batch_size))

    def asked(examples: Sequence[Example], options: Sequence[ChoiceQuestion]) -> tuple[Job, ...]:
        shown = batches(examples, batch_size) if examples else [()] * len(options)
        parts = zip(shown, batches(options, batch_size), strict=False)
        return tuple(Job("options", batch, chat=chat, questions=part) for batch, part in parts) if with_eval else ()

    short = attackable(attacked, answered, prefix_tokens) if with_attack else ([], [])
    long = attackable(attacked, answered, long_prefix_tokens) if with_attack and long_prefix_tokens else ([], [])
    own_control = prefix_tokens > 0
    compared, members = (memory.heldout, [example for _, example in memory.members]) if memory else ((), [])
    rest = _without(heldout, compared)

    def read(examples: Sequence[Example]) -> tuple[Job, ...]:
        return cut("nll", examples) if memory is None or not short[0] else _likelihood_jobs(memory, examples, batch_size=batch_size)

    def exposed(examples: Sequence[Example]) -> tuple[Job, ...]:
        return _detail_jobs(memory.details, examples, batch_size=batch_size) if memory and short[0] else ()

    groups = {
        "nll": (*read(compared), *cut("nll", rest)) if with_eval else (),
        "heldout": cut("answer", answered) if with_eval or (short[0] and not own_control) else (),
        "train": cut("answer", short[0], prefix_tokens),
        "control": cut("answer", short[1], prefix_tokens) if own_control else (),
        "label": asked(heldout, questions),
        "prefixed_train": cut("answer", long[0], long_prefix_tokens),
        "prefixed_control": cut("answer", long[1], long_prefix_tokens),
        "choice": asked((), choices),
        "member": read(members) if short[0] else (),
        "compared": read(compared) if short[0] and not with_eval else (),
        "member_detail": exposed(members),
        "compared_detail": exposed(compared),
    }
    return Plan(groups, labels, memory)


def _without(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    others_ids = {example.record.record_id for example in others}
    return [example for example in examples if example.record.record_id not in others_ids]


def _detail_jobs(details: DetailPlan, examples: Sequence[Example], *, batch_size: int) -> tuple[Job, ...]:
    queries = [query for _, query in _queries(details, examples)]
    return tuple(Job("detail", queries=batch) for batch in batches(queries, batch_size))


def _likelihood_jobs(memory: MemoryPlan, examples: Sequence[Example], *, batch_size: int) -> tuple[Job, ...]:
    return tuple(
        Job("likelihood", batch, sampling=memory.sampling, spans=tuple(memory.details.spans[e.record.record_id] for e in batch))
        for batch in batches(examples, batch_size)
    )


def _queries(details: DetailPlan, examples: Sequence[Example]) -> list[tuple[int, Branches]]:
    """The queries of those examples that have any, in order, each with its record's id."""
    ids = [example.record.record_id for example in examples]
    return [(record_id, query) for record_id in ids for query in details.queries.get(record_id, ())]


def run_job(lm: LanguageModel, adapter: Vector, job: Job) -> list[Any]:
    """The results of a job, one an example, query or canary: `(nll, num_tokens)`, a `Likelihood`, an array of token NLLs, an exposure in bits, or an
    answer's text, or the negative log-likelihoods of a question's options; of a shadow, its adapter; of an attack across clients, its texts."""
    results: Sequence[Any]
    match job.kind:
        case "shadow":
            assert job.settings is not None, "a shadow needs training settings"
            results = train_adapter(lm, adapter, job.examples, settings=job.settings, seed=job.seed)[:1]
        case "across":
            assert job.across is not None, "an attack needs settings"
            view = ClientView(own=job.examples, release=adapter)
            results = attack_across(lm, view, settings=job.across, chat=job.chat, seed=job.seed)
        case "options":
            results = option_nlls(lm, adapter, job.questions, batch_size=len(job.questions), chat=job.chat)
        case "likelihood":
            assert job.sampling is not None, "a target needs to be said"
            results = likelihoods(lm, adapter, job.examples, attack=job.sampling, batch_size=len(job.examples), spans=job.spans)
        case "detail":
            results = detail_exposures(lm, adapter, job.queries, batch_size=len(job.queries))
        case "token_nll":
            results = token_nlls(lm, adapter, job.examples, batch_size=len(job.examples))
        case "exposure":
            among = {"num_references": job.num_references, "seed": job.seed}
            results = exposures(lm, adapter, job.canaries, **among, batch_size=CANARY_BATCH, chat=job.chat)
        case "nll":
            lm.set_adapter(adapter)
            results = mean_nll(lm, job.examples, batch_size=len(job.examples))
        case "answer":
            results = _answers(lm, adapter, job)
        case _:
            raise AssertionError(job.kind)
    return list(results)


def _answers(lm: LanguageModel, adapter: Vector, job: Job) -> list[str]:
    lm.set_adapter(adapter)
    prompts = [attack_prompt(example, prefix_tokens=job.prefix_tokens) for example in job.examples]
    outputs = write_texts(lm, prompts, sampling=Sampling(max_new_tokens=job.max_new_tokens), batch_size=len(prompts))
    given = [example.response_ids[: job.prefix_tokens] for example in job.examples]
    return [written_text(lm.tokenizer, ids, after=after).strip() for ids, after in zip(outputs, given, strict=True)]


def measure(
    plan: Plan, results: Sequence[list[Any]], *, tokenizer: Any, base: Mapping[int, Likelihood] | None = None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The `eval` and `attack` objects of a round's record, from the results of `plan.jobs` in order.

    `base` holds what the base model makes of the records whose likelihood was asked for, by record id (see `base_likelihoods`).
    """
    found = _by_group(plan, results)
    utility = _utility(plan, found) if plan.groups["nll"] else None
    if not plan.groups["train"]:
        return utility, None
    attack: dict[str, Any] = {}
    sides = {"train": "train", "heldout": "control" if plan.groups["control"] else "heldout"}
    if plan.groups["prefixed_train"]:
        sides |= {"prefixed_train": "prefixed_train", "prefixed_heldout": "prefixed_control"}
    for side, name in sides.items():
        attack |= {f"{side}_{key}": value for key, value in _attack(plan.groups[name], found[name], tokenizer=tokenizer).items()}
    return utility, attack | {"num_examples": len(found["train"])} | _memory(plan, found, base or {})


def base_likelihoods(plan: Plan, results: Sequence[list[Likelihood]]) -> dict[int, Likelihood]:
    """By record id, from the results of the plan's `likelihood_jobs` with the base model."""
    return {
        example.record.record_id: found
        for job, likelihoods_ in zip(plan.likelihood_jobs, results, strict=True)
        for example, found in zip(job.examples, likelihoods_, strict=True)
    }


def loss_is_finite(plan: Plan, results: Sequence[list[Any]]) -> bool:
    """Whether every NLL among the results of `plan.jobs` is a number."""
    read = ("nll", "likelihood")
    return all(math.isfinite(one[0]) for job, found in zip(plan.jobs, results, strict=True) if job.kind in read for one in found)


def record_rows(
    plan: Plan, results: Sequence[list[Any]], *, tokenizer: Any, base: Mapping[int, Likelihood] | None = None
) -> list[dict[str, Any]]:
    """What the figures of `measure` are the means of: one row a held-out record, one an attacked one, one a member, and one a question.

    `side` is heldout, control, train or member, and with the longer prefix prefixed_train or prefixed_control.
    A held-out record has `nll` (summed over its `num_tokens`) and, where it was answered, `answer` and `rouge_l` beside what was asked. A
    member, and a held-out record that is compared with them, have `base_nll` beside `nll`, `extraction_bits` (-log2 of the probability
    that sampling writes its `target_tokens`; None where it never does, or where the prefix leaves no target), and `details` where it has
    any (see `details.detail_rows`).
    """
    found, base = _by_group(plan, results), base or {}
    details = {record_id: {"details": rows} for record_id, rows in _detail_rows(plan, found, base).items()}
    ids = [example.record.record_id for name in ("nll", "compared", "heldout") for example in plan.examples(name)]
    rows: dict[int, dict[str, Any]] = {record_id: {"side": "heldout", "record_id": record_id} for record_id in ids}
    for example, (nll, num_tokens, *_) in zip(plan.examples("nll"), found["nll"], strict=True):
        rows[example.record.record_id] |= {"nll": nll, "num_tokens": num_tokens}
    for example, likelihood in _read(plan, found, "nll", "compared"):
        rows[example.record.record_id] |= _likelihood_row(example, likelihood, base) | details.get(example.record.record_id, {})
    for example, answer in zip(plan.examples("heldout"), found["heldout"], strict=True):
        record = example.record
        asked = {"instruction": record.instruction, "reference": record.response, "answer": answer}
        rows[record.record_id] |= asked | {"rouge_l": rouge_l(answer, record.response)}
    for example, (question, chosen) in zip(plan.examples("label"), _chosen(plan, found, "label"), strict=True):
        rows[example.record.record_id] |= {"label_chosen": plan.labels[chosen], "label_right": chosen == question.answer}
    attack_rows = [
        {"side": side, "record_id": example.record.record_id, "answer": answer, "rouge_l": rouge_l(answer, truth)}
        for side in ("control", "train", "prefixed_control", "prefixed_train")
        for (example, _, truth), answer in zip(_sought(plan.groups[side], tokenizer=tokenizer), found[side], strict=True)
    ]
    holders = {example.record.record_id: client_id for client_id, example in plan.memory.members} if plan.memory else {}
    member_rows = [
        {"side": "member", "record_id": example.record.record_id, "client_id": holders[example.record.record_id]}
        | _likelihood_row(example, likelihood, base)
        | details.get(example.record.record_id, {})
        for example, likelihood in _read(plan, found, "member")
    ]
    choice_rows = [
        {"side": "choice", "question": number, "chosen": question.options[option], "right": option == question.answer}
        for number, (question, option) in enumerate(_chosen(plan, found, "choice"))
    ]
    return [*rows.values(), *attack_rows, *member_rows, *choice_rows]


def _read(plan: Plan, found: dict[str, list[Any]], *names: str) -> list[tuple[Example, Likelihood]]:
    """The examples of the `likelihood` jobs of these names, each with what was found."""
    pairs = [pair for name in names for pair in zip(plan.examples(name), found[name], strict=True)]
    return [(example, one) for example, one in pairs if isinstance(one, Likelihood)]


def _likelihood_row(example: Example, likelihood: Likelihood, base: Mapping[int, Likelihood]) -> dict[str, Any]:
    is_written = likelihood.target_tokens and math.isfinite(likelihood.target_log_prob)
    return {
        "label": example.record.label,
        "nll": likelihood.nll,
        "num_tokens": likelihood.num_tokens,
        "base_nll": base[example.record.record_id].nll,
        "extraction_bits": -likelihood.target_log_prob / math.log(2) if is_written else None,
        "target_tokens": likelihood.target_tokens,
    }


def _memory(plan: Plan, found: dict[str, list[Any]], base: Mapping[int, Likelihood]) -> dict[str, Any]:
    """The attack's `memory`, `extraction` and `details`: what the likelihoods of members and held-out records say; each left out where a side is
    too small."""
    members, heldout = _read(plan, found, "member"), _read(plan, found, "nll", "compared")
    figures: dict[str, Any] = {}
    if plan.memory is not None and members and len(heldout) > 1:
        figures["memory"] = memory_report(_gains(members, base), _gains(heldout, base), seed=plan.memory.seed)
    sought = [[one.target_log_prob for _, one in side if one.target_tokens] for side in (members, heldout)]
    if plan.memory is not None and all(sought):
        figures["extraction"] = extraction_report(*sought, attack=plan.memory.sampling)
    if plan.memory is not None:
        rows = _detail_rows(plan, found, base)
        of_members, control = ([row for e, _ in side for row in rows.get(e.record.record_id, [])] for side in (members, heldout))
        report = details_report(of_members, untrained_rows(control, plan.memory.details.pool))
        figures |= {"details": report} if report else {}
    return figures


def _detail_rows(plan: Plan, found: dict[str, list[Any]], base: Mapping[int, Likelihood]) -> dict[int, list[dict[str, Any]]]:
    """The rows of the details of each record that has any and whose likelihood was read, by record id."""
    if plan.memory is None:
        return {}
    details, exposures = plan.memory.details, dict[int, list[tuple[float | None, int]]]()
    for name, examples in (("member_detail", [e for _, e in plan.memory.members]), ("compared_detail", plan.memory.heldout)):
        for (record_id, query), exposed in zip(_queries(details, examples) if plan.groups[name] else [], found[name], strict=True):
            exposures.setdefault(record_id, []).append((exposed, len(query.branches) - 1))
    read = {e.record.record_id: one for e, one in _read(plan, found, "member", "nll", "compared")}
    return {
        record_id: detail_rows(
            record_id,
            details.spans[record_id],
            bits=one.detail_bits,
            base_bits=base[record_id].detail_bits,
            exposures=exposures.get(record_id, ()),
        )
        for record_id, one in read.items()
        if details.spans[record_id]
    }


def _gains(side: Sequence[tuple[Example, Likelihood]], base: Mapping[int, Likelihood]) -> Gains:
    return Gains(
        nats=np.array([base[example.record.record_id].nll - one.nll for example, one in side]),
        num_tokens=np.array([one.num_tokens for _, one in side], dtype=np.float64),
        labels=[example.record.label for example, _ in side],
    )


def _by_group(plan: Plan, results: Sequence[list[Any]]) -> dict[str, list[Any]]:
    """The results of each of the plan's lists of jobs."""
    rest = iter(results)
    assert len(results) == len(plan.jobs), (len(results), len(plan.jobs))
    return {name: [value for _ in jobs for value in next(rest)] for name, jobs in plan.groups.items()}


def _chosen(plan: Plan, found: dict[str, list[Any]], name: str) -> list[tuple[ChoiceQuestion, int]]:
    """Each question of a list of jobs with the number of its likeliest option."""
    questions = plan.questions(name)
    return list(zip(questions, choose(questions, found[name], per_byte=False), strict=True))


def mean_of(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean of each figure over the clients' measurements that have it; None if there are none.

    Of figures within figures, those in which all agree stay as they are (settings, say), and lists are averaged entry by entry. Intervals
    are left out, since their mean is no interval of the mean, and so are words in which the clients differ.
    """
    if not measured:
        return None
    means: dict[str, Any] = {}
    for key in dict.fromkeys(key for m in measured for key in m if not key.endswith("_interval")):
        values = [m[key] for m in measured if m.get(key) is not None]
        means[key] = _mean_value(values) if values else None
    return means


def _mean_value(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        means = mean_of(values) or {}
        return means | {key: one for key, one in values[0].items() if key in means and all(other.get(key) == one for other in values)}
    if isinstance(values[0], list):
        return [_mean_value(entries) for entries in zip(*values, strict=True)]
    if isinstance(values[0], str):
        return None
    return sum(values) / len(values)


def _utility(plan: Plan, found: dict[str, list[Any]]) -> dict[str, Any]:
    mean = sum(total for total, *_ in found["nll"]) / max(1, sum(count for _, count, *_ in found["nll"]))
    truths = [example.record.response for example in plan.examples("heldout")]
    scores = [rouge_l(answer, truth) for answer, truth in zip(found["heldout"], truths, strict=True)]
    totals, counts = np.array([one[:2] for one in found["nll"]]).T
    utility = {
        "heldout_nll": mean,
        "heldout_nll_interval": level_interval(totals, counts),
        "heldout_perplexity": math.exp(min(mean, 700.0)),
        "heldout_rouge_l": sum(scores) / len(scores) if scores else None,
    }
    if plan.groups["label"]:
        figures = label_figures(plan.questions("label"), found["label"], plan.labels)
        utility |= {f"label_{key}": figures[key] for key in ("accuracy", "macro_f1", "accuracy_of_commonest", "macro_f1_of_commonest")}
        num_right = round(figures["accuracy"] * figures["num_questions"])
        utility["label_accuracy_interval"] = list(clopper_pearson(num_right, figures["num_questions"]))
    if plan.groups["choice"]:
        utility |= {f"choice_{key}": value for key, value in choice_figures(plan.questions("choice"), found["choice"]).items()}
    return utility


def _sought(jobs: Sequence[Job], *, tokenizer: Any) -> list[tuple[Example, str, str]]:
    """Each attacked example with the part of its response that is given away, and the part that is sought."""
    pairs = [(example, written_text(tokenizer, example.response_ids[: job.prefix_tokens])) for job in jobs for example in job.examples]
    return [(example, given, _remainder(example, given, tokenizer=tokenizer)) for example, given in pairs]


def _attack(jobs: Sequence[Job], answers: list[str], *, tokenizer: Any) -> dict[str, Any]:
    sought, details = _sought(jobs, tokenizer=tokenizer), []
    for example, given, _ in sought:
        told = details_found(given, example.record.details)
        # What an earlier turn of a conversation has is in the prompt of its last one, and is asked for nowhere.
        wanted = [d for d in example.record.details if not example.record.history or place_of(d, example.record.response) is not None]
        details.append([d for d in wanted if d not in told])
    return dict(vars(score_extraction(answers, [truth for _, _, truth in sought], details)))


def _remainder(example: Example, given: str, *, tokenizer: Any) -> str:
    """The response without its beginning `given`, in the tokenizer's spelling where that is another one (lower case, composed characters)."""
    response = example.record.response
    if not response.startswith(given):
        response = written_text(tokenizer, example.response_ids)
    return response.removeprefix(given).strip()
