"""Utility and leakage of a given adapter, cut into jobs that any worker can do in any order with the same result.

Utility: held-out NLL (nats a response token, over all held-out records) and ROUGE-L of greedy answers. Leakage: the extraction
attack on training records, with the held-out records as its control. Answers to held-out prompts serve both.
Left out: judges that compare answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysim.adapter import Vector
from raysim.attacks.canaries import Canary, exposures
from raysim.attacks.extraction import attack_prompt, score_extraction
from raysim.attacks.membership import token_nlls
from raysim.base import LanguageModel
from raysim.data.similarity import details_found, rouge_l
from raysim.data.tokens import Example
from raysim.generate import Sampling, generate
from raysim.train import TrainSettings, mean_nll, train_adapter

CANARY_TOKENS = 8
"""Tokens of a canary's secret, about."""
CANARY_BATCH = 64
"""Secrets scored at once."""


@dataclass(frozen=True)
class Job:
    """A piece of evaluation: the `nll` of examples, the `token_nll` of each of their tokens, the `answer` to each prompt plus
    `prefix_tokens` of its response, the `exposure` of canaries among `num_references` other secrets, or a `shadow` trained on examples."""

    kind: str
    examples: tuple[Example, ...]
    prefix_tokens: int
    max_new_tokens: int
    canaries: tuple[Canary, ...] = ()
    num_references: int = 0
    seed: int = 0
    system_prompt: str | None = None
    settings: TrainSettings | None = None

    @property
    def cost(self) -> int:
        """Roughly how long it takes, for ordering: answering costs more than scoring."""
        tokens = sum(example.num_tokens for example in self.examples)
        if self.kind in ("answer", "shadow"):
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

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All jobs in the order in which `measure` expects their results."""
        return self.nll_jobs + self.heldout_jobs + self.attack_jobs + self.control_jobs


def plan(
    *,
    heldout: Sequence[Example],
    num_generated: int,
    attacked: Sequence[Example],
    prefix_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    with_eval: bool,
    with_attack: bool,
) -> Plan:
    """The jobs that measure one adapter, `batch_size` examples each (the batch is part of a result's last bits)."""

    def cut(kind: str, examples: Sequence[Example], prefix: int) -> tuple[Job, ...]:
        chunks = [tuple(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]
        return tuple(Job(kind, chunk, prefix, max_new_tokens) for chunk in chunks)

    answered = heldout[:num_generated]
    own_control = with_attack and prefix_tokens > 0
    return Plan(
        nll_jobs=cut("nll", heldout, 0) if with_eval else (),
        heldout_jobs=cut("answer", answered, 0) if with_eval or (with_attack and not own_control) else (),
        attack_jobs=cut("answer", attacked, prefix_tokens) if with_attack else (),
        control_jobs=cut("answer", answered, prefix_tokens) if own_control else (),
    )


def run_job(lm: LanguageModel, adapter: Vector, job: Job) -> list[Any]:
    """The results of a job, one an example or canary: `(nll, num_tokens)`, an array of token NLLs, an exposure in bits, or an answer's
    text; of a shadow, its adapter."""
    if job.kind == "shadow":
        assert job.settings is not None, "a shadow needs training settings"
        return [train_adapter(lm, adapter, job.examples, settings=job.settings, seed=job.seed)[0]]
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
                system_prompt=job.system_prompt,
            )
        )
    lm.set_adapter(adapter)
    if job.kind == "nll":
        return list(mean_nll(lm, job.examples, batch_size=len(job.examples)))
    prompts = [attack_prompt(example, prefix_tokens=job.prefix_tokens) for example in job.examples]
    outputs = generate(
        lm.model,
        prompts,
        sampling=Sampling(max_new_tokens=job.max_new_tokens),
        eos_token_ids=lm.eos_token_ids,
        pad_token_id=lm.pad_token_id,
        batch_size=len(prompts),
        autocast_dtype=None if lm.is_float32 else lm.compute_dtype,
    )
    return [lm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in outputs]


def measure(plan: Plan, results: Sequence[list[Any]], *, tokenizer: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The `eval` and `attack` objects of a round's record, from the results of `plan.jobs` in order."""
    assert len(results) == len(plan.jobs), (len(results), len(plan.jobs))
    rest = list(results)

    def take(jobs: tuple[Job, ...]) -> list[Any]:
        return [value for _ in jobs for value in rest.pop(0)]

    nll, heldout, attacked, control = (take(jobs) for jobs in (plan.nll_jobs, plan.heldout_jobs, plan.attack_jobs, plan.control_jobs))
    utility = _utility(nll, plan.heldout_jobs, heldout) if plan.nll_jobs else None
    if not plan.attack_jobs:
        return utility, None
    train = _attack(plan.attack_jobs, attacked, tokenizer=tokenizer)
    held = _attack(plan.control_jobs or plan.heldout_jobs, control or heldout, tokenizer=tokenizer)
    attack = {f"train_{key}": value for key, value in train.items()} | {f"heldout_{key}": value for key, value in held.items()}
    return utility, attack | {"num_examples": len(attacked)}


def mean_of(measured: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean of each figure over several clients' measurements; None if there are none."""
    if not measured:
        return None
    means: dict[str, Any] = {}
    for key in measured[0]:
        values = [m[key] for m in measured if m[key] is not None]
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
            given = tokenizer.decode(example.response_ids[: job.prefix_tokens], skip_special_tokens=True)
            truths.append(_remainder(example, given))
            details.append([d for d in example.record.details if d not in details_found(given, example.record.details)])
    score = score_extraction(answers, truths, details)
    return {"rouge_l": score.rouge_l, "exact_match": score.exact_match, "details_rate": score.details_rate}


def _remainder(example: Example, given: str) -> str:
    response = example.record.response
    return response[len(given) :].strip() if given and response.startswith(given) else response
