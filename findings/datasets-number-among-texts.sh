#!/usr/bin/env bash
# Versions: datasets 5.2.0 with pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6; Python 3.11. Seen since 2026-11-28.
#
# What happens: the JSON reader decides the type of a field from the first 10 MB of the first file. If the field holds only texts
# there and a number once later, then from the 10 MB piece with the number on, and in all files after it, each text comes back as its
# JSON source: with quotes around it, line feeds and quotes escaped. The type stays string, and nothing is said. That the field is declared
# as a string does not help. A number within the first 10 MB does no harm: the field then is of mixed type, and all values are as written.
#
# Seen:
#   one file of 26000 rows, 24401963 bytes, the number in row 12500: 14820 texts changed, the first in row 11179, the last in row 25999
#     row 11179 begins '"Line 11179\\nsays \\"yes\\". w' instead of 'Line 11179\nsays "yes". w'
#   the same, declared as a string: 14820 texts changed
#   the same, with on_mixed_types=None: refused
#   the same, read in one piece: 0 texts changed
#   the same file without the number: 0 texts changed
#   three files of 2 rows, the number in the second: ['a', 'b', '"c"', '7', '"d"', '"e"']
#   the same, the one with the number first: ['c', 7, 'a', 'b', 'd', 'e']
#
# Why it matters: a model trained on such rows learns to write quotes and \n in its answers, and only part of its records is hit.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6

cd "$work"
export HF_HOME="$work/cache" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
venv/bin/python - <<'PYTHON'
import json
import os

from datasets import Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

ROWS, NUMBER = 26000, 12500


def text(row):
    return f'Line {row}\nsays "yes". ' + "word " * 180


def write(name, values):
    with open(name, "w") as file:
        file.writelines(json.dumps({"text": value}) + "\n" for value in values)


def changed(name, **options):
    values = load_dataset("json", data_files=name, split="train", **options)["text"][:]
    return [row for row, value in enumerate(values) if row != NUMBER and value != text(row)], values


write("number.jsonl", [7 if row == NUMBER else text(row) for row in range(ROWS)])
write("texts.jsonl", [text(row) for row in range(ROWS)])
seen = {}

rows, values = changed("number.jsonl")
print(
    f"one file of {ROWS} rows, {os.path.getsize('number.jsonl')} bytes, the number in row {NUMBER}: "
    f"{len(rows)} texts changed, the first in row {rows[0] if rows else None}, the last in row {rows[-1] if rows else None}"
)
if rows:
    print(f"  row {rows[0]} begins {values[rows[0]][:28]!r} instead of {text(rows[0])[:24]!r}")
seen["as it comes"] = len(rows)
seen["the others are JSON source"] = all(values[row] == json.dumps(text(row)) for row in rows)

rows, _ = changed("number.jsonl", features=Features({"text": Value("string")}))
print(f"the same, declared as a string: {len(rows)} texts changed")
seen["declared"] = len(rows)

try:
    changed("number.jsonl", on_mixed_types=None)
    seen["on_mixed_types=None"] = "read"
except DatasetGenerationError:
    seen["on_mixed_types=None"] = "refused"
print(f"the same, with on_mixed_types=None: {seen['on_mixed_types=None']}")

rows, _ = changed("number.jsonl", chunksize=64 << 20)
print(f"the same, read in one piece: {len(rows)} texts changed")
seen["one piece"] = len(rows)

rows, _ = changed("texts.jsonl")
print(f"the same file without the number: {len(rows)} texts changed")
seen["no number"] = len(rows)

files = {"one.jsonl": ["a", "b"], "two.jsonl": ["c", 7], "three.jsonl": ["d", "e"]}
for name, values in files.items():
    write(name, values)
seen["files"] = load_dataset("json", data_files=list(files), split="train")["text"][:]
print(f"three files of 2 rows, the number in the second: {seen['files']}")
seen["number first"] = load_dataset("json", data_files=["two.jsonl", "one.jsonl", "three.jsonl"], split="train")["text"][:]
print(f"the same, the one with the number first: {seen['number first']}")

expected = {
    "as it comes": 14820,
    "the others are JSON source": True,
    "declared": 14820,
    "on_mixed_types=None": "refused",
    "one piece": 0,
    "no number": 0,
    "files": ["a", "b", '"c"', "7", '"d"', '"e"'],
    "number first": ["c", 7, "a", "b", "d", "e"],
}
if seen != expected:
    raise SystemExit(f"the behaviour has changed: {seen}")
PYTHON
