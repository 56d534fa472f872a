"""Membership inference: who holds a release and a record says how likely the record was trained on.

Every score is computed from the negative log-likelihoods of a response's tokens (nats), and is higher the more likely
the record is a member. What the attacker sees: the released adapter, the base model, the record, and for `lira_scores`
shadow adapters that he trained himself on records like these.
Left out: online LiRA, which trains shadows on each attacked record, and attacks on the training loop.

Shape legend: B = batch, T = tokens, D = hidden size, V = vocabulary, N = scored (response) positions of a batch,
E = examples, S = shadow models.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from raysim.data.tokens import Example
from raysim.lora.layout import Vector
from raysim.model.language_model import LanguageModel
from raysim.model.train import batches_by_length, response_token_nll
from raysim.privacy.audit_bounds import Estimate, roc_auc, tpr_at_fpr

Floats = NDArray[np.float64]

OWN_VARIANCE_SHADOWS = 64
"""From so many shadow models without an example on, its variance is estimated from them alone (Carlini et al. 2022)."""


# --- likelihoods ---


@torch.no_grad()
def token_nlls(lm: LanguageModel, adapter: Vector, examples: Sequence[Example], *, batch_size: int) -> list[Floats]:
    """The negative log-likelihood (nats) of every scored token of each example under `adapter`, in order.

    Equal to the losses of the full logits_BTV at those positions; the head runs on the N scored positions only. Neither
    the batch nor the padding changes more than last bits. `adapter` stays loaded.
    """
    lm.set_adapter(adapter)
    lm.model.eval()
    results: list[Floats] = [np.empty(0)] * len(examples)
    for batch in batches_by_length(examples, batch_size=batch_size):
        for index, nll in zip(batch, _batch_nlls(lm, [examples[i] for i in batch]), strict=True):
            results[index] = nll
    return results


def _batch_nlls(lm: LanguageModel, examples: Sequence[Example]) -> list[Floats]:
    """`token_nlls` of one batch."""
    nll_N, _ = response_token_nll(lm, examples)
    ends = np.cumsum([len(example.scored) for example in examples])
    return np.split(nll_N.double().cpu().numpy(), ends[:-1])


# --- scores: the higher, the more likely a member ---


def loss_scores(nlls: Sequence[ArrayLike]) -> Floats:
    """Minus the mean NLL of a token, shape (E,): what is known well was seen. Yeom et al. (2018), arXiv 1709.01604."""
    return -np.array([_tokens(nll).mean() for nll in nlls])


def calibrated_scores(nlls: Sequence[ArrayLike], base_nlls: Sequence[ArrayLike]) -> Floats:
    """How much lower the mean NLL is than under the base model, shape (E,): text that is easy for any model is no evidence.

    Carlini et al. (2021), arXiv 2012.07805, with the base model as the reference.
    """
    assert len(nlls) == len(base_nlls), (len(nlls), len(base_nlls))
    return loss_scores(nlls) - loss_scores(base_nlls)


def zlib_scores(nlls: Sequence[ArrayLike], texts: Sequence[str]) -> Floats:
    """Minus the model's bits for a response over zlib's bits for its text, shape (E,). Carlini et al. (2021), arXiv 2012.07805.

    Both are of the whole response, so that the ratio does not grow with its length.
    """
    assert len(nlls) == len(texts), (len(nlls), len(texts))
    bits = [_tokens(nll).sum() / math.log(2) for nll in nlls]
    return -np.array([model / (8 * len(zlib.compress(text.encode()))) for model, text in zip(bits, texts, strict=True)])


def min_k_scores(nlls: Sequence[ArrayLike], *, share: float = 0.2) -> Floats:
    """Minus the mean NLL of the worst known `share` of the tokens (at least one), shape (E,): members have no surprises.

    Min-K% Prob, Shi et al. (2023), arXiv 2310.16789.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share={share!r} must be greater than 0 and at most 1")
    tokens = [np.sort(_tokens(nll))[::-1] for nll in nlls]
    return -np.array([nll[: max(1, math.floor(share * len(nll) + 1e-9))].mean() for nll in tokens])


def lira_scores(target: ArrayLike, shadows: ArrayLike, *, is_out: ArrayLike) -> Floats:
    """Offline LiRA: by how many standard deviations the target's statistic exceeds those of shadows without the example.

    `target` (E,) holds a statistic that is higher for members, such as `loss_scores`; `shadows` (S, E) the same under each
    shadow model, and `is_out` (S, E) whether that model was trained without the example (entries elsewhere are not looked at).
    The variance is pooled over examples while any has fewer than OWN_VARIANCE_SHADOWS shadows, and 1 where it cannot be
    estimated: one variance for all leaves their order to the differences. The score is the argument of the normal
    distribution function in Carlini et al. (2022), arXiv 2112.03570: the same order, without its saturation at 1.

    Errors: ValueError if every shadow was trained on some example.
    """
    target_E, shadow_SE = np.asarray(target, dtype=np.float64), np.asarray(shadows, dtype=np.float64)
    out_SE = np.asarray(is_out, dtype=bool)
    assert shadow_SE.shape == out_SE.shape == (len(shadow_SE), len(target_E)), (shadow_SE.shape, out_SE.shape, target_E.shape)
    count_E = out_SE.sum(axis=0)
    if (count_E == 0).any():
        raise ValueError(
            f"shadows: {int((count_E == 0).sum())} of {len(count_E)} examples are in every shadow's training set; train one without"
        )
    mean_E = np.where(out_SE, shadow_SE, 0.0).sum(axis=0) / count_E
    square_E = np.where(out_SE, (shadow_SE - mean_E) ** 2, 0.0).sum(axis=0)
    pooled = square_E.sum() / max(1, int((count_E - 1).sum()))
    variance_E = square_E / (count_E - 1) if count_E.min() >= OWN_VARIANCE_SHADOWS else np.full_like(square_E, pooled)
    return (target_E - mean_E) / np.sqrt(np.where(variance_E > 0.0, variance_E, 1.0))  # type: ignore[no-any-return]  # numpy says Any


def _tokens(nll: ArrayLike) -> Floats:
    tokens = np.asarray(nll, dtype=np.float64)
    assert tokens.shape == (max(1, tokens.size),), tokens.shape
    return tokens


# --- figures ---


def membership_report(scores_in: ArrayLike, scores_out: ArrayLike) -> dict[str, Any]:
    """How well scores tell members from non-members: AUC and true-positive rates at 0.1% and 1% false positives, with 95% intervals."""
    auc = roc_auc(scores_in, scores_out)
    report = {"num_in": len(np.asarray(scores_in)), "num_out": len(np.asarray(scores_out)), **_with_interval("auc", auc)}
    for name, fpr in (("tpr_at_0.1pct", 0.001), ("tpr_at_1pct", 0.01)):
        report |= _with_interval(name, tpr_at_fpr(scores_in, scores_out, fpr=fpr))
    return report


def _with_interval(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_interval": [estimate.lower, estimate.upper]}
