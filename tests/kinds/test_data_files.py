"""Data files in the shapes in which instruction sets come: what is read of each, by value, from a file and from a folder in the Hub's layout.

A kind is a file's name, its content, the fields asked for, and either the records that its definition gives or the parts of the one line that refuses it.
"""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from raysim.config import DataConfig, SynthesisConfig
from raysim.data.choices import ChoiceQuestion, read_choices
from raysim.data.configured import public_records
from raysim.data.records import Record
from raysim.data.sources import read_source
from raysim.data.values import MAX_CHARACTERS

PAIR = {"instruction": "Which tool is in drawer 1?", "response": "The saw."}
OTHER = {"instruction": "Which tool is in drawer 2?", "response": "The file."}
ASKED, ANSWERED = PAIR["instruction"], PAIR["response"]


@dataclass(frozen=True)
class Kind:
    """One kind of data file."""

    name: str
    content: bytes
    records: list[Record] = field(default_factory=list)
    """What is read of it, or nothing if it is refused."""
    refused: tuple[str, ...] = ()
    """Parts of the line that refuses it."""
    fields: dict[str, str] = field(default_factory=dict)
    said: str = ""
    """Part of what the log says of it."""


def record(position: int = 0, instruction: str = ASKED, response: str = ANSWERED, **more: Any) -> Record:
    return Record(position, instruction, response, **more)


BOTH = [record(), record(1, OTHER["instruction"], OTHER["response"])]


def lines(*rows: Any, end: str = "\n") -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + end for row in rows).encode()


def chat(*turns: tuple[str, Any], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


def messages(*turns: tuple[str, Any]) -> bytes:
    return lines({"messages": chat(*turns)})


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


TWO = (("user", "Is it open?"), ("assistant", "Yes."), ("user", ASKED), ("assistant", ANSWERED))
EARLIER = (("user", "Is it open?"), ("assistant", "Yes."))
LABEL = {"label_field": "ward"}
ALPACA = {"preset": "alpaca"}
ALPACA_ROW = {"instruction": ASKED, "output": ANSWERED}
CSV = f"instruction,response\r\n{ASKED},{ANSWERED}\r\n"
FPB = "What is the sentiment of this sentence from the financial news for an investor? Answer with one word: negative, neutral or positive.\n\n"

CONVERSATIONS: dict[str, Kind] = {
    "messages": Kind("a.jsonl", messages(*TWO[2:]), [record()]),
    "messages, two turns": Kind("a.jsonl", messages(*TWO), [record(history=EARLIER)]),
    "messages, system turn": Kind(
        "a.jsonl", messages(("system", "Be brief."), *TWO), [record(history=(("system", "Be brief."), *EARLIER))]
    ),
    "messages, empty system turn": Kind("a.jsonl", messages(("system", ""), *TWO[2:]), [record()]),
    "messages, null system turn": Kind("a.jsonl", messages(("system", None), *TWO[2:]), [record()]),
    "sharegpt": Kind(
        "a.json", json.dumps([{"conversations": chat(("human", ASKED), ("gpt", ANSWERED), keys=("from", "value"))}]).encode(), [record()]
    ),
    "sharegpt, names of speakers": Kind(
        "a.jsonl",
        lines(
            *(
                {"conversations": chat((user, ASKED), (bot, ANSWERED), keys=("from", "value"))}
                for user in ("user", "Human")
                for bot in ("model", "bot", "chatgpt")
            )
        ),
        [record(position) for position in range(6)],
    ),
    "sharegpt, columns of turns": Kind(
        "a.jsonl", lines({"conversations": {"from": ["human", "gpt"], "value": [ASKED, ANSWERED]}}), [record()]
    ),
    "sharegpt, one turn's weight": Kind(
        "a.jsonl",
        lines({"conversations": [{"from": "human", "value": ASKED, "weight": 0}, {"from": "gpt", "value": ANSWERED, "weight": 1}]}),
        [record()],
    ),
    "chat, answer of weight 0": Kind(
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED, "weight": 0}]}),
        refused=("line 1: the field 'messages': turn 2", "weight 0"),
    ),
    "chat in a field of its own": Kind("a.jsonl", lines({"talk": chat(*TWO)}), [record(history=EARLIER)], fields={"chat_field": "talk"}),
    "chat inside an object": Kind("a.jsonl", lines({"data": {"talk": chat(*TWO[2:])}}), [record()], fields={"chat_field": "data.talk"}),
    "chat in a csv cell": Kind(
        "a.csv", ('messages\n"' + json.dumps(chat(*TWO)).replace('"', '""') + '"\n').encode(), [record(history=EARLIER)]
    ),
    "chat in a preset": Kind(
        "a.jsonl", lines({"messages": chat(*TWO), "category": "qa"}), [record(history=EARLIER, label="qa")], fields={"preset": "dolly"}
    ),
    "chat with a label and details": Kind(
        "a.jsonl",
        lines(
            {
                "messages": chat(("user", "I am Kim."), ("assistant", "Hello Kim, ask Ann."), *TWO[2:]),
                "ward": "w1",
                "names": ["Kim", "Ann", "saw"],
            }
        ),
        [record(history=(("user", "I am Kim."), ("assistant", "Hello Kim, ask Ann.")), label="w1", details=("Ann", "saw"))],
        fields=LABEL | {"details_field": "names"},
        said="1 of 3 details are left out",
    ),
    "chat, content in parts": Kind(
        "a.jsonl",
        messages(("user", [{"type": "text", "text": "Which tool"}, {"type": "text", "text": "is in drawer 1?"}]), TWO[3]),
        [record(instruction="Which tool\nis in drawer 1?")],
    ),
    "chat, a picture": Kind(
        "a.jsonl",
        messages(("user", [{"type": "image_url", "image_url": {"url": "x"}}]), TWO[3]),
        refused=("line 1: the field 'messages': turn 1", "type 'image_url'"),
    ),
    "chat, call of a tool": Kind(
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}),
        refused=("line 1: the field 'messages': turn 2", "'tool_calls'"),
    ),
    "chat, answer of a tool": Kind(
        "a.jsonl", messages(TWO[2], ("tool", "5"), TWO[3]), refused=("turn 2 has the role 'tool'", "user, human")
    ),
    "chat, thoughts kept apart": Kind(
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED, "reasoning_content": "Hm."}]}),
        refused=("turn 2", "'reasoning_content'"),
    ),
    "chat, last question open": Kind(
        "a.jsonl", messages(*TWO[2:], ("user", "And now?"), ("user", "Well?")), [record()], said="1 conversations are read without turns"
    ),
    "chat, assistant speaks first": Kind(
        "a.jsonl", messages(("assistant", "Hello."), *TWO[2:]), [record()], said="1 conversations are read without turns"
    ),
    "chat, neighbours of one role": Kind(
        "a.jsonl",
        messages(("user", "Hello."), ("user", ASKED), ("assistant", ANSWERED), ("assistant", "Look there.")),
        [record(instruction=f"Hello.\n\n{ASKED}", response=f"{ANSWERED}\n\nLook there.")],
    ),
    "chat, no answer in one": Kind(
        "a.jsonl", messages(*TWO[2:]) + messages(TWO[0]) + lines({"messages": []}), [record()], said="2 of 3 records are left out"
    ),
    "chat, an empty turn in one": Kind(
        "a.jsonl", messages(*TWO[:1], ("assistant", " "), *TWO[2:]) + messages(*TWO[2:]), [record(1)], said="1 of 2 records"
    ),
    "chat, late system turn": Kind(
        "a.jsonl", messages(*TWO[:2], ("system", "Be brief."), *TWO[2:]), refused=("'messages' has a system turn",)
    ),
    "chat, a turn that is none": Kind("a.jsonl", lines({"messages": ["hello"]}), refused=("turn 1 is a text, not an object",)),
    "chat, other keys": Kind(
        "a.jsonl", lines({"messages": [{"speaker": "x", "text": "y"}]}), refused=("turn 1 lacks role and content", "it has speaker, text")
    ),
    "chat, a text": Kind(
        "a.jsonl", lines({"messages": "hello"}), refused=("line 1: the field 'messages' holds a text, not a list of turns",)
    ),
    "chat under both names": Kind(
        "a.jsonl",
        lines({"messages": chat(*TWO), "conversations": chat(*TWO)}),
        refused=("'messages' and 'conversations' both hold", "data.chat_field"),
    ),
    "chat among plain records": Kind("a.jsonl", lines(PAIR, {"messages": chat(*TWO)}), [record(), record(1, history=EARLIER)]),
    "chat, an input field": Kind(
        "a.jsonl",
        lines({"messages": chat(*TWO), "more": "x"}),
        refused=("'more' cannot be added to a conversation",),
        fields={"input_field": "more"},
    ),
    "chat field and preset": Kind(
        "a.jsonl",
        lines({"messages": chat(*TWO)}),
        refused=("data.chat_field='messages' has no place with data.preset='alpaca'",),
        fields=ALPACA | {"chat_field": "messages"},
    ),
}

VALUES: dict[str, Kind] = {
    "input null": Kind("a.jsonl", lines(ALPACA_ROW | {"input": None}), [record()], fields=ALPACA),
    "input NaN": Kind("a.jsonl", lines(ALPACA_ROW | {"input": float("nan")}), [record()], fields=ALPACA),
    "input infinite": Kind("a.jsonl", lines(ALPACA_ROW | {"input": float("-inf")}), [record()], fields=ALPACA),
    "input absent in some": Kind(
        "a.jsonl", lines(ALPACA_ROW, ALPACA_ROW | {"input": "Look."}), [record(), record(1, f"{ASKED}\n\nLook.")], fields=ALPACA
    ),
    "input absent in all": Kind("a.jsonl", lines(ALPACA_ROW), [record()], fields=ALPACA),
    "input named, absent in all": Kind(
        "a.jsonl", lines(PAIR, OTHER), refused=("lacks the field 'more'", "no record has it"), fields={"input_field": "more"}
    ),
    "input instead of instruction": Kind("a.jsonl", lines(ALPACA_ROW | {"instruction": "", "input": ASKED}), [record()], fields=ALPACA),
    "empty outputs": Kind(
        "a.jsonl",
        lines(ALPACA_ROW, ALPACA_ROW | {"output": ""}, ALPACA_ROW | {"output": None}, ALPACA_ROW | {"instruction": " "}, ALPACA_ROW),
        [record(), record(4)],
        fields=ALPACA,
        said="3 of 5 records are left out, since there is nothing to learn (line 2: the field 'output' is empty)",
    ),
    "all outputs empty": Kind(
        "a.jsonl",
        lines(PAIR | {"response": ""}, PAIR | {"response": None}),
        refused=("line 1: the field 'response' is empty, as in all records",),
    ),
    "output lacking in one": Kind(
        "a.jsonl", lines(PAIR, {"instruction": "x"}), refused=("line 2 lacks the field 'response'; it has instruction",)
    ),
    "numbers and truth values": Kind(
        "a.jsonl",
        lines({"instruction": 7, "response": True}, {"instruction": "x", "response": 0}, {"instruction": "y", "response": 1.5}),
        [record(0, "7", "true"), record(1, "x", "0"), record(2, "y", "1.5")],
    ),
    "the texts NA, None, NaN": Kind(
        "a.jsonl",
        lines(*({"instruction": "x", "response": text} for text in ("NA", "None", "NaN"))),
        [record(i, "x", t) for i, t in enumerate(("NA", "None", "NaN"))],
    ),
    "the texts NA, None in csv": Kind("a.csv", b"instruction,response\nx,NA\ny,None\n", [record(0, "x", "NA"), record(1, "y", "None")]),
    "codes in csv": Kind(
        "a.csv",
        b"instruction,response,ward\nx,007,01\ny,1e3,1.0\n",
        [record(0, "x", "007", label="01"), record(1, "y", "1e3", label="1.0")],
        fields=LABEL,
    ),
    "dates": Kind(
        "a.jsonl", lines({"instruction": "When?", "response": "2020-01-01 00:00:00"}), [record(0, "When?", "2020-01-01 00:00:00")]
    ),
    "a list as a text": Kind(
        "a.jsonl", lines(PAIR, PAIR | {"response": ["a"]}), refused=("line 2: the field 'response' holds a list, not a text",)
    ),
    "turns as a text": Kind("a.jsonl", lines(PAIR | {"response": chat(*TWO)}), refused=("'response' holds a list", "data.chat_field")),
    "an object as a text": Kind(
        "a.jsonl",
        lines(PAIR | {"response": {"text": "a"}}),
        refused=("'response' holds an object with text, not a text", "'response.text'"),
    ),
    "the second of two names": Kind(
        "a.jsonl",
        lines({"question": ASKED, "answer": ANSWERED, "collection": None, "document_source": "w1", "focus": None}),
        [record(label="w1")],
        fields={"preset": "medquad"},
    ),
    "a conversation beside a null instruction": Kind(
        "a.jsonl", lines({"instruction": None, "messages": chat(*TWO)}), [record(history=EARLIER)]
    ),
    "a null conversation beside an instruction": Kind("a.jsonl", lines(PAIR | {"messages": None}), [record()]),
    "a null instruction and a null conversation": Kind(
        "a.jsonl",
        lines(PAIR, PAIR | {"instruction": None, "messages": None}),
        [record()],
        said="(line 2: the field 'instruction' is empty)",
    ),
    "a text inside an object": Kind(
        "a.jsonl", lines({"instruction": ASKED, "answer": {"text": ANSWERED}}), [record()], fields={"response_field": "answer.text"}
    ),
    "a name with a dot": Kind(
        "a.jsonl", lines({"instruction": ASKED, "answer.text": ANSWERED}), [record()], fields={"response_field": "answer.text"}
    ),
    "a label inside an object": Kind(
        "a.jsonl", lines(PAIR | {"meta": {"ward": "w1"}}), [record(label="w1")], fields={"label_field": "meta.ward"}
    ),
    "no such inner field": Kind(
        "a.jsonl",
        lines(PAIR | {"meta": {"ward": "w1"}}),
        refused=("lacks the field 'meta.wards'", "meta.ward"),
        fields={"label_field": "meta.wards"},
    ),
    "labels 1, 1.0, '1'": Kind(
        "a.jsonl", lines(*(PAIR | {"ward": ward} for ward in (1, 1.0, "1", " 1 "))), [record(i, label="1") for i in range(4)], fields=LABEL
    ),
    "labels false, 0, 0.5": Kind(
        "a.jsonl",
        lines(*(PAIR | {"ward": ward} for ward in (False, 0, 0.5))),
        [record(i, label=w) for i, w in enumerate(("false", "0", "0.5"))],
        fields=LABEL,
    ),
    "labels in two forms of Unicode": Kind(
        "a.jsonl",
        lines(PAIR | {"ward": "Caf\u00e9  A"}, PAIR | {"ward": "Cafe\u0301\nA"}),
        [record(i, label="Caf\u00e9 A") for i in range(2)],
        fields=LABEL,
    ),
    "label that is the response": Kind(
        "a.jsonl",
        lines({"instruction": "x", "mood": 1.0}),
        [record(0, "x", "1", label="1")],
        fields={"response_field": "mood", "label_field": "mood"},
    ),
    "class number from pandas": Kind(
        "a.jsonl",
        lines({"sentence": "Sales rose.", "label": 2.0}),
        [record(0, f"{FPB}Sales rose.", "positive", label="positive")],
        fields={"preset": "fpb"},
    ),
    "null label": Kind(
        "a.jsonl",
        lines(PAIR | {"ward": "a"}, PAIR | {"ward": None}, PAIR),
        refused=("line 2: the field 'ward' is empty, in 2 of 3 records",),
        fields=LABEL,
    ),
    "NaN label": Kind("a.jsonl", lines(PAIR | {"ward": float("nan")}), refused=("line 1: the field 'ward' is empty",), fields=LABEL),
    "list as a label": Kind("a.jsonl", lines(PAIR | {"ward": ["a"]}), refused=("line 1: the field 'ward' holds a list",), fields=LABEL),
    "object as a group": Kind(
        "a.jsonl", lines(PAIR | {"g": {"x": 1}}), refused=("line 1: the field 'g' holds an object with x",), fields={"group_field": "g"}
    ),
    "groups 3 and 3.0, null": Kind(
        "a.jsonl",
        lines(PAIR | {"g": 3}, PAIR | {"g": 3.0}, PAIR | {"g": None}),
        [record(0, group="3"), record(1, group="3"), record(2)],
        fields={"group_field": "g"},
    ),
    "details null, numbers, wide semicolon": Kind(
        "a.jsonl",
        lines(PAIR | {"d": None}, PAIR | {"d": "saw\uff1bThe"}, {"instruction": "x", "response": "Room 12.", "d": [12, None]}),
        [record(), record(1, details=("saw", "The")), record(2, "x", "Room 12.", details=("12",))],
        fields={"details_field": "d"},
    ),
    "details of objects": Kind(
        "a.jsonl", lines(PAIR | {"d": [{"name": "saw"}]}), refused=("line 1: the field 'd' holds an object",), fields={"details_field": "d"}
    ),
    "half a character": Kind(
        "a.jsonl",
        lines(PAIR, PAIR | {"response": "Fine \ud83d here"}),
        refused=("line 2: the field 'response' has half a character, \\ud83d, at position 5",),
    ),
    "half a character in a label": Kind(
        "a.jsonl", lines(PAIR | {"ward": "\udc00"}), refused=("line 1: the field 'ward' has half a character",), fields=LABEL
    ),
    "half a character in a detail": Kind(
        "a.jsonl", lines(PAIR | {"d": ["\udc00"]}), refused=("line 1: the field 'd' has half a character",), fields={"details_field": "d"}
    ),
    "half a character in a turn": Kind(
        "a.jsonl", messages(("user", "\ud83d"), TWO[3]), refused=("turn 1: the field 'content' has half a character",)
    ),
    "a character of two halves": Kind(
        "a.jsonl", lines(r'{"instruction": "x", "response": "\ud83d\ude00"}'), [record(0, "x", "\U0001f600")]
    ),
    "a zero character": Kind("a.jsonl", lines(r'{"instruction": "x", "response": "a\u0000b"}'), [record(0, "x", "a\0b")]),
    "a text that is too long": Kind(
        "a.jsonl",
        lines(PAIR, PAIR | {"response": "long " * (MAX_CHARACTERS // 5 + 1)}),
        refused=("line 2: the field 'response' has 1,000,004 characters", "1,000,000 are the most"),
    ),
    "a long text": Kind("a.jsonl", lines(PAIR | {"response": "x" * MAX_CHARACTERS}), [record(response="x" * MAX_CHARACTERS)]),
    "a conversation that is too long": Kind(
        "a.jsonl",
        messages(*[(role, "long " * 20_000) for _ in range(6) for role in ("user", "assistant")]),
        refused=("line 1: the field 'messages' has more than 1,000,000",),
    ),
}

FORMS: dict[str, Kind] = {
    "json lines": Kind("a.jsonl", lines(PAIR, "", OTHER), BOTH),
    "json lines, bare carriage returns": Kind("a.jsonl", lines(PAIR, OTHER, end="\r"), BOTH),
    "ndjson": Kind("a.ndjson", lines(PAIR, OTHER), BOTH),
    "json lines, gz": Kind("a.jsonl.gz", gzip.compress(lines(PAIR, OTHER)), BOTH),
    "a broken gz": Kind("a.jsonl.gz", gzip.compress(lines(PAIR, OTHER))[:-9], refused=("is not a whole .gz file",)),
    "one list": Kind("a.json", json.dumps([PAIR, OTHER], indent=2).encode(), BOTH),
    "wrapped list": Kind("a.json", json.dumps({"version": 1, "data": [PAIR, OTHER]}, indent=1).encode(), BOTH),
    "wrapped list in one line": Kind("a.json", json.dumps({"data": [PAIR, OTHER]}).encode(), BOTH),
    "two wrapped lists": Kind(
        "a.json", json.dumps({"train": [PAIR], "test": [OTHER]}).encode(), refused=("several lists of objects, train, test",)
    ),
    "one record with a list of objects": Kind("a.json", json.dumps(PAIR | {"spans": [{"from": 1}]}).encode(), [record()]),
    "one conversation": Kind("a.json", json.dumps({"messages": chat(*TWO)}, indent=1).encode(), [record(history=EARLIER)]),
    "objects over several lines": Kind("a.json", "\n".join(json.dumps(row, indent=2) for row in (PAIR, OTHER)).encode(), BOTH),
    "objects over several lines, one broken": Kind(
        "a.jsonl", (json.dumps(PAIR, indent=2) + '\n{\n  "instruction" 3\n}').encode(), refused=("line 6 is not JSON", "column 17")
    ),
    "a broken line": Kind("a.jsonl", lines(PAIR, '{"instruction": "x"'), refused=("line 2 is not JSON",)),
    "a field twice": Kind(
        "a.jsonl",
        lines(PAIR, '{"instruction": "x", "response": "a", "response": "b"}'),
        refused=("line 2: an object has the field 'response' twice",),
    ),
    "deep nesting": Kind(
        "a.jsonl", lines(PAIR, f'{{"instruction": "x", "response": {nested(100_000)}}}'), refused=("line 2 is nested too deeply",)
    ),
    "deep nesting in a list": Kind("a.json", nested(100_000).encode(), refused=("line 1 is nested too deeply",)),
    "deep nesting in a cell": Kind(
        "a.csv",
        f"instruction,response,d\nx,y,{nested(100_000)}\n".encode(),
        refused=("line 2: the field 'd' is nested too deeply",),
        fields={"details_field": "d"},
    ),
    "a number of 5000 digits": Kind(
        "a.jsonl", lines('{"instruction": %s, "response": "x"}' % ("1" * 5000)), refused=("line 1: a number has 5000 digits",)
    ),
    "line separators in texts": Kind(
        "a.jsonl", '{"instruction": "x\u2028y\u0085", "response": "a\u2029b"}\n'.encode(), [record(0, "x\u2028y", "a\u2029b")]
    ),
    "csv, quotes, commas, line ends": Kind(
        "a.csv", b'instruction,response\r\nx,"He said ""yes, 1"",\nthen; left."\r\n', [record(0, "x", 'He said "yes, 1",\nthen; left.')]
    ),
    "csv, mark and CRLF": Kind("a.csv", b"\xef\xbb\xbf" + CSV.encode(), [record()]),
    "csv, semicolons": Kind("a.csv", f"instruction;response\n{ASKED};{ANSWERED}\n".encode(), [record()]),
    "csv, semicolons and commas": Kind("a.csv", b"instruction;response;a,b\nx, y;z;1\n", [record(0, "x, y", "z")]),
    "csv, tabs": Kind("a.csv", f"instruction\tresponse\n{ASKED}\t{ANSWERED}\n".encode(), [record()]),
    "csv, delimiter told by Excel": Kind("a.csv", f"sep=;\r\ninstruction;response\r\n{ASKED};{ANSWERED}\r\n".encode(), [record()]),
    "tsv": Kind("a.tsv", b'instruction\tresponse\nx, y\tHe said "no".\n', [record(0, "x, y", 'He said "no".')]),
    "csv, blanks in the header": Kind("a.csv", b"\ninstruction, response\nx,y\n", [record(0, "x", "y")]),
    "csv, a field of 200 kB": Kind("a.csv", b"instruction,response\nx," + b"y" * 200_000 + b"\n", [record(0, "x", "y" * 200_000)]),
    "csv, a short row": Kind("a.csv", b"instruction,response,ward\nx,y\nz\n", [record(0, "x", "y")], said="1 of 2 records are left out"),
    "csv, a long row": Kind("a.csv", b"instruction,response\nx,y,z\n", refused=("line 2 has more columns than the header", "hold ','")),
    "csv, an open quote": Kind("a.csv", b'instruction,response\nx,"y\nz,w\n', refused=("is not csv",)),
    "csv, a column twice": Kind("a.csv", b"instruction,response,response\nx,y,z\n", refused=("the header has 'response' twice",)),
    "csv, another field's name": Kind("a.csv", b"question;answer\nx;y\n", refused=("line 2 lacks the field 'instruction'",)),
    "csv, Windows-1252": Kind(
        "a.csv",
        "instruction,response\r\nx,Caf\u00e9 \u2026 \u20ac5\r\n".encode("cp1252"),
        [record(0, "x", "Caf\u00e9 \u2026 \u20ac5")],
        said="read as Windows-1252",
    ),
    "csv, GBK": Kind(
        "a.csv",
        "instruction,response\r\n\u4f60\u597d,\u8bf7\u6309\u533b\u5631\u670d\u7528\r\n".encode("gbk"),
        refused=("line 2 is not UTF-8", "convert it to UTF-8"),
    ),
    "csv, Windows-1251": Kind(
        "a.csv", "instruction,response\r\nx,\u041f\u0440\u0438\u0432\u0435\u0442\r\n".encode("cp1251"), refused=("line 2 is not UTF-8",)
    ),
    "csv, damaged UTF-8": Kind(
        "a.csv", "instruction,response\r\nx,Caf\u00e9 na\u00efve\r\ny,".encode() + b"\xc3\r\n", refused=("line 3 is not UTF-8",)
    ),
    "csv, UTF-16": Kind("a.csv", CSV.encode("utf-16"), [record()]),
    "csv, UTF-16 without its mark": Kind("a.csv", CSV.encode("utf-16-le"), refused=("line 1 holds a zero byte",)),
    "json lines, UTF-16": Kind("a.jsonl", lines(PAIR).decode().encode("utf-16"), [record()]),
    "json lines, UTF-32": Kind("a.jsonl", lines(PAIR).decode().encode("utf-32"), [record()]),
    "json lines, Windows-1252": Kind(
        "a.jsonl", lines(PAIR) + b'{"instruction": "Caf\xe9"}\n', refused=("line 2 is not UTF-8; convert the file",)
    ),
    "sentences, Windows-1252": Kind(
        "a.txt",
        "Sales rose \u2026 by 5 percent .@positive\r\nA mail to a@b .@neutral\r\n".encode("cp1252"),
        [
            record(0, f"{FPB}Sales rose \u2026 by 5 percent .", "positive", label="positive"),
            record(1, f"{FPB}A mail to a@b .", "neutral", label="neutral"),
        ],
        fields={"preset": "fpb"},
    ),
    "sentences, separators within": Kind(
        "a.txt",
        "Up \u0085 and\u2028on\x0c .@positive\n".encode(),
        [record(0, f"{FPB}Up \u0085 and\u2028on\x0c .", "positive", label="positive")],
        fields={"preset": "fpb"},
    ),
    "not a data file": Kind("a.xml", b"<a/>", refused=("cannot tell what .xml holds",)),
    "a column for each letter": Kind(
        "a.json",
        json.dumps({"instruction": {"0": "x"}, "response": {"0": "y"}}).encode(),
        refused=("'instruction' holds an object with 0",),
    ),
}

KINDS = CONVERSATIONS | VALUES | FORMS


def spec(kind: Kind, path: Path, *, source: str) -> DataConfig:
    return DataConfig(source, str(path), **kind.fields)


def check(kind: Kind, found: Callable[[], Any], *, path: Path, caplog: pytest.LogCaptureFixture) -> str:
    if kind.refused:
        with pytest.raises(ValueError) as error:
            found()
        said = str(error.value)
        assert "\n" not in said
        assert said.startswith(("data.path=" + str(path), "data.chat_field=")), said
        assert all(part in said for part in kind.refused), said
        return "refused"
    assert list(found().records) == kind.records
    logged = [message.getMessage() for message in caplog.records if message.name.startswith("raysim")]
    assert any(kind.said in message for message in logged) if kind.said else True, logged
    return f"{len(kind.records)} read"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_read(kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]) -> None:
    path = tmp_path / kind.name
    path.write_bytes(kind.content)
    record_property("cell", check(kind, lambda: read_source(spec(kind, path, source="jsonl")), path=path, caplog=caplog))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, in which `datasets` keeps what it converts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.name != "a.xml"], ids=[name for name, kind in KINDS.items() if kind.name != "a.xml"]
)
def test_hub(
    kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: Path, record_property: Callable[[str, object], None]
) -> None:
    """A folder in the Hub's layout that holds the file gives the same records, and the same line."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / kind.name).write_bytes(kind.content)
    record_property("cell", check(kind, lambda: read_source(spec(kind, folder, source="hub")), path=folder, caplog=caplog))


def write_table(path: Path, columns: dict[str, Any]) -> None:
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)


AT = datetime(2020, 1, 2, 3, 4)

# What a folder in the Hub's layout holds, the fields asked for, and the records or what is refused.
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, str], list[Record] | str]] = {
    "a field in the second file only": (
        {"train-1.jsonl": lines(PAIR), "train-2.jsonl": lines(OTHER | {"more": "Look."})},
        {"input_field": "more"},
        [record(), record(1, f"{OTHER['instruction']}\n\nLook.", OTHER["response"])],
    ),
    "a field in the first file only": (
        {"train-1.jsonl": lines(PAIR | {"more": "Look."}), "train-2.jsonl": lines(OTHER)},
        {"input_field": "more"},
        [record(0, f"{ASKED}\n\nLook."), record(1, OTHER["instruction"], OTHER["response"])],
    ),
    "a fault in the second file": (
        {"train-1.jsonl": lines(PAIR), "train-2.jsonl": lines(OTHER, "{")},
        {},
        r"set: train-2.jsonl: line 2 is not JSON",
    ),
    "a number far into a file of texts": (
        {
            "train.jsonl": lines(
                *(PAIR | {"more": "x" * 2_000_000} for _ in range(6)), PAIR | {"response": 'He said "no".'}, PAIR | {"response": 5}
            )
        },
        {},
        [*(record(i) for i in range(6)), record(6, response='He said "no".'), record(7, response="5")],
    ),
    "texts that look like dates": (
        {"train.jsonl": lines(*(PAIR | {"response": f"2020-01-0{day}"} for day in (1, 2)))},
        {},
        [record(i, response=f"2020-01-0{i + 1}") for i in range(2)],
    ),
    "csv with settings of its own": (
        {
            "set.csv": f"instruction;response\n{ASKED};{ANSWERED}\n".encode(),
            "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: set.csv\n  sep: ';'\n---\n",
        },
        {},
        [record()],
    ),
    "parquet": ({"train.parquet": {"instruction": [ASKED], "response": [ANSWERED]}}, {}, [record()]),
    "parquet, dates, decimals, floats, null": (
        {
            "train.parquet": {
                "instruction": ["a", "b", None],
                "response": [AT, AT, AT],
                "ward": [1.0, 2.0, None],
                "sum": [Decimal("1.50"), None, None],
            }
        },
        {"label_field": "ward", "input_field": "sum"},
        [record(0, "a\n\n1.50", "2020-01-02T03:04:00", label="1"), record(1, "b", "2020-01-02T03:04:00", label="2")],
    ),
    "parquet, conversations": ({"train.parquet": {"messages": [chat(*TWO)]}}, {}, [record(history=EARLIER)]),
    "parquet, a list": (
        {"train.parquet": {"instruction": [ASKED], "response": [["a"]]}},
        {},
        r"row 1: the field 'response' holds a list, not a text",
    ),
    "parquet, bytes": (
        {"train.parquet": {"instruction": [ASKED], "response": [b"a"]}},
        {},
        r"row 1: the field 'response' holds bytes, not a text",
    ),
    "parquet, a field in the second file only": (
        {
            "train-1.parquet": {"instruction": [ASKED], "response": [ANSWERED]},
            "train-2.parquet": {"instruction": [ASKED], "response": [5], "more": ["Look."]},
        },
        {"input_field": "more"},
        [record(), record(1, f"{ASKED}\n\nLook.", "5")],
    ),
    "parquet, a picture": (
        {"train.parquet": {"instruction": [ASKED], "response": [{"bytes": b"a", "path": "x"}]}},
        {},
        r"row 1: the field 'response' holds an object with bytes, path, not a text",
    ),
    "parquet that is none": ({"train.parquet": b"PAR1"}, {}, r"the file is not Parquet that can be read \(.*Parquet.*\)"),
    "arrow": (
        {"train.arrow": {"instruction": [ASKED], "response": [ANSWERED], "at": [AT]}},
        {"input_field": "at"},
        [record(0, f"{ASKED}\n\n2020-01-02T03:04:00")],
    ),
    "arrow, other fields in the second file": (
        {"train-1.arrow": {"instruction": [ASKED]}, "train-2.arrow": {"response": [ANSWERED]}},
        {},
        r"the folder could not be loaded as a data set \(.*; .*column names don't match.*\)",
    ),
    "no data files": (
        {"README.md": b"# Nothing"},
        {},
        r"the folder could not be loaded as a data set \(.*doesn't contain any data files.*\)",
    ),
    "several splits, none of them train": ({"test.jsonl": lines(PAIR), "validation.jsonl": lines(PAIR)}, {}, r"has no split 'train' but "),
}


@pytest.mark.parametrize(("files", "fields", "expected"), FOLDERS.values(), ids=FOLDERS.keys())
def test_folder(
    files: dict[str, Any],
    fields: dict[str, str],
    expected: list[Record] | str,
    tmp_path: Path,
    cache: Path,
    record_property: Callable[[str, object], None],
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in files.items():
        if isinstance(content, dict):
            write_table(folder / name, content)
        else:
            (folder / name).write_bytes(content)
    source = DataConfig("hub", str(folder), **fields)
    if isinstance(expected, list):
        assert list(read_source(source).records) == expected
        record_property("cell", f"{len(expected)} read")
        return
    with pytest.raises(ValueError, match=expected) as error:
        read_source(source)
    assert str(error.value).startswith(f"data.path={folder}: ")
    assert "\n" not in str(error.value)
    record_property("cell", "refused")


PATHS: dict[str, tuple[str, str, str]] = {
    "absent": ("jsonl", "{folder}/gone.jsonl", r"the file does not exist; give a .jsonl"),
    "a folder": ("jsonl", "{folder}", r"the file is a folder; give a .jsonl"),
    "a pipe": ("jsonl", "{folder}/pipe", r"the file is not a file; give a .jsonl"),
    "too long a name": ("jsonl", "{folder}/" + "x" * 300, r"the file cannot be reached \(File name too long\)"),
    "a zero byte": ("jsonl", "{folder}/a\0b", r"the file cannot be reached \(embedded null byte\)"),
    "a home that is none": ("jsonl", "~nobody-of-that-name/set.jsonl", r"the file does not exist"),
    "a file as a data set": ("hub", "{folder}/set.jsonl", r"is a file, not a data set; use data.source=jsonl"),
    "too long a name, hub": ("hub", "{folder}/" + "x" * 300, r"looked for a local folder and for a data set on the Hub"),
}


@pytest.mark.parametrize(("source", "path", "expected"), PATHS.values(), ids=PATHS.keys())
def test_path(source: str, path: str, expected: str, tmp_path: Path, cache: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "set.jsonl").write_bytes(lines(PAIR))
    with pytest.raises(ValueError, match=expected) as error:
        read_source(DataConfig(source, path.format(folder=tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "path"), [("jsonl", "~/set/a.jsonl"), ("hub", "~/set")], ids=["the home folder's file", "the home folder's data set"]
)
def test_home(source: str, path: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(lines(PAIR))
    assert list(read_source(DataConfig(source, path)).records) == [record()]


CHOICE = {"question": "Which?", "options": ["saw", "file"], "answer": 1}
ASKED_CHOICE = ChoiceQuestion("Which?\n\nA. saw\nB. file\n\nAnswer with the text of the right option.", ("saw", "file"), 1)

QUESTIONS: dict[str, tuple[str, bytes, str]] = {
    "questions, lines": ("q.jsonl", lines(CHOICE), ""),
    "questions, one over several lines": ("q.jsonl", json.dumps(CHOICE, indent=1).encode(), ""),
    "questions, wrapped": ("q.json", json.dumps({"data": [CHOICE]}).encode(), ""),
    "questions, UTF-16": ("q.jsonl", lines(CHOICE).decode().encode("utf-16"), ""),
    "questions, gz": ("q.jsonl.gz", gzip.compress(lines(CHOICE)), ""),
    "questions, bare carriage returns": ("q.jsonl", lines(CHOICE, end="\r"), ""),
    "questions, Windows-1252": ("q.jsonl", lines(CHOICE) + b"\xe9", r"line 2 is not UTF-8"),
    "questions, half a character": (
        "q.jsonl",
        lines(CHOICE | {"question": "\ud83d"}),
        r"line 1: the field 'question' has half a character",
    ),
    "questions, half an option": (
        "q.jsonl",
        lines(CHOICE | {"options": ["a", "\ud83d"]}),
        r"line 1: the field 'options' has half a character",
    ),
    "questions, NaN": ("q.jsonl", lines(CHOICE | {"question": float("nan")}), r"line 1: the field 'question' must hold a text"),
    "questions, NaN answer": ("q.jsonl", lines(CHOICE | {"answer": float("nan")}), r"line 1: the field 'answer' is nan, which names none"),
    "questions, deep nesting": ("q.jsonl", lines(CHOICE, nested(100_000)), r"line 2 is nested too deeply"),
    "questions, too long": (
        "q.jsonl",
        lines(CHOICE | {"question": "x" * (MAX_CHARACTERS + 1)}),
        r"line 1: the field 'question' has 1,000,001 characters",
    ),
    "questions, a field twice": (
        "q.jsonl",
        lines('{"question": "a", "question": "b"}'),
        r"line 1: an object has the field 'question' twice",
    ),
}


@pytest.mark.parametrize(("name", "content", "refused"), QUESTIONS.values(), ids=QUESTIONS.keys())
def test_questions(name: str, content: bytes, refused: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if not refused:
        assert read_choices(path, form="options") == [ASKED_CHOICE]
        return
    with pytest.raises(ValueError, match=refused) as error:
        read_choices(path, form="options")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (lines(PAIR, PAIR | {"response": ""}), ""),
        (lines({"question": "a"}), r"^synthesis.path=.*: line 1 lacks the field 'instruction'; it has question \(set synthesis.preset\)$"),
        (lines(PAIR | {"response": "\ud83d"}), r"^synthesis.path=.*: line 1: the field 'response' has half a character"),
    ],
    ids=["public records", "public records, other fields", "public records, half a character"],
)
def test_public(rows: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(rows)
    synthesis = SynthesisConfig(source="file", path=str(tmp_path / "a.jsonl"))
    if not expected:
        assert public_records(synthesis) == [record()]
        return
    with pytest.raises(ValueError, match=expected):
        public_records(synthesis)
