"""LOCIT: each client tunes an adapter of its own and shares nothing: the lower bound that federation has to beat.

`locit_synthetic` (LOCIT+SG in ACM TIST 17(5), 2026) tunes it on records that it writes itself as well: what self-generation does without
federation.
"""

import dataclasses

from raysim.methods.call import ClientCall, ClientResult, ClientState, one_by_one
from raysim.methods.synthesis.pool import as_rows, encode, pooled, select, write
from raysim.model.language_model import LanguageModel
from raysim.model.train import train_adapter


@one_by_one
def locit(lm: LanguageModel, call: ClientCall) -> ClientResult:
    """One round of a client: train its own adapter on the real examples, keep it."""
    own = call.state.arrays["adapter"] if call.state else call.adapter
    adapter, stats = train_adapter(lm, own, call.shard, settings=call.train_settings(), seed=call.seed("train"))
    return ClientResult(upload=call.upload(call.adapter), stats=stats, state=ClientState(arrays={"adapter": adapter}))


@one_by_one
def locit_synthetic(lm: LanguageModel, call: ClientCall) -> ClientResult:
    """One round of a client: its own model writes records and scores them; train its adapter on them and the real ones, keep it."""
    own = call.state.arrays["adapter"] if call.state else call.adapter
    alone = dataclasses.replace(call, adapter=own)
    candidates = select(lm, own, write(lm, alone), call=alone)
    pool = pooled(alone, candidates)
    mixed = [*call.shard, *encode(lm, pool, call=alone)]
    adapter, stats = train_adapter(lm, own, mixed, settings=call.train_settings(), seed=call.seed("train"))
    return ClientResult(
        upload=call.upload(call.adapter),
        stats=stats,
        state=ClientState(arrays={"adapter": adapter}, records=pool),
        synthetic=as_rows(candidates, call=call),
    )
