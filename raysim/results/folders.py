"""What the folders of runs, comparisons and sweeps say: the only reader of their files, which gives frozen dataclasses (`contents`).

A file that is missing is a FileNotFoundError; one that is cut, altered or of another kind is a ValueError of one line that names the file
and the key. `so_far` is for pages: it takes a run as far as it got, and says in plain sentences what is missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open

from raysim.config import Config, flatten_keys, load, to_dict
from raysim.errors import check_folder_name, shown
from raysim.federation.checkpoint import Snapshot, load_latest
from raysim.privacy.mechanism import Mechanism, held_records
from raysim.results import files
from raysim.results.contents import (
    Answer,
    Audit,
    Comparison,
    Environment,
    Judge,
    Judged,
    Ledger,
    Partition,
    RoundRecord,
    Summary,
    Synthetic,
)
from raysim.results.files import REMEDY, read_json, read_jsonl, read_text

Kind = TypeVar("Kind")


ADAPTERS: Any = cache(TypeAdapter)
"""By dataclass, what makes one of a JSON object; made once."""


def typed(kind: type[Kind], value: Mapping[str, Any], *, where: str) -> Kind:
    """The JSON object `value` as a `kind` of `contents`; keys that it does not know are passed over.

    Errors: ValueError naming `where` and the first key that is missing or holds something else.
    """
    try:
        found: Kind = ADAPTERS(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = f"has no {key!r}" if first["type"] == "missing" else f"holds {key}={shown(first['input'])} ({first['msg']})"
        raise ValueError(f"{where} {problem}; {REMEDY}") from None
    return found


@dataclass(frozen=True)
class RunFolder:
    """A run's files, each read when it is first asked for."""

    path: Path

    def has(self, name: str) -> bool:
        """Whether the folder has the file `name`."""
        return (self.path / name).is_file()

    @property
    def is_run(self) -> bool:
        """Whether a run was begun here."""
        return self.has(files.CONFIG)

    @property
    def is_over(self) -> bool:
        """Whether all rounds are done and summed up."""
        return self.has(files.SUMMARY)

    @property
    def is_finished(self) -> bool:
        """Whether the run is over, its page written, and every file as it was then."""
        return self.is_over and not self.damage

    @cached_property
    def damage(self) -> str:
        """What is wrong with the files of a run that is over, by their hashes; empty for nothing."""
        if not self.has(files.HASHES):
            return f"{files.HASHES} is missing"
        try:
            stated, found = self.json(files.HASHES), files.hashes(self.path)
        except ValueError as error:
            return str(error)
        gone = [f"{name} is missing" for name in stated if name not in found]
        changed = [f"{name} is not what {files.HASHES} says" for name in stated if found.get(name, stated[name]) != stated[name]]
        added = [f"{name} is not in {files.HASHES}" for name in found if name not in stated and name in files.OF_A_RUN]
        return next(iter([*gone, *changed, *added]), "")

    @property
    def is_stopped(self) -> bool:
        """Whether a sweep's scheduler ended the run early."""
        return self.has(files.STOPPED)

    @cached_property
    def config(self) -> Config:
        """The configuration."""
        return load(self.path / files.CONFIG)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration by dotted keys, but for what a comparison is made of."""
        return flatten_keys({key: value for key, value in to_dict(self.config).items() if key != "compare"})

    def json(self, name: str) -> dict[str, Any]:
        """A file's object, as it stands there."""
        return read_json(self.path / name)

    def text(self, name: str) -> str:
        """A file's text."""
        return read_text(self.path / name)

    def jsonl(self, name: str) -> list[dict[str, Any]]:
        """The objects of a file that has one a line, as they stand there; none where there is no such file."""
        return read_jsonl(self.path / name) if self.has(name) else []

    @cached_property
    def summary(self) -> Summary:
        """What the run came to."""
        return self._object(Summary, files.SUMMARY)

    @cached_property
    def ledger(self) -> Ledger:
        """What was promised to whom."""
        return self._object(Ledger, files.LEDGER)

    @cached_property
    def partition(self) -> Partition:
        """Who holds what."""
        return self._object(Partition, files.PARTITION)

    @cached_property
    def environment(self) -> Environment:
        """What computed the run."""
        return self._object(Environment, files.ENVIRONMENT)

    @cached_property
    def audit(self) -> Audit:
        """What attacks on the release found; empty where none was made."""
        return self._object(Audit, files.AUDIT) if self.has(files.AUDIT) else Audit()

    @cached_property
    def judge(self) -> Judge | None:
        """What a judge made of the last answers; None where nothing was judged."""
        return self._object(Judge, files.JUDGE) if self.has(files.JUDGE) else None

    @cached_property
    def records(self) -> tuple[RoundRecord, ...]:
        """The rounds recorded, after that of the untouched base model (index -1) where it was measured."""
        return _typed_lines(RoundRecord, self.path / files.ROUNDS)

    @property
    def rounds(self) -> tuple[RoundRecord, ...]:
        """The records of rounds."""
        return tuple(record for record in self.records if record.round_index >= 0)

    @cached_property
    def answers(self) -> tuple[Answer, ...]:
        """What adapters made of records and questions."""
        return _typed_lines(Answer, self.path / files.ANSWERS)

    @cached_property
    def synthetic(self) -> tuple[Synthetic, ...]:
        """The synthetic candidates, kept and dropped."""
        return self._lines(Synthetic, files.SYNTHETIC)

    @cached_property
    def judged(self) -> tuple[Judged, ...]:
        """The pairs that a judge was shown."""
        return self._lines(Judged, files.JUDGED)

    @cached_property
    def mechanism(self) -> Mechanism:
        """The mechanism that the configuration describes for these shards."""
        return Mechanism.of_run(self.config, manifest=self.json(files.PARTITION))

    @cached_property
    def shard_sizes(self) -> list[int]:
        """Records of each client, inserted canaries with them."""
        return held_records(self.json(files.PARTITION))

    @cached_property
    def snapshot(self) -> Snapshot | None:
        """The newest checkpoint that is whole."""
        return load_latest(self.path / files.STATE)[0] if (self.path / files.STATE).is_dir() else None

    @cached_property
    def factors(self) -> tuple[tuple[int, int], ...]:
        """Of each LoRA factor in the released adapter its rank, and how many inputs (A) or outputs (B) its layer has; empty for none."""
        path = self.path / files.ADAPTER / files.TENSORS
        if not path.is_file():
            return ()
        with safe_open(path, framework="np") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        return tuple(shape if "lora_A" in name else shape[::-1] for name, shape in shapes.items())

    def _object(self, kind: type[Kind], name: str) -> Kind:
        return typed(kind, self.json(name), where=str(self.path / name))

    def _lines(self, kind: type[Kind], name: str) -> tuple[Kind, ...]:
        """The lines of a file that a run need not have."""
        return _typed_lines(kind, self.path / name) if self.has(name) else ()


def _typed_lines(kind: type[Kind], path: Path, *, cut: list[str] | None = None) -> tuple[Kind, ...]:
    return tuple(typed(kind, found, where=f"{path}: line {number}") for number, found in files.numbered(path, cut=cut))


# --- as far as it got


@dataclass(frozen=True)
class RunSoFar:
    """What a run's files say, finished or not; None for a file that is missing, which `notes` says."""

    folder: RunFolder
    summary: Summary
    stored: Mapping[str, Any]
    """The summary as a JSON object, for tables that hold all of it."""
    records: tuple[RoundRecord, ...]
    ledger: Ledger | None
    partition: Partition | None
    environment: Environment | None
    synthetic: tuple[Synthetic, ...]
    notes: tuple[str, ...]
    """Plain sentences about what is missing or cut short, and what must be said of the method."""


def so_far(run_dir: Path) -> RunSoFar:
    """Everything that the files of a run say, with a note for each that is missing or cut short.

    The summary's unit is that of a promise, None where nothing is promised. Errors: ValueError if the folder holds no run, or a file is broken.
    """
    folder, notes = RunFolder(Path(run_dir)), list[str]()
    if not folder.is_run:
        raise ValueError(f"run folder {str(run_dir)!r} has no {files.CONFIG}; give the folder of a run, such as runs/quickstart/fedit")

    def there(name: str) -> bool:
        notes.extend([] if folder.has(name) else [f"{name} is missing."])
        return folder.has(name)

    rounds = files.numbered(folder.path / files.ROUNDS, cut=notes) if there(files.ROUNDS) else []
    ledger = folder.ledger if there(files.LEDGER) else None
    stored = folder.json(files.SUMMARY) if folder.has(files.SUMMARY) else _unfinished(folder, [record for _, record in rounds], notes)
    stored |= {"unit": ledger.unit if ledger and ledger.epsilon is not None else None, "finished": folder.has(files.SUMMARY)}
    notes += filter(None, [folder.config.method.spec.note])
    return RunSoFar(
        folder=folder,
        summary=typed(Summary, stored, where=str(folder.path / files.SUMMARY)),
        stored=stored,
        records=tuple(typed(RoundRecord, record, where=f"{folder.path / files.ROUNDS}: line {number}") for number, record in rounds),
        ledger=ledger,
        partition=folder.partition if there(files.PARTITION) else None,
        environment=folder.environment if there(files.ENVIRONMENT) else None,
        synthetic=_typed_lines(Synthetic, folder.path / files.SYNTHETIC, cut=notes) if folder.has(files.SYNTHETIC) else (),
        notes=tuple(notes),
    )


def _unfinished(folder: RunFolder, records: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, Any]:
    """What the rounds so far amount to."""
    num_rounds = folder.config.server.num_rounds
    done = sum(record["round_index"] >= 0 for record in records)
    notes.append(f"This run is not finished: {done} of {num_rounds} rounds are recorded. The figures are those of the last one.")
    ledger = folder.json(files.LEDGER) if folder.has(files.LEDGER) else {}
    return files.summarise(folder.config, records=records, ledger=ledger, num_rounds=num_rounds)


# --- comparisons


@dataclass(frozen=True)
class ComparisonFolder:
    """A comparison's files."""

    path: Path

    @cached_property
    def comparison(self) -> Comparison:
        """Which runs stand for which entry and seed.

        Errors: ValueError if the folder has no comparison over seeds.
        """
        path = self.path / files.COMPARISON
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is missing; give the folder of a comparison with compare_seeds")
        found = typed(Comparison, read_json(path), where=str(path))
        for member in found.members:
            check_folder_name(member.folder, key=f"{path}: folder")  # which could lead elsewhere
        return found

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        """Of each claim its verdict and its words.

        Errors: ValueError naming the file if it is no list of such.
        """
        path = self.path / files.CLAIMS
        rows = files.read_json_list(path)
        for number, row in enumerate(rows):
            if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("verdict", "claim"))):
                raise ValueError(f"{path}: claim {number} has no verdict and words: {shown(row)}; write the page again with raysim report")
        return [(row["verdict"], row["claim"]) for row in rows]

    @property
    def run_folders(self) -> list[Path]:
        """The folders of the comparison's runs, each once."""
        return [self.path / folder for folder in dict.fromkeys(member.folder for member in self.comparison.members)]


def runs_below(folder: Path, *, with_file: str = files.CONFIG) -> list[Path]:
    """The folders of runs right below a folder that have the file."""
    return sorted(path.parent for path in folder.glob(f"*/{with_file}")) if folder.is_dir() else []


def kind_of(folder: Path) -> str:
    """What a folder is that of: a `run`, a `sweep`, `claims` (a comparison that decides some) or a `comparison`; empty for none of them."""
    signs = {
        "run": (folder / files.ROUNDS).is_file(),
        "sweep": (folder / files.SWEEP).is_file() and (folder / files.RESULTS).is_file(),
        "claims": (folder / files.CLAIMS).is_file(),
        "comparison": bool(runs_below(folder, with_file=files.ROUNDS)),
    }
    return next((kind for kind, sign in signs.items() if sign), "")
