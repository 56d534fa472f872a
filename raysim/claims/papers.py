"""The claims of the papers of FEDPIT and DP-LoRA, which stand in `papers.yaml`, and those of them that are computed: bytes and a formula for noise."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from raysim.claims.decide import (
    FAILS,
    HOLDS,
    LEAKAGE,
    OPEN,
    UTILITY,
    Claim,
    Contrast,
    Reading,
    RunData,
    Runs,
    Term,
    above,
    rising,
)
from raysim.console.words import human_bytes
from raysim.privacy.accounting import analytic_epsilon, analytic_sigma, epsilon_pld, paper_epsilon, paper_sigma

BYTES_PER_PARAMETER = 4

ALPHAS = (("0.1", "-alpha-0.1"), ("1", ""), ("10", "-alpha-10"))
"""Dirichlet alpha, and what it adds to an entry's name."""
BETAS = (("0", "fedpit-beta-0"), ("0.3", "fedpit-beta-0.3"), ("0.5", "fedpit"), ("0.7", "fedpit-beta-0.7"), ("1", "fedit"))
"""FEDPIT's beta, and its entry; at 1 FEDPIT is FEDIT."""
RANKS = ("4", "16", "64")
EPSILONS = ("1", "3", "8", "none")
"""Epsilon of DP-LoRA's entries; `none` is the same training without noise."""
PUBLISHED_SIGMA, PUBLISHED_ROUNDS, PUBLISHED_DELTA = 2.0, 50, 1e-5
LITERAL_SENSITIVITY = 2.0 * 2.0**0.5
"""Over the clipping norm: a record can turn the clipped mean gradients of A and of B from one end to the other."""


def dplora(epsilon: str, rank: str) -> str:
    """The entry of DP-LoRA at an epsilon and a rank."""
    return f"dplora-eps-{epsilon}-rank-{rank}"


def uplink(runs: Runs) -> Reading:
    """What DP-LoRA's clients send against what full fine-tuning would: by formula, and as the rounds recorded it.

    The formula is T K L r (n_in + n_out) numbers (the paper's T K L 2 n r for square layers); full fine-tuning sends T K times all parameters.
    It holds if every run's records agree with the formula and are below full fine-tuning.
    """
    found = [(rank, run) for rank in RANKS for run in runs.get(dplora("none", rank), {}).values()]
    found = [(rank, run) for rank, run in found if run.factors and run.rounds]
    if not found:
        return Reading("bytes", OPEN, f"no run of {', '.join(dplora('none', rank) for rank in RANKS)}")
    lines = []
    for rank in dict.fromkeys(rank for rank, _ in found):
        counted, formula, full = sent_bytes(next(run for other, run in found if other == rank))
        share = f"{counted / full:.2%} of full fine-tuning's {human_bytes(full)}"
        lines.append(f"rank {rank}: {human_bytes(counted)} counted, {human_bytes(formula)} by formula, {share}")
    fits = all(counted == formula and counted < full for counted, formula, full in (sent_bytes(run) for _, run in found))
    return Reading("bytes", HOLDS if fits else FAILS, "; ".join(lines))


def sent_bytes(run: RunData) -> tuple[int, int, int]:
    """What all clients of a run sent: as counted in its rounds, by formula, and what full fine-tuning would have sent."""
    turns = sum(len(record.cohort) - record.num_failed + record.num_dropped for record in run.rounds)
    counted = sum(record.uplink_bytes for record in run.rounds)
    formula = turns * sum(rank * size for rank, size in run.factors) * BYTES_PER_PARAMETER
    return counted, formula, turns * (run.summary.num_base_parameters or 0) * BYTES_PER_PARAMETER


def sigma_formula(runs: Runs) -> Reading:
    """The epsilon that the paper's formula states for the literal runs, against what the accountant makes of the same noise over all rounds.

    It holds if the accountant's epsilon of every run is at most the stated one.
    """
    ledgers = [run.ledger for run in runs.get("dplora-literal", {}).values()]
    known = [
        (one, one.paper_epsilon_per_step, one.epsilon)
        for one in ledgers
        if one.paper_epsilon_per_step is not None and one.epsilon is not None
    ]
    if not known:
        return Reading("epsilon", OPEN, "no run of dplora-literal with a ledger")
    fits = all(accounted <= stated for _, stated, accounted in known)
    one, stated, accounted = known[0]
    text = (
        f"sigma {one.noise_multiplier:g}, delta {one.delta:g}: stated {stated:.3g}; accounted for "
        f"{one.num_releases} rounds {accounted:.4g}. {published_setting()}"
    )
    return Reading("epsilon", HOLDS if fits else FAILS, text)


def published_setting() -> str:
    """What the published sigma, rounds and delta come to, in words."""
    sigma, rounds, delta = PUBLISHED_SIGMA, PUBLISHED_ROUNDS, PUBLISHED_DELTA
    whole = epsilon_pld(sigma / LITERAL_SENSITIVITY, sampling_prob=1.0, num_releases=rounds, delta=delta)
    return (
        f"At the published sigma {sigma:g}, {rounds} rounds and delta {delta:g}: stated {paper_epsilon(sigma, delta=delta):.3g} a step; exactly "
        f"{analytic_epsilon(sigma, delta=delta):.3g} a step if a record moved the gradient by C, and {whole:.3g} in all for what a record does move"
    )


def sigma_table(
    epsilons: Sequence[float] = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0), *, delta: float = PUBLISHED_DELTA
) -> list[tuple[float, float, float]]:
    """For each epsilon of one release the noise multiplier by the paper's formula, and the exact one."""
    return [(epsilon, paper_sigma(epsilon, delta=delta), analytic_sigma(epsilon, delta=delta)) for epsilon in epsilons]


COMPUTED: dict[str, Callable[[Runs], Reading]] = {"uplink-below-full": uplink, "sigma-formula": sigma_formula}
"""Claims in which nothing is random, by key."""
DECIDED_BY = {"utility": UTILITY, "leakage": LEAKAGE, "computed": ()}


def claims_of(groups: Sequence[Mapping[str, Any]]) -> tuple[Claim, ...]:
    """The claims of a paper, from the groups of `papers.yaml`."""
    return tuple(
        Claim(
            one["key"],
            one["claim"],
            group["where"],
            one["published"],
            figures=DECIDED_BY[group["figures"]],
            contrasts=_contrasts(one),
            compute=COMPUTED.get(one["key"]),
        )
        for group in groups
        for one in group["claims"]
    )


def _contrasts(claim: Mapping[str, Any]) -> tuple[Contrast, ...]:
    sums = [Contrast(text, tuple(Term(*term) for term in terms)) for text, terms in claim.get("sums", {}).items()]
    return (*(above(*pair) for pair in claim.get("above", [])), *rising(*claim.get("rising", [])), *sums)


PAPERS: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("papers.yaml")))
CLAIMS = {name: claims_of(groups) for name, groups in PAPERS.items()}
