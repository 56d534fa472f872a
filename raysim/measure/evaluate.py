"""Utility and leakage of a given adapter, cut into jobs that any worker can do in any order with the same result.

Utility: held-out NLL (nats a response token, over all held-out records) and ROUGE-L of greedy answers. Leakage: the extraction
attack on training records, with the held-out records as its control, by prompts and, if asked for, once more with more of the
response given away. Answers to held-out prompts serve both. For sets with labels: accuracy and macro-F1 by the likelihood of the
labels' words; for multiple-choice questions: accuracy by that of the options. `record_rows` keeps what each figure is the mean of.
Left out: judges that compare answers (`judged.py` reads the answers that a run keeps).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysim.attacks.canaries import Canary, exposures
from raysim.attacks.cross_client import CrossClientSettings, attack_across
from raysim.attacks.extraction import attack_prompt, attackable, score_extraction
from raysim.attacks.membership import token_nlls
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
from raysim.model.train import TrainSettings, mean_nll, train_adapter

CANARY_TOKENS = 8
"""Tokens of a canary's secret, about."""
TOKENS_A_QUESTION = 100
"""Tokens of a question with its options, about."""
CANARY_BATCH = 64
"""Secrets scored at once."""


@dataclass(frozen=True)
class Job:
    """A piece of evaluation: the `nll` of examples, the `token_nll` of each of their tokens, the `answer` to each prompt plus
    `prefix_tokens` of its response, the `options` of each of its questions by likelihood, the `exposure` of canaries among
    `num_references` other secrets, a `shadow` trained on examples, or what a client with these examples draws `across` from the others."""

    kind: str
    examples: tuple[Example, ...]
    prefix_tokens: int
    max_new_tokens: int
    canaries: tuple[Canary, ...] = ()
    num_references: int = 0
    seed: int = 0
    chat: ChatFormat = DEFAULT_CHAT
    settings: TrainSettings | None = None
    questions: tuple[ChoiceQuestion, ...] = ()
    across: CrossClientSettings | None = None

    @property
    def cost(self) -> int:
        """Roughly how long it takes, for ordering: answering costs more than scoring."""
        tokens = sum(example.num_tokens for example in self.examples) + TOKENS_A_QUESTION * len(self.questions)
        if self.kind in ("answer", "shadow", "across"):
            return 10 * tokens
        return tokens + CANARY_TOKENS * self.num_references * len(self.canaries)


@dataclass(frozen=True)
class Plan:
    """What to measure of one adapter: jobs, and which of their examples are held-out answers and attacked records."""

    nll_jobs: tuple[Job, ...]
    heldout_jobs: tuple[Job, ...]
    attack_jobs: tuple[Job, ...]
    control_jobs: tuple[Job, ...]
    """Held-out prompts with the attack's prefix; empty where the prefix is empty and the held-out answers serve."""
    label_jobs: tuple[Job, ...] = ()
    """Held-out prompts as questions whose options are the set's labels; empty where it has none."""
    labels: tuple[str, ...] = ()
    prefixed_jobs: tuple[Job, ...] = ()
    """The attack once more, with a longer prefix; empty where it is not asked for."""
    prefixed_control_jobs: tuple[Job, ...] = ()
    """Held-out prompts with that prefix."""
    choice_jobs: tuple[Job, ...] = ()
    """Multiple-choice questions; empty where there are none."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All jobs in the order in which `measure` expects their results."""
        return tuple(job for jobs in self.groups for job in jobs)

    @property
    def groups(self) -> tuple[tuple[Job, ...], ...]:
        """The lists of jobs."""
        prefixed = (self.prefixed_jobs, self.prefixed_control_jobs)
        return (self.nll_jobs, self.heldout_jobs, self.attack_jobs, self.control_jobs, self.label_jobs, *prefixed, self.choice_jobs)


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
) -> Plan:
    """The jobs that measure one adapter, `batch_size` examples each (the batch is part of a result's last bits).

    `answered` are the held-out examples whose answers are asked for, the control of the attacks on `attacked`.
    `questions` are the held-out records as questions for their label, in the same order, or none; `choices` are multiple-choice questions.
    An attack leaves out records of which its prefix leaves nothing, and is not made where either side has no others.
    """

    def cut(kind: str, examples: Sequence[Example], prefix: int) -> tuple[Job, ...]:
        chunks = [tuple(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]
        return tuple(Job(kind, chunk, prefix, max_new_tokens) for chunk in chunks)

    asked = [(heldout[i : i + batch_size], questions[i : i + batch_size]) for i in range(0, len(questions) * with_eval, batch_size)]
    chosen = [tuple(choices[i : i + batch_size]) for i in range(0, len(choices) * with_eval, batch_size)]
    short = attackable(attacked, answered, prefix_tokens) if with_attack else ([], [])
    long = attackable(attacked, answered, long_prefix_tokens) if with_attack and long_prefix_tokens else ([], [])
    own_control = prefix_tokens > 0
    return Plan(
        nll_jobs=cut("nll", heldout, 0) if with_eval else (),
        heldout_jobs=cut("answer", answered, 0) if with_eval or (short[0] and not own_control) else (),
        attack_jobs=cut("answer", short[0], prefix_tokens),
        control_jobs=cut("answer", short[1], prefix_tokens) if own_control else (),
        label_jobs=tuple(Job("options", tuple(e), 0, 0, chat=chat, questions=tuple(q)) for e, q in asked),
        labels=labels,
        prefixed_jobs=cut("answer", long[0], long_prefix_tokens),
        prefixed_control_jobs=cut("answer", long[1], long_prefix_tokens),
        choice_jobs=tuple(Job("options", (), 0, 0, chat=chat, questions=part) for part in chosen),
    )


def run_job(lm: LanguageModel, adapter: Vector, job: Job) -> list[Any]:
    """The results of a job, one an example or canary: `(nll, num_tokens)`, an array of token NLLs, an exposure in bits, or an answer's
    text, or the negative log-likelihoods of a question's options; of a shadow, its adapter; of an attack across clients, its texts."""
    if job.kind == "shadow":
        assert job.settings is not None, "a shadow needs training settings"
        return [train_adapter(lm, adapter, job.examples, settings=job.settings, seed=job.seed)[0]]
    if job.kind == "across":
        assert job.across is not None, "an attack needs settings"
        view = ClientView(own=job.examples, release=adapter)
        return list(attack_across(lm, view, settings=job.across, chat=job.chat, seed=job.seed))
    if job.kind == "options":
        return list(option_nlls(lm, adapter, job.questions, batch_size=len(job.questions), chat=job.chat))
    if job.kind == "token_nll":
        return list(token_nlls(lm, adapter, job.examples, batch_size=len(job.examples)))
    if job.kind == "exposure":
        return list(
            exposures(
                lm,
                adapter,
                job.canaries,
                num_references=job.num_references,
                seed=job.seed,
                batch_size=CANARY_BATCH,
                chat=job.chat,
            )
        )
    lm.set_adapter(adapter)
    if job.kind == "nll":
        return list(mean_nll(lm, job.examples, batch_size=len(job.examples)))
    prompts = [attack_prompt(example, prefix_tokens=job.prefix_tokens) for example in job.examples]
    outputs = write_texts(lm, prompts, sampling=Sampling(max_new_tokens=job.max_new_tokens), batch_size=len(prompts))
    given = [example.response_ids[: job.prefix_tokens] for example in job.examples]
    return [written_text(lm.tokenizer, ids, after=after).strip() for ids, after in zip(outputs, given, strict=True)]


def measure(plan: Plan, results: Sequence[list[Any]], *, tokenizer: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The `eval` and `attack` objects of a round's record, from the results of `plan.jobs` in order."""
    nll, heldout, attacked, control, options, prefixed, prefixed_control, choices = _taken(plan, results)
    utility = _utility(nll, plan.heldout_jobs, heldout) if plan.nll_jobs else None
    if utility is not None and plan.label_jobs:
        found = label_figures(_questions(plan.label_jobs), options, plan.labels)
        utility |= {f"label_{key}": found[key] for key in ("accuracy", "macro_f1", "accuracy_of_commonest", "macro_f1_of_commonest")}
    if utility is not None and plan.choice_jobs:
        utility |= {f"choice_{key}": value for key, value in choice_figures(_questions(plan.choice_jobs), choices).items()}
    if not plan.attack_jobs:
        return utility, None
    train = _attack(plan.attack_jobs, attacked, tokenizer=tokenizer)
    held = _attack(plan.control_jobs or plan.heldout_jobs, control or heldout, tokenizer=tokenizer)
    attack = {f"train_{key}": value for key, value in train.items()} | {f"heldout_{key}": value for key, value in held.items()}
    for side, jobs, answers in (("train", plan.prefixed_jobs, prefixed), ("heldout", plan.prefixed_control_jobs, prefixed_control)):
        figures = _attack(jobs, answers, tokenizer=tokenizer) if jobs else {}
        attack |= {f"prefixed_{side}_{key}": value for key, value in figures.items()}
    return utility, attack | {"num_examples": len(attacked)}


def record_rows(plan: Plan, results: Sequence[list[Any]], *, tokenizer: Any) -> list[dict[str, Any]]:
    """What the figures of `measure` are the means of: one row a held-out record, one an attacked one, and one a question.

    `side` is heldout, control or train, and with the longer prefix prefixed_train or prefixed_control.
    A held-out record has `nll` (summed over its `num_tokens`) and, where it was answered, `answer` and `rouge_l` beside what was asked.
    """
    nll, heldout, attacked, control, options, prefixed, prefixed_control, choices = _taken(plan, results)
    answered = [example for job in plan.heldout_jobs for example in job.examples]
    rows: dict[int, dict[str, Any]] = {}
    for example in [example for job in plan.nll_jobs for example in job.examples] or answered:
        rows[example.record.record_id] = {"side": "heldout", "record_id": example.record.record_id}
    for example, (total, count) in zip([e for job in plan.nll_jobs for e in job.examples], nll, strict=True):
        rows[example.record.record_id] |= {"nll": total, "num_tokens": count}
    for example, answer in zip(answered, heldout, strict=True):
        record = example.record
        asked = {"instruction": record.instruction, "reference": record.response, "answer": answer}
        rows[record.record_id] |= asked | {"rouge_l": rouge_l(answer, record.response)}
    questions = _questions(plan.label_jobs)
    asked_for_label = [example for job in plan.label_jobs for example in job.examples]
    for example, question, chosen in zip(asked_for_label, questions, choose(questions, options, per_byte=False), strict=True):
        rows[example.record.record_id] |= {"label_chosen": plan.labels[chosen], "label_right": chosen == question.answer}
    attacks = (
        ("control", plan.control_jobs, control),
        ("train", plan.attack_jobs, attacked),
        ("prefixed_control", plan.prefixed_control_jobs, prefixed_control),
        ("prefixed_train", plan.prefixed_jobs, prefixed),
    )
    attack_rows = [row for side, jobs, answers in attacks for row in _attack_rows(side, jobs, answers, tokenizer=tokenizer)]
    picked = zip(_questions(plan.choice_jobs), choose(_questions(plan.choice_jobs), choices, per_byte=False), strict=True)
    answered_questions = [
        {"side": "choice", "question": number, "chosen": question.options[option], "right": option == question.answer}
        for number, (question, option) in enumerate(picked)
    ]
    return [*rows.values(), *attack_rows, *answered_questions]


def _questions(jobs: Sequence[Job]) -> list[ChoiceQuestion]:
    return [question for job in jobs for question in job.questions]


def _taken(plan: Plan, results: Sequence[list[Any]]) -> list[list[Any]]:
    """The results of each of the plan's lists of jobs."""
    assert len(results) == len(plan.jobs), (len(results), len(plan.jobs))
    rest = list(results)
    return [[value for _ in jobs for value in rest.pop(0)] for jobs in plan.groups]


def _attack_rows(side: str, jobs: tuple[Job, ...], answers: list[str], *, tokenizer: Any) -> list[dict[str, Any]]:
    rows = []
    for example, prefix, answer in zip(
        [e for job in jobs for e in job.examples], [job.prefix_tokens for job in jobs for _ in job.examples], answers, strict=True
    ):
        truth = _remainder(example, written_text(tokenizer, example.response_ids[:prefix]), tokenizer=tokenizer)
        rows.append({"side": side, "record_id": example.record.record_id, "answer": answer, "rouge_l": rouge_l(answer, truth)})
    return rows


def mean_of(measured: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean of each figure over the clients' measurements that have it; None if there are none."""
    if not measured:
        return None
    means: dict[str, Any] = {}
    for key in dict.fromkeys(key for m in measured for key in m):
        values = [m[key] for m in measured if m.get(key) is not None]
        means[key] = sum(values) / len(values) if values else None
    return means


def _utility(nll: list[tuple[float, int]], jobs: tuple[Job, ...], answers: list[str]) -> dict[str, Any]:
    mean = sum(total for total, _ in nll) / max(1, sum(count for _, count in nll))
    truths = [example.record.response for job in jobs for example in job.examples]
    scores = [rouge_l(answer, truth) for answer, truth in zip(answers, truths, strict=True)]
    return {
        "heldout_nll": mean,
        "heldout_perplexity": math.exp(min(mean, 700.0)),
        "heldout_rouge_l": sum(scores) / len(scores) if scores else None,
    }


def _attack(jobs: tuple[Job, ...], answers: list[str], *, tokenizer: Any) -> dict[str, Any]:
    truths, details = [], []
    for job in jobs:
        for example in job.examples:
            given = written_text(tokenizer, example.response_ids[: job.prefix_tokens])
            truths.append(_remainder(example, given, tokenizer=tokenizer))
            told = details_found(given, example.record.details)
            # What an earlier turn of a conversation has is in the prompt of its last one, and is asked for nowhere.
            wanted = [d for d in example.record.details if not example.record.history or place_of(d, example.record.response) is not None]
            details.append([d for d in wanted if d not in told])
    score = score_extraction(answers, truths, details)
    return dict(vars(score))


def _remainder(example: Example, given: str, *, tokenizer: Any) -> str:
    """The response without its beginning `given`, in the tokenizer's spelling where that is another one (lower case, composed characters)."""
    response = example.record.response
    if not response.startswith(given):
        response = written_text(tokenizer, example.response_ids)
    return response.removeprefix(given).strip()
