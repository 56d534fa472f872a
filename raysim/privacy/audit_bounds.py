"""What attacks say about a run's epsilon: a lower bound from one run, an estimate from a Gaussian fit, and figures of membership.

An accountant states epsilon at most; a bound from here states epsilon at least. If the second exceeds the first, the run
does not keep its promise. All scores are of one kind: the higher, the more likely the canary or record was used.
Two bounds from one run: through (epsilon, delta), which assumes nothing of the mechanism (Steinke et al. 2023), and through a family of
trade-off functions, which is tighter and is about mechanisms of that family (Mahloujifar et al. 2024).
Left out: audits that need several runs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtrc, expit, log_ndtr, logit, ndtri
from scipy.stats import beta, binom, rankdata

from raysim.privacy.tradeoff import MOST_EPSILON, Family, TradeOff

Floats = NDArray[np.float64]

TOLERANCE = 1e-6
"""Bisection stops when epsilon is known this closely."""
SCALE_TOLERANCE = 1e-3
"""The search among the members of a family stops when the scale is known to this share."""
LEAST_SCALE = 1.0 / 64.0
"""A family's member with so much more noise protects so well that refuting no other counts as refuting nothing."""
FEWEST_GUESSES = 8
"""All of fewer guesses can be right by chance too often to be tried among others."""
TIE_SEED = 160493
"""Seed of the order among equal scores: a constant, so that nobody can look for a lucky one."""


@dataclass(frozen=True)
class OneRunResult:
    """A lower bound on epsilon and what it rests on."""

    epsilon_lower: float
    num_canaries: int
    num_guesses: int
    num_correct: int


@dataclass(frozen=True)
class GaussianEstimate:
    """An estimate of epsilon (no bound) with its interval, and the two normal distributions that it compares."""

    epsilon_estimate: float
    interval: tuple[float, float]
    mean_in: float
    std_in: float
    mean_out: float
    std_out: float


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval."""

    value: float
    lower: float
    upper: float


# --- a lower bound from one run ---


@functools.lru_cache(maxsize=4096)
def one_run_epsilon(num_canaries: int, num_guesses: int, num_correct: int, *, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that `num_correct` right guesses of `num_guesses` refute, or 0 if they refute none.

    Guarantees: if every one of `num_canaries` was included by an independent fair coin, and the guesses came from the
    output of an (epsilon, delta)-private mechanism, the value exceeds epsilon with probability at most 1 - `confidence`.
    Steinke, Nasr and Jagielski (2023), arXiv 2305.08846. `num_guesses` must not depend on the coins.
    """
    _check_guesses(num_canaries, num_guesses, num_correct, delta, confidence)

    def refuted(epsilon: float) -> bool:
        return _p_value(epsilon, num_canaries, num_guesses, num_correct, delta) < 1.0 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2.0 * high
    while high - low > TOLERANCE:
        middle = (low + high) / 2.0
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _p_value(epsilon: float, num_canaries: int, num_guesses: int, num_correct: int, delta: float) -> float:
    """The most probable that so many right guesses can be under (epsilon, delta)-privacy: beta + 2 m delta alpha.

    With X ~ Binomial(r, 1 / (1 + exp(-epsilon))): beta = P[X >= v] and alpha = max over i >= 1 of P[v > X >= v - i] / i.
    """
    chance = expit(epsilon)
    reached = float(bdtrc(num_correct - 1, num_guesses, chance))
    if delta == 0.0 or num_correct == 0:
        return reached
    shortfalls = np.arange(1, num_correct + 1)
    just_missed = bdtrc(num_correct - shortfalls - 1, num_guesses, chance) - reached
    return min(1.0, reached + 2.0 * num_canaries * delta * float((just_missed / shortfalls).max()))


def one_run_audit(
    scores: ArrayLike, included: ArrayLike, *, delta: float, num_guesses: int | None = None, confidence: float = 0.95
) -> OneRunResult:
    """The lower bound on epsilon from the scores of canaries of which each was `included` by a fair coin.

    The top half of the guesses says `in`, the bottom half `out` (an odd one goes to the top), and no guess is made between.
    Equal scores are ordered by a fixed random permutation, which knows nothing of `included`: they are worth coin flips.
    Without `num_guesses` it is the best of `guess_grid`, each at a confidence corrected for their number (Bonferroni);
    with it, it must have been fixed before anybody saw `included`. Among equal bounds the fewest guesses are reported.

    Guarantees: as `one_run_epsilon`, and the same result if scores are passed through any strictly increasing function.
    """
    score = _checked_scores("scores", scores, at_least=1)
    label = np.asarray(included, dtype=bool)
    if label.shape != score.shape:
        raise ValueError(f"included has shape {label.shape} and scores has {score.shape}; give one of each a canary")
    choices = guess_grid(len(score)) if num_guesses is None else (num_guesses,)
    corrected = 1.0 - (1.0 - confidence) / len(choices)
    results = []
    for number, correct in _counted(score, label, choices):
        bound = one_run_epsilon(len(score), number, correct, delta=delta, confidence=corrected)
        results.append(OneRunResult(epsilon_lower=bound, num_canaries=len(score), num_guesses=number, num_correct=correct))
    return max(results, key=lambda result: result.epsilon_lower)


def guess_grid(num_canaries: int) -> tuple[int, ...]:
    """The numbers of guesses that are tried for `num_canaries`: all of them, a half, a quarter and so on to a 64th, if not too few."""
    fewer = {num_canaries // parts for parts in (2, 4, 8, 16, 32, 64)}
    return tuple(sorted({num_canaries, *(number for number in fewer if number >= FEWEST_GUESSES)}))


def _counted(score: Floats, label: NDArray[np.bool_], choices: Sequence[int]) -> list[tuple[int, int]]:
    """For each number of guesses, how many are right."""
    ties = np.random.default_rng(TIE_SEED).permutation(len(score))
    ranked = label[np.lexsort((ties, -score))]
    return [(number, _correct_guesses(ranked, number)) for number in choices]


def _correct_guesses(ranked: NDArray[np.bool_], num_guesses: int) -> int:
    """Right guesses when the first of `ranked` (best score first) are called `in` and the last are called `out`."""
    num_in, num_out = (num_guesses + 1) // 2, num_guesses // 2
    return int(ranked[:num_in].sum()) + int((~ranked[len(ranked) - num_out :]).sum())


# --- the same through trade-off functions ---


def is_refuted(curve: TradeOff, *, num_canaries: int, num_guesses: int, num_correct: int, confidence: float = 0.95) -> bool:
    """Whether so many right guesses are less probable than 1 - `confidence` under every mechanism with this trade-off function.

    Mahloujifar, Melis and Chaudhuri (2024), arXiv 2410.22235. Let Q_i be the probability of at least i right guesses of n among m
    canaries. Fix the other canaries' coins and a guess: that it is made while i others are guessed right is a test for its canary,
    right (and then i + 1 are) if the guess is, with the chance a of a true positive and b of a false one, b >= g(a), g = `least_false`.
    g is convex, so that over all canaries and guesses, with R_i = sum over j >= i of j P[j right] / m and H_i the same of n - j,

        H_i >= g(R_{i+1}), that is (n - i) Q_i >= Q_{i+1} + ... + Q_n + m g(((i + 1) Q_{i+1} + Q_{i+2} + ... + Q_n) / m).

    The right side grows with every Q, so the least Q_0 that goes with Q_v = 1 - `confidence` follows from v downwards; if it is more
    than 1, Q_v is less than supposed. `num_guesses` must not depend on the coins.
    """
    _check_guesses(num_canaries, num_guesses, num_correct, 0.0, confidence)
    tail, beyond = 1.0 - confidence, 0.0  # Q_{i+1}, and the sum of all Q behind it
    for i in range(num_correct - 1, -1, -1):
        reached = ((i + 1) * tail + beyond) / num_canaries
        beyond += tail
        tail = max(tail, (beyond + num_canaries * curve.least_false(min(reached, 1.0))) / (num_guesses - i))
        if tail > 1.0:
            return True
    return False


def trade_off_audit(scores: ArrayLike, included: ArrayLike, *, family: Family, confidence: float = 0.95) -> OneRunResult:
    """The lower bound on epsilon from the scores of canaries of which each was `included` by a fair coin, for a mechanism of `family`.

    It is the epsilon of the least private member that is refuted. Guesses, ties and the choice among numbers of guesses are those
    of `one_run_audit`; where nothing is refuted, the counts are of the guesses that chance explains least.

    Guarantees: if the mechanism keeps the trade-off function of some member, the value exceeds that one's epsilon with probability at
    most 1 - `confidence`. So it exceeds what the member at scale 1 claims only if the claim, as a whole curve, is refuted.
    """
    score, label = _checked_scores("scores", scores, at_least=1), np.asarray(included, dtype=bool)
    choices = guess_grid(len(score))
    counts = _counted(score, label, choices)
    corrected = 1.0 - (1.0 - confidence) / len(choices)

    def refuting(scale: float) -> tuple[int, int] | None:
        curve = family.member(scale)
        for number, correct in counts:
            if is_refuted(curve, num_canaries=len(score), num_guesses=number, num_correct=correct, confidence=corrected):
                return number, correct
        return None

    scale, found = _largest_refuted(refuting, family)
    number, correct = found or min(counts, key=lambda count: float(bdtrc(count[1] - 1, count[0], 0.5)) if count[1] else 1.0)
    bound = family.epsilon(scale) if found else 0.0
    return OneRunResult(epsilon_lower=bound, num_canaries=len(score), num_guesses=number, num_correct=correct)


def _largest_refuted(refuting: Callable[[float], tuple[int, int] | None], family: Family) -> tuple[float, tuple[int, int] | None]:
    """The largest scale with a refutation, to a relative `SCALE_TOLERANCE`, and that one; None at the end of the search below."""
    low, found = 1.0, refuting(1.0)
    while found is None and low > LEAST_SCALE:
        low /= 2.0
        found = refuting(low)
    high = 2.0 * low
    while found and low >= 1.0 and family.epsilon(low) < MOST_EPSILON and (further := refuting(high)):
        low, high, found = high, 2.0 * high, further
    while found and high / low > 1.0 + SCALE_TOLERANCE:
        middle = math.sqrt(low * high)
        further = refuting(middle)
        low, high, found = (middle, high, further) if further else (low, middle, found)
    return low, found


# --- an estimate from a Gaussian fit ---


def gaussian_audit(scores_in: ArrayLike, scores_out: ArrayLike, *, delta: float, confidence: float = 0.95) -> GaussianEstimate:
    """An ESTIMATE of epsilon at `delta`: that of telling two normal distributions apart, fitted to scores with and without use.

    It is no bound: nothing in it fails safely where scores are not normal, or where another attack would see more. Two
    normals of different variance differ most in their tails, so that few scores overestimate, their variances differing by
    chance: at delta = 1e-5, scores of equal distribution give 1.7 on average if there are 100 of each, and 0.5 if 1000.
    The interval covers sampling error only: epsilon grows with the distance between the normals and with the ratio of their
    deviations, and its ends are those of both, each at half the error (delta method and Bonferroni: rather too wide).
    Andrew et al. (2023), arXiv 2302.03098: cosines of canary updates with what was released, against those of unused ones.
    """
    _check_share("delta", delta)
    _check_share("confidence", confidence)
    mean_in, std_in, num_in = _normal_fit("scores_in", scores_in)
    mean_out, std_out, num_out = _normal_fit("scores_out", scores_out)
    apart = np.array([(mean_in - mean_out) / math.sqrt(std_in * std_out), math.log(std_in / std_out)])
    reach = float(ndtri(1.0 - (1.0 - confidence) / 4.0)) * _standard_errors(*apart.tolist(), num_in=num_in, num_out=num_out)
    least, most = np.maximum(np.abs(apart) - reach, 0.0), np.abs(apart) + reach
    lower, estimate, upper = _epsilon_between(*np.array([least, apart, most]).T, delta=delta).tolist()
    return GaussianEstimate(estimate, (lower, upper), mean_in, std_in, mean_out, std_out)


def _normal_fit(name: str, values: ArrayLike) -> tuple[float, float, int]:
    """Mean, standard deviation and number of the scores."""
    score = _checked_scores(name, values, at_least=2)
    std = float(score.std(ddof=1))
    if not (math.isfinite(std) and std > 0.0):
        raise ValueError(f"{name}: the standard deviation is {std}, so no normal distribution fits; give finite scores that differ")
    return float(score.mean()), std, len(score)


def _standard_errors(distance: float, log_ratio: float, *, num_in: int, num_out: int) -> Floats:
    """Of the difference of means over the geometric mean of the deviations, and of the log-ratio of the deviations."""
    of_means = math.exp(log_ratio) / num_in + math.exp(-log_ratio) / num_out
    of_logs = 0.5 / (num_in - 1) + 0.5 / (num_out - 1)
    return np.sqrt([of_means + distance**2 * of_logs / 4.0, of_logs])


def _epsilon_between(distance: Floats, log_ratio: Floats, *, delta: float) -> Floats:
    """The least epsilon at which two normals are (epsilon, delta)-indistinguishable, both ways round.

    Their means are `distance` geometric means of their standard deviations apart, which are exp(`log_ratio`) to 1.
    """
    ratio = np.exp(log_ratio)
    inwards = _one_way_epsilon(distance * np.sqrt(ratio), ratio, delta=delta)
    outwards = _one_way_epsilon(-distance / np.sqrt(ratio), 1.0 / ratio, delta=delta)
    return np.maximum(inwards, outwards)


def _one_way_epsilon(mean: Floats, std: Floats, *, delta: float) -> Floats:
    """The least epsilon >= 0 with `_one_way_delta` at most `delta`, by bisection; the least is where it crosses, since it falls."""
    low, high = np.zeros_like(mean), np.ones_like(mean)
    while (wider := _one_way_delta(high, mean, std) > delta).any():
        low, high = np.where(wider, high, low), np.where(wider, 2.0 * high, high)
    while (high - low > TOLERANCE * np.maximum(1.0, high)).any():
        middle = (low + high) / 2.0
        above = _one_way_delta(middle, mean, std) > delta
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(_one_way_delta(np.zeros_like(mean), mean, std) > delta, high, 0.0)


def _one_way_delta(epsilon: Floats, mean: Floats, std: Floats) -> Floats:
    """P(S) - exp(epsilon) Q(S) for P = N(mean, std^2), Q = N(0, 1) and S = {x: p(x) > exp(epsilon) q(x)}, exactly.

    p(x) / q(x) is the exponential of a quadratic a x^2 + b x + c, so S lies outside its two roots (std >= 1, where one root
    is infinite at std = 1) or between them (std < 1). Everything is kept in logarithms: exp(epsilon) may be huge and Q(S) tiny.
    """
    a, b = (1.0 - std**-2) / 2.0, mean / std**2
    c = -np.log(std) - (mean / std) ** 2 / 2.0 - epsilon
    discriminant = b**2 - 4.0 * a * c
    half = -(b + np.copysign(np.sqrt(np.maximum(discriminant, 0.0)), b)) / 2.0
    with np.errstate(divide="ignore", invalid="ignore"):
        roots = np.array([half / a, c / half])
        low, high = roots.min(axis=0), roots.max(axis=0)
        outside = a >= 0.0
        log_p = _log_mass((low - mean) / std, (high - mean) / std, outside)
        log_q = _log_mass(low, high, outside)
        excess = -np.exp(log_p) * np.expm1(np.minimum(epsilon + log_q - log_p, 0.0))
    never = ((a < 0.0) & (discriminant <= 0.0)) | ((a == 0.0) & (b == 0.0))
    return np.where(never, 0.0, excess)


def _log_mass(low: Floats, high: Floats, outside: NDArray[np.bool_]) -> Floats:
    """Log-probability that a standard normal is outside `low` to `high`, or between them, taken in the tail where neither is near 1."""
    flip = low + high > 0.0
    left, right = log_ndtr(np.where(flip, -high, low)), log_ndtr(np.where(flip, -low, high))
    return np.asarray(np.where(outside, np.logaddexp(log_ndtr(low), log_ndtr(-high)), right + np.log1p(-np.exp(left - right))))


# --- figures of membership, with intervals ---


def clopper_pearson(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided confidence interval for a proportion (Clopper and Pearson 1934); (0, 1) without any trial."""
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} must be between 0 and trials={trials}")
    _check_share("confidence", confidence)
    tail = (1.0 - confidence) / 2.0
    lower = float(beta.ppf(tail, successes, trials - successes + 1)) if successes > 0 else 0.0
    upper = float(beta.ppf(1.0 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return lower, upper


def roc_auc(scores_in: ArrayLike, scores_out: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """The probability that a member scores above a non-member (ties count half), with DeLong's interval on the logit scale.

    DeLong, DeLong and Clarke-Pearson (1988). Where that variance is zero, as with complete separation, the interval is
    Clopper and Pearson's for as many disjoint pairs of a member and a non-member as there are: wide for few, and never a point.
    """
    _check_share("confidence", confidence)
    inside, outside = _checked_scores("scores_in", scores_in, at_least=2), _checked_scores("scores_out", scores_out, at_least=2)
    ranks = rankdata(np.concatenate([inside, outside]))
    beaten = (ranks[: len(inside)] - rankdata(inside)) / len(outside)
    beating = 1.0 - (ranks[len(inside) :] - rankdata(outside)) / len(inside)
    auc = float(beaten.mean())
    variance = float(beaten.var(ddof=1) / len(inside) + beating.var(ddof=1) / len(outside))
    if variance < 1e-15:
        pairs = min(len(inside), len(outside))
        bounds = [clopper_pearson(rounded, pairs, confidence=confidence) for rounded in (math.floor(auc * pairs), math.ceil(auc * pairs))]
        return Estimate(auc, bounds[0][0], bounds[1][1])
    reach = float(ndtri(0.5 + confidence / 2.0)) * math.sqrt(variance) / (auc * (1.0 - auc))
    return Estimate(auc, float(expit(logit(auc) - reach)), float(expit(logit(auc) + reach)))


def tpr_at_fpr(scores_in: ArrayLike, scores_out: ArrayLike, *, fpr: float, confidence: float = 0.95) -> Estimate:
    """The largest share of members above a threshold that at most a share `fpr` of the non-members exceed, with an interval.

    The interval is free of distributions and covers both errors, the threshold's and the share's: order statistics of the
    non-members bracket the threshold of exactly `fpr`, Clopper-Pearson bounds the share at either end, and the four errors
    add up to 1 - `confidence`. With fewer than about 4.4 / fpr non-members (at 95%) its lower end is 0: so few cannot show
    that a threshold is as strict as that.
    """
    _check_share("confidence", confidence)
    _check_share("fpr", fpr)
    inside = _checked_scores("scores_in", scores_in, at_least=1)
    descending = np.sort(_checked_scores("scores_out", scores_out, at_least=1))[::-1]
    error = (1.0 - confidence) / 4.0
    strict = int(binom.ppf(error, len(descending), fpr))
    lenient = int(binom.ppf(1.0 - error, len(descending), fpr)) + 1
    allowed = math.floor(fpr * len(descending) + 1e-9)
    strictest, found, loosest = (_num_above(inside, descending, rank) for rank in (strict, allowed + 1, lenient))
    one_sided = 1.0 - 2.0 * error
    lower = clopper_pearson(strictest, len(inside), confidence=one_sided)[0]
    return Estimate(found / len(inside), lower, clopper_pearson(loosest, len(inside), confidence=one_sided)[1])


def roc_points(scores_in: ArrayLike, scores_out: ArrayLike, *, most: int) -> tuple[Floats, Floats]:
    """False-positive and true-positive rates of calling in whatever scores above a threshold, for thresholds from high to low.

    They begin at (0, 0), end at (1, 1) and take equal scores together. Of more than `most` points, those are kept whose false-positive
    rates are spread in logarithms, since the small ones are what counts (Carlini et al. 2022, arXiv 2112.03570).
    """
    inside, outside = _checked_scores("scores_in", scores_in, at_least=1), _checked_scores("scores_out", scores_out, at_least=1)
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    fpr = np.append(0.0, 1.0 - np.searchsorted(np.sort(outside), thresholds) / len(outside))
    tpr = np.append(0.0, 1.0 - np.searchsorted(np.sort(inside), thresholds) / len(inside))
    if len(fpr) > most:
        wanted = np.concatenate([[0.0], np.geomspace(1.0 / len(outside), 1.0, most - 1)])
        kept = np.unique(np.append(np.searchsorted(fpr, wanted + 1e-12, side="right") - 1, len(fpr) - 1))  # the best threshold at each rate
        fpr, tpr = fpr[kept], tpr[kept]
    return fpr, tpr


def _num_above(inside: Floats, descending: Floats, rank: int) -> int:
    """Members above the non-member of this rank, the best being 1: none above rank 0, all above a rank that nobody has."""
    if rank == 0:
        return 0
    return len(inside) if rank > len(descending) else int((inside > descending[rank - 1]).sum())


# --- checks ---


def _checked_scores(name: str, values: ArrayLike, *, at_least: int) -> Floats:
    score = np.asarray(values, dtype=np.float64)
    if score.ndim != 1 or len(score) < at_least:
        raise ValueError(f"{name} has shape {score.shape}; give a list of at least {at_least}")
    if np.isnan(score).any():
        raise ValueError(f"{name} has {int(np.isnan(score).sum())} NaN of {len(score)}; a model that diverged cannot be audited")
    return score


def _check_share(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name}={value!r} must be between 0 and 1")


def _check_guesses(num_canaries: int, num_guesses: int, num_correct: int, delta: float, confidence: float) -> None:
    if not 0 <= num_guesses <= num_canaries:
        raise ValueError(f"num_guesses={num_guesses} must be between 0 and num_canaries={num_canaries}")
    if not 0 <= num_correct <= num_guesses:
        raise ValueError(f"num_correct={num_correct} must be between 0 and num_guesses={num_guesses}")
    if not 0.0 <= delta < 1.0:
        raise ValueError(f"delta={delta!r} must be at least 0 and less than 1")
    _check_share("confidence", confidence)
