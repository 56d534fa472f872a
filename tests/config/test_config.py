"""The configuration: layers, ranges, choices, combinations, and that every refusal is one line naming its key."""

import ast
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from raysim.config import (
    CHOICES,
    KEYS,
    LEAST_ABOVE_ZERO,
    RANGES,
    RESULT_NEUTRAL,
    RULES,
    Config,
    Key,
    Rule,
    asks_for_labels,
    concerns,
    find_config,
    flatten_keys,
    from_layers,
    lacking,
    load,
    result_key,
    shipped_configs,
    statement,
    to_dict,
    to_yaml,
    unresolved,
    unused_privacy,
    with_overrides,
)
from raysim.config import schema as config_module
from raysim.config.load import _merged, _override
from raysim.lora.spec import RULES as LORA_SPECS
from raysim.runs.compare import comparison
from raysim.runs.run import run
from raysim.sweeps.space import grid_points, trial_config

FLAT = flatten_keys(to_dict(Config()))
NUMERIC = {key for key, value in FLAT.items() if isinstance(value, int | float) and not isinstance(value, bool)}
LOWEST = sorted(RANGES)
CLIENT_ONLY = [key.name for key in KEYS.values() if key.only == "privacy.unit=client" and key.name != "privacy.noise_at"]
HIGHEST = sorted(set(RANGES) - {"resources.client.num_gpus"})
"""Of whole GPUs a rule says why there is at most one."""
CLIENT = ["privacy.unit=client"]
DEEPSPEED = ["train.engine=deepspeed"]
DPLORA = ["method.name=dplora"]
PRIVATE_FEDPIT = ["method.name=fedpit", "privacy.unit=example", "fedpit.scorer=none"]
SHIPPED = sorted(path.stem for path in shipped_configs().glob("*.yaml"))


def refusal(*overrides: str, source: str | Path = "") -> str:
    """The text of the refusal of `overrides`, which must be one line."""
    with pytest.raises(ValueError) as caught:
        load(source, list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def assert_kept(overrides: list[str]) -> None:
    """`overrides` load, and every one is as it was given."""
    flat = flatten_keys(to_dict(load("", overrides)))
    for word in overrides:
        key, _, value = word.partition("=")
        assert flat[key] == OmegaConf.select(OmegaConf.from_dotlist([word]), key) or str(flat[key]) == value, word


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- defaults and layers


def test_defaults_load_and_equal_the_dataclasses_but_for_what_is_resolved() -> None:
    resolved = flatten_keys(to_dict(load()))
    changed = {key: resolved[key] for key in FLAT if resolved[key] != FLAT[key]}
    assert resolved.keys() == FLAT.keys()
    assert changed == {"privacy.unit": "none", "server.weighting": "examples", "audit.canary": "record"}


def test_every_default_can_be_given_by_hand() -> None:
    plain = {key: value for key, value in FLAT.items() if key != "compare"}
    assert with_overrides(load(), plain) == load()


def test_command_line_wins_over_file_and_file_over_default(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", "seed: 5\nlora:\n  rank: 8\n")
    config = load(path, ["lora.rank=2", "lora.dropout=0.1"])
    assert (config.seed, config.lora.rank, config.lora.dropout, config.lora.alpha) == (5, 2, 0.1, Config().lora.alpha)


def test_objectives_are_replaced_and_a_space_is_added_to(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", "sweep: {space: {lora.rank: [2, 4]}, objectives: {epsilon: min}}\n")
    config = load(path, ["sweep.space.partition.alpha=[1, 2]"])
    assert config.sweep.objectives == {"epsilon": "min"}
    assert set(config.sweep.space) == {"lora.rank", "partition"}
    assert load(path, ["sweep.objectives={heldout_nll: min}"]).sweep.objectives == {"heldout_nll": "min"}
    assert load("").sweep.objectives == {"heldout_nll": "min", "leakage": "min"}


def test_a_sweep_may_set_a_budget_that_only_some_of_its_points_have() -> None:
    assert load("", ["sweep.space={method.name: [fedit, dplora]}", "privacy.target_epsilon=3"]).privacy.target_epsilon == 3
    with pytest.raises(ValueError, match=r"privacy\.target_epsilon is set but means nothing"):
        load("", ["privacy.target_epsilon=3"])


def test_the_last_of_two_overrides_wins() -> None:
    assert load("", ["seed=1", "seed=2"]).seed == 2


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path / "empty.yaml", "")) == load()


def test_lists_are_replaced_and_null_is_a_value() -> None:
    config = load("", ["lora.target_modules=[k_proj]", "data.system_prompt=null"])
    assert config.lora.target_modules == ["k_proj"]
    assert config.data.system_prompt is None
    assert load("", ["data.system_prompt=''"]).data.system_prompt == ""


def test_auto_follows_the_method_and_the_guarantee() -> None:
    assert load("", ["method.name=dplora"]).privacy.unit == "example"
    assert load("", ["method.name=dplora"]).server.weighting == "uniform"
    assert load("", ["privacy.unit=client"]).server.weighting == "uniform"
    assert load("", ["method.name=fedpit"]).server.weighting == "examples"
    assert load("", ["method.name=fewfedweight"]).server.weighting == "adaptive"
    assert load("", ["out=elsewhere"]).out == "elsewhere"


def test_what_auto_decided_can_be_decided_again_for_another_method() -> None:
    fedit = load("", ["method.name=fedit"])
    assert with_overrides(fedit, unresolved(fedit) | {"method.name": "dplora"}).privacy.unit == "example"
    few = load("", ["method.name=fewfedweight"])
    assert with_overrides(few, unresolved(few) | {"method.name": "fedpit"}).server.weighting == "examples"
    private = load("", ["privacy.unit=client"])
    assert with_overrides(private, unresolved(private)) == private
    with pytest.raises(ValueError, match=r"privacy\.unit"):
        with_overrides(private, unresolved(private) | {"method.name": "dplora"})


# --- refusals


@pytest.mark.parametrize("key", LOWEST)
def test_below_the_range_is_refused_by_name(key: str) -> None:
    low, _, inclusive = RANGES[key]
    below = int(low) - 1 if inclusive else int(low)
    text = refusal(f"{key}={below}")
    assert text.startswith(f"{key}=")
    assert ("at least" if inclusive else "greater than") in text


@pytest.mark.parametrize("key", HIGHEST)
def test_above_the_range_is_refused_by_name(key: str) -> None:
    high = RANGES[key][1]
    above = int(high) + 1 if isinstance(high, int) else 2 * high
    text = refusal(f"{key}={above}")
    assert text.startswith(f"{key}=")
    assert "at most" in text


@pytest.mark.parametrize("key", [key for key in LOWEST if RANGES[key][2]])
def test_the_lowest_value_is_allowed(key: str) -> None:
    low = RANGES[key][0]
    assert flatten_keys(to_dict(load("", [f"{key}={low}"])))[key] == low


MANY = ["data.num_train=0", "partition.num_clients=1000000"]
CLIENT = ["privacy.unit=client"]
RANKS = ["train.engine=deepspeed", "resources.backend=ray", "resources.client.num_ranks=2"]
IN_A_SETTING = {
    "clients.overselect": ["server.cohort_size=2"],
    "server.min_clients": MANY,
    "partition.min_examples": ["data.num_train=0"],
    "partition.num_clients": ["data.num_train=0"],
    "privacy.count_noise": [*CLIENT, "privacy.clipping=adaptive"],
    "privacy.dropout_tolerance": [*CLIENT, "privacy.noise_at=distributed"],
    "privacy.max_epsilon": CLIENT,
    "privacy.noise_cohort_size": CLIENT,
    "privacy.num_bands": [*MANY, *CLIENT, "privacy.sampler=cyclic", "server.cohort_size=1"],
    "privacy.population": [*CLIENT, "privacy.noise_cohort_size=10"],
    "privacy.target_epsilon": CLIENT,
    "resources.client.num_ranks": ["train.engine=deepspeed", "resources.backend=ray"],
    "server.cohort_size": MANY,
}


@pytest.mark.parametrize("key", HIGHEST)
def test_the_highest_value_is_allowed(key: str) -> None:
    high, setting = RANGES[key][1], IN_A_SETTING.get(key, [])
    assert flatten_keys(to_dict(load("", [*setting, f"{key}={high}"])))[key] == high


@pytest.mark.parametrize("key", LEAST_ABOVE_ZERO)
def test_a_number_that_is_next_to_nothing_is_refused_where_zero_means_none(key: str) -> None:
    setting, least = IN_A_SETTING.get(key, []), LEAST_ABOVE_ZERO[key]
    assert refusal(*setting, f"{key}={least / 2}") == f"{key}={least / 2!r} must be 0, or at least {least:g}"
    for value in (0.0, least):
        assert flatten_keys(to_dict(load("", [*setting, f"{key}={value}"])))[key] == value


@pytest.mark.parametrize("key", sorted(key for key in NUMERIC if isinstance(FLAT[key], float)))
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_what_is_no_finite_number_is_refused(key: str, value: str) -> None:
    assert refusal(f"{key}={value}").startswith(f"{key}=")


def test_every_number_has_a_range_and_every_range_a_number() -> None:
    assert set(RANGES) == NUMERIC


@pytest.mark.parametrize("key", sorted(CHOICES))
def test_an_unknown_choice_is_refused_with_the_choices(key: str) -> None:
    text = refusal(f"{key}=nonsense")
    assert text.startswith(f"{key}='nonsense'")
    assert all(repr(choice) in text for choice in CHOICES[key])


@pytest.mark.parametrize(("key", "default"), [(key, FLAT[key]) for key in sorted(CHOICES)])
def test_the_default_is_one_of_the_choices(key: str, default: str) -> None:
    assert default in CHOICES[key]


RANKED = "lora.aggregation=flora"
LORA_RULES = [
    *(
        ([f"lora.aggregation={name}", "privacy.unit=client"], [f"lora.aggregation='{name}'", one.no_client])
        for name, one in LORA_SPECS.items()
        if one.no_client
    ),
    (["method.name=locit", "lora.aggregation=ffa"], ["lora.aggregation='ffa'", "shares no adapter"]),
    (["method.name=base", "lora.aggregation=ffa"], ["lora.aggregation='ffa'", "shares no adapter"]),
    (["method.name=scaffold", "lora.aggregation=rolora"], ["lora.aggregation='rolora'", "the same entries in every round"]),
    (["method.name=fedpit", "lora.aggregation=fedex"], ["lora.aggregation='fedex'", "the base of its round"]),
    (["method.name=fedpit", "lora.aggregation=fedsa"], ["lora.aggregation='fedsa'", "an adapter of another kind"]),
    (["method.name=dplora", "dplora.mode=literal", "lora.aggregation=ffa"], ["lora.aggregation='ffa'", "dplora.mode=example"]),
    (
        ["privacy.unit=client", "lora.aggregation=fedsvd", "audit.num_canaries=9", "audit.canary=update"],
        ["lora.aggregation='fedsvd'", "audit.num_canaries=0"],
    ),
    (["lora.aggregation=fedsvd", "server.optimizer=momentum"], ["server.optimizer='momentum'", "use 'none'"]),
    (["lora.aggregation=fedex", "server.lr=0.5"], ["server.lr=0.5", "use 1"]),
    (["lora.client_ranks=[4,4,8]"], ["lora.client_ranks=[4, 4, 8]", "'flora' or 'flexlora' or 'hetlora' or 'florist'"]),
    (["method.name=fedpit", "lora.aggregation=flexlora", "lora.client_ranks=[4,4,8]"], ["lora.client_ranks", "leave it out"]),
    ([RANKED, "lora.client_ranks=[4,4,8]", "lora.rank_shares={4: 1.0}"], ["lora.client_ranks", "lora.rank_shares"]),
    ([RANKED, "lora.client_ranks=[4,4]"], ["lora.client_ranks=[4, 4]", "partition.num_clients=3"]),
    ([RANKED, "lora.client_ranks=[4,4,17]"], ["lora.client_ranks=[4, 4, 17]", "lora.rank=16"]),
    ([RANKED, "lora.client_ranks={4: 0.5, 8: 0.4}"], ["lora.rank_shares", "sum to 1"]),
]
"""What a rule for combining adapters cannot do: the overrides, and what the refusal names."""
COMBINATIONS = [
    *LORA_RULES,
    (["lora.target_modules=[]"], ["lora.target_modules", "q_proj"]),
    (["server.cohort_size=4"], ["server.cohort_size=4", "partition.num_clients=3"]),
    (["clients.dropout_by_client=[0.1]"], ["clients.dropout_by_client=[0.1]", "partition.num_clients=3"]),
    (["evaluate.exactness_gap=true", *CLIENT], ["evaluate.exactness_gap=true", "that of the noise"]),
    (["evaluate.exactness_gap=true", "server.rule=median"], ["evaluate.exactness_gap=true", "server.rule='median'"]),
    (["evaluate.exactness_gap=true", "server.lr=0.5"], ["evaluate.exactness_gap=true", "something else on purpose"]),
    (["evaluate.exactness_gap=true", "method.name=locit"], ["evaluate.exactness_gap=true", "one adapter that all clients train"]),
    (["evaluate.exactness_gap=true", "lora.aggregation=fedsa"], ["evaluate.exactness_gap=true", "share whole"]),
    (
        ["evaluate.exactness_gap=true", "adversary.attack=sign_flip", "adversary.share=0.34"],
        ["evaluate.exactness_gap=true", "send what they trained"],
    ),
    (["clients.overselect=1.3"], ["clients.overselect=1.3", "set server.cohort_size"]),
    (["clients.overselect=1.3", "server.cohort_size=2", *CLIENT], ["clients.overselect=1.3", "lets one client decide by its speed"]),
    (
        ["clients.deadline_s=3", "method.name=dplora"],
        ["clients.deadline_s=3.0", "how long a client's records are", "privacy.unit='example'"],
    ),
    (
        ["clients.deadline_s=3", *CLIENT, "privacy.noise_at=client"],
        ["clients.deadline_s=3.0", "privacy.noise_at='client'", "or privacy.unit=client"],
    ),
    (["clients.deadline_s=3", "clients.late=stale", *CLIENT], ["clients.late='stale'", "count twice in a round", "use 'drop'"]),
    (["clients.deadline_s=3", "clients.late=stale", "method.name=scaffold"], ["clients.late='stale'", "control variates of another round"]),
    (["clients.deadline_s=3", "clients.late=stale", "server.rule=median"], ["clients.late='stale'", "server.rule='median'"]),
    (["server.rule=krum", *CLIENT], ["server.rule='krum'", "not bounded by privacy.clip_norm", "use 'mean'"]),
    (["server.rule=median", "method.name=scaffold"], ["server.rule='median'", "nor control variates"]),
    (["adversary.attack=scale"], ["adversary.share=0.2", "makes none of partition.num_clients=3 clients hostile"]),
    (["adversary.attack=scale", "adversary.share=0.5", "method.name=cenit"], ["adversary.attack='scale'", "method.name='cenit'"]),
    (
        ["adversary.attack=scale", "adversary.share=0.5", *CLIENT, "privacy.noise_at=client"],
        ["adversary.attack='scale'", "privacy.noise_at='client'", "a hostile one need not do"],
    ),
    (["adversary.attack=backdoor", "adversary.share=0.5", "adversary.trigger=' '"], ["adversary.trigger", "must not be empty"]),
    (["server.min_clients=2", *CLIENT], ["server.min_clients=2", "how many clients came", "privacy.dropout_tolerance"]),
    (["server.min_clients=9"], ["server.min_clients=9", "is more than a round has clients"]),
    (["partition.num_clients=49"], ["partition.num_clients=49", "data.num_train=48", "lower num_clients"]),
    (["partition.min_examples=17"], ["partition.min_examples=17"]),
    (["method.name=dplora", "train.prox_mu=0.1"], ["train.prox_mu"]),
    (["data.source=jsonl"], ["data.path", "a file"]),
    (["data.source=hub"], ["data.path", "data set id"]),
    (["server.weighting=adaptive"], ["server.weighting='adaptive'", "method.name='fewfedweight'", "use examples or uniform"]),
    (["synthesis.source=file"], ["synthesis.path is empty", "a file of public records"]),
    (["synthesis.path=somewhere.jsonl"], ["synthesis.path", "synthesis.source='self'", "set it to 'file'"]),
    (["synthesis.preset=alpaca"], ["synthesis.preset", "synthesis.source='self'", "set it to 'file'"]),
    (
        [*PRIVATE_FEDPIT, "synthesis.source=file", "synthesis.path=x.jsonl"],
        ["synthesis.source='file'", "nothing to protect; use 'none'"],
    ),
    (["resources.num_actors=0"], ["resources.num_actors='0'", "at least 1"]),
    (["resources.num_actors=many"], ["resources.num_actors='many'", "auto"]),
    (["clients.batched=4", *CLIENT], ["clients.batched='4'", "who trains beside it"]),
    (["clients.batched=4", "train.micro_batch_size=2"], ["clients.batched='4'", "train.micro_batch_size"]),
    (["clients.batched=4", "train.engine=deepspeed", "resources.backend=ray"], ["clients.batched='4'", "a client is several"]),
    ([*RANKS, "lora.dropout=0.1"], ["resources.client.num_ranks=2", "lora.dropout=0.1"]),
    ([*RANKS, "resources.client.num_gpus=0.5"], ["resources.client.num_ranks=2", "use resources.client.num_gpus=1"]),
    (["clients.batched=0"], ["clients.batched='0'", "at least 1"]),
    (["clients.batched=many"], ["clients.batched='many'", "auto"]),
    (["resources.client.num_gpus=1.5"], ["resources.client.num_gpus=1.5", "one device", "use at most 1"]),
    (["resources.client.num_ranks=2"], ["resources.client.num_ranks=2", "needs train.engine='deepspeed'"]),
    ([*DEEPSPEED, "resources.client.num_ranks=2", "resources.backend=local"], ["resources.client.num_ranks=2", "resources.backend='ray'"]),
    ([*DEEPSPEED, "method.name=dplora"], ["train.engine='deepspeed'", "privacy.unit='example'", "use 'torch'"]),
    (
        [*DEEPSPEED, "deepspeed.zero_stage=3", "model.quantization=nf4"],
        ["train.engine='deepspeed'", "deepspeed.zero_stage=3", "model.quantization=none"],
    ),
    ([*DEEPSPEED, "sweep.space={lora.rank: [2, 4]}"], ["train.engine='deepspeed'", "no place in a sweep"]),
    ([*DEEPSPEED, "deepspeed.config={train_batch_size: 4}"], ["deepspeed.config=", "train_batch_size: train.batch_size", "leave it out"]),
    (["resources.client.num_gpus=2"], ["resources.client.num_gpus=2", "train.engine=deepspeed with resources.client.num_ranks"]),
    *[
        ([f"server.optimizer={name}"], ["server.lr=1", f"server.optimizer='{name}'", "less than 1, such as 0.001"])
        for name in ("adam", "yogi", "adagrad")
    ],
]


@pytest.mark.parametrize(("overrides", "named"), COMBINATIONS)
def test_combinations_without_a_meaning_are_refused(overrides: list[str], named: list[str]) -> None:
    text = refusal(*overrides)
    assert all(part in text for part in named), text


@pytest.mark.parametrize(
    "overrides",
    [
        ["server.cohort_size=3"],
        ["partition.num_clients=48"],
        ["partition.num_clients=49", "partition.min_examples=0"],
        ["partition.num_clients=49", "data.num_train=0"],
        ["privacy.unit=client", "server.weighting=uniform"],
        ["method.name=dplora", "privacy.unit=example"],
        ["data.source=jsonl", "data.path=somewhere.jsonl"],
        ["resources.num_actors=2"],
        ["resources.client.num_gpus=0.25"],
        ["resources.client.num_gpus=1"],
        ["server.optimizer=momentum"],
        ["method.name=fewfedweight", "server.weighting=adaptive"],
        ["method.name=fewfedweight", "server.weighting=uniform"],
        ["method.name=fedpit", "synthesis.source=file", "synthesis.path=x.jsonl", "synthesis.preset=medquad"],
        ["server.optimizer=adam", "server.lr=0.999"],
    ],
)
def test_the_neighbours_of_refused_combinations_are_allowed(overrides: list[str]) -> None:
    assert_kept(overrides)


# --- what a unit, a place of the noise, a sampler and the rest can be together

CYCLIC = [*CLIENT, "partition.num_clients=12", "server.cohort_size=3", "privacy.sampler=cyclic"]
POISSON = [*CLIENT, "partition.num_clients=12", "server.cohort_size=3"]
DISTRIBUTED = [*CLIENT, "privacy.noise_at=distributed"]
LOCAL = [*CLIENT, "privacy.noise_at=client"]
ADAPTIVE = "privacy.clipping=adaptive"
FIXED = "privacy.sampler=fixed"


WITHOUT_A_MECHANISM = [
    *[
        ([f"method.name={method}", "privacy.unit=example"], f"privacy.unit='example' needs .* \\(method.name='{method}' does not bound")
        for method in ("fedit", "scaffold", "fedmit", "fewfedweight", "locit", "locit_synthetic", "cenit", "base")
    ],
    *[
        ([*DPLORA, f"privacy.unit={unit}"], f"privacy.unit='{unit}' does not fit method.name='dplora', .* use method.name=fedit")
        for unit in ("none", "client")
    ],
    *[
        ([f"method.name={method}", *CLIENT], f"privacy.unit='client' is a guarantee for method.name='fedit' only, not '{method}'")
        for method in ("fedpit", "fedmit", "fewfedweight", "locit", "locit_synthetic", "cenit", "base")
    ],
    (
        ["method.name=scaffold", *CLIENT],
        "privacy.unit='client' does not cover method.name='scaffold': control variates are a second upload, .* use method.name=fedit",
    ),
    ([*CLIENT, "server.weighting=examples"], "server.weighting='examples' is unbounded in one client .* use uniform"),
    (PRIVATE_FEDPIT[:2], "fedpit.share_mix and fedpit.scorer use private records: .* share_mix=0 and scorer='none'"),
    ([*PRIVATE_FEDPIT, "fedpit.share_mix=0.1"], "fedpit.share_mix and fedpit.scorer use private records"),
    ([*CLIENT, "server.cohort_size=2", "privacy.sampler=all"], "privacy.sampler='all' contradicts server.cohort_size=2; use 'poisson'"),
    ([*LOCAL, ADAPTIVE], "privacy.clipping needs privacy.noise_at='server', not 'client'"),
    ([*DISTRIBUTED, ADAPTIVE], "privacy.clipping needs privacy.noise_at='server', not 'distributed'"),
    ([*LOCAL, "privacy.noise_cohort_size=9"], "privacy.noise_cohort_size needs privacy.noise_at='server', not 'client'"),
    ([*DISTRIBUTED, "privacy.noise_cohort_size=9"], "privacy.noise_cohort_size needs privacy.noise_at='server', not 'distributed'"),
    ([*POISSON, FIXED, ADAPTIVE], "privacy.sampler='fixed' has no event .* use 'poisson' or 'all'"),
    ([*POISSON, FIXED, "privacy.noise_at=client"], "privacy.sampler='fixed' has no event .* use 'poisson' or 'all'"),
    ([*POISSON, FIXED, "privacy.noise_at=distributed"], "privacy.sampler='fixed' has no event .* use 'poisson' or 'all'"),
    (
        [*CYCLIC, "server.cohort_size=5"],
        "privacy.sampler='cyclic' needs a server.cohort_size that divides partition.num_clients, .* or use 'poisson'",
    ),
    ([*CYCLIC, "privacy.noise_at=client"], "privacy.sampler='cyclic' needs .* privacy.noise_at='server'"),
    ([*CYCLIC, ADAPTIVE], "privacy.sampler='cyclic' needs .* privacy.clipping='flat'"),
    ([*POISSON, "privacy.num_bands=2"], "privacy.num_bands=2 needs privacy.sampler='cyclic'"),
    ([*CYCLIC, "privacy.num_bands=5"], "privacy.num_bands=5 needs .* at least as many cohorts in its cycle \\(4\\)"),
    ([*CYCLIC, "privacy.num_bands=2", "privacy.secure_noise=true"], "privacy.num_bands=2 needs .* seeded noise"),
    ([*POISSON, FIXED, "privacy.noise_cohort_size=9"], "privacy.noise_cohort_size=9 needs privacy.sampler='poisson' or 'all', not 'fixed'"),
    ([*CYCLIC, "privacy.noise_cohort_size=9"], "privacy.noise_cohort_size=9 needs privacy.sampler='poisson' or 'all', not 'cyclic'"),
    (
        [*POISSON, "privacy.noise_cohort_size=9", "privacy.population=8"],
        "privacy.population=8 must be at least privacy.noise_cohort_size=9",
    ),
    ([*POISSON, "privacy.population=8"], "privacy.population=8 needs privacy.noise_cohort_size, the cohort drawn from it"),
    ([*CLIENT, "privacy.dropout_tolerance=0.2"], "privacy.dropout_tolerance=0.2 needs privacy.noise_at='distributed', not 'server'"),
    ([*LOCAL, "privacy.dropout_tolerance=0.2"], "privacy.dropout_tolerance=0.2 needs privacy.noise_at='distributed', not 'client'"),
    (["audit.multiplicities=[1,0]"], "audit.multiplicities=\\[1, 0\\] must all be at least 1"),
    ([*DPLORA, "audit.num_canaries=4", "audit.canary=update"], "audit.canary='update' needs method.name='fedit' .* use 'record'"),
    ([*DISTRIBUTED, "audit.num_canaries=4"], "audit.canary='update' needs .* one by one"),
    (
        ["audit.num_canaries=4", "audit.canary=gradient"],
        "audit.canary='gradient' needs method.name='dplora' with dplora.mode='example'",
    ),
    (
        [*DPLORA, "dplora.mode=literal", "audit.num_canaries=4", "audit.canary=gradient"],
        "audit.canary='gradient' needs method.name='dplora' with dplora.mode='example'; use 'record'",
    ),
    ([*CLIENT, "audit.num_canaries=4", "audit.canary=record"], "audit.canary='record' audits a record where .* use 'update'"),
    (["method.name=base", "audit.num_canaries=4"], "audit.num_canaries needs a method that trains; method.name='base' does not"),
]


@pytest.mark.parametrize(("overrides", "named"), WITHOUT_A_MECHANISM)
def test_privacy_that_no_mechanism_has_is_refused_with_what_to_use(overrides: list[str], named: str) -> None:
    assert re.search(f"^{named}", refusal(*overrides)), refusal(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        PRIVATE_FEDPIT,
        [*CLIENT, "privacy.sampler=all"],
        [*CLIENT, "privacy.sampler=all", "server.cohort_size=3"],
        [*CLIENT, ADAPTIVE],
        [*POISSON, ADAPTIVE],
        [*POISSON, FIXED],
        [*POISSON, "privacy.noise_at=client"],
        [*POISSON, "privacy.noise_at=distributed", "privacy.dropout_tolerance=0.2"],
        [*CYCLIC, "privacy.num_bands=4"],
        [*CYCLIC, "privacy.secure_noise=true"],
        [*POISSON, "privacy.noise_cohort_size=9", "privacy.population=9"],
        [*CLIENT, ADAPTIVE, "privacy.noise_cohort_size=9"],
        [*CLIENT, "audit.num_canaries=4"],
        [*LOCAL, "audit.num_canaries=4"],
        [*DISTRIBUTED, "audit.canary=update"],
        [*DPLORA, "audit.num_canaries=4", "audit.canary=gradient"],
        [*DPLORA, "privacy.noise_at=client", "privacy.target_epsilon=3", "privacy.max_epsilon=2"],
        [*PRIVATE_FEDPIT, "privacy.target_epsilon=3"],
        ["audit.num_canaries=4", "audit.canary=update"],
        ["audit.multiplicities=[1,2]"],
    ],
)
def test_privacy_that_some_mechanism_has_is_allowed(overrides: list[str]) -> None:
    assert_kept(overrides)


NOT_BY_DEFAULT = {
    "privacy.sampler": "poisson",
    "privacy.clipping": "adaptive",
    "privacy.noise_cohort_size": 9,
    "privacy.population": 99,
    "privacy.num_bands": 2,
    "privacy.dropout_tolerance": 0.2,
    "privacy.count_noise": 3.0,
}


def test_every_key_for_clients_alone_has_a_value_here() -> None:
    assert set(NOT_BY_DEFAULT) == set(CLIENT_ONLY)


@pytest.mark.parametrize("key", CLIENT_ONLY)
@pytest.mark.parametrize("method", [DPLORA, PRIVATE_FEDPIT, ["method.name=fedit"], ["method.name=fedpit"]])
def test_a_privacy_key_that_means_nothing_is_refused_and_not_ignored(key: str, method: list[str]) -> None:
    text = refusal(*method, f"{key}={NOT_BY_DEFAULT[key]}")
    unit = load("", method).privacy.unit
    assert text.startswith(f"{key} is set but means nothing with privacy.unit={unit!r} (method.name='{method[0].split('=')[1]}'); ")
    assert text.endswith("it is for privacy.unit='client'" if unit == "example" else "or leave it out")


@pytest.mark.parametrize("method", ["fedit", "fedpit", "locit", "cenit", "base"])
@pytest.mark.parametrize("setting", ["privacy.target_epsilon=3", "privacy.max_epsilon=3", "privacy.noise_at=server"])
def test_a_budget_without_noise_is_refused_with_what_has_noise(method: str, setting: str) -> None:
    key = setting.partition("=")[0]
    assert refusal(f"method.name={method}", setting) == (
        f"{key} is set but means nothing with privacy.unit='none' (method.name={method!r}); "
        "set privacy.unit=client, or method.name=dplora, or leave it out"
    )


@pytest.mark.parametrize("where", ["server", "distributed"])
@pytest.mark.parametrize("method", [DPLORA, PRIVATE_FEDPIT])
def test_noise_for_records_is_added_where_the_records_are(method: list[str], where: str) -> None:
    text = refusal(*method, f"privacy.noise_at={where}")
    assert text.startswith("privacy.noise_at is set but means nothing with privacy.unit='example'")
    assert text.endswith("noise is added at the client: use 'client'")


def test_auto_decides_where_noise_is_added_and_who_is_drawn() -> None:
    def decided(*overrides: str) -> tuple[str, str, str]:
        config = load("", list(overrides))
        return config.privacy.noise_at, config.privacy.sampler, config.audit.canary

    assert decided() == ("auto", "auto", "record")
    assert decided(*CLIENT) == ("server", "all", "update")
    assert decided(*POISSON) == ("server", "poisson", "update")
    assert decided(*DPLORA) == decided(*PRIVATE_FEDPIT) == ("client", "auto", "record")


@pytest.mark.parametrize("budget", ["privacy.target_epsilon", "privacy.max_epsilon"])
def test_a_budget_of_a_comparison_is_for_the_entries_that_have_noise(tmp_path: Path, budget: str) -> None:
    """The others run without; a run by itself that would ignore it is refused."""
    text = (
        f"privacy: {{{budget.partition('.')[2]}: 3, clipping: adaptive, noise_at: server}}\ncompare:\n"
        "  fedit: {method.name: fedit}\n  base: {method.name: base}\n"
        "  clients: {privacy.unit: client}\n  records: {method.name: dplora}\n"
    )
    path = written(tmp_path / "c.yaml", text)
    config = load(path)
    assert unused_privacy(config) == {budget: 0.0, "privacy.clipping": "flat", "privacy.noise_at": "auto"}
    entries = {entry.name: entry for entry in comparison(config)}
    budgets = {name: flatten_keys(to_dict(entry))[budget] for name, entry in entries.items()}
    assert budgets == {"fedit": 0.0, "base": 0.0, "clients": 3.0, "records": 3.0}
    assert {name: entry.privacy.clipping for name, entry in entries.items()} == dict.fromkeys(budgets, "flat") | {"clients": "adaptive"}
    assert {name: entry.privacy.noise_at for name, entry in entries.items()} == {
        "fedit": "auto",
        "base": "auto",
        "clients": "server",
        "records": "client",
    }
    assert all(unused_privacy(entry) == {} for entry in entries.values())
    with pytest.raises(ValueError, match=rf"^{re.escape(budget)} is set but means nothing with privacy\.unit='none'"):
        run(with_overrides(config, {"out": str(tmp_path / "run")}), display=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("lora.rnak=8", "lora.rank"),
        ("rank=8", "lora.rank"),
        ("sede=1", "seed"),
        ("train.learning_rate=1", None),
        ("resources.client.num_gpu=1", "resources.client.num_gpus"),
        ("zzz=1", None),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(override: str, suggestion: str | None) -> None:
    text = refusal(override)
    assert text.startswith(f"unknown key {override.partition('=')[0]}")
    if suggestion:
        assert text.endswith(f"did you mean {suggestion}?")


def test_an_unknown_key_in_a_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", "server:\n  num_round: 3\n")
    assert refusal(source=path) == "unknown key server.num_round; did you mean server.num_rounds?"


@pytest.mark.parametrize("override", ["lora=8", "resources.client=1"])
def test_a_section_is_not_a_value(override: str) -> None:
    text = refusal(override)
    assert text.startswith(f"{override.partition('=')[0]} is a section")


@pytest.mark.parametrize("override", ["lora.rank=abc", "lora.rank=1.5", "train.lr=fast", "fedpit.accumulate=perhaps", "lora.rank=null"])
def test_a_value_of_another_type_is_refused_by_name(override: str) -> None:
    assert override.partition("=")[0] in refusal(override)


@pytest.mark.parametrize("override", ["lora.rank", "=3", " =3", ""])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    assert "key=value" in refusal(override)


@pytest.mark.parametrize(("text", "said"), [("a: [1", "not valid YAML"), ("- 1\n- 2\n", "key: value"), ("7", "c.yaml")])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path / "c.yaml", text)
    message = refusal(source=path)
    assert said in message
    assert str(path) in message


def test_a_config_that_is_nowhere_is_refused_with_the_shipped_names() -> None:
    text = refusal(source="quickstrat")
    assert "'quickstrat'" in text
    assert all(name in text for name in SHIPPED)


# --- sets by name


def test_a_set_can_be_named_by_one_word() -> None:
    assert load("", ["data=finance"]) == load("", ["data.source=finance"])
    named = load("quickstart", ["data=medquad", "data.path=x.jsonl", "data.num_train=9"])
    assert named == load("quickstart", ["data.source=jsonl", "data.preset=medquad", "data.path=x.jsonl", "data.num_train=9"])
    with pytest.raises(ValueError, match=r"data\.path is empty but data\.source='jsonl' needs a file"):
        load("", ["data=fpb"])
    with pytest.raises(ValueError, match=r"data='fbp' is none of clinic, .*tfns.*; data is a section"):
        load("", ["data=fbp"])


def test_labels_are_asked_for_where_a_set_is_known_to_have_them() -> None:
    labelled = ["data=finance", "data=tfns data.path=x", "evaluate.labels=always", "data=fiqa data.path=x evaluate.labels=auto"]
    plain = ["data=clinic", "data=finance evaluate.labels=never", "data=dolly data.path=x", "data=finance data.source=jsonl data.path=x"]
    assert [asks_for_labels(load("", text.split())) for text in labelled + plain] == [True] * 4 + [False] * 4


# --- shipped configs


def test_the_quickstart_is_shipped() -> None:
    assert "quickstart" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_found_by_name_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = shipped_configs() / f"{name}.yaml"
    assert find_config(name) == find_config(f"{name}.yaml") == path
    assert load(name) == load(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_holds_differences_from_the_defaults_only(name: str) -> None:
    plain = OmegaConf.to_container(OmegaConf.load(shipped_configs() / f"{name}.yaml"))
    assert isinstance(plain, dict)
    given_values = flatten_keys({str(key): value for key, value in plain.items() if key != "compare"})
    assert {key: value for key, value in given_values.items() if FLAT[key] == value} == {}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_run_of_a_shipped_comparison_is_allowed(name: str) -> None:
    for overrides in load(name).compare.values():
        wanted = flatten_keys(overrides)
        flat = flatten_keys(to_dict(load(name, [f"{key}={value}" for key, value in wanted.items()])))
        assert {key: flat[key] for key in wanted} == wanted


def test_a_file_wins_over_a_shipped_config_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "quickstart.yaml", "seed: 77\n")
    assert load("quickstart.yaml").seed == 77


# --- the object


def sections(config: Any) -> list[Any]:
    nested = [getattr(config, f.name) for f in dataclasses.fields(config)]
    return [config, *(part for child in nested if dataclasses.is_dataclass(child) for part in sections(child))]


def test_every_part_is_frozen() -> None:
    parts = sections(load())
    assert len(parts) > 10
    for part in parts:
        first = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, first, None)


def test_with_overrides_changes_a_copy_and_checks_it() -> None:
    config = load()
    changed = with_overrides(config, {"lora.rank": 2})
    assert (config.lora.rank, changed.lora.rank) == (16, 2)
    with pytest.raises(ValueError, match=r"^lora\.rank=0"):
        with_overrides(config, {"lora.rank": 0})


def plainly_merged(overrides: list[str]) -> Config:
    """The definition of a load: all defaults, then one override after the other, through OmegaConf; nothing decided or checked."""
    schema = OmegaConf.structured(Config)

    def thaw(node: Any) -> None:
        OmegaConf.set_readonly(node, False)
        for key in node if isinstance(node, DictConfig) else ():
            if OmegaConf.is_config(node[key]):
                thaw(node[key])

    thaw(schema)
    found = OmegaConf.to_object(OmegaConf.merge(schema, *(OmegaConf.from_dotlist([item]) for item in overrides)))
    assert isinstance(found, Config)
    return found


@settings(max_examples=40)
@given(
    st.lists(
        st.sampled_from(
            [
                "lora.rank=3",
                "train.lr=1",
                "seed=7",
                "name=null-and-void",
                "lora.target_modules=[a,b]",
                "partition.alpha=0.25",
                "compare={a: {lora.rank: 2}}",
                "compare_seeds=[0,3]",
                "resources.client.num_cpus=2",
                "sweep.max_concurrent=2",
                "data.details_field=x",
                "train.max_steps=${lora.rank}",
                "name=run-${seed}-${method.name}",
                "audit.multiplicities=[1]",
                "server.num_rounds=${train.batch_size}",
                "method.name=dplora",
                'sweep.seeds=["${seed}",1]',
                "evaluate.labels=never",
            ]
        ),
        max_size=5,
        unique_by=lambda item: item.partition("=")[0],
    )
)
def test_what_is_not_named_is_as_if_all_had_been_merged(overrides: list[str]) -> None:
    expected = plainly_merged(overrides)
    assert _merged([_override(item) for item in overrides]) == expected
    assert load("", overrides) == load("", overrides)
    plain = {key: value for key, value in flatten_keys(to_dict(expected)).items() if FLAT.get(key) != value}
    if "method.name" not in plain and not expected.compare:  # the first decides again what is decided, the second is a whole
        assert with_overrides(load(), plain) == load("", overrides)


def test_a_file_that_has_changed_and_an_override_that_was_used_elsewhere_are_read_as_they_stand(tmp_path: Path) -> None:
    path = written(tmp_path / "config.yaml", "lora: {rank: 4}\n")
    assert load(path, ["compare={a: {lora.rank: 2}}", "train.lr=0.5"]).lora.rank == 4
    written(path, "lora: {rank: 8}\n")
    assert load(path).lora.rank == 8
    assert (load(path).compare, load("", ["train.lr=0.5"]).compare) == ({}, {})
    several = [load(path, ["compare={a: {lora.rank: 2}}", f"compare.b.lora.rank={rank}"]).compare for rank in (2, 3)]
    assert several == [{"a": {"lora.rank": 2}, "b": {"lora": {"rank": rank}}} for rank in (2, 3)]


def round_trip(config: Config, path: Path) -> Config:
    return load(written(path, to_yaml(config)))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method.name=dplora", "privacy.noise_multiplier=0.5"],
        ["privacy.unit=client"],
        ["data.system_prompt=''"],
        ["data.system_prompt=null"],
        ["data.system_prompt='line: one # two'"],
        ["compare={a: {method.name: fedit}, b: {lora: {rank: 4}}}"],
    ],
)
def test_a_written_configuration_loads_as_itself(overrides: list[str], tmp_path: Path) -> None:
    config = load("", overrides)
    assert round_trip(config, tmp_path / "config.yaml") == config


@given(lr=st.floats(1e-300, 1e9), alpha=st.floats(1e-6, 1e6), seed=st.integers(0, 2**62))
def test_numbers_survive_the_file_to_the_last_bit(lr: float, alpha: float, seed: int) -> None:
    config = with_overrides(load(), {"train.lr": lr, "partition.alpha": alpha, "seed": seed})
    layer = OmegaConf.create(to_yaml(config))
    assert isinstance(layer, DictConfig)
    assert from_layers([layer]) == config


def test_result_key_leaves_out_what_changes_no_result() -> None:
    elsewhere = [
        "name=other",
        "out=elsewhere",
        "model.cache_dir=somewhere",
        "resources.backend=local",
        "resources.num_actors=2",
        "resources.client.num_cpus=1",
        "resources.client.num_gpus=0.5",
        "resources.client.memory_gb=2",
        "compare={a: {seed: 1}}",
        "sweep.seeds=[1,2]",
    ]
    assert load("", elsewhere) != load()
    assert result_key(load("", elsewhere)) == result_key(load())


def test_result_key_holds_everything_else() -> None:
    neutral = {"name", "out", "compare", "compare_seeds", "claims", "model.cache_dir", "resources.backend", "resources.num_actors"}
    neutral |= {"train.gradient_checkpointing", "train.engine"}
    neutral |= {key for key in FLAT if key.startswith(("resources.client.", "deepspeed.", "sweep.", "judge."))} - {"deepspeed.config"}
    assert set(FLAT) - set(result_key(load())) == neutral
    assert all(any(key == n or key.startswith(f"{n}.") for key in FLAT) for n in RESULT_NEUTRAL)


@pytest.mark.parametrize("override", ["seed=1", "train.dtype=float32", "resources.num_threads=2", "evaluate.batch_size=2", "lora.rank=2"])
def test_result_key_sees_what_changes_results(override: str) -> None:
    assert result_key(load("", [override])) != result_key(load())


def test_a_fixture_configuration_is_small(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("lora.rank=2", "method.name=dplora")
    assert (config.model.name, config.lora.rank, config.privacy.unit) == ("tiny", 2, "example")


def test_every_value_has_a_docstring_under_it() -> None:
    tree = ast.parse(Path(config_module.__file__).read_text())
    assert undocumented(tree) == []
    assert undocumented(ast.parse("@dataclass\nclass A:\n    x: int = 0\n    y: int = 1\n    'y.'\n    z: BConfig = 0")) == ["A.x"]


def undocumented(tree: ast.Module) -> list[str]:
    """The fields of the module's dataclasses that no docstring follows; sections are described by their own fields."""
    missing = []
    for node in (n for n in tree.body if isinstance(n, ast.ClassDef) and n.decorator_list):
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation) in SECTION_TYPES | {"BConfig"}:
                continue
            if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)):
                missing.append(f"{node.name}.{ast.unparse(field.target)}")
    return missing


SECTION_TYPES = {type(part).__name__ for part in sections(Config())}


# --- what a user can bring


BROUGHT = [
    (["seed=" + "9" * 400], r"^seed=9+\.\.\. \(400 characters\) must be at least 0"),
    (["server.num_rounds=" + "9" * 60], r"^server\.num_rounds=9+ must be at least 1 and at most 1000000$"),
    (["train.lr=1e308"], r"^train\.lr=1e\+308 must be greater than 0 and at most 1e\+38$"),
    (["audit.num_shadows=1"], r"^audit\.num_shadows=1 leaves half of the records in every shadow's training set"),
    (["partition.alpha=1e308"], r"^partition\.alpha=1e\+308 must be at least 1e-06 and at most 1000000$"),
    (["lora=[1]"], r"^lora is a section"),
    (["data.template_args=[1]"], r"^data\.template_args=\[1\] must be a mapping"),
    (["compare_seeds=3"], r"^compare_seeds=3 must be a list, such as compare_seeds=\[3\]$"),
    (["compare=[1]"], r"^compare=\[1\] must be a mapping"),
    (["compare={a: 5}"], r"^compare\.a=5 must hold the overrides that make the run"),
    (["compare={A: {}, a: {}}"], r"^compare: 'A' and 'a' differ by case only"),
    (["compare={report.html: {}}"], r"^compare: the name 'report\.html' is the name of a file"),
    (["compare={..: {}}"], r"^compare: the name '\.\.' must not begin with a dot"),
    (["name=../../x"], r"^name: the name '\.\./\.\./x' must not begin with a dot"),
    (["name=a/b"], r"^name: the name 'a/b' must not hold '/'"),
    (["compare_seeds=[-1]"], r"^compare_seeds=\[-1\] must all be at least 0"),
    (["compare_seeds=[{},[]]"], r"^compare_seeds=\[{}, \[\]\] must hold numbers, and {} is none$"),
    (["sweep.seeds=[" + "9" * 30 + "]"], r"^sweep\.seeds=.* must all be at least 0 and at most"),
    (["audit.multiplicities=[100000]"], r"^audit\.multiplicities=\[100000\] must all be at least 1 and at most 10000"),
    (["data.system_prompt=${x}"], r"^data\.system_prompt: Interpolation key 'x' not found; a plain dollar sign"),
    (["resources.num_actors=²"], r"^resources\.num_actors='²' must be"),
    (["clients.batched=²"], r"^clients\.batched='²' must be"),
    (["lora.target_modules=q_proj,v_proj"], r"^lora\.target_modules='q_proj,v_proj' is one text; list"),
    (["lora.target_modules=['']"], r"^lora\.target_modules=\[''\] holds an empty name"),
    (["data.template_date=2024-2-1"], r"^data\.template_date='2024-2-1' must be a day as YYYY-MM-DD, or today$"),
    (["data.template_date=20240201"], r"^data\.template_date='20240201' must be a day"),
    (["data.template_date=2024-02-30"], r"^data\.template_date='2024-02-30' must be a day"),
    (["data.template_args={messages: 1}"], r"^data\.template_args: messages is given by raysim itself"),
    (["data.template_args={a b: 1}"], r"^data\.template_args: 'a b' is no argument's name"),
    (["data.template_args={a: .nan}"], r"^data\.template_args\.a=nan must be a text, a number"),
    (
        ["data.chat_field=messages", "data.source=jsonl", "data.path=x", "data.preset=alpaca"],
        r"^data\.chat_field='messages' means nothing with",
    ),
    (["model.name=' '"], r"^model\.name is empty"),
]


@pytest.mark.parametrize(("overrides", "named"), BROUGHT)
def test_what_users_bring_is_refused_in_one_line_that_names_it(overrides: list[str], named: str) -> None:
    text = refusal(*overrides)
    assert re.search(named, text), text
    assert "\n" not in text
    assert len(text) < 500


def test_one_layer_may_be_named_without_a_list() -> None:
    assert load("", ["lora.target_modules=all-linear"]).lora.target_modules == ["all-linear"]
    assert with_overrides(load(), {"lora.target_modules": "v_proj"}).lora.target_modules == ["v_proj"]


def test_arguments_and_the_day_of_a_template_are_kept_by_the_file(tmp_path: Path) -> None:
    config = load("", ["data.template_args={enable_thinking: false, tools_note: [a, {b: 1}]}", "data.template_date=today"])
    assert config.data.template_args == {"enable_thinking": False, "tools_note": ["a", {"b": 1}]}
    assert round_trip(config, tmp_path / "config.yaml") == config


def test_a_file_that_only_its_points_or_entries_name_is_asked_of_them() -> None:
    swept = load("", ["data.source=jsonl", "sweep.space={data.path: [a.jsonl, b.jsonl]}"])
    assert [trial_config(swept, point, out="").data.path for point in grid_points(swept)] == ["a.jsonl", "b.jsonl"]
    compared = load("", ["data.source=jsonl", "compare={a: {data.path: a.jsonl}, b: {data.path: b.jsonl}}"])
    assert [entry.data.path for entry in comparison(compared)] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ValueError, match=r"compare\.a: data\.path is empty"):
        comparison(load("", ["data.source=jsonl", "compare={a: {}}"]))
    assert refusal("data.source=jsonl", "sweep.space={lora.rank: [1, 2]}").startswith("data.path is empty")


# --- what stands with the fields, and the table of combinations


def parts_of(needs: str) -> list[tuple[str, list[str]]]:
    """The key and the values of each setting in what is needed."""
    return [(re.split("!?=", part)[0], re.split("!?=", part)[1].split("|") if "=" in part else []) for part in needs.split(" or ")]


@pytest.mark.parametrize("key", [key for key in KEYS.values() if key.needs], ids=lambda key: key.name)
def test_what_a_key_needs_is_a_setting_that_there_is(key: Key) -> None:
    for name, values in (part for needs in key.needs for part in parts_of(needs)):
        assert name in KEYS
        assert name != key.name
        assert set(values) <= set(KEYS[name].choices) or (not KEYS[name].choices and all(re.fullmatch(r"-?\d+", value) for value in values))
    assert key.only in ("", *key.needs)


@pytest.mark.parametrize(
    ("needs", "overrides", "because"),
    [
        ("server.optimizer=adam|yogi", ["server.optimizer=yogi", "server.lr=0.1"], ""),
        ("server.optimizer=adam|yogi", ["server.optimizer=adagrad", "server.lr=0.1"], "server.optimizer=adagrad"),
        ("server.optimizer!=none", ["server.optimizer=momentum"], ""),
        ("server.optimizer!=none", [], "server.optimizer=none"),
        ("audit.num_canaries", ["audit.num_canaries=4"], ""),
        ("audit.num_canaries", [], "audit.num_canaries=0"),
        ("audit.multiplicities", [], "audit.multiplicities=[]"),
        ("audit.multiplicities", ["audit.multiplicities=[2]"], ""),
        ("privacy.target_epsilon=0", ["privacy.unit=client", "privacy.target_epsilon=3.5"], "privacy.target_epsilon=3.5"),
        ("evaluate.choices_path", [], "evaluate.choices_path=''"),
        ("attack.every!=-1", ["attack.every=-1"], "attack.every=-1"),
        ("seed=1 or audit.inversion", ["seed=1"], ""),
        ("seed=1 or audit.inversion", ["audit.inversion=true"], ""),
        ("seed=1 or audit.inversion", [], "seed=0 and audit.inversion=false"),
    ],
)
def test_what_is_needed_holds_or_names_what_is_not_so(needs: str, overrides: list[str], because: str) -> None:
    assert lacking(needs, load("", overrides)) == because


def test_every_rule_refuses_something_in_its_own_words() -> None:
    """No row of the table is dead: for each, one of the refusals above is its line."""
    set_in_vain = [[*method, f"{key}={value}"] for key, value in NOT_BY_DEFAULT.items() for method in ([], DPLORA)] + [
        ["privacy.target_epsilon=3"],
        ["privacy.max_epsilon=3"],
        ["privacy.noise_at=server"],
        [*DPLORA, "privacy.noise_at=server"],
    ]
    given_overrides = [*(case[0] for case in (*COMBINATIONS, *WITHOUT_A_MECHANISM, *BROUGHT)), *set_in_vain, ["compare_seeds=[1,1]"]]
    texts = [refusal(*overrides) for overrides in given_overrides]
    dead = [rule for rule in RULES if not any(re.fullmatch(pattern_of(rule), text) for text in texts)]
    assert dead == []


def pattern_of(rule: Rule) -> str:
    """What a refusal by `rule` matches: its line, whatever the values."""
    line = f"{rule.about} {rule.reason}{'; ' if rule.remedy else ''}{rule.remedy}"
    return ".*".join(re.escape(part) for part in re.split(r"\{[^{}]*\}", line))


def test_a_rule_is_stated_without_values_and_names_keys() -> None:
    for rule in RULES:
        assert rule.key in KEYS
        assert not re.search(r"[{}]|\(\)|=[ ,;.]|  ", statement(rule)), statement(rule)
        assert concerns(rule, rule.key)


def test_a_rule_concerns_the_keys_that_it_names_and_no_others() -> None:
    rule = Rule("server.lr={value}", lambda config: True, "is too much for server.optimizer={server.optimizer!r}", "seeded out of name")
    assert {key for key in KEYS if concerns(rule, key)} == {"server.lr", "server.optimizer"}
    assert not concerns(Rule("train.lr_schedule='cosine'", lambda config: True, "x"), "train.lr")


def bomb(levels: int) -> str:
    """YAML in which each of so many lists names the one before ten times."""
    lines = ["a0: &a0 [1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (bomb(12), "use fewer aliases"),
        ("a: &a [*a]\n", "use fewer aliases"),
        ("a: " + "[" * 20_000, "is not valid YAML"),
        ("#" + "x" * 2**20 + "\n", "more than the 1,048,576 bytes that a configuration may have"),
    ],
    ids=["aliases of aliases", "an alias of itself", "deep nesting", "a megabyte"],
)
def test_a_file_that_grows_without_bound_is_refused_at_once(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    text = refusal_of(tmp_path / "a.yaml")
    assert named in text
    assert "\n" not in text


def refusal_of(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    return str(caught.value)


def test_an_alias_that_saves_a_few_words_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("compare:\n  a: &a {method.name: fedit}\n  b: *a\n")
    assert load(tmp_path / "a.yaml").compare == {"a": {"method.name": "fedit"}, "b": {"method.name": "fedit"}}
