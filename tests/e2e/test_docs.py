"""README and the pages under docs/: every command on them works, every block of output is what was printed, every link leads somewhere.

A comment above a block, which a reader of the rendered page does not see, says what is done with its commands:

- none: they are run as they are printed, down the page in one folder, and the next block of text is their standard output, byte for byte;
- `<!-- refused -->`: run as well, with exit status 2, and the next block of text is their standard error;
- `<!-- loaded, not run: REASON -->`: the real command line takes them as far as the folder that they would write or read, which is not to be had.
  Their configuration, with every override, every entry of a comparison (but of those for claims, whose entries the tests of claims load) and every
  point of a sweep, has passed by then.

Left out: commands of Ray named within a sentence, and whether what took minutes would print today what a page shows of it.
"""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from raysim.cli import main
from raysim.config import load
from tests.conftest import ROOT
from tests.small_runs import environment

pytestmark = pytest.mark.pictures

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, "CONTRIBUTING.md", "EXPERIMENTS.md", "CHANGELOG.md", "findings/README.md"]
SLOW = {"docs/clusters.md", "docs/sweeps.md"}
SHELL_OPERATORS = set("();<>|&")
NO_KEYS = {"model.generate"}  # a function of transformers
FILE_SUFFIXES = {"csv", "html", "jsonl", "json", "md", "png", "py", "yaml"}
LINK = r"\]\(([^)\s]+)\)"
MOST_LINES = 200
"""README is shorter than this."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: where its first line stands, its language, its text, and what the comment above it says."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def is_loaded(self) -> bool:
        return re.fullmatch(r"loaded, not run: \S.*", self.mark) is not None

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "python") and not self.is_loaded

    @property
    def lines(self) -> list[str]:
        """The commands of a block for the shell."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if words_of(line)]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, from top to bottom."""
    found: list[Block] = []
    lines = (ROOT / page).read_text(encoding="utf-8").split("\n")
    start = 0
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if not start:
            start = number + 1
            continue
        above = re.fullmatch(r"<!-- (.*) -->", lines[start - 2]) if start > 1 else None
        text = "".join(f"{inner}\n" for inner in lines[start:number])
        found.append(Block(page, start + 1, lines[start - 1].removeprefix("```"), text, above[1] if above else ""))
        start = 0
    assert not start, f"{page} ends within a block"
    return found


def words_of(line: str) -> list[str]:
    """The words and operators that the shell makes of a line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def prose(page: str) -> str:
    """What a page says outside its blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(page: str) -> list[str]:
    """What stands between backticks in the sentences of a page, on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a folder that has what a checkout has, but for its results; with a home elsewhere and `raysim` on the path."""
    folder, home, programs = tmp_path / "checkout", tmp_path / "home", tmp_path / "bin"
    for made in (folder, home, programs):
        made.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", ".git", ".venv") and not entry.name.endswith("_cache"):
            (folder / entry.name).symlink_to(entry)
    for name, options in (("raysim", "-m raysim"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {options} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.chdir(folder)
    for name, value in (environment() | {"HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


def test_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") < MOST_LINES
    read_on = text.partition("## Where to read on")[2]
    assert [page for page in PAGES[1:] if f"]({page})" not in read_on] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    for block in blocks(page):
        where = f"{page}:{block.line}"
        assert block.language in ("sh", "python", "text"), f"{where}: a block is sh, python or text"
        assert not block.mark or block.is_loaded or block.mark == "refused", f"{where}: {block.mark!r} says nothing"
        assert block.language == "sh" or not block.mark, f"{where}: only commands carry a mark"
        if block.language == "text":
            assert not re.search(r"^(\$ |raysim |make |ray |python )", block.text, re.MULTILINE), f"{where} has commands"


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in PAGES])
def test_commands_run_as_they_are_printed(page: str, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(page)
    assert any(block.is_run and block.mark != "refused" for block in found), "a page has something to try"
    names: dict[str, Any] = {"__name__": "__main__"}
    for block, following in zip(found, [*found[1:], None], strict=True):
        if not block.is_run:
            continue
        out, err = run(block, names, capsys)
        if following is not None and following.language == "text":
            assert following.text == (err if block.mark == "refused" else out), f"{page}:{following.line}"


def run(block: Block, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What a block wrote to standard output and to standard error."""
    capsys.readouterr()
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)
        return capsys.readouterr()
    out, err = "", ""
    for line in block.lines:
        status, *wrote = run_here(line, capsys) if can_run_here(line) else run_in_shell(line)
        assert status == (2 if block.mark == "refused" else 0), f"{block.page}: {line}\n{wrote[0]}{wrote[1]}"
        out, err = out + wrote[0], err + wrote[1]
    return out, err


def can_run_here(line: str) -> bool:
    """Whether a line is raysim alone and starts no Ray: then it need not wait for another interpreter to import everything."""
    words = words_of(line)
    if words[0] != "raysim" or any(set(word) <= SHELL_OPERATORS for word in words):
        return False
    return words[1] in ("audit", "budget", "report", "verify") or ("resources.backend=local" in words and words[1] != "sweep")


def run_here(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the console script's function, given the line's words."""
    status = main(words_of(line)[1:])
    return status, *capsys.readouterr()


def run_in_shell(line: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a line that the shell runs."""
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=280, check=False)
    return done.returncode, done.stdout, done.stderr


LOADED = [(block, line) for page in PAGES for block in blocks(page) if block.is_loaded for line in block.lines]


@pytest.mark.parametrize(("block", "line"), [pytest.param(*case, id=f"{case[0].page}: {' '.join(words_of(case[1]))}") for case in LOADED])
def test_commands_that_are_not_run_load(block: Block, line: str, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_line_loads(line, capsys)


def test_commands_in_sentences_load(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {span for page in PAGES for span in spans(page) if re.match(r"(raysim|make|python) [a-z-]", span)}
    assert len(named) > 10
    for span in sorted(named):
        assert_line_loads(span, capsys)


def test_commands_of_the_shipped_configurations_load(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {
        line
        for path in (ROOT / "configs").iterdir()
        for line in re.findall(r"^#   (raysim .*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) > 10
    for line in sorted(named):
        assert_line_loads(line, capsys)


def test_a_command_that_has_gone_or_a_key_that_was_renamed_is_noticed(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (
        "raysim run quickstart lora.rnak=16",
        "raysim run quickstart method.name=dplora lora.rank=0",
        "raysim sweep quickstart 'sweep.space={lora.rnak: [1, 2]}'",
        "raysim sweep quickstart 'sweep.space={lora.rank: [1, 0]}'",
        "raysim compare quickstrat",
        "raysim rnu quickstart",
        "raysim audit runs/a --atack membership",
        "make no-such-target",
        "make test ARGS=tests/no_such_folder",
        "python benchmarks/no_such_file.py",
        "python benchmarks/round_time.py --no-such-option 2",
        "python -m tests.kinds.no_such_module",
        "ray job submit --workingdir . -- raysim configs",
        "ray job submit --working-dir . -- raysim run quickstart lora.rnak=16",
        "ray uup cluster.yaml",
        "RAYSIM_NO_SUCH_NAME=1 raysim compare quickstart",
        "ray up no-such-file.yaml",
        "no-such-command",
    ):
        with pytest.raises((AssertionError, SystemExit, click.ClickException)):
            assert_line_loads(line, capsys)


def assert_line_loads(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Takes every command of a line as far as it goes without its work; errors as those of `assert_loads`."""
    for words in simple_commands(line):
        assert_loads(words, capsys)


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line; the variables that are set for one alone come before it, as an `export` of them."""
    words: list[str] = []
    for word in [*words_of(line), ";"]:
        if set(word) <= SHELL_OPERATORS:
            num_set = next((n for n, given in enumerate(words) if not re.match(r"[A-Z_]+=", given)), len(words))
            yield from filter(None, (["export", *words[:num_set]] if num_set else [], words[num_set:]))
            words = []
        else:
            words.append(word)


def assert_loads(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Takes a command as far as it goes without its work.

    Errors: AssertionError, SystemExit or ClickException if it would not come so far, or there is no way here to tell.
    """
    program, *arguments = words
    if program == "raysim":
        assert_raysim_loads(arguments, capsys)
    elif program == "ray":
        assert_ray_loads(arguments, capsys)
    elif program == "make":
        assert_make_loads(arguments, capsys)
    elif program == "python":
        file = ROOT / (f"{arguments[1].replace('.', '/')}.py" if arguments[0] == "-m" else arguments[0])
        assert file.is_file(), f"{words}: no such program"
        text = file.read_text(encoding="utf-8")
        assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in text] == []
    elif program == "export":
        known = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "raysim").rglob("*.py"))
        names = {word.partition("=")[0] for word in arguments} - {"RAY_AUTH_MODE"}  # which is Ray's
        assert [name for name in names if not re.search(rf"\b{name}\b", known)] == []
    else:
        assert program == "chmod", f"{words}: there is no way here to tell whether this works"


def assert_raysim_loads(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Runs `raysim ARGUMENTS` with a file where it would make its folder, or without the folder that it would read, which is the last that it checks."""
    command, *rest = arguments
    capsys.readouterr()
    if not rest:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0, command
    elif command in ("run", "compare", "sweep"):
        Path("taken").write_text("")
        once = ["compare_seeds=[]"] if command == "compare" else []  # a comparison for claims ends there, one of other runs at its folder
        assert main([*arguments, *once, "out=taken"]) == 2
        said = capsys.readouterr().err
        taken = r"out='[^']*taken' (is a file|cannot be written \(Not a directory\)); choose a(nother)? folder"
        assert re.fullmatch(rf"raysim: ({taken}|claims='\w+' needs compare_seeds, .*)\n", said), said
    else:
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert command in ("audit", "report", "verify"), command
        folder = re.escape(rest[0])
        assert re.fullmatch(rf"raysim: ('{folder}' is (not|neither) the folder of a run .*|{folder} holds no finished run .*)\n", said), (
            said
        )


def assert_make_loads(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Has make say what it would do, and loads what raysim would be given."""
    ours = {
        key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS", "OUT")
    }  # of `make test`
    done = subprocess.run(["make", "--dry-run", *arguments], capture_output=True, text=True, check=False, env=ours)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if re.match(r"\S*/raysim ", line):
            assert_raysim_loads(words_of(line)[1:], capsys)
    paths = [word for argument in arguments for word in argument.removeprefix("ARGS=").split() if word.startswith("tests/")]
    assert [path for path in paths if not Path(path).exists()] == []


def assert_ray_loads(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Has Ray read its command line, with nothing done, looks for the files that it names, and loads what it would run as a job."""
    from ray.scripts.scripts import cli  # it brings Ray's serving library: seconds, for two tests

    command: click.Command = cli
    context = command.make_context("ray", list(arguments))
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command = found
        context = command.make_context(name, rest, parent=context)
    named = [context.params.get(name) or "." for name in ("working_dir", "runtime_env", "cluster_config_file")]
    assert [path for path in named if not Path(path).exists()] == []
    if entrypoint := context.params.get("entrypoint"):
        assert_loads(list(entrypoint), capsys)


def test_keys_that_sentences_name_are_keys_of_the_configuration() -> None:
    known = dataclasses.asdict(load())
    sections = {name for name, value in known.items() if isinstance(value, dict)}
    keys = {key for page in PAGES for span in spans(page) for key in re.findall(r"(?<![\w.*/-])[a-z_]+(?:\.[a-z_]+)+", span)}
    keys = {key for key in keys if key.partition(".")[0] in sections and key.rpartition(".")[2] not in FILE_SUFFIXES} - NO_KEYS
    assert len(keys) > 30
    assert [key for key in sorted(keys) if not is_key(key, known)] == []
    assert not is_key("lora.rnak", known)


def is_key(key: str, known: dict[str, Any]) -> bool:
    """Whether the configuration has a key of that name."""
    value: Any = known
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


@pytest.mark.parametrize("page", LINKING)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for link in re.findall(LINK, prose(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_files_of_the_project_that_sentences_name_are_there(page: str) -> None:
    named = [span for span in spans(page) if re.fullmatch(r"(raysim|benchmarks|configs|docs|findings|tests)/[\w./-]*", span)]
    assert [span for span in named if not (ROOT / span).exists()] == []


def test_every_picture_is_on_a_page() -> None:
    shown = {Path(link).name for page in PAGES for link in re.findall(LINK, prose(page))}
    assert {path.name for path in (ROOT / "docs").iterdir()} <= shown
