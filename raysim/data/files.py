"""Rows of data files: JSON in its many layouts, csv, and lines of sentence@label, from this machine or from the Hub.

Texts come as they stand in the file: no type is guessed from other rows, so that "NA", "007" and a date stay what they are. The package
`datasets` finds and fetches the files of a data set, and reads those of other kinds that carry their types with them (Arrow).
Left out: other code pages than Windows-1252 (which none can tell from each other), archives of several files, and scripts of data sets.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from raysim.data.values import kind_of, listed

# (where it stands, such as "line 3"; its fields)
Row = tuple[str, dict[str, Any]]

RECORD_FILES = "give a .jsonl, .json, .csv, .parquet or sentence@label .txt file"

LINE_END = re.compile(r"\r\n|\n|\r")
"""What ends a line of a file. `str.splitlines` also ends one at characters that stand within texts, such as U+2028."""

UNPACK: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MOST_UNPACKED_BYTES = 2**30
"""Of a packed file, unpacked, and of the values of a Parquet file: a few kilobytes can hold as much as a disk."""
MOST_LINE = 2**25
"""Characters of a record that is a line of JSON: more than a text of the most characters takes, each of them written as its code."""
CHUNK_BYTES, BATCH_ROWS = 2**20, 1000
"""How much is unpacked at once."""
MARKS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"", "utf-8-sig"))
"""Byte order marks and the encodings they tell, the longer ones first."""
OWN_READERS = ("json", "csv", "text", "parquet")
"""What `datasets` calls files that are read here: those whose types it would guess, and those that it reads with the types of the first one."""
MAX_DIGITS = 4300
"""The longest whole number that Python reads."""


def file_rows(path: str, *, wanted: frozenset[str], say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of a local file, by its ending; `wanted` are the names of fields by which a csv delimiter and a wrapped list are recognised.

    Guarantees: a line ends at a line feed, a carriage return or both, and nowhere else. UTF-8, and UTF-16 and UTF-32 that begin with their
    mark, are read; a csv or text file in none of them is read as Windows-1252 if it can be that, and `say` is told.
    Errors: ValueError in one line for what cannot be read, naming the line.
    """
    _check_file(path, remedy=RECORD_FILES)
    return _rows(path, name=Path(path).name, wanted=wanted, say=say)


def hub_rows(path: str, *, wanted: frozenset[str], say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of the data set's `train` split, or of its only one; `path` may also be a local folder in the Hub's layout.

    Guarantees: JSON, csv, text and Parquet files give the same rows as `file_rows`, each file by itself.
    Errors: ValueError in one line.
    """
    folder = os.path.expanduser(path)
    if os.path.isfile(folder):
        raise ValueError("is a file, not a data set; use data.source=jsonl, or give the folder that holds it")
    try:
        builder, splits = _fetched(folder if os.path.isdir(folder) else path)
    except Exception as error:
        raise ValueError(_not_loaded(error, found=os.path.isdir(folder))) from None
    if "train" not in splits and len(splits) != 1:
        raise ValueError(f"has no split 'train' but {listed(splits)}; download the file wanted and use data.source=jsonl")
    split = splits["train"] if "train" in splits else next(iter(splits.values()))
    if builder.name not in OWN_READERS:
        yield from _typed_rows(split)
        return
    for url, file in split.items():
        name = url.rsplit("/", 1)[-1]
        place = f"{name}: " if len(split) > 1 else ""
        try:
            for where, values in _rows(file, name=name, wanted=wanted, say=say):
                yield place + where, values
        except ValueError as error:
            raise ValueError(f"{place}{error}") from None


def json_items(text: str, *, wanted: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """What a JSON text lists, each with its place: one list, one value a line, values one after another, or the list that one object wraps.

    An object that has a field in `wanted` is an item itself.
    Errors: ValueError naming the line.
    """
    if text.lstrip().startswith("["):
        yield from ((f"item {number}", item) for number, item in enumerate(_parsed(text, line=1), 1))
        return
    lines = [(number, line) for number, line in enumerate(LINE_END.split(text), 1) if line.strip()]
    try:
        first = DECODER.decode(lines[0][1]) if lines else None
    except (ValueError, RecursionError):
        items = list(_one_after_another(text))
    else:
        if len(lines) != 1:
            for number, line in lines:
                if len(line) > MOST_LINE:
                    raise ValueError(f"line {number} has {len(line):,} characters, of which a record may have {MOST_LINE:,}; remove it")
                yield f"line {number}", _parsed(line, line=number)
            return
        items = [(f"line {lines[0][0]}", first)]
    yield from _unwrapped(items[0][1], wanted=wanted) if len(items) == 1 else items


def read_any_text(path: str, *, remedy: str, say: Callable[[str], None]) -> str:
    """The text of a local file.

    Errors: ValueError in one line, as `file_rows`; `remedy` is said of a file that is none.
    """
    _check_file(path, remedy=remedy)
    return _text_of_file(path, name=Path(path).name, say=say)


def parse_json(text: str, *, at: str) -> Any:
    """The value of a JSON text that stands within a field, which `at` names.

    Errors: ValueError in one line.
    """
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{at} is not JSON ({error.msg}, column {error.pos + 1}); mend or remove it") from None
    except RecursionError:
        raise ValueError(f"{at} is nested too deeply to be read; flatten it or remove it") from None
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None


def _endings(name: str) -> tuple[str, str]:
    """What a file's name says it holds, and how that is packed."""
    path = Path(name.lower())
    return (path.with_suffix("").suffix, path.suffix) if path.suffix in UNPACK else (path.suffix, "")


def _rows(path: str, *, name: str, wanted: frozenset[str], say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of a file that is called `name`, wherever it lies."""
    ending, packing = _endings(name)
    if ending == ".parquet" and not packing:
        return _parquet_rows(os.path.expanduser(path))
    if ending not in READERS:
        raise ValueError(f"cannot tell what {ending or 'a file without an ending'} holds; it must end in {', '.join(READERS)} or .parquet")
    text = _text_of_file(path, name=name, say=say)
    if not text.strip():
        raise ValueError("the file is empty; give one with at least one record")
    return READERS[ending](text, wanted)


def _check_file(path: str, *, remedy: str) -> None:
    file = Path(os.path.expanduser(path))
    try:
        file.stat()
        what = "is a folder" if file.is_dir() else "" if file.is_file() else "is not a file"
    except FileNotFoundError:
        what = "does not exist"
    except (OSError, ValueError) as error:  # a name that is too long or holds a zero byte, a folder that may not be entered
        what = f"cannot be reached ({error.strerror if isinstance(error, OSError) else error})"
    if what:
        raise ValueError(f"the file {what}; {remedy}")


def _text_of_file(path: str, *, name: str, say: Callable[[str], None]) -> str:
    ending, packing = _endings(name)
    try:
        content = Path(os.path.expanduser(path)).read_bytes()
    except OSError as error:
        raise ValueError(f"the file cannot be read ({error.strerror})") from None
    try:
        content = _unpacked(content, packing=packing) if packing else content
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        raise ValueError(f"the file is not a whole {packing} file; pack it again, or unpack it") from None
    return _decoded(content, ending=ending, say=say)


def _unpacked(content: bytes, *, packing: str) -> bytes:
    unpacked = io.BytesIO()
    with UNPACK[packing](io.BytesIO(content)) as file:
        while chunk := file.read(CHUNK_BYTES):
            unpacked.write(chunk)
            _check_unpacked(unpacked.tell())
    return unpacked.getvalue()


def _check_unpacked(num_bytes: int) -> None:
    if num_bytes > MOST_UNPACKED_BYTES:
        raise ValueError(f"the file holds more than {MOST_UNPACKED_BYTES:,} bytes unpacked; split it, or unpack it")


def _decoded(content: bytes, *, ending: str, say: Callable[[str], None]) -> str:
    encoding = next(encoding for mark, encoding in MARKS if content.startswith(mark))
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\n|\r", content[: error.start])) + 1
        if encoding != "utf-8-sig" or ending not in (".csv", ".tsv", ".txt"):
            raise ValueError(f"line {line} is not {encoding.upper().removesuffix('-SIG')}; convert the file") from None
        text = _western(content, line=line)
        say(f"is not UTF-8 (line {line}) and was read as Windows-1252; convert the file if it is something else")
    if "\0" in text:
        line = len(LINE_END.findall(text[: text.index("\0")])) + 1
        raise ValueError(f"line {line} holds a zero byte, so this is no text in UTF-8; convert the file")
    return text


def _western(content: bytes, *, line: int) -> str:
    """The text as Windows-1252 (Latin-1 with its unused bytes filled), unless it looks like damaged UTF-8 or like another code page.

    Of damaged UTF-8 most characters outside ASCII still decode; in texts of other scripts and of other code pages they stand in rows.
    """
    utf8 = [character for character in content.decode("utf-8", errors="ignore") if not character.isascii()]
    num_left = sum(byte > 127 for byte in content) - len("".join(utf8).encode())
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        text = None
    if text is None or len(utf8) > num_left or re.search(r"[^\x00-\x7f]{4}", text):
        raise ValueError(f"line {line} is not UTF-8, and the file does not look like Windows-1252 either; convert it to UTF-8") from None
    return text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the field {next(name for name in names if names.count(name) > 1)!r} twice; remove one")
    return fields


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits; write it as a text")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole_number)


def _parsed(text: str, *, line: int) -> Any:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _json_error(error, line=line) from None


def _json_error(error: Exception, *, line: int) -> ValueError:
    """The error in words, for a text whose first line has the number `line`."""
    if isinstance(error, json.JSONDecodeError):
        return ValueError(f"line {line + error.lineno - 1} is not JSON ({error.msg}, column {error.colno}); mend or remove it")
    if isinstance(error, RecursionError):
        return ValueError(f"line {line} is nested too deeply to be read; flatten it or remove it")
    return ValueError(f"line {line}: {error}")


def _one_after_another(text: str) -> Iterator[tuple[str, Any]]:
    """The values of a text in which they may go over several lines."""
    start, line = 0, 1
    while match := re.compile(r"\S").search(text, start):
        line += len(LINE_END.findall(text, start, match.start()))
        try:
            item, end = DECODER.raw_decode(text, match.start())
        except json.JSONDecodeError as error:
            raise _json_error(error, line=1) from None
        except (ValueError, RecursionError) as error:
            raise _json_error(error, line=line) from None
        yield f"line {line}", item
        line += len(LINE_END.findall(text, match.start(), end))
        start = end


def _unwrapped(item: Any, *, wanted: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """The objects that the only object of a file lists, or that object if it lists none."""
    lists = [] if not isinstance(item, dict) or wanted & item.keys() else [name for name, value in item.items() if _lists_objects(value)]
    if len(lists) > 1:
        raise ValueError(f"the file holds several lists of objects, {listed(lists)}; keep one of them")
    if not lists:
        yield "line 1", item
    for name in lists:
        yield from ((f"item {number} of {name!r}", entry) for number, entry in enumerate(item[name], 1))


def _lists_objects(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(entry, dict) for entry in value)


def _json_rows(text: str, wanted: frozenset[str]) -> Iterator[Row]:
    for place, item in json_items(text, wanted=wanted):
        if not isinstance(item, dict):
            raise ValueError(f"{place} is not an object with fields but {kind_of(item)}")
        yield place, item


def _csv_rows(text: str, wanted: frozenset[str]) -> Iterator[Row]:
    """Cells as texts, by the delimiter that finds most of the wanted fields in the header; a field may be of any length."""
    csv.field_size_limit(2**31 - 1)  # csv's own limit is for the whole process; the length of a text is bounded where it is read
    given = re.match(r"sep=(.)(\r\n|\n|\r)", text)  # how Excel writes which delimiter follows
    headers = {
        delimiter: _header(text[given.end() if given else 0 :], delimiter) for delimiter in ([given[1]] if given else [",", ";", "\t", "|"])
    }
    delimiter = max(headers, key=lambda key: (len(wanted & set(headers[key])), len(headers[key]) if wanted & set(headers[key]) else 0))
    names = headers[delimiter]
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise ValueError(f"the header has {twice[0]!r} twice; rename one of the columns")
    stream = io.StringIO(text, newline="")
    if given:
        stream.readline()
    reader = csv.DictReader(stream, fieldnames=names, delimiter=delimiter, strict=True)
    first_line = 2 if given else 1
    try:
        for number, row in enumerate(reader):
            line = reader.line_num + first_line - 1
            if None in row:
                raise ValueError(f"line {line} has more columns than the header; quote fields that hold {delimiter!r}")
            if number:  # the header is the first row
                yield f"line {line}", row
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num + first_line - 1} is not csv ({error}); a quote within a quoted field is written twice"
        ) from None


def _header(text: str, delimiter: str) -> list[str]:
    try:
        return [
            name.strip() for name in next(filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)), [])
        ]
    except csv.Error:
        return []


def _sentence_rows(text: str, wanted: frozenset[str]) -> Iterator[Row]:
    for number, line in enumerate(LINE_END.split(text), 1):
        if not line.strip():
            continue
        sentence, separator, label = line.rpartition("@")
        if not separator:
            raise ValueError(f"line {number} is not of the form sentence@label")
        yield f"line {number}", {"sentence": sentence, "label": label}


READERS: dict[str, Callable[[str, frozenset[str]], Iterator[Row]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".txt": _sentence_rows,
    ".tsv": _csv_rows,
    ".ndjson": _json_rows,
}


def _parquet_rows(path: str) -> Iterator[Row]:
    """The rows of a Parquet file, with the types that it gives its columns."""
    from pyarrow import ArrowException  # 100 MB, and used for files of this kind only
    from pyarrow.parquet import ParquetFile

    try:
        rows = (row for batch in _bounded(ParquetFile(path).iter_batches(BATCH_ROWS)) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"row {number}", row
    except (ArrowException, OSError) as error:
        raise ValueError(f"the file is not Parquet that can be read ({_reasons(error)}); export it again, or as JSON lines") from None


def _bounded(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a Parquet file, until they come to too much."""
    num_bytes = 0
    for batch in batches:
        num_bytes += batch.nbytes
        _check_unpacked(num_bytes)
        yield batch


def _fetched(path: str) -> tuple[Any, dict[str, Any]]:
    """The builder of a data set, and each split: its files on this machine by their addresses, or its rows where files carry their types."""
    from datasets import DownloadManager, load_dataset_builder  # seconds to import, and used by one source only

    builder = load_dataset_builder(path)
    if builder.name in OWN_READERS:
        files = {str(split): list(urls) for split, urls in builder.config.data_files.items()}
        return builder, {split: dict(zip(urls, DownloadManager().download(urls), strict=True)) for split, urls in files.items()}
    builder.download_and_prepare()
    return builder, dict(builder.as_dataset())


def _typed_rows(rows: Any) -> Iterator[Row]:
    """The rows of files that carry their types with them."""
    try:
        for number, row in enumerate(rows, 1):
            yield f"row {number}", dict(row)
    except Exception as error:
        raise ValueError(f"a row cannot be read ({_reasons(error)}); export the fields wanted, and use data.source=jsonl") from None


def _not_loaded(error: Exception, *, found: bool) -> str:
    if found:
        return (
            f"the folder could not be loaded as a data set ({_reasons(error)}); check its files, or use data.source=jsonl for one of them"
        )
    return (
        f"looked for a local folder and for a data set on the Hub of that name, and could load neither ({_reasons(error)});"
        " check the name and the connection, or download a file and use data.source=jsonl"
    )


def _reasons(error: BaseException) -> str:
    """What went wrong in one line: the error and the innermost one that led to it, which says why."""
    cause = error
    while inner := cause.__cause__ or cause.__context__:
        cause = inner
    return "; ".join(dict.fromkeys(" ".join(str(one).split())[:300] or type(one).__name__ for one in (error, cause)))
