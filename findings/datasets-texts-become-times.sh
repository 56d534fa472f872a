#!/usr/bin/env bash
# Versions: datasets 5.2.0 with pyarrow 26.0.1, pandas 3.1.1, numpy 2.4.6; Python 3.11. Seen since 2026-11-28.
#
# What happens: where all texts of a field of a JSON lines file look like dates, the field becomes a timestamp. A date then reads as midnight
# of that day, and a time loses its zone. One text among them that is no date leaves all as they were. That the field is declared as a
# string does not bring the written text back.
#
# Seen (what str() gives of the first value):
#   dates                      timestamp[s]  '2020-01-01 00:00:00'    written '2020-01-01'
#   times with a zone          timestamp[s]  '2020-01-01 10:00:00'    written '2020-01-01T10:00:00Z'
#   dates, declared as string  string        '2020-01-01 00:00:00'    written '2020-01-01'
#   dates and one other text   string        '2020-01-01'             written '2020-01-01'
#   dates, from a list         string        '2020-01-01'             written '2020-01-01'
#
# Why it matters: a prompt or an answer that is built from such a field has other characters than the file, so that training and the
# comparison of an answer with its reference go by a text which nobody wrote; and one more row in the file changes all of them.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6

cd "$work"
export HF_HOME="$work/cache" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
venv/bin/python - <<'PYTHON'
import json

from datasets import Dataset, Features, Value, load_dataset


def written(name, values):
    with open(name, "w") as file:
        file.writelines(json.dumps({"answer": value}) + "\n" for value in values)
    return name


def read(name, **options):
    return load_dataset("json", data_files=name, split="train", **options)


days = [f"2020-01-{day:02d}" for day in range(1, 29)]
times = [f"{day}T10:00:00Z" for day in days]
dates = written("dates.jsonl", days)
cases = {
    "dates": (days, read(dates)),
    "times with a zone": (times, read(written("times.jsonl", times))),
    "dates, declared as string": (days, read(dates, features=Features({"answer": Value("string")}))),
    "dates and one other text": (days, read(written("other.jsonl", [*days, "in spring"]))),
    "dates, from a list": (days, Dataset.from_list([{"answer": day} for day in days])),
}
seen = {}
for case, (texts, data) in cases.items():
    kind, first = data.features["answer"].dtype, str(data[0]["answer"])
    print(f"{case:<25}  {kind:<12}  {first!r:<23}  written {texts[0]!r}")
    seen[case] = kind, first

expected = {
    "dates": ("timestamp[s]", "2020-01-01 00:00:00"),
    "times with a zone": ("timestamp[s]", "2020-01-01 10:00:00"),
    "dates, declared as string": ("string", "2020-01-01 00:00:00"),
    "dates and one other text": ("string", "2020-01-01"),
    "dates, from a list": ("string", "2020-01-01"),
}
if seen != expected:
    raise SystemExit(f"the behaviour has changed: {seen}")
PYTHON
