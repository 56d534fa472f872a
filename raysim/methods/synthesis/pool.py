"""The synthetic records of a client's round: written by a model or taken from a file, filtered, scored, pooled with earlier ones.

`fedpit.*` says how, for every method that trains on such records; `synthesis.*` says where they come from.
"""

import dataclasses
import math
from typing import Any, TypeVar

from raysim.data.configured import chat_format, instruction_opening, responses_are_labels
from raysim.data.tokens import Example, encode_records
from raysim.lora.layout import Vector
from raysim.methods.call import ClientCall
from raysim.methods.synthesis.private import PrivateSynthesisSettings, synthesize_private
from raysim.methods.synthesis.write import (
    Candidate,
    SynthesisSettings,
    as_record,
    choose_public,
    instruction_following_scores,
    nearest_to_private,
    synthesize,
)
from raysim.model.language_model import LanguageModel
from raysim.model.train import TrainStats

S = TypeVar("S", SynthesisSettings, PrivateSynthesisSettings)


def write(lm: LanguageModel, call: ClientCall) -> list[Candidate]:
    """New candidates: what the model with the call's adapter writes, privately where the mechanism says so, or a draw from the file.

    Instructions that the client's pool already holds are not repeated (but under privacy, where past rounds may be no filter).
    """
    seed = call.seed("synthesis")
    if call.mechanism.kind == "synthesis":
        return synthesize_private(lm, call.adapter, call.shard, settings=_private_settings(call), seed=seed)
    known = [record["instruction"] for record in past(call)]
    if call.config.synthesis.source == "file":
        return choose_public(call.public, call.shard, settings=_settings(call), known=known, seed=seed)
    return synthesize(lm, call.adapter, call.shard, settings=_settings(call), known=known, seed=seed)


def past(call: ClientCall) -> list[dict[str, Any]]:
    """The client's pool of earlier rounds."""
    return call.state.records if call.state else []


def select(lm: LanguageModel, scorer: Vector, candidates: list[Candidate], *, call: ClientCall) -> list[Candidate]:
    """The candidates with scores under the adapter `scorer`; of those that passed the filters the best `num_kept` stay kept.

    A score that is not finite (the scorer diverged) is no score and ranks last.
    """
    fedpit_config = call.config.fedpit
    passed = [i for i, candidate in enumerate(candidates) if candidate.verdict == "kept"]
    ranked = passed
    results = list(candidates)
    if fedpit_config.scorer == "ifs" and passed:
        pairs = encode(lm, [_stored(candidates[i]) for i in passed], call=call)
        scores = instruction_following_scores(
            lm, scorer, pairs, batch_size=call.config.train.batch_size, chat=chat_format(call.config.data)
        )
        for index, score in zip(passed, scores, strict=True):
            results[index] = dataclasses.replace(results[index], score=score if math.isfinite(score) else None)
        ranked = sorted(passed, key=lambda i: (results[i].score is None, results[i].score or 0.0, i))
    for index in ranked[fedpit_config.num_kept :]:
        results[index] = dataclasses.replace(results[index], verdict="score")
    return results


def pooled(call: ClientCall, candidates: list[Candidate]) -> list[dict[str, Any]]:
    """The client's pool with what was kept: the newest `pool_size` pairs, and at least as many as are kept in a round."""
    kept = [_stored(candidate) for candidate in candidates if candidate.verdict == "kept"]
    size = max(call.config.fedpit.pool_size, call.config.fedpit.num_kept, 1)
    return [*past(call), *kept][-size:]


def encode(lm: LanguageModel, pool: list[dict[str, Any]], *, call: ClientCall) -> list[Example]:
    """The pool as examples; an instruction so long that no response fits is impossible by `max_instruction_tokens`."""
    records = [as_record(Candidate(**pair), record_id=index) for index, pair in enumerate(pool)]
    data = call.config.data
    limit = max(data.max_length, call.config.fedpit.max_instruction_tokens + call.config.fedpit.max_response_tokens + 128)
    examples, _ = encode_records(
        records, tokenizer=lm.tokenizer, eos_token_id=lm.eos_token_ids[0], max_length=limit, chat=chat_format(data)
    )
    return examples


def as_rows(candidates: list[Candidate], *, call: ClientCall, own_prompts: bool = False) -> tuple[dict[str, Any], ...]:
    """The candidates for inspection by whoever simulates, each with how near it comes to a record of the client's own (`nearest_to_private`).

    With `own_prompts` the candidates answer the client's own instructions, and only their responses are compared.
    """
    settings = _settings(call)
    settings = dataclasses.replace(settings, labelled=settings.labelled and not own_prompts)
    nearest = [nearest_to_private(candidate, call.shard, settings=settings) for candidate in candidates]
    return tuple({**one.as_dict(), "response_rouge_l": near} for one, near in zip(candidates, nearest, strict=True))


def total(*parts: TrainStats) -> TrainStats:
    """The stats of several trainings as one; the loss is that of the first with any (what is sent), tokens and steps add up."""
    losses = [part.loss for part in parts if part.loss is not None]
    return TrainStats(
        num_tokens=sum(part.num_tokens for part in parts),
        num_steps=sum(part.num_steps for part in parts),
        loss=losses[0] if losses else None,
    )


def _private_settings(call: ClientCall) -> PrivateSynthesisSettings:
    """Private self-generation; what the guarantee rests on comes from the mechanism that is accounted for."""
    fedpit_config, mechanism = call.config.fedpit, call.mechanism
    settings = _settings_of(
        PrivateSynthesisSettings,
        call,
        num_candidates=mechanism.num_steps,
        max_demonstrations=fedpit_config.num_response_demonstrations,
        max_demonstration_tokens=call.config.data.max_length * fedpit_config.subset_size,
        sampling_prob=mechanism.record_prob(call.client_id),
        noise_multiplier=mechanism.noise_multiplier,
        decoding=fedpit_config.private_decoding,
        secure_noise=mechanism.secure_noise,
        batch_size=max(call.config.evaluate.batch_size, fedpit_config.num_subsets + 1),
    )
    assert settings.num_tokens == mechanism.num_tokens, (settings.num_tokens, mechanism.num_tokens)
    return settings


def _settings(call: ClientCall) -> SynthesisSettings:
    return _settings_of(SynthesisSettings, call)


def _settings_of(kind: type[S], call: ClientCall, **own: Any) -> S:
    """Settings of that kind: what `own` gives, the form of the client's data, and what bears the name of a key of `fedpit`."""
    data = call.config.data
    form = {"opening": instruction_opening(data), "labelled": responses_are_labels(data), "chat": chat_format(data)}
    known = dataclasses.asdict(call.config.fedpit) | form | {"batch_size": call.config.evaluate.batch_size} | own
    return kind(**{field.name: known[field.name] for field in dataclasses.fields(kind)})


def _stored(candidate: Candidate) -> dict[str, Any]:
    return {"instruction": candidate.instruction, "response": candidate.response}
