"""Records from a built-in set, a local file or the Hub, and the split into training and held-out records.

Left out: downloading by URL and scripts of data sets (nothing from a data source is executed), and stratified splits
(a split by group is what keeps near-copies of a record out of the held-out side).
"""

import csv
import dataclasses
import io
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysim.data.builtin import clinic, finance, general
from raysim.data.records import Record
from raysim.rng import numpy_rng

logger = logging.getLogger(__name__)

BUILTIN: dict[str, Callable[[], list[Record]]] = {"clinic": clinic.records, "finance": finance.records, "general": general.records}

# (where it stands, such as "line 3"; its fields)
Row = tuple[str, dict[str, Any]]


def _by_number(words: dict[str, str]) -> Callable[[str], str]:
    """Reads a class number or an already spelled label."""

    def read(value: str) -> str:
        word = words.get(value, value.lower())
        if word not in words.values():
            raise ValueError(f"{value!r} is none of {', '.join([*words, *words.values()])}")
        return word

    return read


def _by_score(value: str) -> str:
    """FiQA's score in [-1, 1] as a word, neutral within 0.1 of zero (or an already spelled label)."""
    if value.lower() in ("negative", "neutral", "positive"):
        return value.lower()
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not -1 <= score <= 1:
        raise ValueError(f"{value!r} is neither a score in [-1, 1] nor negative, neutral or positive")
    return "neutral" if abs(score) < 0.1 else "positive" if score > 0 else "negative"


@dataclass(frozen=True)
class Preset:
    """Field names of a known set; where releases of the set differ, the names are alternatives and the first present one counts."""

    instruction: tuple[str, ...]
    response: tuple[str, ...]
    input: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    empty_input: tuple[str, ...] = ("",)
    """Spellings of an input that is not there."""
    ask: str = "{}"
    """How the instruction is put; `{}` stands for the field's text."""
    read_response: Callable[[str], str] = str
    """Turns the response field into words."""
    remedy: str = ""
    """What to do where the response field is missing."""

    @property
    def opening(self) -> str:
        """What stands before the field's text in every instruction."""
        return self.ask.partition("{}")[0]

    @property
    def labelled(self) -> bool:
        """Whether a response is its label and nothing else."""
        return self.label == self.response


_SENTIMENT = "What is the sentiment of this {kind} for an investor? Answer with one word: negative, neutral or positive.\n\n{{}}"

PRESETS: dict[str, Preset] = {
    "alpacare": Preset(
        instruction=("instruction",),
        input=("input",),
        response=("output",),
        empty_input=("", "<noinput>"),
        remedy="the seed file has no outputs: use the 52k set (MedInstruct-52k), or MedInstruct-test with data.preset=medinstruct",
    ),
    "medinstruct": Preset(
        instruction=("instruction",),
        response=("gpt-4-answer",),
        label=("difficulty",),
        remedy="the seed file has no outputs: use MedInstruct-test.jsonl, or the 52k set with data.preset=alpacare",
    ),
    "medquad": Preset(
        instruction=("question",),
        response=("answer",),
        label=("collection", "document_source"),
        group=("focus", "question_focus"),
        remedy="MedQuAD's three MedlinePlus collections are published without answers: leave them out",
    ),
    "icliniq": Preset(
        instruction=("input",),
        response=("answer_icliniq", "output"),
        remedy="use the file of iCliniq-10k whose answers were written by doctors",
    ),
    "fpb": Preset(
        instruction=("sentence",),
        response=("label",),
        label=("label",),
        ask=_SENTIMENT.format(kind="sentence from the financial news"),
        read_response=_by_number({"0": "negative", "1": "neutral", "2": "positive"}),
    ),
    "fiqa": Preset(
        instruction=("sentence",),
        response=("sentiment_score", "score", "label"),
        label=("sentiment_score", "score", "label"),
        ask=_SENTIMENT.format(kind="headline or post"),
        read_response=_by_score,
    ),
    "tfns": Preset(
        instruction=("text",),
        response=("label",),
        label=("label",),
        ask=_SENTIMENT.format(kind="post on financial news"),
        read_response=_by_number({"0": "negative", "1": "positive", "2": "neutral"}),
    ),
    "dolly": Preset(instruction=("instruction",), input=("context",), response=("response",), label=("category",)),
    "alpaca": Preset(instruction=("instruction",), input=("input",), response=("output",)),
}


def load_records(
    *,
    source: str,
    path: str = "",
    preset: str = "",
    instruction_field: str = "instruction",
    input_field: str = "",
    response_field: str = "response",
    label_field: str = "",
    details_field: str = "",
    group_field: str = "",
) -> list[Record]:
    """All records of a source, in its order.

    A preset replaces the six fields. Details are kept where the response has them and the instruction has not (only
    those can leak); how many were not is logged.
    Errors: ValueError in one line for a source that is missing, empty, malformed, or lacks a field or its content.
    """
    if source in BUILTIN:
        return BUILTIN[source]()
    if source not in ("jsonl", "hub"):
        raise ValueError(f"data.source={source!r} is none of {', '.join([*BUILTIN, 'jsonl', 'hub'])}")
    if preset and preset not in PRESETS:
        raise ValueError(f"data.preset={preset!r} is none of {', '.join(PRESETS)}")
    fields = (
        PRESETS[preset]
        if preset
        else _own_fields(
            instruction_field, input=input_field, response=response_field, label=label_field, details=details_field, group=group_field
        )
    )
    rows = _file_rows(Path(path)) if source == "jsonl" else _hub_rows(path)
    records = [_to_record(index, row, fields=fields, path=path) for index, row in enumerate(rows)]
    if not records:
        raise ValueError(f"data.path={path}: holds no records; give a file with at least one")
    return _with_leakable_details(records, path=path)


def split_records(records: list[Record], *, num_train: int, num_heldout: int, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and held-out records, each in source order; `num_train=0` takes all that is left for training.

    *Guarantees*: no group is on both sides; the held-out side does not depend on `num_train`, and a larger training side
    contains a smaller one. Groups come in a seeded order; the last group of either side is cut to the number asked for,
    and what is cut from the held-out side is not used at all.
    Errors: ValueError where there are too few records.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault((record.group, -1 if record.group else index), []).append(index)
    order = list(groups.values())
    permuted = [order[i] for i in numpy_rng(seed, "split").permutation(len(order))]
    heldout: list[int] = []
    while permuted and len(heldout) < num_heldout:
        heldout.extend(permuted.pop(0))
    rest = [index for group in permuted for index in group]
    if len(heldout) < num_heldout or len(rest) < max(num_train, 1):
        raise ValueError(
            f"data.num_train={num_train} and data.num_heldout={num_heldout} need more than there is: {len(records)} records"
            f" in {len(order)} groups leave {len(rest)} for training after the held-out groups; lower one of them"
        )
    train = rest[:num_train] if num_train else rest
    return [records[i] for i in sorted(train)], [records[i] for i in sorted(heldout[:num_heldout])]


def _own_fields(instruction: str, *, input: str, response: str, label: str, details: str, group: str) -> Preset:
    def names(name: str) -> tuple[str, ...]:
        return (name,) if name else ()

    return Preset(
        instruction=names(instruction),
        input=names(input),
        response=names(response),
        label=names(label),
        details=names(details),
        group=names(group),
        remedy="set data.preset, or the data.*_field keys",
    )


def _to_record(index: int, row: Row, *, fields: Preset, path: str) -> Record:
    where, values = row
    at = f"data.path={path}: {where}"
    instruction = fields.ask.format(_required(values, fields.instruction, at=at, remedy=fields.remedy))
    extra = _optional(values, fields.input, at=at)
    if extra not in fields.empty_input:
        instruction = f"{instruction}\n\n{extra}"
    response = _required(values, fields.response, at=at, remedy=fields.remedy)
    label = _required(values, fields.label, at=at) if fields.label else ""
    try:
        response = fields.read_response(response)
        label = fields.read_response(label) if fields.label == fields.response else label
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None
    details = tuple(_details(values, fields.details, at=at))
    return Record(index, instruction, response, label=label, details=details, group=_optional(values, fields.group, at=at))


def _with_leakable_details(records: list[Record], *, path: str) -> list[Record]:
    """The records with those details only that the response has and the instruction has not."""
    result = []
    for record in records:
        details = tuple(detail for detail in record.details if detail in record.response and detail not in record.instruction)
        result.append(dataclasses.replace(record, details=details))
    num_given, num_kept = (sum(len(record.details) for record in side) for side in (records, result))
    if num_kept < num_given:
        logger.warning(
            "data.path=%s: %d of %d details are left out, since they are not in the response alone", path, num_given - num_kept, num_given
        )
    return result


def _find(values: dict[str, Any], names: tuple[str, ...], *, at: str, remedy: str = "") -> Any:
    """The first of the alternative fields that the row has."""
    for name in names:
        if name in values:
            return values[name]
    wanted = " or ".join(repr(name) for name in names)
    raise ValueError(f"{at} lacks the field {wanted}; it has {', '.join(values) or 'none'}" + (f" ({remedy})" if remedy else ""))


def _required(values: dict[str, Any], names: tuple[str, ...], *, at: str, remedy: str = "") -> str:
    value = _find(values, names, at=at, remedy=remedy)
    text = "" if value is None else str(value).strip()
    if not text:
        name = next(name for name in names if name in values)
        raise ValueError(f"{at}: the field {name!r} is empty; fill it in or remove the record")
    return text


def _optional(values: dict[str, Any], names: tuple[str, ...], *, at: str) -> str:
    value = _find(values, names, at=at) if names else None
    return "" if value is None else str(value).strip()


def _details(values: dict[str, Any], names: tuple[str, ...], *, at: str) -> list[str]:
    """A list of strings; in a csv cell, a JSON list or strings between semicolons."""
    value = _find(values, names, at=at) if names else []
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else value.split(";")
        except json.JSONDecodeError as error:
            raise ValueError(f"{at}: the field {names[0]!r} is not a JSON list ({error.msg})") from None
    if not isinstance(value or [], list):
        raise ValueError(f"{at}: the field {names[0]!r} must be a list of strings, not {type(value).__name__}")
    return [str(detail).strip() for detail in value or [] if str(detail).strip()]


def _file_rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"data.path={path}: the file {what}; give a .jsonl, .json, .csv or sentence@label .txt file")
    readers = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".txt": _sentence_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"data.path={path}: cannot tell what {path.suffix or 'a file without an ending'} holds; it must end in {', '.join(readers)}"
        )
    text = _read_text(path)
    if not text.strip():
        raise ValueError(f"data.path={path}: the file is empty; give one with at least one record")
    return readers[path.suffix.lower()](text, path)


def _read_text(path: Path) -> str:
    """UTF-8; a .txt may be Latin-1, in which the Financial PhraseBank was published."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if path.suffix.lower() == ".txt":
            return content.decode("latin-1")
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"data.path={path}: line {line} is not UTF-8; convert the file") from None


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    """One object a line, or one list of objects."""
    if text.lstrip().startswith("["):
        items = _parse(text, path=path, first_line=1)
        places = [f"item {number}" for number in range(1, len(items) + 1)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        places = [f"line {number}" for number, _ in lines]
        items = (_parse(line, path=path, first_line=number) for number, line in lines)
    for place, item in zip(places, items, strict=True):
        if not isinstance(item, dict):
            raise ValueError(f"data.path={path}: {place} is not an object with fields but {type(item).__name__}")
        yield place, item


def _parse(text: str, *, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"data.path={path}: line {first_line + error.lineno - 1} is not JSON ({error.msg}, column {error.colno})"
        ) from None


def _csv_rows(text: str, path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"data.path={path}: line {reader.line_num} is not csv ({error})") from None
        if row is None:
            return
        if None in row:
            raise ValueError(f"data.path={path}: line {reader.line_num} has more columns than the header; quote fields that hold commas")
        yield f"line {reader.line_num}", row


def _sentence_rows(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        sentence, separator, label = line.rpartition("@")
        if not separator:
            raise ValueError(f"data.path={path}: line {number} is not of the form sentence@label")
        yield f"line {number}", {"sentence": sentence, "label": label}


def _hub_rows(path: str) -> Iterator[Row]:
    """The rows of the data set's `train` split, or of its only one; `path` may also be a local folder in the Hub's layout."""
    from datasets import load_dataset  # imported here: seconds to import, and used by this source only

    try:
        splits = load_dataset(path)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"data.path={path}: looked for a local folder and for a data set on the Hub of that name, and could load neither ({reason});"
            " check the name and the connection, or download a file and use data.source=jsonl"
        ) from None
    if "train" not in splits and len(splits) != 1:
        raise ValueError(
            f"data.path={path}: has no split 'train' but {', '.join(splits)}; download the file wanted and use data.source=jsonl"
        )
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    for number, row in enumerate(rows, 1):
        yield f"row {number}", dict(row)
