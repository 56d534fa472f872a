"""Ranks of one client come to what one process does: every stage of ZeRO, batches that do not divide, and a base of which each rank holds a part."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysim.config import load
from raysim.model.sharded import Group, Sharding, free_address
from raysim.model.train import train_adapter
from tests.conftest import SMALL
from tests.method_calls import RECORDS, some_adapter
from tests.model.test_memory import PLAIN
from tests.small_runs import environment
from tests.tiny_models import build, encode, sharp_base

pytest.importorskip("deepspeed")

RANK = """
import json, sys
from dataclasses import replace
import numpy as np
from raysim.model.generate import Sampling, write_texts
from raysim.model.sharded import Sharding, held, join
from raysim.model.train import mean_nll, train_adapter
from raysim.model.language_model import build_language_model
from tests.method_calls import RECORDS, some_adapter
from tests.model.test_memory import PLAIN
from tests.tiny_models import ALL_LINEAR, encode, sharp_base

rank, address, out, plan = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
group = join(address, rank, Sharding(plan["num_ranks"], plan["stage"], plan.get("offload", "none")))
base = sharp_base()
for array in base.tensors.values():
    array.flags.writeable = False  # as the copy that processes share
lm = build_language_model(base, rank=4, alpha=8.0, dropout=0.0, target_modules=ALL_LINEAR, group=group)
examples, found = encode(lm, RECORDS), {}
for name, more in plan["settings"].items():
    start = some_adapter(lm)
    correction = np.full_like(start, 0.01) if more.pop("corrected", False) else None
    lm.keep_activations(True)
    found[name], stats = train_adapter(lm, start, examples, settings=replace(PLAIN, **more), seed=1, correction=correction)
    found[f"{name} loss"] = np.array([stats.loss])
lm.set_adapter(found[name])
found["nll"] = np.array(mean_nll(lm, examples, batch_size=2))
texts = write_texts(lm, [example.prompt_ids for example in examples], sampling=Sampling(max_new_tokens=8), batch_size=2)
found["texts"] = np.array([[*ids, *[-1] * (8 - len(ids))] for ids in texts])
found["held"] = np.array([held(lm.model.get_base_model()), base.num_parameters])
np.savez(f"{out}/{rank}.npz", **found)
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "corrected": {"corrected": True},
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "of one": {"batch_size": 1, "max_steps": 3},
    "in parts": {"batch_size": 5, "micro_batch_size": 1},
    "again": {"keep_activations": False},
    "last": {"prox_mu": 0.0, "max_grad_norm": 0.0},
}


def ranks(folder: Path, **plan: object) -> list[dict[str, np.ndarray]]:
    """What each rank of a group comes to."""
    address, given = free_address(), json.dumps({"settings": SETTINGS, **plan})
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), address, str(folder), given],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(int(str(plan["num_ranks"])))
    ]
    for one in started:
        _, said = one.communicate(timeout=280)
        assert one.returncode == 0, said[-3000:]
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(len(started))]


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "stage", "offload"), [(2, 0, "none"), (2, 2, "cpu"), (2, 3, "none")])
def test_ranks_come_to_what_one_process_does(tmp_path: Path, num_ranks: int, stage: int, offload: str) -> None:
    found = ranks(tmp_path, num_ranks=num_ranks, stage=stage, offload=offload)
    lm = build(sharp_base())
    examples = encode(lm, RECORDS)
    for name, more in SETTINGS.items():
        start, settings = some_adapter(lm), {key: value for key, value in more.items() if key != "corrected"}
        correction = np.full_like(start, 0.01) if "corrected" in more else None
        own, stats = train_adapter(lm, start, examples, settings=replace(PLAIN, **settings), seed=1, correction=correction)
        assert np.abs(own - start).max() > 1e-3
        for one in found:
            np.testing.assert_allclose(one[name], own, atol=1e-5, err_msg=name)
            assert one[f"{name} loss"][0] == pytest.approx(stats.loss, rel=1e-5)
    for one in found[1:]:
        assert all(one[name].tobytes() == found[0][name].tobytes() for name in (*SETTINGS, "nll", "texts")), "ranks never part"
    share, whole = found[0]["held"].tolist()
    assert share == pytest.approx(whole / num_ranks if stage == 3 else whole, rel=0.01)


def test_a_batch_is_shared_so_that_every_example_counts_once() -> None:
    for num_ranks in (1, 2, 3):
        for size in range(1, 8):
            shares = [Group(rank, Sharding(num_ranks)).share(range(10, 10 + size)) for rank in range(num_ranks)]
            assert len({len(share) for share in shares}) == 1, "all ranks go through the layers as often"
            assert sorted(index for share in shares for index, counts in share if counts) == list(range(10, 10 + size))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["resources.client.num_ranks=2"], r"num_ranks=2 needs train\.engine='deepspeed'"),
        (["train.engine=deepspeed", "resources.client.num_ranks=2"], r"num_ranks=2 needs resources\.backend='ray'"),
        (["train.engine=deepspeed", "method.name=dplora"], r"train\.engine='deepspeed' has no guarantee with privacy\.unit='example'"),
        (["train.engine=deepspeed", "deepspeed.config={optimizer: {type: Adam}}"], r"deepspeed\.config=.*names what raysim sets itself"),
        (
            ["train.engine=deepspeed", "deepspeed.config={zero_optimization: {stage: 2}}"],
            r"zero_optimization\.stage: deepspeed\.zero_stage",
        ),
        (["train.engine=deepspeed", "deepspeed.zero_stage=3", "model.quantization=nf4"], r"cannot have a base in parts"),
        (["train.engine=deepspeed", "deepspeed.zero_stage=4"], r"deepspeed\.zero_stage=4 must be at least 0 and at most 3"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("", [*SMALL, *settings])


def test_what_deepspeed_has_of_its_own_may_be_set() -> None:
    config = load("", [*SMALL, "train.engine=deepspeed", "deepspeed.config={zero_optimization: {stage3_max_live_parameters: 1000}}"])
    assert config.deepspeed.config == {"zero_optimization": {"stage3_max_live_parameters": 1000}}
