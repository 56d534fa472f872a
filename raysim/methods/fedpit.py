"""FEDPIT: few-shot federated instruction tuning on self-generated data; arXiv 2403.06131 and ACM TIST 17(5), 2026.

First version (`local_train_on: real+synthetic`, `share_mix: 0`): the shared adapter is trained on synthetic records only and
sent; a private adapter is trained on real and synthetic records and kept. Later version (`local_train_on: real`): the private
adapter sees real records only, scores the synthetic ones, and `share_mix` (beta) of it is mixed into what is sent.
The full text of the first version was not available to us; where it is silent (that both adapters start each round from the
shared one) we follow the later version.
Protection is empirical only: synthetic records are written from private demonstrations, and beta > 0 sends real updates.
With `privacy.unit: example` it is more than that: the records are written by differentially private self-generation, nothing
real enters what is sent (beta 0, no scorer), and the shared adapter, trained on them alone, inherits the guarantee.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from raysim.adapter import Vector
from raysim.base import LanguageModel
from raysim.data.tokens import Example, encode_records
from raysim.methods.call import ClientCall, ClientResult, ClientState
from raysim.private_synthesis import PrivateSynthesisSettings, synthesize_private
from raysim.synthesis import Candidate, SynthesisSettings, as_record, instruction_following_scores, synthesize
from raysim.train import TrainStats, train_adapter


def fedpit(lm: LanguageModel, call: ClientCall) -> ClientResult:
    """One round of a client: write synthetic records with the shared model, train one adapter on them and one on real ones."""
    fedpit_config = call.config.fedpit
    settings = call.train_settings()
    past = call.state.records if call.state else []
    real_only = fedpit_config.local_train_on == "real"

    candidates = _write(lm, call, known=[record["instruction"] for record in past])
    if real_only:
        private, private_stats = train_adapter(lm, call.adapter, call.shard, settings=settings, seed=call.seed("train"))
        scorer = private
    else:
        scorer = call.state.arrays["adapter"] if call.state else call.adapter
    candidates = select(lm, scorer, candidates, call=call)
    pool = [*past, *(_stored(candidate) for candidate in candidates if candidate.verdict == "kept")][-_pool_size(call) :]
    synthetic = _encode(lm, pool, call=call)
    public, public_stats = train_adapter(lm, call.adapter, synthetic, settings=settings, seed=call.seed("synthetic"))
    if not real_only:
        private, private_stats = train_adapter(lm, call.adapter, [*call.shard, *synthetic], settings=settings, seed=call.seed("train"))

    update = mix(private, public, share=fedpit_config.share_mix) - call.adapter
    return ClientResult(
        update=update,
        stats=_total(public_stats, private_stats),
        state=ClientState(arrays={"adapter": private}, records=pool),
        synthetic=tuple(candidate.as_dict() for candidate in candidates),
    )


def mix(private: Vector, public: Vector, *, share: float) -> Vector:
    """beta W_private + (1 - beta) W_public, element by element (TIST algorithm 1, step 5); exact at beta = 0 and 1."""
    if share == 0.0:
        return public
    if share == 1.0:
        return private
    return np.asarray(np.float32(share) * private + np.float32(1.0 - share) * public, dtype=np.float32)


def select(lm: LanguageModel, scorer: Vector, candidates: list[Candidate], *, call: ClientCall) -> list[Candidate]:
    """The candidates with scores under the adapter `scorer`; of those that passed the filters the best `num_kept` stay kept.

    A score that is not finite (the scorer diverged) is no score and ranks last.
    """
    fedpit_config = call.config.fedpit
    passed = [i for i, candidate in enumerate(candidates) if candidate.verdict == "kept"]
    ranked = passed
    results = list(candidates)
    if fedpit_config.scorer == "ifs" and passed:
        pairs = _encode(lm, [_stored(candidates[i]) for i in passed], call=call)
        scores = instruction_following_scores(lm, scorer, pairs, batch_size=call.config.train.batch_size)
        for index, score in zip(passed, scores, strict=True):
            results[index] = dataclasses.replace(results[index], score=score if math.isfinite(score) else None)
        ranked = sorted(passed, key=lambda i: (results[i].score is None, results[i].score or 0.0, i))
    for index in ranked[fedpit_config.num_kept :]:
        results[index] = dataclasses.replace(results[index], verdict="score")
    return results


def _write(lm: LanguageModel, call: ClientCall, *, known: list[str]) -> list[Candidate]:
    """The shared model's synthetic records, privately where the mechanism says so (then past rounds are no filter either)."""
    seed = call.seed("synthesis")
    if call.mechanism.kind == "synthesis":
        return synthesize_private(lm, call.adapter, call.shard, settings=_private_settings(call), seed=seed)
    return synthesize(lm, call.adapter, call.shard, settings=_settings(call), known=known, seed=seed)


def _private_settings(call: ClientCall) -> PrivateSynthesisSettings:
    """Private self-generation; what the guarantee rests on comes from the mechanism that is accounted for."""
    fedpit_config, mechanism = call.config.fedpit, call.mechanism
    settings = PrivateSynthesisSettings(
        num_candidates=mechanism.num_steps,
        num_subsets=fedpit_config.num_subsets,
        max_demonstrations=fedpit_config.num_response_demonstrations,
        max_demonstration_tokens=call.config.data.max_length * fedpit_config.subset_size,
        sampling_prob=mechanism.record_prob(call.client_id),
        top_k=fedpit_config.top_k,
        noise_multiplier=mechanism.noise_multiplier,
        max_instruction_tokens=fedpit_config.max_instruction_tokens,
        max_response_tokens=fedpit_config.max_response_tokens,
        min_instruction_words=fedpit_config.min_instruction_words,
        decoding=fedpit_config.private_decoding,
        secure_noise=mechanism.secure_noise,
        batch_size=max(call.config.evaluate.batch_size, fedpit_config.num_subsets + 1),
        system_prompt=call.config.data.system_prompt,
    )
    assert settings.num_tokens == mechanism.num_tokens, (settings.num_tokens, mechanism.num_tokens)
    return settings


def _settings(call: ClientCall) -> SynthesisSettings:
    fedpit_config = call.config.fedpit
    names = {f.name for f in dataclasses.fields(SynthesisSettings)} - {"batch_size", "system_prompt"}
    values: dict[str, Any] = {name: value for name, value in dataclasses.asdict(fedpit_config).items() if name in names}
    return SynthesisSettings(batch_size=call.config.evaluate.batch_size, system_prompt=call.config.data.system_prompt, **values)


def _pool_size(call: ClientCall) -> int:
    return max(call.config.fedpit.pool_size, call.config.fedpit.num_kept, 1)


def _stored(candidate: Candidate) -> dict[str, Any]:
    return {"instruction": candidate.instruction, "response": candidate.response}


def _encode(lm: LanguageModel, pool: list[dict[str, Any]], *, call: ClientCall) -> list[Example]:
    """The pool as examples; an instruction so long that no response fits is impossible by `max_instruction_tokens`."""
    records = [as_record(Candidate(**pair), record_id=index) for index, pair in enumerate(pool)]
    data = call.config.data
    limit = max(data.max_length, call.config.fedpit.max_instruction_tokens + call.config.fedpit.max_response_tokens + 128)
    examples, _ = encode_records(
        records, tokenizer=lm.tokenizer, eos_token_id=lm.eos_token_ids[0], max_length=limit, system_prompt=data.system_prompt
    )
    return examples


def _total(*parts: TrainStats) -> TrainStats:
    """The stats of several trainings as one; the loss is that of the first with any (what is sent), tokens and steps add up."""
    losses = [part.loss for part in parts if part.loss is not None]
    return TrainStats(
        num_tokens=sum(part.num_tokens for part in parts),
        num_steps=sum(part.num_steps for part in parts),
        loss=losses[0] if losses else None,
    )
