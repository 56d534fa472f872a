"""FedMIT: the ablation of FEDPIT that trains one adapter on real and synthetic records together, and sends it; ACM TIST 17(5), 2026, section 4.3.

The records are made and chosen as in FEDPIT's later version: scored by an adapter trained on the real records, which is used for nothing
else. What is sent has seen every real record, so it leaks as FEDIT's does.
"""

from raysim.methods.call import ClientCall, ClientResult, ClientState, one_by_one
from raysim.methods.synthesis.pool import as_rows, encode, pooled, select, total, write
from raysim.model.language_model import LanguageModel
from raysim.model.train import TrainStats, train_adapter


@one_by_one
def fedmit(lm: LanguageModel, call: ClientCall) -> ClientResult:
    """One round of a client: write synthetic records with the shared model, train the shared adapter on them and the real ones."""
    settings, scorer = call.train_settings(), call.adapter
    scorer_stats = TrainStats(num_tokens=0, num_steps=0, loss=None)

    candidates = write(lm, call)
    if call.config.fedpit.scorer == "ifs" and any(candidate.verdict == "kept" for candidate in candidates):
        scorer, scorer_stats = train_adapter(lm, call.adapter, call.shard, settings=settings, seed=call.seed("scorer"))
    candidates = select(lm, scorer, candidates, call=call)
    pool = pooled(call, candidates)
    mixed = [*call.shard, *encode(lm, pool, call=call)]
    adapter, stats = train_adapter(lm, call.adapter, mixed, settings=settings, seed=call.seed("train"))

    return call.result(
        adapter,
        stats=total(stats, scorer_stats),
        state=ClientState(arrays={}, records=pool),
        synthetic=as_rows(candidates, call=call),
    )
