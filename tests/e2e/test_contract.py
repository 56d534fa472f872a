"""The folder of a run as other programs read it: every file and key, and figures that an independent reading confirms."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from peft import PeftModel
from safetensors import safe_open

from raysim.config import load
from raysim.model.base_model import load_base_model
from raysim.runs.compare import compare
from raysim.runs.run import Run, open_backend, run
from tests.pictures import drawn
from tests.small_runs import METHODS, overrides, small

ROUND_KEYS = {
    "round_index",
    "cohort",
    "num_tokens",
    "train_loss",
    "update_norm_median",
    "clip_fraction",
    "noise_std",
    "signal_to_noise",
    "epsilon",
    "uplink_bytes",
    "downlink_bytes",
    "wall_s",
    "tokens_per_s",
    "eval",
    "attack",
    "num_dropped",
}
LEDGER_KEYS = {
    "unit",
    "neighbouring_relation",
    "sampler",
    "sampling_prob",
    "noise_multiplier",
    "accounted_multiplier",
    "clip_norm",
    "num_releases",
    "delta",
    "epsilon",
    "epsilon_rdp",
    "guarantee",
}
SUMMARY_KEYS = {"method", "seed", "eval", "attack", "epsilon", "adapter_sha256", "num_parameters", "uplink_bytes", "wall_s"}
DRAWN = ("fedit", "fedpit", "dplora-example")
"""Methods whose pages have their figures here; between them they have every figure of a run's page."""
PRIVATE = ["dplora-example", "dplora-literal", "fedit-client"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Run]]:
    """A function from a method to its small run, each made once, in this process."""
    runs: dict[str, Run] = {}
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as backend:

        def make(method: str) -> Run:
            if method not in runs:
                with drawn() if method in DRAWN else contextlib.nullcontext():
                    runs[method] = run(small(method, out=tmp_path_factory.mktemp(method) / "run"), display=False, backend=backend)
            return runs[method]

        yield make


@pytest.mark.parametrize("method", METHODS)
def test_every_file_of_the_contract_is_there_with_every_key(finished: Callable[[str], Run], method: str) -> None:
    out = finished(method).out
    assert load(out / "config.yaml") == finished(method).config, "config.yaml alone makes the run again"
    assert set(read(out / "environment.json")) >= {"raysim", "commit", "python", "num_cpus", "gpus", "packages"}
    partition = read(out / "partition.json")
    assert len(partition["sha256"]) == 64
    assert sum(client["num_examples"] for client in partition["clients"]) == 12
    assert all({"num_examples", "num_tokens", "label_counts"} <= set(client) for client in partition["clients"])
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert rounds == finished(method).records
    assert [record["round_index"] for record in rounds] == ([-1] if method == "base" else [0, 1])
    for record in rounds:
        assert set(record) >= ROUND_KEYS
        of_one_model = set() if method.startswith("locit") else {"heldout_nll_interval"}
        assert set(record["eval"]) == {"heldout_nll", "heldout_perplexity", "heldout_rouge_l"} | of_one_model
        assert set(record["attack"]) >= {
            f"{side}_{key}" for side in ("train", "heldout") for key in ("rouge_l", "exact_match", "details_rate")
        }
    assert set(read(out / "ledger.json")) >= LEDGER_KEYS
    assert set(read(out / "summary.json")) >= SUMMARY_KEYS
    assert (out / "synthetic.jsonl").is_file() == (method in ("fedpit", "fedmit", "fewfedweight", "locit_synthetic"))
    page = (out / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page, "the page opens without a server or a network"
    assert bool(list((out / "figures").glob("*.png"))) == (method in DRAWN)
    assert not list(out.rglob(".*")), "no scratch file is left behind"


@pytest.mark.parametrize("method", PRIVATE)
def test_epsilon_is_what_the_accountant_gives_for_the_ledgers_own_numbers(finished: Callable[[str], Run], method: str) -> None:
    ledger = read(finished(method).out / "ledger.json")
    event: Any = dp_accounting.GaussianDpEvent(ledger["accounted_multiplier"])
    if ledger["sampling_prob"] < 1:
        event = dp_accounting.PoissonSampledDpEvent(ledger["sampling_prob"], event)
    expected = PLDAccountant().compose(event, ledger["num_releases"]).get_epsilon(ledger["delta"])
    assert ledger["epsilon"] == pytest.approx(expected, rel=0.01)
    assert ledger["epsilon"] <= ledger["epsilon_rdp"]
    assert ledger["epsilon"] == finished(method).records[-1]["epsilon"] == read(finished(method).out / "summary.json")["epsilon"]
    assert f"{ledger['epsilon']:.4g}" in ledger["guarantee"]


def test_the_numbers_of_releases_are_those_that_were_made(finished: Callable[[str], Run]) -> None:
    made = {method: read(finished(method).out / "ledger.json")["num_releases"] for method in PRIVATE}
    assert made == {"dplora-example": 2 * 2, "dplora-literal": 2, "fedit-client": 2}


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(PRIVATE)))
def test_no_epsilon_is_claimed_where_nothing_is_promised(finished: Callable[[str], Run], method: str) -> None:
    ledger = read(finished(method).out / "ledger.json")
    assert ledger["epsilon"] is ledger["epsilon_rdp"] is None
    assert "No differential-privacy guarantee" in ledger["guarantee"] or method == "base"


@pytest.mark.parametrize("method", ["fedit", "fedpit", "dplora-example", "fedit-client"])
def test_the_hash_is_of_the_saved_tensors_and_traffic_of_their_size(finished: Callable[[str], Run], method: str) -> None:
    out = finished(method).out
    summary = read(out / "summary.json")
    values = saved_values(out / "adapter" / "adapter_model.safetensors")
    checkpoint = saved_values(out / "state" / "round-00002" / "server.safetensors")
    assert sorted(values) == sorted(checkpoint), "what is released is what the server holds"
    assert summary["adapter_sha256"] == hashlib.sha256(np.asarray(checkpoint, dtype="<f4").tobytes()).hexdigest()
    assert summary["num_parameters"] == len(values)
    assert summary["uplink_bytes"] == 4 * len(values) * 3 * 2
    assert summary["adapter_sha256"] in (out / "adapter" / "README.md").read_text()


def saved_values(path: Path) -> list[float]:
    """All numbers in a safetensors file, tensor by tensor in the order of their names."""
    with safe_open(path, framework="np") as tensors:
        return [float(x) for name in sorted(tensors.keys()) for x in tensors.get_tensor(name).reshape(-1)]


def test_peft_alone_loads_the_released_adapter_and_it_does_what_was_measured(finished: Callable[[str], Run]) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig  # the base model as another program would have it

    base = load_base_model("tiny")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**base.config))
    model.load_state_dict({name: torch.tensor(array) for name, array in base.tensors.items()}, strict=False)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        before = model(ids).logits
        tuned = PeftModel.from_pretrained(model, str(finished("fedit").out / "adapter"))
        after = tuned(ids).logits
    assert not torch.equal(before, after)
    for name, tensor in tuned.named_parameters():
        if "lora_" in name:
            assert tensor.abs().max() > 0, name


def test_a_comparison_writes_a_folder_per_entry_and_is_not_computed_twice(tmp_path: Path) -> None:
    config = load("quickstart", overrides("fedit", "server.num_rounds=1", out=tmp_path / "all"))
    runs = compare(config, display=False)
    assert [done.out.name for done in runs] == ["base", "fedit", "fedpit", "dplora"]
    for name in ("results.csv", "summary.json", "report.html"):
        assert (tmp_path / "all" / name).is_file()
    table = (tmp_path / "all" / "results.csv").read_text().splitlines()
    assert len(table) == 1 + 4
    kept = {path: path.stat().st_mtime_ns for done in runs for path in done.out.rglob("*") if path.is_file()}
    again = compare(config, display=False)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [done.summary for done in again] == [done.summary for done in runs]


@pytest.mark.slow
def test_one_round_on_the_real_default_model_lowers_the_held_out_loss(tmp_path: Path) -> None:
    few = ["data.num_train=6", "data.num_heldout=4", "data.max_length=160", "server.num_rounds=1", "attack.every=-1", "lora.rank=8"]
    quick = ["evaluate.num_generated=1", "evaluate.max_new_tokens=4", "train.batch_size=2", "train.dtype=auto", "resources.backend=local"]
    losses = {}
    for method in ("base", "fedit"):
        config = load("", [*few, *quick, f"method.name={method}", f"out={tmp_path / method}"])
        losses[method] = run(config, display=False).summary["eval"]["heldout_nll"]
    assert math.isfinite(losses["base"])
    assert losses["fedit"] < losses["base"] - 0.02


def read(path: Path) -> dict[str, Any]:
    """A JSON file's object."""
    value: dict[str, Any] = json.loads(path.read_text())
    return value
