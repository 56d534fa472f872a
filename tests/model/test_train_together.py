"""Clients that are trained in one pass, against each of them by itself."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raysim.config import Config, load
from raysim.data.records import Record
from raysim.data.tokens import Example
from raysim.federation.assignment import Assignment
from raysim.federation.worker import Worker
from raysim.lora.layout import Vector
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.model.train import TrainSettings, train_adapter
from raysim.model.train_together import check_together, draws, measured_size, train_together
from raysim.privacy.clipping import ChunkSum
from raysim.runs.run import resolved, run
from tests.conftest import SMALL
from tests.method_calls import make_call
from tests.tiny_models import ALL_LINEAR

GRADIENT = TrainSettings(1, 1, 4, 1.0, "sgd", 0.0, 0.0, 0.0)
"""One step of SGD at a learning rate of 1: what it changes is the gradient."""
WHOLE = TrainSettings(2, 0, 2, 0.01, "adamw", 0.1, 1.0, 0.3)
RECORD = Record(record_id=0, instruction="", response="")


def make_config(method: str, batched: str) -> Config:
    return load("", [*SMALL, f"method.name={method}", f"clients.batched={batched}"])


def build(*, dropout: float = 0.0) -> LanguageModel:
    return build_language_model(load_base_model("tiny"), rank=2, alpha=4.0, dropout=dropout, target_modules=ALL_LINEAR)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build()


def clients(lm: LanguageModel, *sizes: int) -> tuple[list[Vector], list[list[Example]]]:
    """An adapter of its own for each client, and so many examples of unequal lengths."""
    rng = np.random.default_rng(0)

    def example() -> Example:
        prompt, response = (tuple(rng.integers(5, 261, int(rng.integers(2, 12))).tolist()) for _ in range(2))
        return Example(record=RECORD, prompt_ids=prompt, response_ids=response)

    adapters = [(0.2 * rng.standard_normal(lm.layout.num_parameters)).astype(np.float32) for _ in sizes]
    return adapters, [[example() for _ in range(size)] for size in sizes]


def one_by_one(
    lm: LanguageModel, adapters: list[Vector], shards: list[list[Example]], settings: TrainSettings, shifts: list[Vector] | None = None
) -> list[tuple[Vector, object]]:
    own = shifts or [None] * len(shards)
    return [
        train_adapter(lm, adapter, shard, settings=settings, seed=k, correction=shift)
        for k, (adapter, shard, shift) in enumerate(zip(adapters, shards, own, strict=True))
    ]


def distance(ours: Vector, theirs: Vector, start: Vector) -> float:
    """How far two trained adapters are from one another, as a share of what training changed."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - start))


def test_gradients_are_those_of_each_client_by_itself(lm: LanguageModel) -> None:
    adapters, shards = clients(lm, 1, 4, 2, 3)
    together = train_together(lm, adapters, shards, settings=GRADIENT, seeds=range(4))
    alone = one_by_one(lm, adapters, shards, GRADIENT)
    for (ours, stats), (theirs, expected), start in zip(together, alone, adapters, strict=True):
        assert distance(ours, theirs, start) < 1e-5
        assert distance(together[0][0] - adapters[0] + start, theirs, start) > 0.1 or start is adapters[0], "each has its own"
        assert (stats.num_tokens, stats.num_steps) == (expected.num_tokens, expected.num_steps)  # type: ignore[attr-defined]
        assert stats.loss == pytest.approx(expected.loss, rel=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("settings", [WHOLE, replace(WHOLE, optimizer="sgd"), replace(WHOLE, max_steps=3, prox_mu=0.0)])
def test_whole_trainings_are_those_of_each_client_by_itself(lm: LanguageModel, settings: TrainSettings) -> None:
    """Of unequal shards, so that clients take unequal numbers of steps, each with its own moments, clipping and batches."""
    adapters, shards = clients(lm, 2, 7, 1, 4)
    shifts = [0.01 * adapter for adapter in adapters]
    for corrections in (None, shifts):
        together = train_together(lm, adapters, shards, settings=settings, seeds=range(4), corrections=corrections)
        alone = one_by_one(lm, adapters, shards, settings, corrections)
        assert len({stats.num_steps for _, stats in together}) > 1
        for (ours, stats), (theirs, expected), start in zip(together, alone, adapters, strict=True):
            assert distance(ours, theirs, start) < 1e-3
            assert stats.num_steps == expected.num_steps  # type: ignore[attr-defined]


def test_what_is_frozen_stays(lm: LanguageModel) -> None:
    names = frozenset(name for name in lm.layout.names if ".lora_B." in name)
    adapters, shards = clients(lm, 2, 2)
    lm.train_only(names)
    try:
        for trained, start in zip(train_together(lm, adapters, shards, settings=WHOLE, seeds=[0, 1]), adapters, strict=True):
            frozen = lm.layout.group_mask("A")
            assert trained[0][frozen].tobytes() == start[frozen].tobytes()
            assert (trained[0] != start)[~frozen].any()
    finally:
        lm.train_only(frozenset(lm.layout.names))


def test_a_group_of_one_and_what_cannot_go_together_keep_every_bit(lm: LanguageModel) -> None:
    adapters, shards = clients(lm, 3, 0, 2)
    for chosen in ([0], [0, 1, 2]):
        ours = train_together(lm, [adapters[k] for k in chosen], [shards[k] for k in chosen], settings=WHOLE, seeds=chosen)
        for k, (trained, _) in zip(chosen, ours, strict=True):
            assert trained.tobytes() == train_adapter(lm, adapters[k], shards[k], settings=WHOLE, seed=k)[0].tobytes()


def test_a_model_that_draws_in_training_is_refused() -> None:
    drawing = build(dropout=0.1)
    assert draws(drawing)
    adapters, shards = clients(drawing, 2, 2)
    with pytest.raises(ValueError, match=r"clients\.batched=8: the model draws dropout"):
        check_together(drawing, shards[0], size=8)
    assert measured_size(drawing, shards, settings=WHOLE) == 1
    ours = train_together(drawing, adapters, shards, settings=WHOLE, seeds=[0, 1])
    assert ours[1][0].tobytes() == train_adapter(drawing, adapters[1], shards[1], settings=WHOLE, seed=1)[0].tobytes()


def test_a_model_that_mixes_clients_up_is_refused_and_the_adapter_comes_back(lm: LanguageModel) -> None:
    _, [shard] = clients(lm, 3)
    own = lm.get_adapter()
    check_together(lm, shard, size=2)
    spoilt = build()
    layer = spoilt.model.get_submodule(spoilt.layout.names[0].partition(".lora_A")[0])
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].flip(0),))  # type: ignore[arg-type]  # rows of others, as experts see
    with pytest.raises(ValueError, match=r"clients\.batched=2: this model's clients cannot be trained together"):
        check_together(spoilt, shard, size=2)
    assert lm.get_adapter().tobytes() == own.tobytes()


def test_a_measured_size_is_one_of_those_that_were_tried(lm: LanguageModel) -> None:
    _, shards = clients(lm, *[2] * 5)
    own = lm.get_adapter()
    assert measured_size(lm, shards, settings=WHOLE) in (1, 4)
    assert measured_size(lm, shards[:1], settings=WHOLE) == 1
    assert lm.get_adapter().tobytes() == own.tobytes()


def test_what_is_measured_stops_where_memory_does_and_where_clients_are_mixed_up(lm: LanguageModel) -> None:
    _, shards = clients(lm, *[2] * 20)
    layer = lm.model.get_submodule(lm.layout.names[0].partition(".lora_A")[0])

    def full(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[0] >= 2 * 16:  # the rows of sixteen clients
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = layer.register_forward_pre_hook(full)  # type: ignore[arg-type]  # as above
    try:
        assert measured_size(lm, shards, settings=WHOLE) in (1, 4)
    finally:
        hook.remove()
    spoilt = build()
    layer = spoilt.model.get_submodule(spoilt.layout.names[0].partition(".lora_A")[0])
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].flip(0),))  # type: ignore[arg-type]  # rows of others, as experts see
    assert measured_size(spoilt, shards, settings=WHOLE) == 1


@pytest.mark.parametrize("method", ["fedit", "scaffold"])
def test_a_worker_that_trains_clients_together_sends_what_one_by_one_comes_to(method: str) -> None:
    worker = Worker(load_base_model("tiny"), device="cpu", num_threads=1)
    sums = []
    for batched in ("1", "2", "8"):
        call = make_call(worker.language_model(make_config(method, batched).lora), f"method.name={method}", f"clients.batched={batched}")
        assignment = Assignment(call.config, call.mechanism, (1.0,) * 3)
        part, outcomes, _ = worker.run_chunk(assignment, (0, 1, 2), call.round, [call.shard] * 3, [None] * 3)
        assert isinstance(part, ChunkSum)
        assert [(one.client_id, one.failure) for one in outcomes] == [(0, ""), (1, ""), (2, "")]
        sums.append(part.total)
    assert np.linalg.norm(sums[1] - sums[0]) < 1e-3 * np.linalg.norm(sums[0])
    assert np.linalg.norm(sums[2] - sums[0]) < 1e-3 * np.linalg.norm(sums[0])
    assert sums[1].tobytes() != sums[0].tobytes()


def test_a_client_that_fails_in_a_group_fails_alone() -> None:
    worker = Worker(load_base_model("tiny"), device="cpu", num_threads=1)
    call = make_call(worker.language_model(make_config("fedit", "3").lora), "clients.batched=3")
    assignment = Assignment(call.config, call.mechanism, (1.0,) * 3)
    broken = tuple(replace(example, prompt_ids=(10**6,)) for example in call.shard)  # a token that no embedding has
    part, outcomes, _ = worker.run_chunk(assignment, (0, 1, 2), call.round, [call.shard, broken, call.shard], [None] * 3)
    assert [bool(one.failure) for one in outcomes] == [False, True, False]
    assert isinstance(part, ChunkSum)
    assert part.weight == 2.0


def test_a_run_decides_once_how_many_are_trained_together(tmp_path: Path) -> None:
    """What was measured stands in the run's configuration, and a run that goes on takes it from there."""
    settings = ["attack.every=-1", "clients.batched=auto", f"out={tmp_path / 'run'}"]
    config = load("", [*SMALL, *settings])
    done = run(config, display=False)
    assert done.config.clients.batched in ("1", "4")
    assert load(tmp_path / "run" / "config.yaml").clients.batched == done.config.clients.batched
    assert resolved(config).clients.batched == done.config.clients.batched
    writing = load("", [*SMALL, *settings[:2], f"out={tmp_path / 'other'}", "method.name=locit"])
    assert run(writing, display=False).config.clients.batched == "1"
