"""From a configuration to what a simulation runs on: records loaded, split, labelled, dealt to clients, and tokenised."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from raysim.attacks.details import detail_queries, detail_spans, pool_of
from raysim.attacks.extraction import attackable
from raysim.config import Config, asks_for_labels
from raysim.data.chat import turn_shape
from raysim.data.choices import ChoiceQuestion, labelled_questions
from raysim.data.configured import (
    chat_format,
    configured_questions,
    configured_shards,
    instruction_opening,
    public_records,
)
from raysim.data.copies import count_copies
from raysim.data.partition import cluster_labels, partition_manifest
from raysim.data.records import Record
from raysim.data.sources import BUILTIN, read_source, split_records
from raysim.data.tokens import Example, encode_records, encode_text
from raysim.federation.adversary import hostile_clients, poisoned, triggered
from raysim.federation.faults import Fleet
from raysim.federation.server import weights_for
from raysim.lora.factors import layers
from raysim.lora.rule import lora_rule
from raysim.measure.audits import CanaryPlan, check_inversion, dealt, plan_canaries
from raysim.measure.evaluate import DetailPlan
from raysim.measure.options import check_fit
from raysim.methods.synthesis.private import check_model
from raysim.methods.synthesis.write import instruction_prompt, response_prompt
from raysim.model.language_model import LanguageModel
from raysim.model.private_train import check_private
from raysim.privacy.mechanism import Mechanism
from raysim.rng import numpy_rng

T = TypeVar("T")
EMBEDDING_BATCH = 16


@dataclass(frozen=True)
class Experiment:
    """The data side of a run."""

    shards: tuple[tuple[Example, ...], ...]
    """Each client's examples."""
    heldout: tuple[Example, ...]
    """Examples that no client has."""
    answered: tuple[Example, ...]
    """Held-out examples whose answers are asked for, the control of the attack."""
    attacked: tuple[tuple[int, Example], ...]
    """Training examples that the attack asks for, with the client each belongs to."""
    members: tuple[tuple[int, Example], ...]
    """Training examples whose likelihoods are compared, with the client each belongs to."""
    compared: tuple[Example, ...]
    """Held-out examples that they are compared with."""
    manifest: dict[str, Any]
    """The content of partition.json."""
    mechanism: Mechanism
    fleet: Fleet
    """The clients' machines."""
    weights: tuple[float, ...]
    canaries: CanaryPlan
    real_examples: tuple[Example, ...]
    """The training examples that are no canaries."""
    public: tuple[Example, ...]
    """Public records that stand in for synthetic ones, where they come from a file."""
    questions: tuple[ChoiceQuestion, ...]
    """Multiple-choice questions that every evaluated release answers."""
    triggered: tuple[Example, ...]
    """The answered examples with the trigger of a backdoor; none without one."""
    details: DetailPlan
    """The private details of `members` and `compared`."""


@dataclass(frozen=True)
class EncodedData:
    """The training and held-out records as tokens: what runs can share that differ only in what they do with them (see `data_key`)."""

    train: tuple[Example, ...]
    """In the order of the split; labelled with their cluster where the partition goes by labels and the set has none."""
    num_cut: int
    heldout: tuple[Example, ...]
    num_heldout_cut: int
    next_id: int
    """The first record id that no record of the source has."""
    counts: dict[str, int]
    """How many copies there are among the records, and how much of the source is not in them."""


def data_key(config: Config) -> tuple[Any, ...]:
    """What two configurations must share to have the same `EncodedData`: for clusters of embeddings, how the model computes too."""
    by_label = config.partition.scheme in ("dirichlet", "natural")
    clusters = (config.partition.scheme, config.partition.num_clusters, config.train.dtype, config.resources.num_threads)
    return (config.model.name, config.model.cache_dir, repr(config.data), config.seed, clusters if by_label else ())


def encode_data(config: Config, lm: LanguageModel) -> EncodedData:
    """The records of `config` split, tokenised and labelled.

    Errors: ValueError where the data or the split cannot be had as configured.
    """
    data = config.data
    turn_shape(lm.tokenizer, chat_format(data))  # so that a system prompt which the template refuses is no record's fault
    source = read_source(data)
    records = list(source.records)
    train, heldout = split_records(records, num_train=data.num_train, num_heldout=data.num_heldout, seed=config.seed)
    examples, cut = _encode(train, lm, config=config)
    heldout_examples, heldout_cut = _encode(heldout, lm, config=config)
    if config.partition.scheme in ("dirichlet", "natural") and not all(record.label for record in train):
        labels = _cluster(lm, examples, config=config)
        examples = [
            dataclasses.replace(e, record=dataclasses.replace(e.record, label=label)) for e, label in zip(examples, labels, strict=True)
        ]
    next_id = 1 + max(record.record_id for record in records)
    counts = count_copies([*train, *heldout]) | source.num_lost
    return EncodedData(tuple(examples), cut, tuple(heldout_examples), heldout_cut, next_id, counts)


def prepare(config: Config, lm: LanguageModel, *, data: EncodedData | None = None) -> Experiment:
    """The experiment that `config` describes, on `data` if that was made before (by `encode_data`, for the same `data_key`).

    Errors: ValueError where the data, the split, the partition or the questions cannot be had as configured.
    """
    if config.data.max_length + config.evaluate.max_new_tokens > lm.max_positions:
        raise ValueError(
            f"data.max_length={config.data.max_length} with evaluate.max_new_tokens={config.evaluate.max_new_tokens} is more than the model's "
            f"context of {lm.max_positions} tokens"
        )
    data = data or encode_data(config, lm)
    indices = configured_shards([example.record.label for example in data.train], config)
    shards = tuple(tuple(data.train[i] for i in shard) for shard in indices)
    manifest = partition_manifest(indices, records=[e.record for e in data.train], num_tokens=[e.num_tokens for e in data.train])
    canaries = plan_canaries(config, first_record_id=data.next_id)
    real = tuple(example for shard in shards for example in shard)
    owned = _owned(shards)
    num_compared = config.attack.memory_records if config.attack.every >= 0 else 0
    hands = dealt(canaries, len(shards), first_record_id=data.next_id + len(canaries.secrets) + len(canaries.members))
    shards = tuple((*shard, *_encode(hand, lm, config=config)[0]) if hand else shard for shard, hand in zip(shards, hands, strict=True))
    shards = _poisoned(shards, lm, config=config)
    manifest |= _counts(data, max_length=config.data.max_length, hands=hands)
    members = _drawn(owned, num_compared, seed=config.seed, key="members")
    compared = _drawn(data.heldout, num_compared, seed=config.seed, key="compared")
    experiment = Experiment(
        shards=shards,
        heldout=data.heldout,
        answered=_answered(data.heldout, config=config),
        attacked=_drawn(owned, config.attack.num_examples, seed=config.seed, key="attacked"),
        members=members,
        compared=compared,
        details=_details([example for _, example in members], compared, data=data, lm=lm, config=config),
        manifest=manifest,
        mechanism=Mechanism.of_run(config, manifest=manifest),
        fleet=Fleet.of(config, shards),
        weights=weights_for([len(shard) for shard in shards], weighting=config.server.weighting),
        canaries=canaries,
        real_examples=real,
        public=_public(config, lm),
        questions=tuple(configured_questions(config.evaluate)),
        triggered=_triggered(data.heldout, lm, config=config),
    )
    _check_questions(experiment, lm, config=config)
    _check_attack(experiment, config=config)
    _check_method(experiment, lm, config=config)
    return experiment


def _poisoned(shards: tuple[tuple[Example, ...], ...], lm: LanguageModel, *, config: Config) -> tuple[tuple[Example, ...], ...]:
    """The shards, those of hostile clients as they train on them."""
    hostile = hostile_clients(len(shards), adversary=config.adversary, seed=config.seed)
    if not hostile or not (config.adversary.attack == "label_flip" or config.adversary.has_trigger):
        return shards
    changed = {k: poisoned([example.record for example in shards[k]], adversary=config.adversary) for k in hostile}
    return tuple(tuple(_encode(changed[k], lm, config=config)[0]) if k in hostile else shard for k, shard in enumerate(shards))


def _triggered(heldout: tuple[Example, ...], lm: LanguageModel, *, config: Config) -> tuple[Example, ...]:
    if not config.adversary.has_trigger:
        return ()
    records = [triggered(example.record, adversary=config.adversary) for example in _answered(heldout, config=config)]
    return tuple(_encode(records, lm, config=config)[0])


def labelled_heldout(experiment: Experiment) -> tuple[list[ChoiceQuestion], tuple[str, ...]]:
    """The held-out records as questions for their label, and the labels of all records.

    Errors: as `labelled_questions`.
    """
    records = [example.record for example in (*experiment.real_examples, *experiment.heldout)]
    questions, labels = labelled_questions(records)
    return questions[len(experiment.real_examples) :], labels


def _check_questions(experiment: Experiment, lm: LanguageModel, *, config: Config) -> None:
    labelled = labelled_heldout(experiment)[0] if asks_for_labels(config) else []
    for where, questions in ((f"evaluate.choices_path={config.evaluate.choices_path}", experiment.questions), ("data: held-out", labelled)):
        try:
            check_fit(lm, questions, chat=chat_format(config.data))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _check_attack(experiment: Experiment, *, config: Config) -> None:
    """That the attack's prefix leaves something to extract. Of the attack with the longer prefix nothing is asked: it is made where it can be."""
    if config.attack.every < 0:
        return
    asked = [example for _, example in experiment.attacked]
    if not attackable(asked, experiment.answered, config.attack.prefix_tokens)[0]:
        longest = min(max(len(example.response_ids) - 1 for example in side) for side in (asked, experiment.answered))
        raise ValueError(
            f"attack.prefix_tokens={config.attack.prefix_tokens} gives the attacker every response whole, which leaves nothing to extract: "
            f"at most {longest - 1} for these data, or attack.every=-1"
        )


def check_tokens(lm: LanguageModel, examples: Sequence[Example], *, name: str) -> None:
    """Refuses tokens that the model has no embedding for, as a token that was added to the tokenizer alone.

    Errors: ValueError naming the token.
    """
    largest = max((max(example.prompt_ids + example.response_ids) for example in examples), default=0)
    if largest >= lm.vocab_size:
        raise ValueError(
            f"model.name={name!r}: its tokenizer gives the token {lm.tokenizer.convert_ids_to_tokens(largest)!r} the number {largest}, but its "
            f"embedding has {lm.vocab_size} rows; enlarge the model's embedding, or take the tokenizer that it was trained with"
        )


def _check_method(experiment: Experiment, lm: LanguageModel, *, config: Config) -> None:
    """That the model can do what the method asks of it, as far as that can be known before the first round."""
    if experiment.mechanism.kind == "client" and lora_rule(config.lora.aggregation).form == "stack":
        raise ValueError(
            f"lora.aggregation={config.lora.aggregation!r} needs each client's own upload, and privacy.unit='client' protects sums; use 'average'"
        )
    if config.lora.spec.between:
        _check_bases(lm, config=config)
    kind, fedpit, needed = experiment.mechanism.kind, config.fedpit, 0
    if config.method.spec.writes and config.synthesis.source == "self":
        longest = max(fedpit.max_instruction_tokens, fedpit.max_response_tokens)
        bare = response_prompt(lm, [], instruction=instruction_opening(config.data), chat=chat_format(config.data))
        needed = max(len(bare), len(encode_text(lm.tokenizer, instruction_prompt([])))) + fedpit.max_instruction_tokens + longest
        if needed > lm.max_positions:
            raise ValueError(
                f"fedpit.max_instruction_tokens={fedpit.max_instruction_tokens} with fedpit.max_response_tokens={fedpit.max_response_tokens} and the "
                f"words around them take up to {needed} tokens, more than the model's context of {lm.max_positions}; lower them"
            )
    if kind == "synthesis":
        check_model(lm, longest=needed + config.data.max_length * fedpit.subset_size)
    check_inversion(config, lm, experiment.real_examples)
    if kind == "example" and config.dplora.mode == "example":
        check_private(lm, experiment.real_examples)


def _check_bases(lm: LanguageModel, *, config: Config) -> None:
    """That every adapted layer has as many orthonormal rows and columns as the rank asks for."""
    smallest = min(min(layer.num_outputs, layer.num_inputs) for layer in layers(lm.layout))
    if config.lora.rank > smallest:
        raise ValueError(
            f"lora.rank={config.lora.rank} must be at most {smallest}, the narrower side of the smallest adapted layer, for "
            f"lora.aggregation={config.lora.aggregation!r}, whose bases are orthonormal"
        )


def _public(config: Config, lm: LanguageModel) -> tuple[Example, ...]:
    """The public records, if the method trains on such (`synthesis.source: file`)."""
    if not config.method.spec.writes:
        return ()
    records = public_records(config.synthesis)
    try:
        return tuple(_encode(records, lm, config=config)[0])
    except ValueError as error:
        raise ValueError(f"synthesis.path={config.synthesis.path}: {error}") from None


def _counts(data: EncodedData, *, max_length: int, hands: Sequence[Sequence[Record]]) -> dict[str, Any]:
    return {
        "num_heldout": len(data.heldout),
        "num_cut": data.num_cut,
        "num_heldout_cut": data.num_heldout_cut,
        "max_length": max_length,
        "num_canary_records": [len(hand) for hand in hands],
        **data.counts,
    }


def _encode(records: Sequence[Record], lm: LanguageModel, *, config: Config) -> tuple[list[Example], int]:
    examples, num_cut = encode_records(
        records,
        tokenizer=lm.tokenizer,
        eos_token_id=lm.eos_token_ids[0],
        max_length=config.data.max_length,
        chat=chat_format(config.data),
        loss_on=config.data.loss_on,
    )
    check_tokens(lm, examples, name=config.model.name)
    return examples, num_cut


def _owned(shards: Sequence[Sequence[Example]]) -> list[tuple[int, Example]]:
    """The training examples with their clients, by record and not by client: a sample is of the same records whatever the method."""
    return sorted(((k, example) for k, shard in enumerate(shards) for example in shard), key=lambda pair: pair[1].record.record_id)


def _answered(heldout: tuple[Example, ...], *, config: Config) -> tuple[Example, ...]:
    """A seeded sample of the held-out examples, in source order: a file may go by label or by source, and its first records be all of one.

    Built-in sets come in a drawn order: of those, the first ones.
    """
    if config.data.source in BUILTIN:
        return heldout[: config.evaluate.num_generated]
    return _drawn(heldout, config.evaluate.num_generated, seed=config.seed, key="answered")


def _details(
    members: Sequence[Example], compared: Sequence[Example], *, data: EncodedData, lm: LanguageModel, config: Config
) -> DetailPlan:
    """Where the details of the compared records stand, and what a sample of them is ranked among."""
    pool = pool_of(*([example.record for example in side] for side in (data.train, data.heldout)))
    spans = {example.record.record_id: tuple(detail_spans(example, lm.tokenizer)) for example in (*members, *compared)}
    with_details = [[example for example in side if spans[example.record.record_id]] for side in (members, compared)]
    chosen = [e for side in with_details for e in _drawn(side, config.attack.detail_records, seed=config.seed, key="details")]
    queries = {
        example.record.record_id: tuple(
            detail_queries(
                [example],
                [spans[example.record.record_id]],
                pool=pool,
                tokenizer=lm.tokenizer,
                chat=chat_format(config.data),
                num_references=config.attack.detail_references,
                seed=config.seed,
            )
        )
        for example in chosen
    }
    return DetailPlan(spans, queries, pool)


def _drawn(items: Sequence[T], num: int, *, seed: int, key: str) -> tuple[T, ...]:
    """`num` of the items, or all of fewer, in their order."""
    chosen = numpy_rng(seed, key).permutation(len(items))[:num]
    return tuple(items[i] for i in sorted(chosen))


@torch.no_grad()
def mean_hidden_states(lm: LanguageModel, examples: Sequence[Example]) -> np.ndarray:
    """The base model's last hidden state averaged over each prompt, float32 of shape (examples, hidden size)."""
    lm.model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    rows: list[np.ndarray] = [np.empty(0)] * len(examples)
    for start in range(0, len(order), EMBEDDING_BATCH):
        batch = order[start : start + EMBEDDING_BATCH]
        width = max(len(examples[i].prompt_ids) for i in batch)
        ids_BT = torch.full((len(batch), width), lm.pad_token_id)
        for row, i in enumerate(batch):
            ids_BT[row, : len(examples[i].prompt_ids)] = torch.tensor(examples[i].prompt_ids)
        with lm.model.disable_adapter():
            hidden_BTD = lm.last_hidden(ids_BT.to(lm.device)).float()
        for row, i in enumerate(batch):
            rows[i] = hidden_BTD[row, : len(examples[i].prompt_ids)].mean(dim=0).cpu().numpy()
    return np.stack(rows)


def _cluster(lm: LanguageModel, examples: Sequence[Example], *, config: Config) -> list[str]:
    if config.partition.scheme == "natural":
        raise ValueError("partition.scheme='natural' needs data.label_field (or a preset) to name the field that tells clients apart")
    return cluster_labels(mean_hidden_states(lm, examples), num_clusters=config.partition.num_clusters, seed=config.seed)
