"""The data side of a run: one split and one set of attacked records for all methods, and every record with one owner."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from raysim.config import CHOICES, Config
from raysim.data.tokens import Example
from raysim.federation.setup import Experiment, mean_hidden_states, prepare
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.runs.run import notes
from tests.method_calls import RECORDS
from tests.tiny_models import encode

Make = Callable[..., Config]
TRAINED = [method for method in CHOICES["method.name"] if method != "base"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build_language_model(load_base_model("tiny"), rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"])


def ids(examples: tuple[Example, ...] | list[Example]) -> list[int]:
    return [example.record.record_id for example in examples]


def trained_ids(experiment: Experiment) -> list[int]:
    return sorted(i for shard in experiment.shards for i in ids(shard))


def write_jsonl(folder: Path, rows: list[dict[str, object]]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def two_kinds(count: int) -> list[dict[str, object]]:
    """Two kinds of prompts that share no letter, so that their hidden states lie apart."""
    kinds = ("aeiou " * 3, "9876 54 " * 3)
    return [{"instruction": f"{kinds[i % 2]}{'ab' if i % 2 == 0 else '12'}" * (1 + i // 8), "response": f"r {i}"} for i in range(count)]


def test_all_methods_see_one_split_and_attack_the_same_records(lm: LanguageModel, tiny_config: Make) -> None:
    found = [prepare(tiny_config(f"method.name={method}"), lm) for method in CHOICES["method.name"]]
    assert len({tuple(trained_ids(experiment)) for experiment in found}) == 1
    assert len({tuple(ids(experiment.heldout)) for experiment in found}) == 1
    assert len({tuple(ids([example for _, example in experiment.attacked])) for experiment in found}) == 1
    owners = {experiment.attacked for experiment, m in zip(found, CHOICES["method.name"], strict=True) if m != "cenit"}
    assert len(owners) == 1
    hashes = {e.manifest["sha256"] for e, m in zip(found, CHOICES["method.name"], strict=True) if m != "cenit"}
    assert len(hashes) == 1


@pytest.mark.parametrize("scheme", ["dirichlet", "iid", "quantity"])
def test_every_record_has_one_owner_and_heldout_none(lm: LanguageModel, tiny_config: Make, scheme: str) -> None:
    config = tiny_config(f"partition.scheme={scheme}", "data.num_train=20", "data.num_heldout=30", "attack.num_examples=7")
    experiment = prepare(config, lm)
    trained = trained_ids(experiment)
    assert len(experiment.shards) == 3
    assert len(trained) == len(set(trained)) == 20
    assert len(experiment.heldout) == 30
    assert not set(trained) & set(ids(experiment.heldout))
    assert len(experiment.attacked) == 7
    for client_id, example in experiment.attacked:
        assert example in experiment.shards[client_id]
    assert experiment.mechanism.shard_sizes == tuple(map(len, experiment.shards))
    assert experiment.weights == tuple(float(len(shard)) for shard in experiment.shards)
    assert [client["num_examples"] for client in experiment.manifest["clients"]] == [len(shard) for shard in experiment.shards]
    assert [c["num_tokens"] for c in experiment.manifest["clients"]] == [sum(e.num_tokens for e in s) for s in experiment.shards]


def test_the_seed_decides_split_partition_and_attack(lm: LanguageModel, tiny_config: Make) -> None:
    first, again, other = (prepare(tiny_config(f"seed={seed}"), lm) for seed in (0, 0, 1))
    assert (first.shards, first.heldout, first.attacked, first.manifest) == (again.shards, again.heldout, again.attacked, again.manifest)
    assert trained_ids(first) != trained_ids(other)
    assert first.manifest["sha256"] != other.manifest["sha256"]


def test_more_attacked_than_there_are_takes_all(lm: LanguageModel, tiny_config: Make) -> None:
    experiment = prepare(tiny_config("attack.num_examples=500"), lm)
    assert ids([example for _, example in experiment.attacked]) == trained_ids(experiment)


def test_a_prefix_that_gives_every_response_away_is_refused(lm: LanguageModel, tiny_config: Make) -> None:
    found = prepare(tiny_config(), lm)
    sides = ([example for _, example in found.attacked], found.answered)
    longest = min(max(len(example.response_ids) for example in side) for side in sides) - 1
    prepare(tiny_config(f"attack.prefix_tokens={longest - 1}"), lm)
    prepare(tiny_config("attack.every=-1", f"attack.prefix_tokens={longest}"), lm)
    with pytest.raises(ValueError, match=rf"attack.prefix_tokens={longest} gives .* whole.*at most {longest - 1} for these data"):
        prepare(tiny_config("attack.every=0", f"attack.prefix_tokens={longest}"), lm)
    prepare(tiny_config("attack.long_prefix_tokens=10000"), lm)


def test_held_out_answers_are_a_fair_sample_of_a_file_in_label_order(lm: LanguageModel, tiny_config: Make, tmp_path: Path) -> None:
    """Of the first ones in the order of the file, all would be of one label, and no control for an attack on training records of both."""
    rows: list[dict[str, object]] = [{"instruction": f"q {i}", "response": f"r {i}", "kind": "ab"[i >= 60]} for i in range(120)]
    path = write_jsonl(tmp_path, rows)
    data = ["data.source=jsonl", f"data.path={path}", "data.label_field=kind", "data.num_train=40", "data.num_heldout=60"]
    found = [prepare(tiny_config(*data, f"seed={seed}", "evaluate.num_generated=20"), lm) for seed in range(8)]
    kinds = [Counter(example.record.label for example in experiment.answered) for experiment in found]
    assert all(kind.total() == 20 and 4 <= kind["a"] <= 16 for kind in kinds), kinds
    assert 64 <= sum(kind["a"] for kind in kinds) <= 96
    for experiment in found:
        assert ids(experiment.answered) == sorted(set(ids(experiment.answered)) & set(ids(experiment.heldout)))
    again, whole = (prepare(tiny_config(*data, "seed=0", f"evaluate.num_generated={num}"), lm) for num in (20, 60))
    assert again.answered == found[0].answered
    assert whole.answered == whole.heldout


def test_of_a_built_in_set_the_first_held_out_records_are_answered(lm: LanguageModel, tiny_config: Make) -> None:
    """Its records come in a drawn order."""
    experiment = prepare(tiny_config("evaluate.num_generated=5"), lm)
    assert experiment.answered == experiment.heldout[:5]


def test_the_attack_does_not_prefer_a_client(lm: LanguageModel, tiny_config: Make) -> None:
    """Two of twelve records, over seeds: every client is attacked at some time, and not only in its first records."""
    owners = Counter(k for seed in range(8) for k, _ in prepare(tiny_config(f"seed={seed}"), lm).attacked)
    assert set(owners) == {0, 1, 2}
    assert max(owners.values()) < 12


def test_cenit_is_one_client_with_everything(lm: LanguageModel, tiny_config: Make) -> None:
    federated = prepare(tiny_config("server.cohort_size=2"), lm)
    pooled = prepare(tiny_config("method.name=cenit", "server.cohort_size=2"), lm)
    assert [sorted(ids(shard)) for shard in pooled.shards] == [trained_ids(federated)]
    assert pooled.mechanism.sample_cohort(0) == (0,)
    assert {client_id for client_id, _ in pooled.attacked} == {0}
    assert len(federated.mechanism.sample_cohort(0)) == 2


def test_natural_is_one_client_a_label(lm: LanguageModel, tiny_config: Make, tmp_path: Path) -> None:
    rows = [{"instruction": f"q {i}", "response": f"r {i}", "ward": "abc"[i % 3]} for i in range(24)]
    source = ["data.source=jsonl", f"data.path={write_jsonl(tmp_path, rows)}", "partition.scheme=natural", "data.num_train=18"]
    experiment = prepare(tiny_config(*source, "data.label_field=ward"), lm)
    assert [{example.record.label for example in shard} for shard in experiment.shards] == [{"a"}, {"b"}, {"c"}]
    with pytest.raises(ValueError, match=r"partition\.scheme='natural' needs data\.label_field"):
        prepare(tiny_config(*source), lm)
    with pytest.raises(ValueError, match=r"partition\.num_clients=4 does not fit .* set partition\.num_clients=3"):
        prepare(tiny_config(*source, "data.label_field=ward", "partition.num_clients=4"), lm)


def test_without_labels_records_are_clustered_by_their_hidden_states(lm: LanguageModel, tiny_config: Make, tmp_path: Path) -> None:
    rows = two_kinds(40)
    config = tiny_config(
        "data.source=jsonl",
        f"data.path={write_jsonl(tmp_path, rows)}",
        "partition.num_clusters=2",
        "partition.num_clients=2",
        "partition.alpha=0.001",
        "data.num_train=32",
    )
    experiment = prepare(config, lm)
    kinds = {label: set[str]() for label in ("cluster-0", "cluster-1")}
    for shard in experiment.shards:
        for example in shard:
            kinds[example.record.label].add(example.record.instruction[0])
    assert sorted(sorted(kind) for kind in kinds.values()) == [["9"], ["a"]]
    counts = [client["label_counts"] for client in experiment.manifest["clients"]]
    assert set().union(*counts) == {"cluster-0", "cluster-1"}


def test_hidden_states_are_the_base_models_mean_over_the_prompt(lm: LanguageModel) -> None:
    """Whatever the adapter and the padding; each prompt alone through the bare decoder."""
    examples = encode(lm, RECORDS)
    lm.set_adapter(np.random.default_rng(0).standard_normal(lm.layout.num_parameters).astype(np.float32))
    states = mean_hidden_states(lm, examples)
    lm.set_adapter(np.zeros(lm.layout.num_parameters, dtype=np.float32))
    for state, example in zip(states, examples, strict=True):
        with torch.no_grad():
            output = lm.model(input_ids=torch.tensor([example.prompt_ids]), output_hidden_states=True)
        np.testing.assert_allclose(state, output.hidden_states[-1][0].mean(dim=0).numpy(), rtol=1e-4, atol=1e-5)


def test_long_prompts_and_contexts_are_refused_and_cuts_counted(lm: LanguageModel, tiny_config: Make) -> None:
    with pytest.raises(ValueError, match=r"data\.max_length=20: \d+ of 12 prompts .* raise data\.max_length"):
        prepare(tiny_config("data.max_length=20"), lm)
    with pytest.raises(ValueError, match=r"data\.max_length=20000 with .* is more than the model's context of 16384 tokens"):
        prepare(tiny_config("data.max_length=20000"), lm)
    whole = prepare(tiny_config(), lm)
    assert (whole.manifest["num_cut"], whole.manifest["num_heldout_cut"]) == (0, 0)
    examples = [example for shard in whole.shards for example in shard]
    limit = max(len(example.prompt_ids) for example in [*examples, *whole.heldout]) + 20
    cut = prepare(tiny_config(f"data.max_length={limit}"), lm)
    assert cut.manifest["num_cut"] == sum(example.num_tokens > limit for example in examples) > 0
    assert cut.manifest["num_heldout_cut"] == sum(example.num_tokens > limit for example in whole.heldout)
    assert max(example.num_tokens for shard in cut.shards for example in shard) == limit
    assert (cut.manifest["max_length"], cut.manifest["num_heldout"]) == (limit, 4)


def test_copies_and_what_is_left_out_are_counted_and_said(lm: LanguageModel, tiny_config: Make, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"instruction": f"q {i % 8}", "response": f"r {i % 8}"} for i in range(24)]
    rows += [{"instruction": "Q  8", "response": "R 8"}, {"instruction": "q 8", "response": "r 8"}, {"instruction": "q", "response": None}]
    source = [
        "data.source=jsonl",
        f"data.path={write_jsonl(tmp_path, rows)}",
        "partition.scheme=iid",
        "data.num_train=0",
        "data.num_heldout=4",
    ]
    config = tiny_config(*source)
    experiment = prepare(config, lm)
    trained, heldout = ({e.record.instruction.casefold() for e in side} for side in (sum(experiment.shards, ()), experiment.heldout))
    assert not trained & heldout
    used = [(e.record.instruction, e.record.response) for side in (*experiment.shards, experiment.heldout) for e in side]
    exact, folded = len(used) - len(set(used)), len(used) - len({" ".join(asked.casefold().split()) for asked, _ in used})
    counts = {"num_copies": folded, "num_exact_copies": exact, "num_left_out": 1, "num_conversations_cut": 0, "num_details_left_out": 0}
    assert experiment.manifest.items() >= counts.items()
    assert notes(experiment, config) == [
        f"{folded} records are copies of others ({exact} letter by letter); no copy of a training record is held out"
    ]


@pytest.mark.parametrize("method", TRAINED)
def test_the_mechanism_is_made_for_the_shards(lm: LanguageModel, tiny_config: Make, method: str) -> None:
    experiment = prepare(tiny_config(f"method.name={method}"), lm)
    mechanism = experiment.mechanism
    assert mechanism.num_clients == len(experiment.shards) == len(experiment.weights)
    assert mechanism.kind == ("example" if method == "dplora" else "none")
    if method == "dplora":
        assert mechanism.sampling_prob == min(1.0, 2 / min(map(len, experiment.shards)))
        assert set(experiment.weights) == {1.0}
