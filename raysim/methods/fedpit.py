"""FEDPIT: few-shot federated instruction tuning on self-generated data; arXiv 2403.06131 and ACM TIST 17(5), 2026.

First version (`local_train_on: real+synthetic`, `share_mix: 0`): the shared adapter is trained on synthetic records only and
sent; a private adapter is trained on real and synthetic records and kept. Later version (`local_train_on: real`): the private
adapter sees real records only, scores the synthetic ones, and `share_mix` (beta) of it is mixed into what is sent.
The full text of the first version was not available to us; where it is silent (that both adapters start each round from the
shared one) we follow the later version.
Protection is empirical only: synthetic records are written from private demonstrations, and beta > 0 sends real updates.
With `synthesis.source: file` public records take the place of written ones.
With `privacy.unit: example` it is more than that: the records are written by differentially private self-generation, nothing
real enters what is sent (beta 0, no scorer), and the shared adapter, trained on them alone, inherits the guarantee.
"""

import numpy as np

from raysim.lora.layout import Vector
from raysim.methods.call import ClientCall, ClientResult, ClientState, one_by_one
from raysim.methods.synthesis.pool import as_rows, encode, pooled, select, total, write
from raysim.model.language_model import LanguageModel
from raysim.model.train import train_adapter


@one_by_one
def fedpit(lm: LanguageModel, call: ClientCall) -> ClientResult:
    """One round of a client: write synthetic records with the shared model, train one adapter on them and one on real ones."""
    fedpit_config = call.config.fedpit
    settings = call.train_settings()
    real_only = fedpit_config.local_train_on == "real"

    candidates = write(lm, call)
    if real_only:
        private, private_stats = train_adapter(lm, call.adapter, call.shard, settings=settings, seed=call.seed("train"))
        scorer = private
    else:
        scorer = call.state.arrays["adapter"] if call.state else call.adapter
    candidates = select(lm, scorer, candidates, call=call)
    pool = pooled(call, candidates)
    synthetic = encode(lm, pool, call=call)
    public, public_stats = train_adapter(lm, call.adapter, synthetic, settings=settings, seed=call.seed("synthetic"))
    if not real_only:
        private, private_stats = train_adapter(lm, call.adapter, [*call.shard, *synthetic], settings=settings, seed=call.seed("train"))

    return call.result(
        mix(private, public, share=fedpit_config.share_mix),
        stats=total(public_stats, private_stats),
        state=ClientState(arrays={"adapter": private}, records=pool),
        synthetic=as_rows(candidates, call=call),
    )


def mix(private: Vector, public: Vector, *, share: float) -> Vector:
    """beta W_private + (1 - beta) W_public, element by element (TIST algorithm 1, step 5); exact at beta = 0 and 1."""
    if share == 0.0:
        return public
    if share == 1.0:
        return private
    return np.asarray(np.float32(share) * private + np.float32(1.0 - share) * public, dtype=np.float32)
