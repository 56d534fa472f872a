"""Rules that combine the updates of clients some of whom may be hostile: what a server makes of every client's own upload.

All are functions of updates of shape (K, P), in float64, and of a weight for each; but for the mean and the bounded mean they count every client
alike, for a client could ask for any weight. None comes with a privacy guarantee of its own: how far one client moves a median is not bounded by
what its update is clipped to.
Left out: rules that need data at the server, or remember clients from round to round.
Legend: K = clients, P = parameters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from raysim.privacy.noise import gaussian

Updates = NDArray[np.float64]
Combine = Callable[[Updates, NDArray[np.float64]], NDArray[np.float64]]
"""From the updates and weights of a round to the update that is applied."""
SMOOTHING, TOLERANCE, MOST_STEPS = 1e-6, 1e-9, 200
"""Of the geometric median: distances below the first, as a share of the median norm, count as so much; it stops where a step moves less than
the second of its length, or after so many."""
FLAME_NOISE = 1e-3
"""FLAME's lambda: its noise over the median norm (Nguyen et al. 2022, section 5)."""


@dataclass(frozen=True)
class RuleSettings:
    """How a rule is set."""

    hostile_share: float
    """Share of a round's clients that is taken for hostile."""
    norm_bound: float
    """Longest update that is not shortened; 0 for the median length."""
    seed: int
    """Of the noise that FLAME adds."""


def rule_of(name: str, settings: RuleSettings) -> Combine | None:
    """The rule that `server.rule` names; None for the mean, which needs no upload by itself."""
    rules: dict[str, Combine] = {
        "median": median,
        "trimmed_mean": partial(trimmed_mean, share=settings.hostile_share),
        "krum": partial(krum, share=settings.hostile_share),
        "multi_krum": partial(multi_krum, share=settings.hostile_share),
        "norm_bound": partial(bounded_mean, bound=settings.norm_bound),
        "geometric_median": geometric_median,
        "flame": partial(flame, seed=settings.seed),
    }
    return None if name == "mean" else rules[name]


def median(updates: Updates, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median of each coordinate; Yin et al. (2018), arXiv 1803.01498."""
    return np.asarray(np.median(updates, axis=0))


def trimmed_mean(updates: Updates, weights: NDArray[np.float64], *, share: float) -> NDArray[np.float64]:
    """The mean of each coordinate without the smallest and the largest `share`; Yin et al. (2018), arXiv 1803.01498."""
    num_cut = min(math.ceil(share * len(updates)), (len(updates) - 1) // 2)
    return np.asarray(np.sort(updates, axis=0)[num_cut : len(updates) - num_cut].mean(axis=0))


def krum(updates: Updates, weights: NDArray[np.float64], *, share: float) -> NDArray[np.float64]:
    """The one update that is nearest to its neighbours; Blanchard et al. (2017), arXiv 1703.02757."""
    return np.asarray(updates[int(np.argmin(krum_scores(updates, num_hostile=_num_hostile(len(updates), share))))])


def multi_krum(updates: Updates, weights: NDArray[np.float64], *, share: float) -> NDArray[np.float64]:
    """The mean of all but as many updates as are taken for hostile, those farthest from their neighbours; Blanchard et al. (2017)."""
    num_hostile = _num_hostile(len(updates), share)
    kept = np.argsort(krum_scores(updates, num_hostile=num_hostile), kind="stable")[: len(updates) - num_hostile]
    return np.asarray(updates[np.sort(kept)].mean(axis=0))


def krum_scores(updates: Updates, *, num_hostile: int) -> NDArray[np.float64]:
    """Of each update the sum of its squared distances to its K - f - 2 nearest neighbours, float64 of shape (K,)."""
    distances_KK = _squared_distances(updates)
    np.fill_diagonal(distances_KK, np.inf)
    num_near = min(max(1, len(updates) - num_hostile - 2), len(updates) - 1)
    return np.asarray(np.sort(distances_KK, axis=1)[:, :num_near].sum(axis=1))


def bounded_mean(updates: Updates, weights: NDArray[np.float64], *, bound: float) -> NDArray[np.float64]:
    """The weighted mean of updates that are shortened to `bound`, or to their median length if that is 0; Sun et al. (2019), arXiv 1911.07963."""
    return np.asarray(np.average(_shortened(updates, bound or float(np.median(_norms(updates)))), axis=0, weights=weights))


def geometric_median(updates: Updates, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The point with the least sum of distances to all, by smoothed Weiszfeld steps; Pillutla et al. (2022), arXiv 1912.13445."""
    point = updates.mean(axis=0)
    least = SMOOTHING * float(np.median(_norms(updates))) or 1.0
    for _ in range(MOST_STEPS):
        nearness = 1.0 / np.maximum(_norms(updates - point), least)
        after = np.average(updates, axis=0, weights=nearness)
        moved, point = float(np.linalg.norm(after - point)), after
        if moved <= TOLERANCE * float(np.linalg.norm(point)):
            break
    return np.asarray(point)


def flame(updates: Updates, weights: NDArray[np.float64], *, seed: int) -> NDArray[np.float64]:
    """The mean of the updates in the largest cluster by direction, shortened to the median length, with noise; Nguyen et al. (2022), arXiv 2101.02281.

    Its noise blurs backdoors. It is no differential privacy: nothing bounds what one client changes about the clusters and the length.
    """
    bound = float(np.median(_norms(updates)))
    mean = _shortened(updates[_in_the_largest_cluster(updates)], bound).mean(axis=0)
    return np.asarray(mean + gaussian(updates.shape[1], std=FLAME_NOISE * bound, seed=seed, secure=False))


def _in_the_largest_cluster(updates: Updates) -> NDArray[np.bool_]:
    """Which updates lie in a cluster of more than half by cosine distance (HDBSCAN); all of them where there is none."""
    if len(updates) < 3:
        return np.ones(len(updates), dtype=bool)
    from sklearn.cluster import HDBSCAN  # with pandas and pyarrow, 100 MB that only this rule needs

    lengths = np.maximum(_norms(updates), np.finfo(np.float64).tiny)
    cosine_KK = 1.0 - np.clip((updates / lengths[:, None]) @ (updates / lengths[:, None]).T, -1.0, 1.0)
    np.fill_diagonal(cosine_KK, 0.0)
    found = HDBSCAN(min_cluster_size=len(updates) // 2 + 1, min_samples=1, allow_single_cluster=True, metric="precomputed", copy=True)
    labels = found.fit(np.maximum(cosine_KK, cosine_KK.T)).labels_
    return np.asarray(labels >= 0 if (labels >= 0).any() else np.ones(len(updates), dtype=bool))


def _num_hostile(num_clients: int, share: float) -> int:
    """f: as many as the share says, and no more than Krum is defined for, K >= 2 f + 3."""
    return max(0, min(math.ceil(share * num_clients), (num_clients - 3) // 2))


def _norms(updates: Updates) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(updates, axis=1))


def _shortened(updates: Updates, bound: float) -> Updates:
    return updates * np.minimum(1.0, bound / np.maximum(_norms(updates), np.finfo(np.float64).tiny))[:, None]


def _squared_distances(updates: Updates) -> NDArray[np.float64]:
    squares = np.sum(updates**2, axis=1)
    return np.asarray(np.maximum(squares[:, None] + squares[None, :] - 2.0 * updates @ updates.T, 0.0))
