"""What the papers of FEDPIT and DP-LoRA claim, each claim as contrasts between entries of `configs/fedpit-claims.yaml` and `dplora-claims.yaml`.

Published figures are quoted as far as they are known to us: FEDPIT's from its last version's text, DP-LoRA's from secondary sources, since its
own text was not available. Absolute win rates of a retired judge on a 7B model cannot be matched by another judge and model: what is
held against our runs is always the ordering.
"""

from collections.abc import Sequence

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
    growth,
    minus,
    rising,
)
from raysim.console.words import human_bytes
from raysim.privacy.accounting import analytic_epsilon, analytic_sigma, epsilon_pld, paper_epsilon, paper_sigma

TIST = "PPFedIT, the last version of FEDPIT (ACM TIST 17(5), Art. 106, 2026)"
TABLE_2 = f"{TIST}, Table 2"
FIRST = "FEDPIT, first version (arXiv 2403.06131), as summarised by others; its full text was not available"
DPLORA = "DP-LoRA (arXiv 2312.17493; ACM TMIS 16(2), 2025), as quoted by others; its own text was not available"
NOT_KNOWN = "not known"
BYTES_PER_PARAMETER = 4

ALPHAS = (("0.1", "-alpha-0.1"), ("1", ""), ("10", "-alpha-10"))
"""Dirichlet alpha, and what it adds to an entry's name."""
BETAS = (("0", "fedpit-beta-0"), ("0.3", "fedpit-beta-0.3"), ("0.5", "fedpit"), ("0.7", "fedpit-beta-0.7"), ("1", "fedit"))
"""FEDPIT's beta, and its entry; at 1 FEDPIT is FEDIT."""
SHOWN = (("1", "fedpit-shown-1"), ("4", "fedpit-shown-4"), ("8", "fedpit"), ("16", "fedpit-shown-16"))
"""Demonstrations in a prompt, and the entry."""
RANKS = ("4", "16", "64")
EPSILONS = ("1", "3", "8", "none")
"""Epsilon of DP-LoRA's entries; `none` is the same training without noise."""
PUBLISHED_SIGMA, PUBLISHED_ROUNDS, PUBLISHED_DELTA = 2.0, 50, 1e-5
LITERAL_SENSITIVITY = 2.0 * 2.0**0.5
"""Over the clipping norm: a record can turn the clipped mean gradients of A and of B from one end to the other."""


def stated(where: str, figures: tuple[str, ...], *rows: tuple[str, str, str, *tuple[Contrast, ...]]) -> tuple[Claim, ...]:
    """Claims that stand in one place and are decided by the same figures, from rows of key, claim, published figures and contrasts."""
    return tuple(Claim(key, text, where, published, figures, tuple(contrasts)) for key, text, published, *contrasts in rows)


FEDPIT_CLAIMS: tuple[Claim, ...] = (
    *stated(
        TABLE_2,
        UTILITY,
        ("fedpit-above-fedit", "FEDPIT's utility is above FEDIT's", "win+tie 62.0 against 53.9 (FedAvg)", above("fedpit", "fedit")),
        (
            "fedpit-above-fewfedweight",
            "FEDPIT's utility is above FewFedWeight's (here a reconstruction)",
            "win+tie 62.0 against 55.7",
            above("fedpit", "fewfedweight"),
        ),
        (
            "fedpit-above-other-federated",
            "FEDPIT's utility is above FedProx's, SCAFFOLD's and FedOpt's",
            "win+tie 62.0 against 55.0, 54.3 and 48.9",
            above("fedpit", "fedprox"),
            above("fedpit", "scaffold"),
            above("fedpit", "fedopt"),
        ),
        (
            "fedpit-near-cenit",
            "FEDPIT's utility comes near CENIT's: it lies nearer to CENIT's than to FEDIT's",
            "win+tie 62.0; CENIT 64.2, FEDIT 53.9: four fifths of the way",
            Contrast("fedpit above the middle between fedit and cenit", (Term(1, "fedpit"), Term(-0.5, "fedit"), Term(-0.5, "cenit"))),
        ),
    ),
    *stated(
        f"{TIST}, section 4 (MedInstruct)",
        UTILITY,
        (
            "locit-synthetic-below-fedit",
            "LOCIT with synthetic data stays below FEDIT",
            "the ordering only, from a figure",
            above("fedit", "locit-synthetic"),
        ),
        ("synthetic-helps-locit", "Synthetic data help LOCIT", "the ordering only, from a figure", above("locit-synthetic", "locit")),
    ),
    *stated(
        FIRST,
        UTILITY,
        (
            "alpha-degrades",
            "Federated methods degrade as alpha falls (from 10 to 0.1)",
            NOT_KNOWN,
            above("fedit-alpha-10", "fedit-alpha-0.1"),
            above("fedpit-alpha-10", "fedpit-alpha-0.1"),
        ),
        (
            "alpha-degrades-fedpit-least",
            "FEDPIT degrades least as alpha falls",
            NOT_KNOWN,
            Contrast(
                "fedit loses more than fedpit from alpha 10 to 0.1",
                (*above("fedit-alpha-10", "fedit-alpha-0.1").terms, *minus(above("fedpit-alpha-10", "fedpit-alpha-0.1").terms)),
            ),
        ),
    ),
    *stated(
        f"{TIST}, section 4.3",
        LEAKAGE,
        (
            "fedit-leakage-grows",
            "FEDIT's leakage grows with rounds",
            "curves between about 30 and 80 of 100 over 10 rounds, read from a figure",
            Contrast("fedit after the last round above after the first", growth("fedit")),
        ),
        (
            "fedpit-leakage-low",
            "FEDPIT's leakage stays low: below FEDIT's at the end, and it grows less",
            "about 20% less",
            above("fedit", "fedpit"),
            Contrast("fedit's leakage grows more than fedpit's", (*growth("fedit"), *minus(growth("fedpit")))),
        ),
    ),
    *stated(
        FIRST,
        LEAKAGE,
        (
            "first-version-leaks-less",
            "What FEDPIT's first version shares (trained on synthetic records alone, as with beta 0) leaks less than FEDIT",
            NOT_KNOWN,
            above("fedit", "fedpit-beta-0"),
        ),
    ),
    *stated(
        f"{TIST}, section 4.3",
        LEAKAGE,
        (
            "leakage-monotone-in-beta",
            "Leakage rises with beta (0, 0.3, 0.5, 0.7, 1)",
            "the ordering of five curves, read from a figure",
            *rising(*(entry for _, entry in BETAS)),
        ),
        (
            "cenit-leaks-most",
            "CENIT leaks most",
            "the steepest curve, read from a figure",
            *tuple(above("cenit", other) for other in ("fedit", "fedpit", "fedmit", "fewfedweight")),
        ),
        (
            "mixing-data-protects-no-better",
            "Real and synthetic data in one adapter (FedMIT) protect less than FEDPIT's two adapters",
            "no better than FedAvg, read from a figure",
            above("fedmit", "fedpit"),
        ),
    ),
    *stated(
        f"{TIST}, section 4 (analysis)",
        UTILITY,
        (
            "demonstrations-help-up-to-8",
            "More demonstrations in the prompt help up to 8",
            "win+tie about 40 at 1, the mid-fifties at 4, level at 8 and 16, read from a figure",
            *rising(*(entry for count, entry in SHOWN if int(count) <= 8)),
        ),
    ),
)


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
    turns = sum(len(record.cohort) - record.num_failed for record in run.rounds)
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
        f"sigma {one.paper_noise_multiplier:g}, delta {one.delta:g}: stated {stated:.3g}; accounted for "
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


MIDDLE = RANKS[len(RANKS) // 2]
DPLORA_CLAIMS: tuple[Claim, ...] = (
    *stated(
        DPLORA,
        UTILITY,
        (
            "utility-rises-with-epsilon",
            f"DP-LoRA's utility rises with epsilon (1, 3, 8, without noise; rank {MIDDLE})",
            "LLaMA-7B, LiveQA: 55.9 at epsilon 2, 69.4 without noise",
            *rising(*(dplora(epsilon, MIDDLE) for epsilon in EPSILONS)),
        ),
        (
            "noise-costs-utility",
            "The noise of a moderate epsilon costs utility (3 against none, every rank)",
            "LLaMA-7B, LiveQA: 69.4 to 55.9 at epsilon 2",
            *tuple(above(dplora("none", rank), dplora("3", rank)) for rank in RANKS),
        ),
        (
            "smaller-rank-less-utility",
            "A smaller rank has less utility (without noise)",
            "the ordering only",
            *rising(*(dplora("none", rank) for rank in RANKS)),
        ),
        (
            "smaller-rank-less-utility-private",
            "A smaller rank has less utility (epsilon 8)",
            "the ordering only",
            *rising(*(dplora("8", rank) for rank in RANKS)),
        ),
        (
            "private-training-learns",
            f"DP-LoRA learns from private records at epsilon 8 (rank {MIDDLE}): better than the base model",
            NOT_KNOWN,
            above(dplora("8", MIDDLE), "base"),
        ),
        (
            "published-algorithm-learns",
            "The published algorithm at its published noise (sigma 2, C 10, SGD) learns: better than the base model",
            NOT_KNOWN,
            above("dplora-literal", "base"),
        ),
    ),
    *stated(
        DPLORA,
        LEAKAGE,
        (
            "noise-protects",
            "DP-LoRA at epsilon 8 leaks less than without noise",
            NOT_KNOWN,
            above(dplora("none", MIDDLE), dplora("8", MIDDLE)),
        ),
    ),
    Claim(
        "uplink-below-full",
        "DP-LoRA sends less than full fine-tuning would, by its formula",
        DPLORA,
        "T K L r 2n numbers against T K times all parameters",
        compute=uplink,
    ),
    Claim(
        "sigma-formula",
        "The formula sigma >= sqrt(2 ln(1.25/delta)) / epsilon gives (epsilon, delta) for the run",
        DPLORA,
        "stated per iteration; sigma 2 and delta 1e-5 are epsilon 2.42",
        compute=sigma_formula,
    ),
)

CLAIMS = {"fedpit": FEDPIT_CLAIMS, "dplora": DPLORA_CLAIMS}
