"""FEDIT: federated instruction tuning by averaging LoRA adapters; Zhang et al. (2024), arXiv 2305.05644.

With `train.prox_mu` it is FedProx. CENIT is the same on all data in one place.
"""

from collections.abc import Sequence

from raysim.methods.call import ClientCall, ClientResult
from raysim.model.language_model import LanguageModel
from raysim.model.train_together import train_together


def fedit(lm: LanguageModel, calls: Sequence[ClientCall]) -> list[ClientResult]:
    """One round of each client of a group: train the shared adapter on the real examples, send the difference."""
    trained = train_together(
        lm,
        [call.adapter for call in calls],
        [call.shard for call in calls],
        settings=calls[0].train_settings(),
        seeds=[call.seed("train") for call in calls],
    )
    return [call.result(adapter, stats=stats) for call, (adapter, stats) in zip(calls, trained, strict=True)]
