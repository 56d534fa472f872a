"""FEDIT: federated instruction tuning by averaging LoRA adapters; Zhang et al. (2024), arXiv 2305.05644.

With `train.prox_mu` it is FedProx. CENIT is the same on all data in one place.
"""

from raysim.methods.call import ClientCall, ClientResult, one_by_one
from raysim.model.language_model import LanguageModel
from raysim.model.train import train_adapter


@one_by_one
def fedit(lm: LanguageModel, call: ClientCall) -> ClientResult:
    """One round of a client: train the shared adapter on the real examples, send the difference."""
    adapter, stats = train_adapter(lm, call.adapter, call.shard, settings=call.train_settings(), seed=call.seed("train"))
    return call.result(adapter, stats=stats)
