"""The audit that goes along with a run: canaries dealt to clients, what they add to a round, and what they tell at the end.

Three kinds of canary for the one-run audit (Steinke et al. 2023, arXiv 2305.08846), so that the unit of the audit is that of the
ledger: a record in a shard, a gradient in a private step, or an update of a client of its own. Secret Sharer canaries are
records too. The bound that comes out is about the release and is put beside what the accountant says of it.
What the auditor sees: the first and the last release, and the canaries.

Left out: auditing a run that had no canaries (the `audit` command runs one again with them).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysim.attacks.canaries import Canary, make_canaries, membership_canaries, secret_examples
from raysim.attacks.inversion import InversionSettings, inversion_sweep, template_opening
from raysim.attacks.inversion import check_model as check_inversion_model
from raysim.attacks.membership import calibrated_scores, lira_scores, loss_scores, membership_report, min_k_scores, zlib_scores
from raysim.config import Config
from raysim.data.configured import chat_format
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.lora.layout import Vector
from raysim.measure.evaluate import Job, batches
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainSettings
from raysim.privacy.audit_bounds import gaussian_audit, one_run_audit
from raysim.privacy.canaries import canary_coins, canary_scores
from raysim.rng import numpy_rng, seed_for

Evaluate = Callable[[Sequence[tuple[Vector, Job]]], list[list[Any]]]
INVERSION_RANKS = (64, 256)
"""Beside the run's own rank; at most half the hidden size, since a span of all dimensions tells nothing."""
INVERSION_BATCHES = (1, 2, 4)
INVERSION_NOISES = (0.0, 1e-3, 1e-1, 1.0)
INVERSION_B_STD = 0.01
DELTA_WITHOUT_PROMISE = 1e-5
"""delta of the bound for a run that promises nothing."""


@dataclass(frozen=True)
class Audited:
    """A run that is over, as its auditor has it."""

    config: Config
    members: Sequence[Example]
    """Records that were trained on."""
    nonmembers: Sequence[Example]
    """Records that were not."""
    first: Vector
    """The release before the run."""
    last: Vector
    """The release after it."""
    evaluate: Evaluate

    @property
    def examples(self) -> list[Example]:
        """Members, then the others."""
        return [*self.members, *self.nonmembers]

    def token_losses(self, examples: Sequence[Example], adapters: Sequence[Vector]) -> list[list[np.ndarray]]:
        """The NLL (nats) of every response token of each example, under each adapter."""
        jobs = [Job("token_nll", batch) for batch in batches(examples, self.config.evaluate.batch_size)]
        results = self.evaluate([(adapter, job) for adapter in adapters for job in jobs])
        return [[nll for part in found for nll in part] for found in batches(results, len(jobs))]

    def report(self, scores: np.ndarray) -> dict[str, Any]:
        """How well scores of `examples` tell members from the others (see `membership_report`)."""
        return membership_report(scores[: len(self.members)], scores[len(self.members) :])


@dataclass(frozen=True)
class CanaryPlan:
    """The canaries of a run."""

    secrets: tuple[Canary, ...] = ()
    """Secret Sharer canaries, by multiplicity."""
    members: tuple[Canary, ...] = ()
    """Record canaries of the one-run audit, each with its coin."""
    num_updates: int = 0
    """Update canaries of the one-run audit."""
    num_gradients: int = 0
    """Gradient canaries of the one-run audit (the clients mix them in themselves)."""

    @property
    def num_one_run(self) -> int:
        """Canaries of the one-run audit, of whichever kind."""
        return len(self.members) + self.num_updates + self.num_gradients


def plan_canaries(config: Config, *, first_record_id: int) -> CanaryPlan:
    """The canaries that `config.audit` asks for; records count their ids from `first_record_id`."""
    audit = config.audit
    seed = seed_for(config.seed, "audit")
    secrets = make_canaries(
        multiplicities=audit.multiplicities, num_per_multiplicity=audit.num_secrets, seed=seed, first_record_id=first_record_id
    )
    number = {kind: audit.num_canaries if audit.canary == kind else 0 for kind in ("record", "update", "gradient")}
    members = membership_canaries(number["record"], seed=seed, first_record_id=first_record_id + len(secrets))
    return CanaryPlan(tuple(secrets), tuple(members), num_updates=number["update"], num_gradients=number["gradient"])


def dealt(plan: CanaryPlan, num_clients: int, *, first_record_id: int) -> list[list[Record]]:
    """The canary records that go into each client's shard: canaries in turn, all copies of one to one client, each copy with an id of its own."""
    hands: list[list[Record]] = [[] for _ in range(num_clients)]
    next_id = first_record_id
    for index, canary in enumerate([*plan.secrets, *plan.members]):
        for _ in range(canary.num_copies):
            hands[index % num_clients].append(dataclasses.replace(canary.record, record_id=next_id))
            next_id += 1
    return hands


# --- by round ---


def exposure_jobs(plan: CanaryPlan, config: Config) -> list[Job]:
    """The jobs that measure how exposed each Secret Sharer canary is, one a canary."""
    return [
        Job(
            "exposure",
            canaries=(canary,),
            num_references=config.audit.num_references,
            seed=seed_for(config.seed, "audit", "references"),
            chat=chat_format(config.data),
        )
        for canary in plan.secrets
    ]


def exposure_record(plan: CanaryPlan, results: Sequence[list[Any]], *, num_references: int) -> dict[str, Any]:
    """Mean exposure (bits) by multiplicity, and the most that so many references can show."""
    by_count: dict[int, list[float]] = {}
    for canary, (value,) in zip(plan.secrets, results, strict=True):
        by_count.setdefault(canary.multiplicity, []).append(value)
    means = {str(count): sum(values) / len(values) for count, values in sorted(by_count.items())}
    return {"by_multiplicity": means, "max": float(np.log2(num_references + 1)), "num_secrets": len(plan.secrets)}


# --- at the end ---


def final_audit(plan: CanaryPlan, run: Audited, *, tokenizer: Any, ledger: dict[str, Any]) -> dict[str, Any] | None:
    """The content of audit.json: `one_run`, `membership` and `inversion`, each null unless it was asked for; None if none was."""
    audit = run.config.audit
    if not (plan.num_one_run or audit.membership or audit.num_shadows or audit.inversion):
        return None
    membership = membership_attack(run) if audit.membership else {}
    if audit.num_shadows:
        membership["lira"] = lira_attack(run, num_shadows=audit.num_shadows)
    return {
        "one_run": _one_run(plan, run, tokenizer=tokenizer, ledger=ledger) if plan.num_one_run else None,
        "membership": membership or None,
        "inversion": inversion_rows(run.config, run.members) if audit.inversion else None,
    }


def membership_attack(run: Audited) -> dict[str, Any]:
    """Four membership scores of training records against held-out ones, each as `membership_report`."""
    examples = run.examples
    after, before = run.token_losses(examples, [run.last, run.first])
    texts = ["\n".join(example.record.answers) if example.earlier else example.record.response for example in examples]
    scores = {
        "loss": loss_scores(after),
        "reference": calibrated_scores(after, before),
        "zlib": zlib_scores(after, texts),
        "min_k": min_k_scores(after),
    }
    return {name: run.report(values) for name, values in scores.items()}


def lira_attack(run: Audited, *, num_shadows: int) -> dict[str, Any]:
    """Offline LiRA: shadow adapters trained without noise on random halves of all records, as long as the run trained."""
    config, train, pool = run.config, run.config.train, run.examples
    settings = TrainSettings(
        num_epochs=train.num_epochs * config.server.num_rounds,
        max_steps=0,
        batch_size=train.batch_size,
        lr=train.lr,
        optimizer=train.optimizer,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        prox_mu=0.0,
    )
    is_in = shadow_halves(num_shadows, len(pool), seed=config.seed)
    jobs = [
        Job("shadow", tuple(pool[i] for i in np.flatnonzero(half)), seed=seed_for(config.seed, "shadow", index), settings=settings)
        for index, half in enumerate(is_in)
    ]
    shadows = [adapter for (adapter,) in run.evaluate([(run.first, job) for job in jobs])]
    own, *others = [loss_scores(losses) for losses in run.token_losses(pool, [run.last, *shadows])]
    return run.report(lira_scores(own, np.stack(others), is_out=~is_in)) | {"num_shadows": num_shadows}


def shadow_halves(num_shadows: int, num_examples: int, *, seed: int) -> np.ndarray:
    """Which examples each shadow is trained on, of shape (num_shadows, num_examples): every example is left out by half of them.

    Shadows come in pairs that split the examples between them.
    """
    halves: list[np.ndarray] = []
    for pair in range((num_shadows + 1) // 2):
        inside = numpy_rng(seed, "shadow half", pair).permutation(num_examples) < num_examples // 2
        halves += [inside, ~inside]
    return np.stack(halves[:num_shadows])


def check_inversion(config: Config, lm: LanguageModel, examples: Sequence[Example]) -> None:
    """Refuses a gradient inversion that could not be made after the run, before the run.

    Errors: ValueError naming `audit.inversion` and the reason.
    """
    if not config.audit.inversion:
        return
    try:
        check_inversion_model(lm, longest=max(example.num_tokens for example in examples))
        opening = template_opening(lm.tokenizer, chat=chat_format(config.data))
        if any(example.prompt_ids[: len(opening)] != opening for example in examples):
            raise ValueError(
                "the records do not all begin as the chat template begins a question, as conversations with a system turn of their own"
            )
    except ValueError as error:
        raise ValueError(f"audit.inversion=true: {error}; leave it out") from None


def inversion_rows(config: Config, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The `inversion` entry of audit.json: rows of the sweep over rank, batch size and noise on the shortest of `examples`, with the run's base model, in float32."""
    base = load_base_model(config.model.name, dtype="float32", cache_dir=config.model.cache_dir)

    def build(rank: int) -> LanguageModel:
        return build_language_model(base, rank=rank, alpha=2.0 * rank, dropout=0.0, target_modules=list(config.lora.target_modules))

    lm = build(config.lora.rank)
    shortest = sorted(examples, key=lambda example: example.num_tokens)[: max(INVERSION_BATCHES)]
    return [
        dict(row)
        for row in inversion_sweep(
            build,
            shortest,
            opening=template_opening(lm.tokenizer, chat=chat_format(config.data)),
            ranks=inversion_ranks(config.lora.rank, hidden_size=int(lm.model.get_input_embeddings().weight.shape[1])),
            batch_sizes=INVERSION_BATCHES,
            noise_multipliers=INVERSION_NOISES,
            b_std=INVERSION_B_STD,
            seed=config.seed,
            settings=InversionSettings(),
        )
    ]


def inversion_ranks(rank: int, *, hidden_size: int) -> list[int]:
    """The ranks of the sweep, in ascending order."""
    return sorted({rank, *(min(other, max(1, hidden_size // 2)) for other in INVERSION_RANKS)})


def _one_run(plan: CanaryPlan, run: Audited, *, tokenizer: Any, ledger: dict[str, Any]) -> dict[str, Any]:
    config = run.config
    if plan.members:
        examples = secret_examples(tokenizer, plan.members, chat=chat_format(config.data))
        scores = calibrated_scores(*run.token_losses(examples, [run.last, run.first]))
        included = np.array([canary.included for canary in plan.members])
    else:
        number = plan.num_updates + plan.num_gradients
        sign = 1.0 if plan.num_updates else -1.0  # a step goes against the gradient
        scores = sign * canary_scores(np.asarray(run.last - run.first, dtype=np.float32), number, seed=config.seed)
        included = canary_coins(number, seed=config.seed)
    delta = ledger["delta"] or DELTA_WITHOUT_PROMISE
    result = one_run_audit(scores, included, delta=delta, confidence=config.audit.confidence)
    entries: dict[str, Any] = {
        "canary": config.audit.canary,
        "unit": "client" if config.audit.canary == "update" else "example",
        "delta": delta,
        "confidence": config.audit.confidence,
        "epsilon_claimed": ledger["epsilon"],
        **dataclasses.asdict(result),
        "num_included": int(included.sum()),
    }
    if not plan.members and min(included.sum(), (~included).sum()) >= 2:
        estimate = gaussian_audit(scores[included], scores[~included], delta=delta, confidence=config.audit.confidence)
        entries["gaussian_estimate"] = dataclasses.asdict(estimate)
    return entries


def verdict(one_run: dict[str, Any]) -> str:
    """What was claimed and what was found, in one line."""
    claimed, found = one_run["epsilon_claimed"], one_run["epsilon_lower"]
    upper = "no guarantee claimed" if claimed is None else f"claimed at most {claimed:.4g}"
    against = "" if claimed is None else (": contradicted" if found > claimed else ": not contradicted")
    return (
        f"{upper} / audited at least {found:.4g} ({100 * one_run['confidence']:.4g}% confidence, {one_run['num_correct']} of "
        f"{one_run['num_guesses']} guesses right over {one_run['num_canaries']} {one_run['canary']} canaries){against}"
    )
