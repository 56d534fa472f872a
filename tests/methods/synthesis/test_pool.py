"""Methods that train on synthetic records beside FEDPIT: what is mixed, what is sent, what is kept; and public records from a file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysim.config import load
from raysim.data.configured import public_records
from raysim.data.records import Record
from raysim.methods.call import ClientState
from raysim.methods.fedit import fedit as fedit_group
from raysim.methods.fedmit import fedmit as fedmit_group
from raysim.methods.fedpit import fedpit as fedpit_group
from raysim.methods.locit import locit as locit_group
from raysim.methods.locit import locit_synthetic as locit_synthetic_group
from raysim.methods.registry import method_of
from raysim.methods.spec import METHODS
from raysim.methods.synthesis.write import instruction_following_scores
from raysim.model.language_model import LanguageModel
from raysim.model.train import train_adapter
from raysim.runs.run import run
from tests.method_calls import RECORDS, alone, in_round, make_call, some_adapter
from tests.small_runs import WRITING, small
from tests.tiny_models import build, encode, sharp_base, spelling_base

fedit = alone(fedit_group)
fedmit = alone(fedmit_group)
fedpit = alone(fedpit_group)
locit = alone(locit_group)
locit_synthetic = alone(locit_synthetic_group)

# A model that writes the same pair whatever it is shown.
INSTRUCTION = [*".Do", "ĉ", *"my", "ċ", *"le", "Ċ"]
ANSWER = ["<|assistant|>", *"Big", "č", *"cat", "Ġ", *"runs", "<|end|>"]
PAIR = {"instruction": "Do my le", "response": "Big\rcat runs"}
WRITES = ["fedpit.max_instruction_tokens=16", "fedpit.max_response_tokens=24", "fedpit.num_candidates=4"]
PUBLIC = [
    Record(record_id=100 + i, instruction=f"{word.title()} things: which {word} is best?", response=f"Take the {word} that lasts, {i}")
    for i, word in enumerate(["lamp", "boat", "chair", "river", "stone", "cloud"])
]
FILE = ["synthesis.source=file", "synthesis.path=public.jsonl"]


@pytest.fixture(scope="module")
def speller() -> LanguageModel:
    """Given an adapter of zeros it spells; the tests' calls start from zeros."""
    return build(spelling_base(INSTRUCTION, ANSWER))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(sharp_base())


def spelling_call(lm: LanguageModel, method: str, *overrides: str, **options: Any) -> Any:
    call = make_call(lm, f"method.name={method}", *WRITES, *overrides, **options)
    return replace(call, adapter=np.where(lm.layout.group_mask("A"), call.adapter, np.float32(0)))


def pairs(lm: LanguageModel, *records: dict[str, str]) -> list[Any]:
    return encode(lm, [Record(record_id=i, label="synthetic", **record) for i, record in enumerate(records)])


# --- real and synthetic records in one adapter ---


def test_fedmit_sends_one_adapter_trained_on_both(speller: LanguageModel) -> None:
    call = spelling_call(speller, "fedmit")
    result = fedmit(speller, call)
    mixed = [*call.shard, *pairs(speller, PAIR)]
    expected, stats = train_adapter(speller, call.adapter, mixed, settings=call.train_settings(), seed=call.seed("train"))
    assert result.upload["adapter"].tobytes() == (expected - call.adapter).tobytes()
    assert result.stats.loss == stats.loss
    assert result.state is not None
    assert (result.state.arrays, result.state.records) == ({}, [PAIR])
    assert result.upload["adapter"].tobytes() != fedit(speller, call).upload["adapter"].tobytes()
    score = [row["score"] for row in result.synthetic if row["kept"]]
    real, _ = train_adapter(speller, call.adapter, call.shard, settings=call.train_settings(), seed=call.seed("scorer"))
    assert score == instruction_following_scores(speller, real, pairs(speller, PAIR), batch_size=4)


def test_fedmit_is_fedpit_that_sends_all_of_an_adapter_for_both(speller: LanguageModel) -> None:
    same = ["fedpit.share_mix=1", "fedpit.local_train_on=real+synthetic", "fedpit.scorer=none"]
    mixed = fedmit(speller, spelling_call(speller, "fedmit", *same))
    assert mixed.upload["adapter"].tobytes() == fedpit(speller, spelling_call(speller, "fedpit", *same)).upload["adapter"].tobytes()
    assert mixed.upload["adapter"].any()


def test_without_candidates_fedmit_is_fedit_and_locit_synthetic_is_locit(speller: LanguageModel) -> None:
    none = spelling_call(speller, "fedmit", "fedpit.num_candidates=0")
    assert fedmit(speller, none).upload["adapter"].tobytes() == fedit(speller, none).upload["adapter"].tobytes()
    assert fedmit(speller, none).stats == fedit(speller, none).stats
    kept = [method(speller, none).state for method in (locit, locit_synthetic)]
    assert kept[0] is not None
    assert kept[1] is not None
    assert kept[0].arrays["adapter"].tobytes() == kept[1].arrays["adapter"].tobytes()


def test_locit_synthetic_writes_scores_and_trains_with_its_own_adapter(speller: LanguageModel) -> None:
    """Under the client's own adapter the model spells, under the server's it does not; nothing is sent."""
    call = spelling_call(speller, "locit_synthetic")
    own = call.adapter
    later = replace(in_round(call, 1), adapter=some_adapter(speller, seed=8), state=ClientState(arrays={"adapter": own}))
    result = locit_synthetic(speller, later)
    assert not result.upload["adapter"].any()
    assert result.state is not None
    assert result.state.records == [PAIR]
    mixed = [*call.shard, *pairs(speller, PAIR)]
    expected, _ = train_adapter(speller, own, mixed, settings=call.train_settings(), seed=later.seed("train"))
    assert result.state.arrays["adapter"].tobytes() == expected.tobytes()
    assert [row["score"] for row in result.synthetic if row["kept"]] == instruction_following_scores(
        speller, own, pairs(speller, PAIR), batch_size=4
    )


# --- public records from a file ---


def file_call(lm: LanguageModel, method: str, *overrides: str, public: list[Record] = PUBLIC) -> Any:
    return make_call(lm, f"method.name={method}", *FILE, "fedpit.scorer=none", *overrides, public=public)


@pytest.mark.parametrize("method", [spec.name for spec in METHODS.values() if spec.writes])
def test_public_records_take_the_place_of_written_ones(lm: LanguageModel, method: str) -> None:
    call = file_call(lm, method, "fedpit.num_candidates=4")
    result = alone(method_of(method))(lm, call)
    drawn = [(row["instruction"], row["response"]) for row in result.synthetic]
    assert len(set(drawn)) == 4
    assert set(drawn) <= {(record.instruction, record.response) for record in PUBLIC}
    assert result.state is not None
    kept = [(record["instruction"], record["response"]) for record in result.state.records]
    assert kept == [pair for pair, row in zip(drawn, result.synthetic, strict=True) if row["kept"]] != []
    other = alone(method_of(method))(lm, replace(call, client_id=1))
    assert [row["instruction"] for row in other.synthetic] != [row["instruction"] for row in result.synthetic], "every client draws its own"
    everything = alone(method_of(method))(lm, file_call(lm, method, "fedpit.num_candidates=99"))
    assert len(everything.synthetic) == len(PUBLIC)


def test_fedpit_trains_what_it_shares_on_the_file_alone(lm: LanguageModel) -> None:
    call = file_call(lm, "fedpit")
    result = fedpit(lm, call)
    assert result.state is not None
    public, _ = train_adapter(
        lm, call.adapter, pairs(lm, *result.state.records), settings=call.train_settings(), seed=call.seed("synthetic")
    )
    assert result.upload["adapter"].tobytes() == (public - call.adapter).tobytes()


def test_a_public_record_that_is_one_of_the_clients_is_no_candidate(lm: LanguageModel) -> None:
    """Near its instructions, near its responses, near another candidate or one of an earlier round; one that is near none stays."""
    copies = [
        Record(record_id=1, instruction=RECORDS[0].instruction, response="Nothing like what the client holds at all"),
        Record(record_id=2, instruction="Which lamp is best in winter, please?", response=RECORDS[1].response),
        Record(record_id=3, instruction="Name a river that flows to the north", response="The Nile does that"),
        Record(record_id=4, instruction="Which boat sails fastest of them all?", response="A catamaran with new sails"),
    ]
    call = file_call(lm, "fedmit", public=copies)
    past = [{"instruction": "Name a river that flows to the north", "response": "The Nile"}]
    result = fedmit(lm, replace(call, state=ClientState(arrays={}, records=past)))
    verdicts = {row["instruction"]: row["verdict"] for row in result.synthetic}
    assert verdicts == {
        copies[0].instruction: "diversity",
        copies[1].instruction: "copy",
        copies[2].instruction: "diversity",
        copies[3].instruction: "kept",
    }
    twice = fedmit(lm, file_call(lm, "fedmit", public=[copies[3], replace(copies[3], record_id=5, response="Another answer to it")]))
    assert sorted(row["verdict"] for row in twice.synthetic) == ["diversity", "kept"]


def test_a_public_record_that_has_a_clients_label_is_no_copy(lm: LanguageModel) -> None:
    def verdicts(*overrides: str) -> set[str]:
        shared = [replace(record, response=RECORDS[0].response) for record in PUBLIC]
        return {row["verdict"] for row in fedmit(lm, file_call(lm, "fedmit", *overrides, public=shared)).synthetic}

    assert verdicts() == {"copy"}
    assert verdicts("data.source=jsonl", "data.path=set.csv", "data.response_field=mood", "data.label_field=mood") == {"kept"}


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def as_line(record: Record) -> str:
    return json.dumps({"instruction": record.instruction, "response": record.response})


def test_a_run_reads_its_public_records_from_the_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "public.jsonl", *map(as_line, PUBLIC))
    settings = ["synthesis.source=file", f"synthesis.path={path}", "evaluate.every=0", "attack.every=-1", "server.num_rounds=1"]
    done = run(small("fedpit", *settings, out=tmp_path / "run"), display=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "synthetic.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 4
    assert {row["instruction"] for row in rows} <= {record.instruction for record in PUBLIC}
    assert done.records[0]["update_norm_median"] > 0


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([as_line(PUBLIC[0]), "{not json"], "synthesis.path={path}: line 2 is not JSON"),
        ([as_line(PUBLIC[0]), "", '{"instruction": "Why?"}'], "synthesis.path={path}: line 3 lacks the field 'response'"),
        (['{"instruction": "Why?", "response": " "}'], "synthesis.path={path}: line 1: the field 'response' is empty"),
        ([""], "synthesis.path={path}: the file is empty"),
        ([json.dumps({"instruction": "long " * 900, "response": "short"})], "synthesis.path={path}: data.max_length=900: 1 of 1 prompts"),
    ],
)
def test_a_file_that_cannot_serve_is_refused_before_any_work_with_its_line(tmp_path: Path, lines: list[str], named: str) -> None:
    path = write_lines(tmp_path / "public.jsonl", *lines)
    config = small("fedpit", "synthesis.source=file", f"synthesis.path={path}", out=tmp_path / "run")
    with pytest.raises(ValueError) as caught:
        run(config, display=False)
    assert str(caught.value).startswith(named.format(path=path)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert "data.preset" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_file_matters_to_the_methods_that_read_it_only(tmp_path: Path) -> None:
    settings = ["synthesis.source=file", f"synthesis.path={tmp_path / 'nowhere.jsonl'}"]
    with pytest.raises(ValueError, match=r"^synthesis\.path=.*nowhere\.jsonl: the file does not exist"):
        run(small("fedmit", *settings, out=tmp_path / "run"), display=False)
    run(small("fedit", *settings, "evaluate.every=0", "attack.every=-1", out=tmp_path / "other"), display=False)


def test_a_preset_reads_a_known_sets_fields(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "set.jsonl", json.dumps({"instruction": "Sum up", "input": "a text", "output": "Done in short"}))
    config = load("", ["synthesis.source=file", f"synthesis.path={path}", "synthesis.preset=alpaca"])
    assert [(record.instruction, record.response) for record in public_records(config.synthesis)] == [("Sum up\n\na text", "Done in short")]
    assert public_records(load("").synthesis) == []


# --- whole runs ---


def test_methods_that_write_make_whole_runs_and_keep_their_pools(tmp_path: Path) -> None:
    for method in ("fedmit", "locit_synthetic"):
        done = run(small(method, "attack.every=-1", "evaluate.every=0", out=tmp_path / method), display=False)
        assert done.records[-1]["eval"] is not None
        assert sum(record["synthetic"]["num_kept"] for record in done.records) > 0, WRITING
        saved = sorted((tmp_path / method / "state" / "round-00002").glob("client-*.json"))
        assert any(json.loads(path.read_text()) for path in saved)
        assert "No differential-privacy guarantee" in done.summary["guarantee"]
    assert done.summary["uplink_bytes"] == 0
    assert sorted(path.name for path in (tmp_path / "locit_synthetic" / "adapter").glob("client-*")) == [f"client-00{k}" for k in range(3)]
