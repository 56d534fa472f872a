"""What is promised to whom: the content of ledger.json, from the mechanism that was run."""

import dataclasses
from typing import Any

from raysim.methods.spec import METHODS
from raysim.privacy import promises
from raysim.privacy.accounting import paper_epsilon
from raysim.privacy.mechanism import LITERAL_SENSITIVITY, Mechanism


def ledger_of(mechanism: Mechanism, num_rounds: int) -> dict[str, Any]:
    """What was promised to whom after `num_rounds`: the content of ledger.json.

    `noise_multiplier` is what the configuration gives, or what was solved for; `accounted_multiplier` what the accountant is given.
    `epsilon` is dp-accounting's at `delta` for the events in `releases`; null where nothing is promised.
    """
    spent, private = mechanism.epsilon(num_rounds), mechanism.kind != "none"
    entries: dict[str, Any] = {
        "unit": {"literal": "example", "synthesis": "example"}.get(mechanism.kind, mechanism.kind),
        "neighbouring_relation": promises.RELATIONS[_relation(mechanism)],
        "sampler": _sampler(mechanism),
        "sampling_prob": mechanism.sampling_prob,
        "noise_multiplier": mechanism.noise_multiplier if private else 0.0,
        "accounted_multiplier": mechanism.accounted_multiplier if private else 0.0,
        "clip_norm": mechanism.clip_norm if private and mechanism.kind != "synthesis" else None,
        "num_releases": mechanism.num_releases(num_rounds),
        "delta": mechanism.delta if private else None,
        "epsilon": spent.quoted if spent else None,
        "epsilon_rdp": spent.rdp if spent else None,
        "accountant": ("pld" if spent.pld is not None else "rdp") if spent else None,
        "releases": [dataclasses.asdict(release) for release in mechanism.releases(num_rounds)],
        "guarantee": guarantee_of(mechanism, num_rounds),
        "simulated": mechanism.noise_cohort_size > 0,
        "noise_at": mechanism.noise_at if private else "none",
        "expected_cohort": mechanism.expected_cohort,
        "num_rounds": num_rounds,
        "seeded_noise": private and mechanism.noise_multiplier > 0.0 and not mechanism.secure_noise,
    }
    return entries | _special_entries(mechanism)


def guarantee_of(mechanism: Mechanism, num_rounds: int) -> str:
    """One plain sentence: who is protected against whom, by how much, and under which assumptions."""
    if mechanism.kind == "none":
        return METHODS[mechanism.method].no_guarantee
    spent = mechanism.epsilon(num_rounds)
    if spent is None:
        return (
            f"No differential-privacy guarantee: noise_multiplier={mechanism.noise_multiplier:g} is too little noise for a finite epsilon."
        )
    secrecy = (
        "its sampling stays secret" if mechanism.secure_noise else "the run's seed, from which noise and sampling are drawn, stays secret"
    )
    who = promises.PROMISES[_promise(mechanism)].format(
        budget=f"({spent.quoted:.4g}, {mechanism.delta:.3g})-differentially private",
        num_rounds=num_rounds,
        clip=f"{mechanism.clip_norm:g}" if mechanism.clipping == "flat" else "a private quantile of their norms",
        num_bands=mechanism.num_bands,
    )
    simulated = ""
    if mechanism.noise_cohort_size:
        simulated = promises.SIMULATED.format(noise_cohort_size=mechanism.noise_cohort_size, population=mechanism.num_simulated)
    return f"{simulated}{who}; it holds for the released adapters, not for the diagnostics beside them, and as long as {secrecy}."


def _relation(mechanism: Mechanism) -> str:
    if mechanism.kind == "client" and mechanism.noise_at != "server":
        return "client-local"
    return "client-fixed" if mechanism.sampler == "fixed" else mechanism.kind


def _promise(mechanism: Mechanism) -> str:
    if mechanism.kind != "client":
        return mechanism.kind
    if mechanism.noise_at != "server":
        return "client-local" if mechanism.noise_at == "client" else "client-distributed"
    return {"fixed": "client-fixed", "cyclic": "client-cyclic"}.get(mechanism.sampler, "client")


def _sampler(mechanism: Mechanism) -> str:
    if mechanism.kind in ("example", "synthesis"):
        return "poisson over records"
    if mechanism.kind == "literal":
        return "fixed-size batches (not amplified)"
    if mechanism.sampler == "cyclic":
        return "fixed order of clients"
    if mechanism.cohort_size == mechanism.num_clients:
        return "every client"
    return "poisson over clients" if mechanism.kind == "client" and mechanism.sampler != "fixed" else "fixed-size cohorts"


def _special_entries(mechanism: Mechanism) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    if mechanism.noise_cohort_size:
        entries |= {"noise_cohort_size": mechanism.noise_cohort_size, "population": mechanism.population or None}
    if mechanism.clipping == "adaptive":
        entries |= {"clipping": "adaptive", "count_noise": mechanism.count_noise, "update_noise_multiplier": mechanism.sum_noise_multiplier}
    if mechanism.sampler == "cyclic":
        entries |= {
            "num_bands": mechanism.num_bands,
            "num_rounds_planned": mechanism.num_rounds,
            "sensitivity": mechanism.sensitivity(mechanism.num_rounds),
        }
    if mechanism.is_masked:
        entries |= {"dropout_tolerance": mechanism.dropout_tolerance}
    if mechanism.kind == "synthesis":
        entries |= {"num_tokens_per_record": mechanism.num_tokens}
    if mechanism.kind == "literal":
        stated = paper_epsilon(mechanism.noise_multiplier, delta=mechanism.delta) if mechanism.noise_multiplier else None
        entries |= {
            "sensitivity_over_clip_norm": LITERAL_SENSITIVITY,
            "paper_epsilon_per_step": stated,
            "paper_epsilon_note": "the paper's formula: of one step, for a sensitivity of C, valid below 1 only; invalid as a total",
        }
    return entries
