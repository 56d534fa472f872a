"""What a refusal says: one line, however long or odd the value, and a word for what a disk, a file or memory refuses.

Left out: our own faults (an assertion, an attribute that is not there), which keep their traceback: hiding it would hide the fault.
"""

import contextlib
import difflib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from safetensors import SafetensorError

LONGEST_SHOWN = 120
"""Characters of a value that a refusal repeats."""
LONGEST_NAME_BYTES = 200
"""Of a run's or an entry's name: file systems take 255 for a folder, and a seed is added to some."""
LONGEST_PART_BYTES, LONGEST_PATH_BYTES = 255, 4095
"""What file systems take for one part of a path, and for all of it."""
REMEDIES: dict[type[OSError], str] = {
    PermissionError: "allow it, or choose another place",
    FileNotFoundError: "put it back, or choose another place",
    NotADirectoryError: "choose another place",
    IsADirectoryError: "choose another place",
}


def one_line(error: BaseException) -> str:
    """An exception's message as one line; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(value: Any) -> str:
    """`value` as a refusal repeats it: its representation, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of more than 4,300 digits; a list within itself
        return f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"


def did_you_mean(given: Any, known: Iterable[str], *, quoted: bool = False) -> str:
    """The end of a refusal that names the one of `known` which `given` may have been meant for; empty where none is near."""
    close = difflib.get_close_matches(str(given)[:LONGEST_SHOWN], list(known), n=1)
    return f"; did you mean {repr(close[0]) if quoted else close[0]}?" if close else ""


def check_folder_name(name: str, *, key: str, taken: Iterable[str] = ()) -> None:
    """Refuses a name that is no single folder's name on every file system, or is one of the files that are `taken`.

    Errors: ValueError naming `key` and the rule.
    """
    num_bytes = len(name.encode("utf-8", "surrogatepass"))
    problem = ""
    if not name.strip() or name != name.strip():
        problem = "must not be empty, nor begin or end with a blank"
    elif name.startswith("."):
        problem = "must not begin with a dot"
    elif bad := next((c for c in name if c in "/\\" or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), ""):
        problem = f"must not hold {bad!r}"
    elif num_bytes > LONGEST_NAME_BYTES:
        problem = f"has {num_bytes} bytes, of which it may have {LONGEST_NAME_BYTES}"
    elif name.casefold() in {other.casefold() for other in taken}:
        problem = "is the name of a file that is written there; choose another"
    if problem:
        raise ValueError(f"{key}: the name {shown(name)} {problem}: a folder is called so")


def check_path(path: str, *, key: str) -> None:
    """Refuses a path that no file system has.

    Errors: ValueError naming `key` and what is wrong.
    """
    parts = [len(part.encode("utf-8", "surrogatepass")) for part in path.split("/")]
    if "\0" in path:
        raise ValueError(f"{key}={shown(path)}: a path has no zero byte")
    if max(parts) > LONGEST_PART_BYTES or sum(parts) + len(parts) > LONGEST_PATH_BYTES:
        raise ValueError(
            f"{key}={shown(path)} is longer than a file system takes ({LONGEST_PART_BYTES} bytes for a name, {LONGEST_PATH_BYTES} in all)"
        )


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns what a disk, a file or too little memory refuses into a RuntimeError of one line that names the place and a remedy.

    A reader that has gone away (`| head`) is none of these, and passes.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        place = " to ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes))
        reason = error.strerror or one_line(error)
        remedy = next((text for kind, text in REMEDIES.items() if isinstance(error, kind)), "make room or mend it, or choose another place")
        raise RuntimeError(f"{place or 'a file or connection'}: {reason}; {remedy}") from error
    except UnicodeError as error:
        raise RuntimeError(f"a file's text is not UTF-8 ({one_line(error)}); convert or restore it") from error
    except SafetensorError as error:
        raise RuntimeError(f"a file of tensors cannot be read ({one_line(error)}); restore it, or run into another folder") from error
    except MemoryError as error:
        raise RuntimeError(
            f"there is not enough memory ({one_line(error)}); lower train.batch_size, evaluate.batch_size, data.max_length or the number of actors"
        ) from error
