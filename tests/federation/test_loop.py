"""The loop: when it measures, what it records, which clients keep what, and what a client's failure does."""

import dataclasses
import json
import math
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from raysim.attacks.cross_client import CrossClientSettings, attack_across
from raysim.attacks.views import ClientView
from raysim.data.configured import chat_format
from raysim.data.similarity import details_found, largest_rouge_l
from raysim.federation import loop
from raysim.federation.assignment import Assignment
from raysim.federation.in_process import LocalClients
from raysim.federation.loop import due
from raysim.federation.on_ray.metrics import METRICS
from raysim.federation.setup import Experiment, prepare
from raysim.federation.worker import Member, Worker
from raysim.lora.layout import Vector
from raysim.lora.rule import Setting, lora_rule
from raysim.measure.evaluate import Job
from raysim.methods.call import ClientResult
from raysim.model.base_model import BaseModel
from raysim.privacy.cohort import Round
from raysim.privacy.noise import gaussian
from raysim.rng import seed_for
from raysim.runs.run import Backend, Run, open_backend, run
from tests.failing_clients import broken
from tests.small_runs import small


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """The tiny model in this process."""
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as opened:
        yield opened


@dataclasses.dataclass
class Seam(Backend):
    """A backend in this process whose clients are made by a function."""

    make: Callable[[Assignment, Experiment], LocalClients]

    def clients(self, assignment: Assignment, experiment: Experiment) -> LocalClients:
        """The clients of a run."""
        return self.make(assignment, experiment)


@pytest.mark.parametrize(
    ("every", "rounds"),
    [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [1, 3, 5, 6]), (3, [2, 5, 6]), (7, [6]), (100, [6]), (0, [6]), (-1, [])],
)
def test_what_is_done_every_so_many_rounds_is_also_done_after_the_last(every: int, rounds: list[int]) -> None:
    assert [i for i in range(7) if due(every, round_index=i, num_rounds=7)] == rounds


def test_utility_and_attack_are_measured_when_due_and_only_then(backend: Backend, tmp_path: Path) -> None:
    settings = ["server.num_rounds=3", "evaluate.every=2", "attack.every=-1"]
    records = finished("fedit", *settings, backend=backend, out=tmp_path / "run").records
    assert [record["eval"] is not None for record in records] == [False, True, True]
    assert [record["attack"] for record in records] == [None] * 3


class Counting(LocalClients):
    """Local clients that note the records of each job by which likelihoods are read, and with which adapter."""

    def __init__(self, worker: Worker, assignment: Assignment, experiment: Experiment, *, noted: list[tuple[bytes, list[int]]]) -> None:
        super().__init__(worker, assignment, experiment)
        self._noted = noted

    def evaluate(self, work: Sequence[tuple[Vector, Job]], on_done: Callable[[], None]) -> list[list[Any]]:
        """See `Clients`."""
        self._noted += [(vector.tobytes(), [e.record.record_id for e in job.examples]) for vector, job in work if job.kind == "likelihood"]
        return super().evaluate(work, on_done)


KEYS = ((1, None, "member"), (1, None, "heldout"), (0, None, "member"), (0, None, "heldout"), (1, 0, "member"))
"""Round, owner and side of rows."""


def read_by(noted: list[tuple[bytes, list[int]]]) -> list[list[int]]:
    """The records that each adapter read, all in order."""
    found: dict[bytes, list[int]] = {}
    for vector, ids in noted:
        found.setdefault(vector, []).extend(ids)
    return [sorted(ids) for ids in found.values()]


def test_the_base_model_reads_each_record_once_for_all_rounds_and_for_the_next_entry(backend: Backend, tmp_path: Path) -> None:
    noted: list[tuple[bytes, list[int]]] = []
    other = Seam(backend.key, backend.worker, None, partial(Counting, backend.worker, noted=noted))
    done = finished("fedit", backend=other, out=tmp_path / "fedit")
    rows = [json.loads(line) for line in (tmp_path / "fedit" / "answers.jsonl").read_text().splitlines()]
    compared = sorted(row["record_id"] for row in rows if row["round_index"] == 0 and "base_nll" in row)
    assert len(compared) == 12 + 4
    assert read_by(noted) == [compared] * 3, "two releases, and the base model"
    noted.clear()
    finished("scaffold", backend=other, out=tmp_path / "scaffold")
    assert read_by(noted) == [compared] * 2
    noted.clear()
    base = finished("base", backend=other, out=tmp_path / "base")
    assert noted == [], "what was read before is what the untouched model makes of them"
    memory = base.records[0]["attack"]["memory"]
    assert (memory["bits_per_record"], memory["auc"], memory["num_members"], memory["num_heldout"]) == (0.0, 0.5, 12, 4)
    finished("fedit", "attack.target_tokens=3", backend=other, out=tmp_path / "target")
    assert read_by(noted) == [compared] * 3, "another target is another question"
    again = finished("fedit", backend=backend, out=tmp_path / "again")
    assert [record["attack"] for record in again.records] == [record["attack"] for record in done.records]


def test_memory_is_of_every_adapter_that_is_attacked_by_its_own_records(backend: Backend, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = finished("fedpit", "attack.num_examples=12", backend=backend, out=out)
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    members = {
        owner: [row for row in rows if (row["round_index"], row["owner"], row["side"]) == (1, owner, "member")] for owner in (None, 0, 1, 2)
    }
    assert sorted(row["record_id"] for row in members[None]) == sorted(row["record_id"] for k in range(3) for row in members[k])
    assert all(row["client_id"] == k for k in range(3) for row in members[k])
    holders = {row["record_id"]: row["client_id"] for row in members[None]}
    assert {row["record_id"]: row["client_id"] for k in range(3) for row in members[k]} == holders
    heldout = [row for row in rows if (row["round_index"], row["owner"], row["side"]) == (1, None, "heldout")]
    level = sum(row["base_nll"] - row["nll"] for row in heldout) / sum(row["num_tokens"] for row in heldout)
    excess = [row["base_nll"] - row["nll"] - row["num_tokens"] * level for row in members[None]]
    memory = done.records[-1]["attack"]["memory"]
    assert memory["strata"] == "all", "four held-out records are too few for two of each label"
    assert memory["bits_per_record"] == pytest.approx(np.mean(excess) / math.log(2))
    private = done.summary["private"]["attack"]["memory"]
    assert private["num_members"] == pytest.approx(4.0)
    assert not [key for key in private if key.endswith("_interval")]


def test_details_are_ranked_among_others_after_the_last_round_and_their_bits_are_known_after_each(backend: Backend, tmp_path: Path) -> None:
    out = tmp_path / "run"
    sizes = ["attack.detail_records=2", "attack.detail_references=9", "data.num_heldout=6"]
    done = finished("fedpit", *sizes, backend=backend, out=out)
    first, last = (record["attack"]["details"] for record in done.records)
    assert (first["num_details"], first["num_control"]) == (last["num_details"], last["num_control"])
    assert (first["num_exposed"], first["exposure"], first["max"]) == (0, None, None)
    assert last["max"] <= math.log2(10)
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    told = {key: [row for row in rows if (row["round_index"], row["owner"], row["side"]) == key and row.get("details")] for key in KEYS}
    assert all(told.values())
    ranked = {key: [row for row in found if any(one["num_references"] for one in row["details"])] for key, found in told.items()}
    assert [len(found) for found in ranked.values()] == [2, 2, 0, 0, 0]
    shown = [one for row in told[1, None, "member"] for one in row["details"]]
    assert last["gain_bits_members"] == pytest.approx(np.mean([one["base_bits"] - one["bits"] for one in shown]))
    assert last["num_details"] == len(shown)
    private = done.summary["private"]["attack"]["details"]
    assert private["exposure"] is None, "adapters that clients keep are not asked so much"
    none = finished("fedpit", "attack.detail_records=0", "data.num_heldout=6", backend=backend, out=tmp_path / "none")
    assert none.summary["attack"]["details"]["num_exposed"] == 0
    assert none.summary["adapter_sha256"] == done.summary["adapter_sha256"]


def test_memory_of_a_sample_is_of_that_many_on_either_side_and_none_where_none_is_asked_for(backend: Backend, tmp_path: Path) -> None:
    some = finished("fedit", "attack.memory_records=3", backend=backend, out=tmp_path / "some")
    none = finished("fedit", "attack.memory_records=0", backend=backend, out=tmp_path / "none")
    figures = [record["attack"]["memory"] for record in some.records]
    assert [(one["num_members"], one["num_heldout"]) for one in figures] == [(3, 3)] * 2
    assert not {"memory", "extraction"} & set(none.summary["attack"])
    assert "member" not in {json.loads(line)["side"] for line in (tmp_path / "none" / "answers.jsonl").read_text().splitlines()}
    assert some.summary["adapter_sha256"] == none.summary["adapter_sha256"]
    for key, value in none.summary["eval"].items():
        assert some.summary["eval"][key] == pytest.approx(value, rel=1e-6), key


def test_memory_is_the_same_after_a_resume(backend: Backend, tmp_path: Path) -> None:
    """In a process that has not read the base model's likelihoods."""
    whole = finished("fedit", backend=backend, out=tmp_path / "run")
    rows = (tmp_path / "run" / "answers.jsonl").read_text()
    for name in ("summary.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "state" / "round-00002")
    again = finished("fedit", backend=dataclasses.replace(backend), out=tmp_path / "run")
    assert [record["attack"] for record in again.records] == [record["attack"] for record in whole.records]
    assert (tmp_path / "run" / "answers.jsonl").read_text() == rows


def test_traffic_is_an_adapter_each_way_for_each_client_of_the_cohort(backend: Backend, tmp_path: Path) -> None:
    cohort = ["partition.num_clients=4", "server.cohort_size=2"]
    done = finished("fedit", *cohort, backend=backend, out=tmp_path / "fedit")
    adapter_bytes = 4 * done.summary["num_parameters"]
    assert [record["uplink_bytes"] for record in done.records] == [2 * adapter_bytes] * 2
    assert [record["downlink_bytes"] for record in done.records] == [2 * adapter_bytes] * 2
    alone = finished("locit", *cohort, backend=backend, out=tmp_path / "locit")
    assert alone.summary["uplink_bytes"] == alone.summary["downlink_bytes"] == 0
    pooled = finished("cenit", backend=backend, out=tmp_path / "cenit").records
    assert pooled[0]["uplink_bytes"] > 12 * 20, "twelve records as text, once"
    assert pooled[1]["uplink_bytes"] == 0


def test_private_adapters_are_measured_unless_not_asked_for(backend: Backend, tmp_path: Path) -> None:
    whole = finished("fedpit", "evaluate.every=0", backend=backend, out=tmp_path / "whole")
    release = finished("fedpit", "evaluate.every=0", "evaluate.private=false", backend=backend, out=tmp_path / "release")
    assert whole.summary["private"]["eval"]["heldout_nll"] != whole.summary["eval"]["heldout_nll"]
    assert release.summary["private"] is None
    assert release.summary["eval"] == whole.summary["eval"]
    alone = finished("locit", "evaluate.every=0", "evaluate.private=false", backend=backend, out=tmp_path / "locit")
    assert alone.summary["eval"] is not None, "where they are the product there is nothing else to measure"


@pytest.mark.parametrize("method", ["fedpit", "locit"])
def test_a_client_that_sits_out_keeps_what_it_kept(backend: Backend, tmp_path: Path, method: str) -> None:
    out = tmp_path / "run"
    settings = ["partition.num_clients=4", "server.cohort_size=2", "server.num_rounds=3", "evaluate.every=0"]
    done = finished(method, *settings, backend=backend, out=out)
    cohorts = [set(record["cohort"]) for record in done.records]
    assert all(len(cohort) == 2 for cohort in cohorts)
    assert len(set(map(frozenset, cohorts))) > 1, "the cohorts of this seed must differ for the test to say anything"
    before, after = kept(out, 2), kept(out, 3)
    assert set(before) == cohorts[0] | cohorts[1]
    assert set(after) == set(before) | cohorts[2]
    for client_id in before:
        assert np.array_equal(before[client_id], after[client_id]) == (client_id not in cohorts[2])


def test_a_round_in_which_no_client_takes_part_still_adds_its_noise_and_is_accounted(backend: Backend, tmp_path: Path) -> None:
    settings = [
        "partition.num_clients=4",
        "server.cohort_size=1",
        "server.num_rounds=6",
        "evaluate.every=0",
        "attack.every=-1",
        "privacy.delta=1e-5",
    ]
    done = finished("fedit-client", *settings, backend=backend, out=tmp_path / "run")
    empty = [record for record in done.records if not record["cohort"]]
    assert empty, "the cohorts of this seed must include an empty one for the test to say anything"
    assert len({len(record["cohort"]) for record in done.records}) > 1, "a Poisson cohort varies in size"
    for record in empty:
        assert record["empty_round"]
        assert record["num_tokens"] == record["num_steps"] == record["uplink_bytes"] == 0
        assert record["train_loss"] is record["update_norm_median"] is None
        assert record["noise_std"] == 1.0
    epsilons = [record["epsilon"] for record in done.records]
    assert epsilons == sorted(set(epsilons)), "every round costs, also one without clients"
    assert done.ledger["num_releases"] == 6


QUICK = ["data.max_length=300", "evaluate.every=0", "evaluate.num_generated=1", "attack.every=-1", "privacy.delta=1e-5"]
DISTRIBUTED = ["partition.num_clients=5", "privacy.noise_at=distributed", "clients.dropout=0.3", "privacy.dropout_tolerance=0.5"]


def test_clients_that_fail_send_nothing_and_a_round_that_loses_too_many_releases_nothing(backend: Backend, tmp_path: Path) -> None:
    done = finished("fedit-client", *QUICK, *DISTRIBUTED, "server.num_rounds=3", backend=backend, out=tmp_path / "run")
    parameters = done.summary["num_parameters"]
    for record in done.records:
        assert record["cohort"] == [0, 1, 2, 3, 4]
        sent = 5 - record["num_failed"]
        assert (record["uplink_bytes"], record["downlink_bytes"]) == (8 * parameters * sent, 4 * parameters * 5)
        assert record["aborted"] == (sent < 3)
        assert record["num_contributed"] == (0 if record["aborted"] else sent)
        assert record["noise_std"] == pytest.approx(0.0 if record["aborted"] else math.sqrt(sent / 3) / 5)
        assert record["update_norm_median"] is record["clip_fraction"] is None, "secure aggregation shows the sum alone"
    assert [record["aborted"] for record in done.records] == [False, False, True], "the failures of this seed must say something"
    assert np.array_equal(released(tmp_path / "run", 2), released(tmp_path / "run", 3))
    assert done.ledger["num_releases"] == 3, "a round that was aborted is counted"


def test_the_bound_that_clipping_adapts_is_that_of_the_next_round(backend: Backend, tmp_path: Path) -> None:
    """All three updates are far shorter or far longer than a bound, so that the count is known and the bound with it."""
    z = 1e-4
    for clip_norm, short in ((1e-4, 0), (20.0, 3)):
        keys = [f"privacy.noise_multiplier={z}", f"privacy.clip_norm={clip_norm}", "privacy.clipping=adaptive"]
        settings = [*QUICK, *keys, "server.num_rounds=3"]
        done = finished("fedit-client", *settings, backend=backend, out=tmp_path / f"{short}")
        bounds = [record["clip_norm"] for record in done.records]
        assert [record["clip_fraction"] for record in done.records] == [1 - short / 3] * 3
        assert bounds[0] == clip_norm
        for round_index in (0, 1):
            noise = gaussian(1, std=3 / 20, seed=seed_for(0, "count noise", round_index), secure=False)[0]
            share = (short + noise) / 3
            assert bounds[round_index + 1] == pytest.approx(bounds[round_index] * math.exp(-0.2 * (share - 0.5)), rel=1e-6)
        stds = [record["noise_std"] for record in done.records]
        assert stds == pytest.approx([bound * (z**-2 - (2 * 3 / 20) ** -2) ** -0.5 / 3 for bound in bounds])


def test_a_run_stops_before_the_round_that_would_exceed_its_budget(backend: Backend, tmp_path: Path) -> None:
    limit = 8.0
    planned = finished("fedit-client", *QUICK, "server.num_rounds=4", backend=backend, out=tmp_path / "planned")
    spent = [record["epsilon"] for record in planned.records]
    assert spent[1] < limit < spent[2]
    kept_to = finished(
        "fedit-client", *QUICK, "server.num_rounds=4", f"privacy.max_epsilon={limit}", backend=backend, out=tmp_path / "kept_to"
    )
    assert [record["epsilon"] for record in kept_to.records] == spent[:2]
    assert (kept_to.ledger["epsilon"], kept_to.summary["num_rounds"]) == (spent[1], 2)
    assert kept_to.records[-1]["eval"] is not None, "what is measured after the last round is measured after the last that was run"


def test_private_self_generation_is_run_as_it_is_accounted(backend: Backend, tmp_path: Path) -> None:
    """As many records as releases, none looked at beside a private one, and a shared adapter that has seen nothing else."""
    settings = [
        *QUICK,
        "privacy.unit=example",
        "privacy.noise_multiplier=8",
        "fedpit.scorer=none",
        "fedpit.num_candidates=3",
        "fedpit.num_subsets=2",
        "fedpit.max_response_tokens=32",
        "fedpit.top_k=8",
    ]
    done = finished("fedpit", *settings, backend=backend, out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "synthetic.jsonl").read_text().splitlines()]
    for client_id in range(3):
        assert sum(row["client_id"] == client_id for row in rows) == done.ledger["num_releases"] == 2 * 3
    assert all(row["score"] is None and row["max_rouge_l"] is None for row in rows)
    assert {row["verdict"] for row in rows} <= {"kept", "format", "diversity", "response"}
    assert any(row["kept"] for row in rows)
    assert (done.ledger["unit"], done.ledger["accounted_multiplier"]) == ("example", pytest.approx(8 / math.sqrt(8 + 32)))
    assert done.ledger["noise_multiplier"] == 8
    assert done.summary["epsilon"] == done.ledger["epsilon"] > 0
    assert "synthetic records are drawn from noised sums" in done.summary["guarantee"]
    assert done.records[-1]["private"] is not None, "each client keeps an adapter of its own records, which is not released"


def test_each_client_attacks_the_last_release_and_finds_what_the_attack_alone_finds(backend: Backend, tmp_path: Path) -> None:
    settings = ["attack.cross_prefixes=2", "attack.cross_samples=3", "attack.cross_tokens=5", "evaluate.every=0"]
    done = finished("fedit", *settings, backend=backend, out=tmp_path / "run")
    assert [record.get("cross_client") is not None for record in done.records] == [False] * (len(done.records) - 1) + [True]
    found = done.records[-1]["cross_client"]
    assert found == done.summary["cross_client"]
    lm = backend.worker.language_model(done.config.lora)
    shards = prepare(done.config, lm).shards
    attack = CrossClientSettings(num_prefixes=2, num_samples=3, max_new_tokens=5, batch_size=done.config.evaluate.batch_size)
    for k, row in enumerate(found["by_attacker"]):
        view = ClientView(own=shards[k], release=released(tmp_path / "run", len(done.records)))
        seed = seed_for(done.config.seed, "across", k)
        texts = attack_across(lm, view, settings=attack, chat=chat_format(done.config.data), seed=seed)
        victims = {d for other in range(3) if other != k for e in shards[other] for d in e.record.details} - {
            d for e in shards[k] for d in e.record.details
        }
        assert (row["client_id"], row["num_queries"], row["num_details"]) == (k, len(texts), len(victims)) == (k, 6, len(victims))
        assert row["coverage"] == len([d for d in victims if any(details_found(text, [d]) for text in texts)]) / len(victims)
    assert found["num_queries"] == 18


def test_a_run_answers_the_questions_of_a_file(backend: Backend, tmp_path: Path) -> None:
    questions = [{"question": f"What is {i}?", "options": ["this", "that"], "answer": "this"} for i in range(5)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    path = f"evaluate.choices_path={tmp_path / 'questions.jsonl'}"
    done = finished("fedit", path, "evaluate.num_choices=4", "server.num_rounds=1", backend=backend, out=tmp_path / "run")
    rows = [row for row in map(json.loads, (tmp_path / "run" / "answers.jsonl").read_text().splitlines()) if row["side"] == "choice"]
    assert [row["question"] for row in rows] == [0, 1, 2, 3]
    assert done.summary["eval"]["choice_accuracy"] == sum(row["right"] for row in rows) / 4
    assert done.summary["eval"]["choice_accuracy_by_chance"] == 0.5
    page = (tmp_path / "run" / "report.html").read_text()
    assert "4 multiple-choice questions" in page


def test_a_bad_file_of_questions_is_named_with_its_line(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"question": "a", "options": ["b", "c"], "answer": "d"}\n')
    with pytest.raises(ValueError, match=r"evaluate.choices_path=.*questions.jsonl: line 1: .*'d', which names none of the options"):
        finished("fedit", f"evaluate.choices_path={tmp_path / 'questions.jsonl'}", backend=backend, out=tmp_path / "run")


def test_a_question_that_is_too_long_is_refused_before_any_work(backend: Backend, tmp_path: Path) -> None:
    questions = [{"question": "What " * times, "options": ["this", "that"], "answer": "this"} for times in (1, 4000)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    with pytest.raises(
        ValueError, match=r"^evaluate.choices_path=.*jsonl: question 2 \('What What .*takes \d+ tokens .* context is .*=\d+;"
    ):
        finished("fedit", f"evaluate.choices_path={tmp_path / 'questions.jsonl'}", backend=backend, out=tmp_path / "run")
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_pooled_data_have_nobody_to_attack(backend: Backend, tmp_path: Path) -> None:
    done = finished("cenit", "attack.cross_prefixes=2", "evaluate.every=0", backend=backend, out=tmp_path / "run")
    assert done.summary["cross_client"] is None


def test_synthetic_records_tell_how_near_they_come_to_private_ones(backend: Backend, tmp_path: Path) -> None:
    done = finished("fedpit", "server.num_rounds=1", backend=backend, out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "synthetic.jsonl").read_text().splitlines()]
    shards = prepare(done.config, backend.worker.language_model(done.config.lora)).shards
    for row in rows:
        own = [example.record.response for example in shards[row["client_id"]]]
        assert row["response_rouge_l"] == (largest_rouge_l(row["response"], own) if row["response"] else None)
    kept = [row["response_rouge_l"] for row in rows if row["kept"] and row["response_rouge_l"] is not None]
    assert done.records[0]["synthetic"]["response_rouge_l"] == {"median": statistics.median(kept), "max": max(kept)}


def released(out: Path, num_rounds: int) -> Vector:
    """The released adapter after so many rounds."""
    adapter: Vector = load_file(out / "state" / f"round-{num_rounds:05d}" / "server.safetensors")["adapter"]
    return adapter


def test_a_record_adds_up_what_its_clients_did(backend: Backend, tmp_path: Path) -> None:
    reports: list[Any] = []
    wrapped = listening(reports)
    other = Seam(backend.key, backend.worker, None, partial(wrapped, backend.worker))
    done = finished("fedpit", "server.num_rounds=1", backend=other, out=tmp_path / "run")
    [record] = done.records
    stats = [report.stats for report in reports]
    assert record["num_tokens"] == sum(s.num_tokens for s in stats) > 0
    assert record["num_steps"] == sum(s.num_steps for s in stats) > 0
    assert record["train_loss"] == pytest.approx(np.average([s.loss for s in stats], weights=[s.num_tokens for s in stats]))
    assert record["tokens_per_s"] == pytest.approx(record["num_tokens"] / record["client_s"])
    assert record["client_s"] <= record["wall_s"]
    rows = [row for report in reports for row in report.synthetic]
    assert record["synthetic"]["num_candidates"] == len(rows)
    assert record["synthetic"]["num_kept"] == sum(row["kept"] for row in rows) > 0
    assert record["synthetic"]["num_kept"] + sum(record["synthetic"]["num_rejected"].values()) == len(rows)
    lines = [json.loads(line) for line in (tmp_path / "run" / "synthetic.jsonl").read_text().splitlines()]
    assert lines == [{"client_id": r.client_id, "round_index": 0, **row} for r in reports for row in r.synthetic]


def listening(reports: list[Any]) -> type[LocalClients]:
    """Local clients whose reports are also written down."""

    class ListeningClients(LocalClients):
        def run_round(self, round: Round, chunks: Sequence[tuple[int, ...]], on_done: loop.OnDone) -> list[Any]:
            def both(outcomes: Sequence[Any]) -> None:
                reports.extend(outcomes)
                on_done(outcomes)

            return super().run_round(round, chunks, both)

    return ListeningClients


@pytest.mark.parametrize(("method", "value"), [("fedit", np.nan), ("fedit-client", np.nan), ("fedit-client", -np.inf)])
def test_an_update_that_is_not_finite_is_dropped_and_counted_and_costs_no_privacy(
    backend: Backend, tmp_path: Path, method: str, value: float
) -> None:
    healthy = finished(method, backend=backend, out=tmp_path / "healthy")
    other = Seam(backend.key, backend.worker, None, partial(LocalClients, Diverging(backend.worker._base, value=value)))
    done = finished(method, backend=other, out=tmp_path / "diverged")
    failure = {"client_id": 1, "reason": "its update is not finite (adapter); lower train.lr"}
    assert [(record["failures"], record["num_failed"]) for record in done.records] == [([failure], 1)] * 2
    assert METRICS["raysim_failed_clients"][1](done.records) == 2
    cells = r"<td>[^<]*</td><td>1</td><td>1, 2</td><td[^>]*>its update is not finite \(adapter\); lower train.lr</td>"
    assert re.search(cells, done.page.read_text())
    assert [record["num_dropped"] for record in done.records] == [1, 1]
    assert [record["num_contributed"] for record in done.records] == [2, 2]
    assert done.summary["num_dropped"] == 2
    assert healthy.summary["num_dropped"] == 0
    assert done.ledger == healthy.ledger
    assert (done.ledger["epsilon"] is None) == (method == "fedit")
    assert done.summary["adapter_sha256"] != healthy.summary["adapter_sha256"]
    assert np.isfinite(load_file(tmp_path / "diverged" / "state" / "round-00002" / "server.safetensors")["adapter"]).all()


class Diverging(Worker):
    """A worker at which the update of client 1 has one coordinate that is not a number."""

    def __init__(self, base: BaseModel, *, value: float) -> None:
        super().__init__(base, device="cpu", num_threads=1)
        self._value = value

    def _trained(self, assignment: Assignment, round: Round, group: Sequence[Member], setting: Setting) -> list[ClientResult]:
        results = super()._trained(assignment, round, group, setting)
        for (client_id, _, _), result in zip(group, results, strict=True):
            if client_id == 1:
                result.upload["adapter"][3] = self._value
        return results


def failing(backend: Backend) -> Seam:
    """A backend whose client 2 has broken data."""
    return Seam(
        backend.key, backend.worker, None, lambda assignment, experiment: LocalClients(backend.worker, assignment, broken(experiment))
    )


def test_an_error_in_a_client_whose_records_are_protected_names_round_and_client(backend: Backend, tmp_path: Path) -> None:
    """One record may be why it fails, and no noise covers that it sends nothing."""
    with pytest.raises(RuntimeError, match="round 0, client 2: "):
        finished("dplora-example", backend=failing(backend), out=tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_client_that_raises_is_in_the_records_and_on_the_page_and_the_round_goes_on_without_it(
    backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others come to what they come to where the client has dropped out."""
    done = run(small("fedit", out=tmp_path / "run"), backend=failing(backend))
    without = finished("fedit", "clients.dropout_by_client=[0,0,0.99]", backend=backend, out=tmp_path / "without")
    assert [record["num_failed"] for record in without.records] == [1, 1], "another seed, where it never came"
    for record, other in zip(done.records, without.records, strict=True):
        [failure] = record["failures"]
        assert failure["client_id"] == 2
        assert failure["reason"].startswith("IndexError: ")
        assert other["failures"] == [{"client_id": 2, "reason": "dropped out"}]
        assert (record["num_failed"], record["num_contributed"], record["aborted"]) == (1, 2, False)
        assert record["uplink_bytes"] == other["uplink_bytes"]
    assert done.summary["adapter_sha256"] == without.summary["adapter_sha256"]
    assert "client 2: IndexError: " in capsys.readouterr().out
    page = done.page.read_text()
    assert "Clients whose updates did not count" in page
    assert "IndexError" in page


def all_failing(backend: Backend) -> Seam:
    """A backend of which each client has broken data."""

    def make(assignment: Assignment, experiment: Experiment) -> LocalClients:
        shards = (broken(experiment).shards[2],) * len(experiment.shards)
        return LocalClients(backend.worker, assignment, dataclasses.replace(experiment, shards=shards))

    return Seam(backend.key, backend.worker, None, make)


def test_a_round_in_which_every_client_of_a_run_fails_ends_it(backend: Backend, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="round 0, client 0: IndexError"):
        finished("fedit", backend=all_failing(backend), out=tmp_path / "run")


def test_a_round_whose_whole_cohort_fails_releases_nothing_and_the_run_goes_on(backend: Backend, tmp_path: Path) -> None:
    """The others of the run may do better."""
    settings = ["server.cohort_size=1", "server.num_rounds=6", "evaluate.every=0", "attack.every=-1"]
    done = finished("fedit", *settings, backend=failing(backend), out=tmp_path / "run")
    whole = [record["cohort"] for record in done.records]
    assert [2] in whole, "the cohorts of this seed must draw the client that fails"
    assert any(cohort != [2] for cohort in whole), "and others"
    for record in done.records:
        fails = record["cohort"] == [2]
        assert [failure["client_id"] for failure in record["failures"]] == [2] * fails
        assert (record["num_failed"], record["num_contributed"], record["empty_round"]) == (fails, not fails, fails)
        assert record["num_failed"] == 0 or (record["uplink_bytes"], record["train_loss"]) == (0, None)
    without = finished("fedit", *settings, "clients.dropout_by_client=[0,0,0.99]", backend=backend, out=tmp_path / "without")
    assert done.summary["adapter_sha256"] == without.summary["adapter_sha256"]


def test_whether_the_whole_cohort_of_protected_clients_fails_shows_in_no_noise_and_no_ledger(backend: Backend, tmp_path: Path) -> None:
    """Such a round is the one of an empty cohort: noise alone, and accounted."""
    healthy = finished("fedit-client", backend=backend, out=tmp_path / "healthy")
    done = finished("fedit-client", backend=all_failing(backend), out=tmp_path / "run")
    nobody = finished("fedit-client", "clients.dropout=0.99", backend=backend, out=tmp_path / "nobody")
    assert [record["num_contributed"] for record in nobody.records] == [0, 0]
    for record, sound, empty in zip(done.records, healthy.records, nobody.records, strict=True):
        assert (record["num_failed"], record["empty_round"], record["aborted"]) == (3, True, False)
        assert {failure["reason"].partition(":")[0] for failure in record["failures"]} == {"IndexError"}
        for key in ("noise_std", "epsilon", "epsilon_rdp"):
            assert record[key] == sound[key] == empty[key]
    assert done.ledger == healthy.ledger
    assert done.summary["adapter_sha256"] == nobody.summary["adapter_sha256"], "the same noise, and nothing else"


def test_a_client_that_fails_only_on_the_second_trip_ends_the_run_and_is_told_why(backend: Backend, tmp_path: Path) -> None:
    class Lost(LocalClients):
        def run_round(self, round: Round, chunks: Sequence[tuple[int, ...]], on_done: loop.OnDone) -> list[Any]:
            if round.trip:
                self._states.pop(1)
            return super().run_round(round, chunks, on_done)

    other = Seam(backend.key, backend.worker, None, partial(Lost, backend.worker))
    with pytest.raises(
        RuntimeError, match="round 0, client 1: on the second trip, of which the first one already counts its update: KeyError"
    ):
        finished("fedit", "lora.aggregation=fedask", backend=other, out=tmp_path / "run")
    done = finished("fedit", "lora.aggregation=fedask", backend=failing(backend), out=tmp_path / "first")
    assert [[failure["client_id"] for failure in record["failures"]] for record in done.records] == [[2], [2]]


def test_a_deadline_changes_neither_the_noise_nor_the_ledger_of_protected_clients(backend: Backend, tmp_path: Path) -> None:
    """Who comes too late adds zero to a sum that is divided and noised as if everybody came."""
    base = ["partition.scheme=quantity", "partition.alpha=0.3", "clients.token_s=1", "attack.every=-1", "privacy.delta=1e-5"]
    settings = [*base, "privacy.noise_at=server", "privacy.clip_norm=1e-3", "privacy.noise_multiplier=1e-6"]
    everybody = finished("fedit-client", *settings, backend=backend, out=tmp_path / "all")
    sizes = [client["num_tokens"] for client in json.loads((tmp_path / "all" / "partition.json").read_text())["clients"]]
    deadline = f"clients.deadline_s={sorted(sizes)[0]}"
    done = finished("fedit-client", *settings, deadline, backend=backend, out=tmp_path / "late")
    assert [record["num_failed"] for record in done.records] == [2, 2], "else nobody came too late"
    assert [record["num_contributed"] for record in done.records] == [1, 1]
    assert done.ledger == everybody.ledger
    for key in ("noise_std", "epsilon", "epsilon_rdp", "clip_norm"):
        assert [record[key] for record in done.records] == [record[key] for record in everybody.records]
    first = begun(done, backend)
    moved = float(np.linalg.norm(released(tmp_path / "late", 1) - first))
    assert moved == pytest.approx(1e-3 / 3, rel=1e-2), "one clipped update, divided by the three that were expected"


def begun(done: Run, backend: Backend) -> Vector:
    """The adapter before the first round."""
    layout = backend.worker.language_model(done.config.lora).layout
    adapter: Vector = lora_rule(done.config.lora.aggregation).start(layout, done.config.seed)["adapter"]
    return adapter


def test_a_round_to_which_too_few_clients_send_releases_nothing_and_says_so(
    backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(small("fedit", "server.min_clients=3", out=tmp_path / "run"), backend=failing(backend))
    assert [(record["aborted"], record["num_contributed"]) for record in done.records] == [(True, 2)] * 2
    assert "round 0: 2 clients sent, too few: nothing is released" in capsys.readouterr().out
    untouched = finished("fedit", "clients.dropout=0.99", backend=backend, out=tmp_path / "nobody")
    assert [record["num_contributed"] for record in untouched.records] == [0, 0]
    assert done.summary["adapter_sha256"] == untouched.summary["adapter_sha256"]
    enough = finished("fedit", "server.min_clients=2", backend=failing(backend), out=tmp_path / "enough")
    assert not any(record["aborted"] for record in enough.records)


@pytest.mark.parametrize("noise_at", ["client", "distributed"])
def test_where_clients_add_noise_one_that_failed_still_sends_its_own(backend: Backend, tmp_path: Path, noise_at: str) -> None:
    """So nobody sees that it failed: the sum is what it would be had its update been zero."""
    settings = ["privacy.delta=1e-5", f"privacy.noise_at={noise_at}", "server.num_rounds=1"]
    done = finished("fedit-client", *settings, backend=failing(backend), out=tmp_path / "run")
    [record] = done.records
    assert [failure["client_id"] for failure in record["failures"]] == [2]
    assert (record["num_contributed"], record["aborted"]) == (3, False)


def test_what_comes_late_counts_in_the_next_round_or_not_at_all_and_a_resume_changes_nothing(backend: Backend, tmp_path: Path) -> None:
    """With equal machines the largest shard takes longest."""
    base = ["partition.scheme=quantity", "partition.alpha=0.3", "clients.token_s=1", "server.num_rounds=3", "attack.every=-1"]
    everybody = finished("fedit", *base, backend=backend, out=tmp_path / "all")
    sizes = [client["num_tokens"] for client in json.loads((tmp_path / "all" / "partition.json").read_text())["clients"]]
    assert [record["simulated_s"] for record in everybody.records] == [max(sizes)] * 3
    slow, deadline_s = sizes.index(max(sizes)), sorted(sizes)[1]
    assert everybody.summary["simulated_s"] == 3 * max(sizes)
    late = [*base, f"clients.deadline_s={deadline_s}"]
    dropped = finished("fedit", *late, backend=backend, out=tmp_path / "dropped")
    assert [record["simulated_s"] for record in dropped.records] == [deadline_s] * 3
    assert [[failure["client_id"] for failure in record["failures"]] for record in dropped.records] == [[slow]] * 3
    assert dropped.records[0]["failures"][0]["reason"] == f"late: {max(sizes):.4g} s of {deadline_s:g} s"
    without = finished(
        "fedit", *base, f"clients.dropout_by_client={[0.99 * (k == slow) for k in range(3)]}", backend=backend, out=tmp_path / "without"
    )
    assert dropped.summary["adapter_sha256"] == without.summary["adapter_sha256"]
    stale = finished("fedit", *late, "clients.late=stale", backend=backend, out=tmp_path / "stale")
    assert [(record["num_late"], record["failures"]) for record in stale.records] == [(1, [])] * 3
    assert len({done.summary["adapter_sha256"] for done in (everybody, dropped, stale)}) == 3
    assert load_file(tmp_path / "stale" / "state" / "round-00002" / "server.safetensors")["late_weight"].tolist() == [
        everybody_weight(tmp_path / "all", slow)
    ]
    shutil.copytree(tmp_path / "stale", tmp_path / "again")
    for name in ("summary.json", "state/round-00003"):
        path = tmp_path / "again" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = finished("fedit", *late, "clients.late=stale", backend=backend, out=tmp_path / "again")
    assert again.summary["adapter_sha256"] == stale.summary["adapter_sha256"]


def everybody_weight(out: Path, client_id: int) -> float:
    """The weight of a client: its number of examples."""
    return float(json.loads((out / "partition.json").read_text())["clients"][client_id]["num_examples"])


def kept(out: Path, num_rounds: int) -> dict[int, Vector]:
    """The adapter that each client keeps after so many rounds."""
    paths = sorted((out / "state" / f"round-{num_rounds:05d}").glob("client-*.safetensors"))
    return {int(path.stem.removeprefix("client-")): load_file(path)["adapter"] for path in paths}


def finished(method: str, *settings: str, backend: Backend, out: Path) -> Run:
    """A small run to its end."""
    return run(small(method, *settings, out=out), display=False, backend=backend)
