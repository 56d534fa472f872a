"""LOCIT: each client tunes an adapter of its own and shares nothing: the lower bound that federation has to beat."""

import numpy as np

from raysim.base import LanguageModel
from raysim.methods.call import ClientCall, ClientResult, ClientState
from raysim.train import train_adapter


def locit(lm: LanguageModel, call: ClientCall) -> ClientResult:
    """One round of a client: train its own adapter on the real examples, keep it."""
    own = call.state.arrays["adapter"] if call.state else call.adapter
    adapter, stats = train_adapter(lm, own, call.shard, settings=call.train_settings(), seed=call.seed("train"))
    return ClientResult(update=np.zeros_like(call.adapter), stats=stats, state=ClientState(arrays={"adapter": adapter}))
