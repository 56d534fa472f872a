"""Sources: every form of file, every preset on a small file of its own shape and on real files, every error line, and the split."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raysim.config import DataConfig, load
from raysim.data.configured import instruction_opening, responses_are_labels
from raysim.data.presets import PRESETS
from raysim.data.records import Record
from raysim.data.sources import BUILTIN, read_source, split_records

ROWS = [
    {"q": "What is a kite?", "more": "", "a": "A toy that flies.", "topic": "toys", "private": ["Mira"], "set": "x"},
    {
        "q": "Where is the key?",
        "more": "It was on the hook.",
        "a": "Mira Solt has it, ask Mira.",
        "topic": "home",
        "private": ["Mira Solt", "hook"],
        "set": "",
    },
]
OWN = {
    "instruction_field": "q",
    "input_field": "more",
    "response_field": "a",
    "label_field": "topic",
    "details_field": "private",
    "group_field": "set",
}


def write(path: Path, content: str | bytes | list[dict[str, object]]) -> str:
    if isinstance(content, list):
        content = "\n".join(json.dumps(row) for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def load_records(**fields: str) -> list[Record]:
    return list(read_source(DataConfig(**fields)).records)


def load_file(path: str, **fields: str) -> list[Record]:
    return load_records(source="jsonl", path=path, **fields)


def as_csv(path: Path) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROWS[0]))
        writer.writeheader()
        writer.writerows({**row, "private": ";".join(row["private"])} for row in ROWS)
    return str(path)


def test_builtin_sets_by_name() -> None:
    for name, records in BUILTIN.items():
        assert load_records(source=name) == records()


@pytest.mark.parametrize("form", ["jsonl", "json", "json lines", "csv", "hub"])
def test_every_form_gives_the_same_records(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "csv":
        records = load_file(as_csv(tmp_path / "set.csv"), **OWN)
    elif form == "hub":
        import datasets  # imported here: takes a second, for this case only

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "set").mkdir()
        write(tmp_path / "set" / "train.jsonl", ROWS)
        records = load_records(source="hub", path=str(tmp_path / "set"), **OWN)
    else:
        text = json.dumps(ROWS, indent=1) if form == "json" else "\n\n".join(json.dumps(row) for row in ROWS)
        records = load_file(write(tmp_path / f"set.{form.split()[0]}", text), **OWN)
    assert records == [
        Record(0, "What is a kite?", "A toy that flies.", label="toys", group="x"),
        Record(1, "Where is the key?\n\nIt was on the hook.", "Mira Solt has it, ask Mira.", label="home", details=("Mira Solt",)),
    ]


def test_details_that_cannot_leak_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_file(write(tmp_path / "set.jsonl", ROWS), **OWN)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("set.jsonl: 2 of 3 details are left out, since they are not in the response alone")


def test_phrasebank_text_is_read_as_utf8_or_latin1(tmp_path: Path) -> None:
    text = "Profit of Sepp\u00e4 rose , mail a@b .@positive\n\nSales were flat .@neutral\n"
    for encoding in ("utf-8", "latin-1"):
        records = load_file(write(tmp_path / "set.txt", text.encode(encoding)), preset="fpb")
        assert [(record.response, record.label) for record in records] == [("positive", "positive"), ("neutral", "neutral")]
        assert records[0].instruction.endswith("\n\nProfit of Sepp\u00e4 rose , mail a@b .")
        assert "negative, neutral or positive" in records[0].instruction


# preset -> a row of its shape, and the instruction's last part, the response, label and group that come of it
SHAPES: dict[str, tuple[dict[str, object], str, str, str, str]] = {
    "alpacare": ({"instruction": "Explain X.", "input": "<noinput>", "output": "X is Y."}, "Explain X.", "X is Y.", "", ""),
    "medinstruct": ({"instruction": "Explain X.", "difficulty": "3", "gpt-4-answer": "Y.", "claude-2": "Z."}, "Explain X.", "Y.", "3", ""),
    "medquad": (
        {"collection": "9_CDC", "focus": "Flu", "question": "What is flu?", "answer": "A virus."},
        "What is flu?",
        "A virus.",
        "9_CDC",
        "Flu",
    ),
    "icliniq": (
        {"instruction": "You are a doctor.", "input": "My knee hurts.", "answer_icliniq": "Rest it."},
        "My knee hurts.",
        "Rest it.",
        "",
        "",
    ),
    "fpb": ({"sentence": "Sales rose.", "label": 2}, "Sales rose.", "positive", "positive", ""),
    "fiqa": ({"sentence": "$X sinks", "sentiment_score": -0.4}, "$X sinks", "negative", "negative", ""),
    "tfns": ({"text": "$X sinks {now}", "label": 0}, "$X sinks {now}", "negative", "negative", ""),
    "dolly": ({"instruction": "Name it.", "context": "A dog.", "response": "Rex", "category": "qa"}, "Name it.\n\nA dog.", "Rex", "qa", ""),
    "alpaca": ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n\n1 and 2", "3", "", ""),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_know_their_fields(tmp_path: Path, preset: str) -> None:
    row, instruction, response, label, group = SHAPES[preset]
    (record,) = load_file(write(tmp_path / "set.jsonl", [row]), preset=preset)
    assert record.instruction.endswith(instruction)
    assert (record.response, record.label, record.group, record.details) == (response, label, group, ())


def test_presets_know_their_opening_and_whether_responses_are_labels(tmp_path: Path) -> None:
    labelled = {preset for preset, (_, _, response, label, _) in SHAPES.items() if response == label}
    assert labelled == {"fpb", "fiqa", "tfns"}
    for preset, (row, ending, *_) in SHAPES.items():
        path = write(tmp_path / "set.jsonl", [row])
        data = load("", ["data.source=jsonl", f"data.path={path}", f"data.preset={preset}"]).data
        (record,) = load_file(path, preset=preset)
        assert record.instruction == instruction_opening(data) + ending
        assert (instruction_opening(data) != "", responses_are_labels(data)) == (preset in labelled,) * 2


def test_own_fields_are_labels_where_the_label_is_the_response() -> None:
    own = ["data.source=jsonl", "data.path=set.jsonl", "data.response_field=mood"]
    assert responses_are_labels(load("", [*own, "data.label_field=mood"]).data)
    assert not responses_are_labels(load("", [*own, "data.label_field=topic"]).data)
    assert not responses_are_labels(load("", own).data)
    assert not responses_are_labels(load("", ["data.source=finance"]).data), "its responses begin with the label, and go on"
    assert instruction_opening(load("", own).data) == ""


@pytest.mark.parametrize(
    ("score", "word"), [("0.1", "positive"), ("0.09", "neutral"), ("-0.09", "neutral"), ("-0.1", "negative"), ("Neutral", "neutral")]
)
def test_fiqa_scores_become_words(tmp_path: Path, score: str, word: str) -> None:
    (record,) = load_file(write(tmp_path / "set.jsonl", [{"sentence": "s", "score": score}]), preset="fiqa")
    assert record.response == word


@pytest.mark.parametrize(
    ("name", "preset", "count", "labels", "groups"),
    [
        ("alpacare/MedInstruct-test.jsonl", "medinstruct", 216, 5, 0),
        ("medquad/medquad_3k.jsonl", "medquad", 3115, 9, 1078),
        ("finance/Sentences_AllAgree.txt", "fpb", 2264, 3, 0),
        ("finance/tfns_train.csv", "tfns", 9543, 3, 0),
        ("general/dolly_3k.jsonl", "dolly", 3000, 8, 0),
    ],
)
def test_presets_on_real_files(shared_data: Path, name: str, preset: str, count: int, labels: int, groups: int) -> None:
    records = load_file(str(shared_data / name), preset=preset)
    assert len(records) == count
    assert len({record.label for record in records}) == labels
    assert len({record.group for record in records} - {""}) == groups
    if preset in ("fpb", "tfns"):
        assert {record.response for record in records} == {"negative", "neutral", "positive"}
    if preset == "tfns":
        assert Counter(record.label for record in records) == {"neutral": 6178, "positive": 1923, "negative": 1442}


def test_real_seed_file_without_outputs_is_refused(shared_data: Path) -> None:
    for preset in ("alpacare", "medinstruct"):
        with pytest.raises(ValueError, match=r"item 1 lacks the field .*the seed file has no outputs: use"):
            load_file(str(shared_data / "alpacare" / "med_seed.json"), preset=preset)


GOOD = '{"instruction": "a", "response": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "fields", "parts"),
    [
        ("set.jsonl", "", {}, ["the file is empty"]),
        ("set.json", " \n ", {}, ["the file is empty"]),
        ("set.json", "[]", {}, ["holds no records"]),
        ("set.csv", "instruction,response\n", {}, ["holds no records"]),
        ("set.xml", "<a/>", {}, ["cannot tell what .xml holds", ".jsonl, .json, .csv, .txt"]),
        ("set.jsonl", f"{GOOD}\n\n{{oops", {}, ["line 3 is not JSON", "column 2"]),
        ("set.json", '[\n{"instruction": 1,\n"response" 2}]', {}, ["line 3 is not JSON"]),
        ("set.jsonl", f"{GOOD}\n[1]", {}, ["line 2 is not an object", "a list"]),
        ("set.json", f"[{GOOD}, 3]", {}, ["item 2 is not an object", "a number"]),
        ("set.jsonl", GOOD.encode() + b"\n\xff\xfe", {}, ["line 2 is not UTF-8"]),
        (
            "set.jsonl",
            f'{GOOD}\n{{"instruction": "a", "answer": "b"}}',
            {},
            ["line 2", "'response'", "it has instruction, answer", "data.preset"],
        ),
        ("set.jsonl", GOOD, {"label_field": "topic"}, ["line 1 lacks the field 'topic'", "it has instruction, response"]),
        ("set.jsonl", GOOD, {"input_field": "extra"}, ["line 1 lacks the field 'extra'"]),
        ("set.jsonl", GOOD, {"group_field": "doc"}, ["line 1 lacks the field 'doc'"]),
        ("set.jsonl", GOOD, {"details_field": "pii"}, ["line 1 lacks the field 'pii'"]),
        ("set.jsonl", GOOD, {"details_field": "response"}, None),
        (
            "set.jsonl",
            '{"instruction": "a", "response": "b", "pii": 3}',
            {"details_field": "pii"},
            ["'pii' must be a list of strings, not a number"],
        ),
        ("set.csv", 'instruction,response,pii\na,b,"[b"\n', {"details_field": "pii"}, ["line 2: the field 'pii' is not JSON"]),
        ("set.jsonl", '{"instruction": "a", "response": " "}', {}, ["line 1: the field 'response' is empty"]),
        ("set.jsonl", '{"instruction": null, "response": "b"}', {}, ["line 1: the field 'instruction' is empty"]),
        ("set.csv", "instruction,response\nc\n", {}, ["line 2: the field 'response' is empty"]),
        ("set.csv", "instruction,response\na,b,c\n", {}, ["line 2 has more columns than the header"]),
        ("set.txt", "fine .@neutral\nno label here\n", {"preset": "fpb"}, ["line 2 is not of the form sentence@label"]),
        (
            "set.txt",
            "fine .@neutral\nodd .@mixed\n",
            {"preset": "fpb"},
            ["line 2: 'mixed' is none of 0, 1, 2, negative, neutral, positive"],
        ),
        ("set.jsonl", '{"sentence": "s", "score": "up"}', {"preset": "fiqa"}, ["line 1: 'up' is neither a score"]),
        ("set.jsonl", '{"sentence": "s", "score": 2.5}', {"preset": "fiqa"}, ["line 1: '2.5' is neither a score"]),
        ("set.jsonl", GOOD, {"preset": "guess"}, ["data.preset='guess' is none of alpacare, medinstruct"]),
        ("set.jsonl", GOOD, {"preset": "medquad"}, ["line 1 lacks the field 'question'"]),
    ],
)
def test_what_a_file_lacks_is_said_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, fields: dict[str, str], parts: list[str] | None
) -> None:
    path = write(tmp_path / name, content)
    if parts is None:
        assert len(load_file(path, **fields)) == 1
        return
    with pytest.raises(ValueError) as error:
        load_file(path, **fields)
    assert "\n" not in str(error.value)
    assert "preset" in fields or str(error.value).startswith(f"data.path={path}")
    assert all(part in str(error.value) for part in parts), error.value


def test_missing_files_and_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path=.*gone.jsonl: the file does not exist; give a .jsonl"):
        load_file(str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match=r"data.path=.*: the file is a folder"):
        load_file(str(tmp_path))
    with pytest.raises(ValueError, match=r"data.source='clinics' is none of clinic, finance, general, referrals, jsonl, hub"):
        load_records(source="clinics")
    with pytest.raises(ValueError, match=r"data.path=.*gone: looked for a local folder and .* on the Hub .*use data.source=jsonl"):
        load_records(source="hub", path=str(tmp_path / "gone"))


def test_hub_set_without_a_train_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets  # imported here: takes a second, for this test only

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split in ("test", "validation"):
        write(tmp_path / "set" / f"{split}.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"has no split 'train' but (test, validation|validation, test)"):
        load_records(source="hub", path=str(tmp_path / "set"), **OWN)
    (tmp_path / "set" / "validation.jsonl").unlink()
    assert len(load_records(source="hub", path=str(tmp_path / "set"), **OWN)) == len(ROWS)


groups_of_records = st.lists(st.sampled_from(["", "", "a", "b", "c", "d"]), min_size=2, max_size=60)


@given(groups_of_records, st.integers(1, 10), st.integers(0, 20), st.integers(0, 20), st.integers(0, 2**62))
@settings(max_examples=200, deadline=None)
def test_split_keeps_groups_together_and_is_nested(names: list[str], num_heldout: int, num_train: int, more: int, seed: int) -> None:
    records = [Record(i, f"ask {i}", "answer", group=name) for i, name in enumerate(names)]
    if len(records) < num_heldout + max(num_train, 1):
        with pytest.raises(ValueError, match=r"data.num_train=.* and data.num_heldout="):
            split_records(records, num_train=num_train, num_heldout=num_heldout, seed=seed)
    try:
        train, heldout = split_records(records, num_train=num_train, num_heldout=num_heldout, seed=seed)
    except ValueError:
        assume(False)  # whole groups on the held-out side can leave too few as well
    assert len(heldout) == num_heldout
    assert not {record.record_id for record in train} & {record.record_id for record in heldout}
    assert not {record.group for record in train} & {record.group for record in heldout} - {""}
    everything, same = split_records(records, num_train=0, num_heldout=num_heldout, seed=seed)
    assert same == heldout
    assert set(train) <= set(everything)
    if num_train:
        assert len(train) == num_train
    elif not any(names):
        assert len(train) == len(records) - num_heldout
    if num_train and num_train + more <= len(everything):
        larger, again = split_records(records, num_train=num_train + more, num_heldout=num_heldout, seed=seed)
        assert again == heldout
        assert set(train) <= set(larger)


def test_split_depends_on_the_seed_and_covers_all_records() -> None:
    records = load_records(source="clinic")
    sides = [split_records(records, num_train=48, num_heldout=32, seed=seed) for seed in range(40)]
    assert len({tuple(record.record_id for record in heldout) for _, heldout in sides}) == 40
    # 40 draws of 32 out of 400: a record is missed by all of them with probability 0.92 ** 40 = 3.6 %.
    drawn = {record.record_id for _, heldout in sides for record in heldout}
    assert 0.92 < len(drawn) / len(records) <= 1.0


@pytest.mark.parametrize(("num_train", "num_heldout"), [(8, 3), (1, 10), (0, 10), (0, 11)])
def test_split_says_what_is_too_few(num_train: int, num_heldout: int) -> None:
    records = [Record(i, f"ask {i}", "answer") for i in range(10)]
    with pytest.raises(ValueError, match=rf"data.num_train={num_train} and data.num_heldout={num_heldout} .* 10 records"):
        split_records(records, num_train=num_train, num_heldout=num_heldout, seed=0)
    assert [len(side) for side in split_records(records, num_train=7, num_heldout=3, seed=0)] == [7, 3]


def test_context_beside_a_record_is_not_passed_over_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Some sets keep a system message or earlier turns in fields of their own."""
    path = tmp_path / "side.jsonl"
    path.write_text(json.dumps({"instruction": "Q", "response": "A", "system": "Be X.", "history": [["q", "a"]]}) + "\n", encoding="utf-8")
    assert load_records(source="jsonl", path=str(path))[0].history == ()
    assert "the field 'system' and 'history' beside a record's own is not read" in caplog.text
    caplog.clear()
    load_records(source="jsonl", path=str(path), instruction_field="system", group_field="")
    assert "'history'" in caplog.text
    assert "'system'" not in caplog.text
