"""Memory: how much likelier an adapter makes the records it was trained on than it makes records like them, and how soon sampling writes one.

Both are read off likelihoods in one teacher-forced pass, so that nothing has to be generated for them. Who measures has the release,
the base model and the records whole: these are figures of the simulator, not what a client or the server of the federation could know.
Left out: which part of a record is remembered, and targets that are written nearly but not exactly.

Shape legend: E = examples, B = batch, V = vocabulary, N = scored positions of a batch, M = target positions of a batch, R = resamples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn import functional as F

from raysim.attacks.details import DetailSpan, detail_bits
from raysim.attacks.extraction import is_attackable
from raysim.data.tokens import Example
from raysim.lora.layout import Vector
from raysim.model.generate import drawn_log_probs
from raysim.model.language_model import LanguageModel
from raysim.model.train import batches_by_length, response_logits, summed_by_example
from raysim.privacy.audit_bounds import Estimate, roc_auc, tpr_at_fpr
from raysim.rng import numpy_rng

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

ROWS_AT_ONCE = 256
"""Positions whose logits are turned into log-probabilities at once: bounds the copies of them."""
NUM_RESAMPLES = 2000
"""Bootstrap samples of an interval."""
FPR = 0.01
"""The share of held-out records taken for members at which the share of members found is given."""
QUERIES = tuple(10**power for power in range(7))
"""Numbers of queries for which the extractable shares are given."""
PROBABILITY = 0.5
"""The p of (n, p)-discoverable extraction: how surely a target is to come out."""


# --- likelihoods ---


@dataclass(frozen=True)
class SamplingAttack:
    """What an attacker who samples is to write, and how tokens are drawn."""

    prefix_tokens: int
    """Tokens of the true response that are given to it."""
    target_tokens: int
    """How many of the next ones it must write, or all that there are if they are fewer; 0 for all."""
    temperature: float
    """0 is greedy."""
    top_k: int
    """0 is the whole vocabulary."""

    def target(self, example: Example) -> range:
        """The places in the response that must be written; none where the prefix leaves nothing but the end token."""
        if not is_attackable(example, self.prefix_tokens):
            return range(0)
        end = len(example.response_ids)
        return range(self.prefix_tokens, min(end, self.prefix_tokens + self.target_tokens) if self.target_tokens else end)


class Likelihood(NamedTuple):
    """How likely an adapter makes a record."""

    nll: float
    """Negative log-likelihood (nats) of the scored tokens, summed."""
    num_tokens: int
    """Scored tokens."""
    target_log_prob: float
    """log p_z (nats): that sampling writes the target; -inf where it never does, 0 for an empty target."""
    target_tokens: int
    """Tokens of the target."""
    detail_bits: tuple[float, ...] = ()
    """-log2 of the probability of each private detail that was asked for, given the true words before it."""


@torch.no_grad()
def likelihoods(
    lm: LanguageModel,
    adapter: Vector,
    examples: Sequence[Example],
    *,
    attack: SamplingAttack,
    batch_size: int,
    spans: Sequence[Sequence[DetailSpan]] = (),
) -> list[Likelihood]:
    """How likely `adapter` makes each example, its details at `spans`, and sampling its target after the prompt and the prefix, from one pass.

    Guarantees: `nll` has the bits of `train.mean_nll` for the same batches; exp(`target_log_prob`) is the probability that
    `generate` with that temperature and top_k writes the target (with the end token, where that belongs to it). `adapter` stays loaded.
    """
    lm.set_adapter(adapter)
    lm.model.eval()
    results: list[Likelihood] = [Likelihood(0.0, 0, 0.0, 0)] * len(examples)
    for batch in batches_by_length(examples, batch_size=batch_size):
        own_spans = [spans[i] for i in batch] if spans else [()] * len(batch)
        for index, found in zip(batch, _of_batch(lm, [examples[i] for i in batch], own_spans, attack=attack), strict=True):
            results[index] = found
    return results


def _of_batch(
    lm: LanguageModel, examples: Sequence[Example], spans: Sequence[Sequence[DetailSpan]], *, attack: SamplingAttack
) -> list[Likelihood]:
    logits_NV, token_N, row_N = response_logits(lm, examples)
    logits_NV = logits_NV.float()
    nll_N = F.cross_entropy(logits_NV, token_N, reduction="none")
    nll_B = summed_by_example(nll_N, row_N, num_examples=len(examples)).tolist()
    ends = np.cumsum([len(example.scored) for example in examples]).tolist()
    token_nlls = np.split(nll_N.double().cpu().numpy(), ends[:-1])
    targets = [attack.target(example) for example in examples]
    # The response is the last of what is scored: earlier turns stand before it.
    firsts = [end - len(example.response_ids) for end, example in zip(ends, examples, strict=True)]
    place_M = torch.tensor([first + k for first, target in zip(firsts, targets, strict=True) for k in target], dtype=torch.long)
    log_prob_M = np.concatenate(
        [
            drawn_log_probs(logits_NV[rows], token_N[rows], temperature=attack.temperature, top_k=attack.top_k).double().cpu().numpy()
            for rows in torch.split(place_M.to(lm.device), ROWS_AT_ONCE)
        ]
    )
    parts = np.split(log_prob_M, np.cumsum([len(target) for target in targets])[:-1])
    return [
        Likelihood(nll, len(example.scored), float(part.sum()), len(part), tuple(detail_bits(nlls, placed)))
        for nll, example, part, nlls, placed in zip(nll_B, examples, parts, token_nlls, spans, strict=True)
    ]


# --- memory: members against held-out records ---


@dataclass(frozen=True)
class Gains:
    """Of E records, how much likelier an adapter makes them than the base model does."""

    nats: Floats
    """Base NLL minus NLL, summed over the tokens, of shape (E,)."""
    num_tokens: Floats
    """Of shape (E,)."""
    labels: Sequence[str]
    """What records are alike by."""

    def taken(self, places: Places) -> "Gains":
        """The records at these places."""
        return Gains(self.nats[places], self.num_tokens[places], [self.labels[i] for i in places])

    @property
    def level(self) -> float:
        """Nats a token, over all the tokens."""
        return float(self.nats.sum() / self.num_tokens.sum())


def memory_report(members: Gains, heldout: Gains, *, seed: int) -> dict[str, Any]:
    """What is remembered of the members beyond what was learned of records like them, with 95% intervals.

    The gain of a record is its NLL under the base model minus that under the adapter: a reference-calibrated loss, Carlini et al. (2021),
    arXiv 2012.07805. Of the stratum s of a member i with n_i tokens and the gain G_i, the held-out records give the gain a token h_s
    (sum of gains over sum of tokens); its excess G_i - n_i h_s is what training on it added to what training on the others did.

    `bits_per_record`: the mean excess of a member over ln 2. `nats_per_token`: the members' excess over their tokens. `auc` and
    `tpr_at_1pct`: how well the excess a token tells members from held-out records (the threshold attack of Yeom et al. (2018), arXiv 1709.01604);
    the h_s that a held-out record is held against leaves it out itself, so that it is not nearer to it than a member is. `strata`: `label` where
    records are held against those of their label, which takes two held-out ones of each label that a member has, or else `all`; held-out
    records of other labels are then passed over. `num_members` and `num_heldout` are those compared.

    Guarantees: members and held-out records of one distribution have an expected excess of 0, whatever the adapter learned of their labels. The
    intervals of the first two are of a bootstrap over records within strata (n - 1 of n are drawn and weighted by n / (n - 1), so that the
    variance is right for few: Rao and Wu 1988), seeded; those of the last two take scores as independent, which a shared h_s makes them nearly.
    `auc` is None for a single member.

    Errors: AssertionError for no member, or fewer than two held-out records.
    """
    assert len(members.nats) >= 1, len(members.nats)
    assert len(heldout.nats) >= 2, len(heldout.nats)
    name, places = _strata(members.labels, heldout.labels)
    strata = [(members.taken(inside), heldout.taken(outside)) for inside, outside in places]
    excess = sum(float((own.nats - own.num_tokens * others.level).sum()) for own, others in strata)
    resampled_R, tokens_R = _resampled_excess(strata, seed=seed)
    num_members, num_tokens = len(members.nats), float(members.num_tokens.sum())
    scores_in = np.concatenate([own.nats / own.num_tokens - others.level for own, others in strata])
    scores_out = np.concatenate([_scores_alone(others) for _, others in strata])
    auc = roc_auc(scores_in, scores_out) if num_members > 1 else None
    return {
        "bits_per_record": excess / num_members / math.log(2),
        "bits_per_record_interval": _middle(resampled_R / num_members / math.log(2)),
        "nats_per_token": excess / num_tokens,
        "nats_per_token_interval": _middle(resampled_R / tokens_R),
        **_with_interval("auc", auc),
        **_with_interval("tpr_at_1pct", tpr_at_fpr(scores_in, scores_out, fpr=FPR)),
        "num_members": num_members,
        "num_heldout": len(scores_out),
        "strata": name,
    }


def _strata(members: Sequence[str], heldout: Sequence[str]) -> tuple[str, list[tuple[Places, Places]]]:
    """By what records are compared, and the places of the members and of the held-out records of each stratum."""
    counts = Counter(heldout)
    if len({*members, *heldout}) == 1 or min(counts[label] for label in members) < 2:
        return "all", [(np.arange(len(members)), np.arange(len(heldout)))]
    sides = [{label: [i for i, own in enumerate(side) if own == label] for label in sorted(set(members))} for side in (members, heldout)]
    return "label", [(np.array(sides[0][label]), np.array(sides[1][label])) for label in sides[0]]


def _scores_alone(records: Gains) -> Floats:
    """The excess a token of each record over the others, of shape (E,)."""
    others = (records.nats.sum() - records.nats) / (records.num_tokens.sum() - records.num_tokens)
    return np.asarray(records.nats / records.num_tokens - others)


def _resampled_excess(strata: Sequence[tuple[Gains, Gains]], *, seed: int) -> tuple[Floats, Floats]:
    """The members' summed excess and their tokens in each bootstrap sample, both of shape (R,)."""
    rng = numpy_rng(seed, "memory", "bootstrap")
    excess_R, tokens_R = np.zeros(NUM_RESAMPLES), np.zeros(NUM_RESAMPLES)
    for own, others in strata:
        own_RE, others_RE = _resampling_weights(len(own.nats), rng), _resampling_weights(len(others.nats), rng)
        level_R = (others_RE * others.nats).sum(axis=1) / (others_RE * others.num_tokens).sum(axis=1)
        own_tokens_R = (own_RE * own.num_tokens).sum(axis=1)
        excess_R += (own_RE * own.nats).sum(axis=1) - level_R * own_tokens_R
        tokens_R += own_tokens_R
    return excess_R, tokens_R


def _resampling_weights(num: int, rng: np.random.Generator) -> Floats:
    """How much each of `num` records counts in each bootstrap sample, of shape (R, num): rows add up to `num`."""
    num_drawn = max(1, num - 1)
    counts_RE = rng.multinomial(num_drawn, np.full(num, 1.0 / num), size=NUM_RESAMPLES)
    return counts_RE.astype(np.float64) * (num / num_drawn)


def level_interval(totals: ArrayLike, counts: ArrayLike) -> list[float]:
    """The 95% interval of the sum of `totals` over the sum of `counts`, by the same bootstrap over records; both have shape (E,)."""
    total_E, count_E = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    weight_RE = _resampling_weights(len(total_E), numpy_rng(0, "level", "bootstrap"))
    return _middle((weight_RE @ total_E) / np.maximum(weight_RE @ count_E, 1.0))


def _middle(values: Floats) -> list[float]:
    """Where the middle 95% of the values end."""
    return [float(end) for end in np.quantile(values, [0.025, 0.975])]


def _with_interval(name: str, estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        return {name: None, f"{name}_interval": None}
    return {name: estimate.value, f"{name}_interval": [estimate.lower, estimate.upper]}


# --- extraction by sampling ---


def queries_needed(log_probs: ArrayLike, *, probability: float) -> Floats:
    """The n = log(1 - p) / log(1 - p_z) independent samples of which one is the target with `probability` p; infinite where p_z is 0.

    `log_probs` are log p_z (nats), of any shape. Exact near 0 and near 1: log(1 - p_z) is never taken of a rounded difference.
    (n, p)-discoverable extraction, Hayes et al. (2024), arXiv 2410.19482.
    """
    if not 0.0 < probability < 1.0:
        raise ValueError(f"probability={probability!r} must be between 0 and 1")
    log_prob = np.minimum(np.asarray(log_probs, dtype=np.float64), 0.0)
    with np.errstate(divide="ignore"):  # of a target that is never missed, or always
        missed = np.where(log_prob > -math.log(2), np.log(-np.expm1(log_prob)), np.log1p(-np.exp(log_prob)))
        return np.asarray(math.log1p(-probability) / missed)


def extraction_report(member_log_probs: ArrayLike, heldout_log_probs: ArrayLike, *, attack: SamplingAttack) -> dict[str, Any]:
    """The shares of members and of held-out records that come out within each number of QUERIES, with PROBABILITY.

    The arguments are log p_z of the records with a target. The medians are of -log2 p_z; None where more than half never come out.
    """
    sides = {"members": np.asarray(member_log_probs, dtype=np.float64), "heldout": np.asarray(heldout_log_probs, dtype=np.float64)}
    needed = {side: queries_needed(log_probs, probability=PROBABILITY) for side, log_probs in sides.items()}
    medians = {side: float(np.median(-log_probs)) / math.log(2) for side, log_probs in sides.items()}
    return {
        "queries": list(QUERIES),
        **{side: [float((one <= queries).mean()) for queries in QUERIES] for side, one in needed.items()},
        "probability": PROBABILITY,
        "temperature": attack.temperature,
        "top_k": attack.top_k,
        "target_tokens": attack.target_tokens,
        **{f"median_bits_{side}": median if math.isfinite(median) else None for side, median in medians.items()},
        **{f"num_{side}": len(log_probs) for side, log_probs in sides.items()},
    }
