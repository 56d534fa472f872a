"""The audit that goes along with a run: canaries dealt to clients, what they add to a round, and what they tell at the end.

Three kinds of canary for the one-run audit (Steinke et al. 2023, arXiv 2305.08846), so that the unit of the audit is that of the
ledger: a record in a shard, a gradient in a private step, or an update of a client of its own. Secret Sharer canaries are
records too. The bound that comes out is put beside what the accountant says.
What the auditor sees: the first and the last release, and the canaries. A guarantee for records holds against the server as well, so
that for gradient canaries he sees what their client sends in every round (`attacks.views`).

Left out: auditing a run that had no canaries (the `audit` command runs one again with them).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from raysim.attacks.canaries import Canary, make_canaries, membership_canaries, secret_examples
from raysim.attacks.inversion import InversionSettings, inversion_sweep, template_opening
from raysim.attacks.inversion import check_model as check_inversion_model
from raysim.attacks.membership import calibrated_scores, lira_scores, loss_scores, membership_report, min_k_scores, zlib_scores
from raysim.config import Config
from raysim.data.configured import chat_format
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.lora.layout import Released, by_name
from raysim.measure.evaluate import Job, batches
from raysim.methods.call import gradient_holders
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainSettings
from raysim.privacy.accounting import Release
from raysim.privacy.audit_bounds import gaussian_audit, one_run_audit, roc_points, trade_off_audit
from raysim.privacy.canaries import canary_coins, canary_directions, scores_along
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.tradeoff import TradeOff, noise_family, trade_off
from raysim.rng import numpy_rng, seed_for

Evaluate = Callable[[Sequence[tuple[Released, Job]]], list[list[Any]]]
INVERSION_RANKS = (64, 256)
"""Beside the run's own rank; at most half the hidden size, since a span of all dimensions tells nothing."""
INVERSION_BATCHES = (1, 2, 4)
INVERSION_NOISES = (0.0, 1e-3, 1e-1, 1.0)
INVERSION_B_STD = 0.01
DELTA_WITHOUT_PROMISE = 1e-5
"""delta of the bound for a run that promises nothing."""

BOUNDS = {"f-DP": "the mechanism's trade-off function", "Steinke": "(epsilon, delta) alone"}
"""`bound` of audit.json -> what the bound goes by."""
MOST_ROC_POINTS, NUM_BOUNDS, LEAST_RATE = 400, 61, 1e-4
"""Of a ROC curve in audit.json: most measured points, points of the bound, and the false-positive rate at which that begins."""


@dataclass(frozen=True)
class Audited:
    """A run that is over, as its auditor has it."""

    config: Config
    members: Sequence[Example]
    """Records that were trained on."""
    nonmembers: Sequence[Example]
    """Records that were not."""
    first: Released
    """The release before the run."""
    last: Released
    """The release after it."""
    evaluate: Evaluate
    notes: Mapping[int, np.ndarray] = field(default_factory=dict)
    """By client, how far its messages went along each gradient canary (`ClientCall.noted`)."""
    frozen: NDArray[np.bool_] | None = None
    """Which entries of the adapter no round trains, on which no update canary lies; None for none."""

    @property
    def examples(self) -> list[Example]:
        """Members, then the others."""
        return [*self.members, *self.nonmembers]

    def token_losses(self, examples: Sequence[Example], adapters: Sequence[Released]) -> list[list[np.ndarray]]:
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


def final_audit(
    plan: CanaryPlan, run: Audited, *, tokenizer: Any, ledger: Mapping[str, Any], mechanism: Mechanism
) -> dict[str, Any] | None:
    """The content of audit.json: `one_run`, `membership`, `inversion` and `roc`, each null unless it was asked for; None if none was."""
    audit = run.config.audit
    if not (plan.num_one_run or audit.membership or audit.num_shadows or audit.inversion):
        return None
    membership, curves = membership_attack(run, ledger=ledger) if audit.membership else ({}, {})
    if audit.num_shadows:
        membership["lira"] = lira_attack(run, num_shadows=audit.num_shadows)
    one_run = None
    if plan.num_one_run:
        scores, included = canary_statistics(plan, run, tokenizer=tokenizer, mechanism=mechanism)
        one_run = _one_run(scores, included, run.config, ledger=ledger)
        curves["canaries"] = roc_record(scores[included], scores[~included], curve=trade_off(promised(ledger)))
    return {
        "one_run": one_run,
        "membership": membership or None,
        "inversion": inversion_rows(run.config, run.members) if audit.inversion else None,
        "roc": curves or None,
    }


def membership_attack(run: Audited, *, ledger: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Four membership scores of training records against held-out ones, each as `membership_report`, and the `roc` entry of the calibrated one."""
    examples = run.examples
    after, before = run.token_losses(examples, [run.last, run.first])
    texts = ["\n".join(example.record.answers) if example.earlier else example.record.response for example in examples]
    scores = {
        "loss": loss_scores(after),
        "reference": calibrated_scores(after, before),
        "zlib": zlib_scores(after, texts),
        "min_k": min_k_scores(after),
    }
    # A guarantee for clients bounds what is told of one record only through two of its curves, one after the other.
    curve = trade_off(promised(ledger)) if ledger["unit"] == "example" else None
    roc = roc_record(*np.split(scores["reference"], [len(run.members)]), curve=curve)
    return {name: run.report(values) for name, values in scores.items()}, {"membership": roc}


def promised(ledger: Mapping[str, Any]) -> list[Release]:
    """The releases that a ledger accounts for."""
    return [Release(**release) for release in ledger["releases"]]


def roc_record(scores_in: np.ndarray, scores_out: np.ndarray, *, curve: TradeOff | None) -> dict[str, Any]:
    """An entry of `roc` in audit.json: the rates at every threshold, and at rates spaced evenly in logarithms what the ledger allows.

    `bound` is null where nothing is promised, or no accountant has the curve.
    """
    fpr, tpr = roc_points(scores_in, scores_out, most=MOST_ROC_POINTS)
    grid = np.logspace(math.log10(LEAST_RATE), 0.0, NUM_BOUNDS)
    bound = None if curve is None else {"fpr": grid.tolist(), "tpr": curve.most_found(grid).tolist()}
    return {"num_in": len(scores_in), "num_out": len(scores_out), "fpr": fpr.tolist(), "tpr": tpr.tolist(), "bound": bound}


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


def canary_statistics(plan: CanaryPlan, run: Audited, *, tokenizer: Any, mechanism: Mechanism) -> tuple[np.ndarray, np.ndarray]:
    """The score of each canary of the one-run audit, high for one that took part, and which were in.

    Of a gradient canary all that its client sent, rounds alike, since each carries the same noise; of an update canary the way from the
    first release to the last; of a record how much better it is known.
    """
    config = run.config
    if plan.members:
        examples = secret_examples(tokenizer, plan.members, chat=chat_format(config.data))
        scores = calibrated_scores(*run.token_losses(examples, [run.last, run.first]))
        return scores, np.array([canary.included for canary in plan.members])
    included = canary_coins(plan.num_updates + plan.num_gradients, seed=config.seed)
    if plan.num_updates:
        first, last = by_name(run.first)["adapter"], by_name(run.last)["adapter"]
        directions = canary_directions(plan.num_updates, size=len(last), seed=config.seed, frozen=run.frozen)
        return scores_along(directions, last.astype(np.float64) - first), included
    unseen = np.zeros(plan.num_gradients)
    holder_M = gradient_holders(config, mechanism)
    return np.array([run.notes.get(int(k), unseen)[i] for i, k in enumerate(holder_M)]), included


def _one_run(scores: np.ndarray, included: np.ndarray, config: Config, *, ledger: Mapping[str, Any]) -> dict[str, Any]:
    """The `one_run` entry of audit.json.

    The stated bound goes through the family of the run's own mechanism where there is one: it contradicts the ledger exactly where it
    refutes the whole curve that the ledger stands on. Steinke's, which takes no curve for granted, stands beside it, each at the full
    confidence: the larger of the two would need half the error for each.
    """
    delta, confidence = ledger["delta"] or DELTA_WITHOUT_PROMISE, config.audit.confidence
    assumption_free = one_run_audit(scores, included, delta=delta, confidence=confidence)
    family = noise_family(promised(ledger), delta=delta)
    stated = trade_off_audit(scores, included, family=family, confidence=confidence) if family else assumption_free
    entries: dict[str, Any] = {
        "canary": config.audit.canary,
        "unit": "client" if config.audit.canary == "update" else "example",
        "delta": delta,
        "confidence": confidence,
        "epsilon_claimed": ledger["epsilon"],
        "bound": "f-DP" if family else "Steinke",
        **dataclasses.asdict(stated),
        "epsilon_lower_steinke": assumption_free.epsilon_lower,
        "num_included": int(included.sum()),
    }
    entries["reason"] = reason_for_nothing(entries, ledger) if stated.epsilon_lower == 0.0 else ""
    if config.audit.canary != "record" and min(included.sum(), (~included).sum()) >= 2:
        estimate = gaussian_audit(scores[included], scores[~included], delta=delta, confidence=confidence)
        entries["gaussian_estimate"] = dataclasses.asdict(estimate)
    return entries


def reason_for_nothing(one_run: Mapping[str, Any], ledger: Mapping[str, Any]) -> str:
    """Why an audit that found nothing was to be expected to, or that it was not."""
    number = one_run["num_canaries"]
    if one_run["epsilon_claimed"] is None:
        return f"{number} canaries did not stand out, which is no guarantee"
    if one_run["canary"] == "record":
        return f"a record moves a release by less than the clip allows, and {number} records are few"
    if one_run["canary"] == "update" and ledger["noise_at"] == "client":
        return "a release carries the noise of all clients, where the ledger counts one client's against a server that sees its message"
    expected = expected_bound(number, promised(ledger), delta=one_run["delta"], confidence=one_run["confidence"])
    if expected is None:
        return "samples of a fixed size have no trade-off function, and without one few canaries refute little"
    if expected == 0.0:
        return f"this noise and sampling hide {number} canaries; more may show something"
    return f"of chance, or because the canaries took part less than the ledger allows: about {expected:.2g} was to be expected"


def expected_bound(num_canaries: int, releases: Sequence[Release], *, delta: float, confidence: float) -> float | None:
    """About what canaries of the full sensitivity in every release would show; None where `noise_family` has no family.

    Scores are put at the quantiles of the normal distributions of their sum over the releases, with the canary and without.
    """
    family = noise_family(releases, delta=delta)
    if family is None:
        return None
    signal = sum(release.count * release.sampling_prob for release in releases)
    noise = math.sqrt(sum(release.count * release.noise_multiplier**2 for release in releases))
    quantiles = ndtri((np.arange(num_canaries // 2) + 0.5) / (num_canaries // 2))
    scores = np.concatenate([quantiles + signal / noise, quantiles])
    return trade_off_audit(scores, np.arange(len(scores)) < len(quantiles), family=family, confidence=confidence).epsilon_lower


def verdict(one_run: Mapping[str, Any]) -> str:
    """What was claimed and what was found, in one line, and where nothing was found why."""
    claimed, found = one_run["epsilon_claimed"], one_run["epsilon_lower"]
    upper = "no guarantee claimed" if claimed is None else f"claimed at most {claimed:.4g}"
    against = "" if claimed is None else (": contradicted" if found > claimed else ": not contradicted")
    because = f"; 0 because {one_run['reason']}" if one_run["reason"] else ""
    return (
        f"{upper} / audited at least {found:.4g} ({100 * one_run['confidence']:.4g}% confidence by {BOUNDS[one_run['bound']]}, {one_run['num_correct']} "
        f"of {one_run['num_guesses']} guesses right over {one_run['num_canaries']} {one_run['canary']} canaries){against}{because}"
    )
