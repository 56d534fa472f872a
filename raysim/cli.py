"""The command line: `raysim run | compare | sweep | audit | verify | budget | plan | rules | report | configs`. What a user gets wrong is one line on standard error and status 2."""

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")

from raysim import __version__
from raysim.commands import configs
from raysim.config import Config, load
from raysim.console.tables import print_comparison
from raysim.errors import check_path, one_line, plain_errors
from raysim.imports import uncollected
from raysim.remote import copied, is_url, origin, worked_on
from raysim.storage import held
from raysim.sweeps.space import check_points, check_sweep, grid_points, probe_points

EPILOG = """examples:
  raysim compare quickstart                              the main job: base model, FEDIT, FEDPIT and DP-LoRA side by side
  raysim run quickstart method.name=fedpit lora.rank=16  one method, into runs/quickstart-fedpit
  raysim run quickstart method.name=fedit privacy.unit=client out=runs/private
  raysim run quickstart resources.client.num_gpus=0.25   four clients to a GPU
  raysim run quickstart method.name=dplora privacy.target_epsilon=3    the noise is solved for
  raysim sweep sweep-smoke                               many runs at once: who is on the privacy-utility front?
  raysim audit runs/quickstart-dplora                    attack a finished run: does the ledger hold?
  raysim verify runs/quickstart-dplora                   recompute epsilon and every hash of a run
  raysim budget --target-epsilon 2 --delta 1e-6 --rounds 1000 --clients 1000000 --per-round 5000
  raysim plan quickstart --gpus 8 --gpu-memory 80        memory, clients at once and seconds a round, before anything runs
  raysim rules                                           rules for combining adapters (lora.aggregation)
  raysim report runs/quickstart                          write the page of a run or comparison again
  raysim configs                                         shipped configurations, and every key with its default
  raysim configs privacy.noise_at                        what one key is, what it takes, and what it cannot be combined with

Any key of the configuration can be set as key=value; `out=DIR` chooses the folder. The same command continues a run that
was interrupted. `out=s3://BUCKET/DIR` keeps results in a bucket. RAY_ADDRESS names a cluster to run on; without it, Ray is started on this machine.
"""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where Ray tells the process of a submitted job about that job."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0 done, 1 failed on the way (run it again to go on), 2 refused.

    What a user, a disk, a file or too little memory can cause is one line on standard error; what only we can cause keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal need not have every character of a name or path
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone away, as `head` does: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _main(given: Sequence[str]) -> int:
    arguments = _parser(next((word for word in given if not word.startswith("-")), "")).parse_args(given)
    heard: list[int] = []
    try:
        with _terminable(heard), plain_errors():
            if "folder" not in arguments:
                return int(arguments.command(arguments))
            _check_folder(arguments.folder)
            with _reached(arguments) as arguments.folder:
                return int(arguments.command(arguments))
    except ValueError as error:
        print(f"raysim: {one_line(error)}", file=sys.stderr)
        return 2
    except (RecursionError, NotImplementedError):  # Python counts them among its RuntimeErrors; they are faults of ours
        raise
    except RuntimeError as error:
        print(f"raysim: {one_line(error)}", file=sys.stderr)
        if arguments.continues:
            print("raysim: the same command continues from the last finished round", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nraysim: interrupted; the same command continues from the last finished round", file=sys.stderr)
        return 128 + (heard[0] if heard else signal.SIGINT)


@contextlib.contextmanager
def _terminable(heard: list[int]) -> Iterator[None]:
    """Inside, SIGTERM (`ray job stop` and batch systems send it) interrupts as Ctrl-C does, and is added to `heard`: Ray passes on no other exception."""

    def terminate(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The parser; what a module of its own defines is read only for the command that is `chosen`."""
    parser = argparse.ArgumentParser(
        prog="raysim",
        description="Simulate federated LoRA fine-tuning of language models: how good, what leaks, at what epsilon, at what cost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"raysim {__version__}")
    parser.set_defaults(continues=False, writes=True)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, function, text, example in (
        ("run", _run, "run one simulation and write its folder", "raysim run quickstart method.name=fedpit lora.rank=16 out=runs/mine"),
        ("compare", _compare, "run what a configuration's `compare` names, side by side", "raysim compare configs/quickstart.yaml seed=1"),
        (
            "sweep",
            _sweep,
            "run many points of `sweep.space`, several at once, ending in a privacy-utility frontier",
            "raysim sweep quickstart method.name=dplora 'sweep.space={privacy.target_epsilon: [1, 3, 8], lora.rank: [4, 16]}'",
        ),
    ):
        command = _command(commands, name, text, example=example)
        command.add_argument("config", help="a YAML file, or the name of a shipped configuration (see `raysim configs`)")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
        command.add_argument("--quiet", action="store_true", help="no progress display")
        command.set_defaults(command=function, continues=True)
    _add_audit(commands, chosen)
    _add_verify(commands, chosen)
    _add_budget(commands, chosen)
    _add_plan(commands, chosen)
    _add_rules(commands, chosen)
    text = "write the page and figures of a run, comparison or sweep again"
    report = _command(commands, "report", text, example="raysim report runs/quickstart")
    report.add_argument("folder", help="the folder of a run or a comparison, such as runs/quickstart")
    report.set_defaults(command=_report)
    text = "list shipped configurations and every key with its default and bounds, or explain one key"
    listing = _command(commands, "configs", text, example="raysim configs privacy\n  raysim configs privacy.num_bands")
    configs.add_arguments(listing)
    listing.set_defaults(command=configs.main)
    return parser


def _add_audit(commands: Any, chosen: str) -> None:
    example = "raysim audit runs/quickstart-dplora\n  raysim audit runs/quickstart-fedit --attack membership --attack canaries"
    command = _command(
        commands, "audit", "attack a finished run: membership, canaries, a lower bound on epsilon, inversion", example=example
    )
    if chosen == "audit":
        with uncollected():
            from raysim.commands import audit  # torch, transformers and Ray

        audit.add_arguments(command)
        command.set_defaults(command=audit.main, continues=True)


def _add_verify(commands: Any, chosen: str) -> None:
    text = "recompute epsilon, hashes and cohorts of a run from its files"
    command = _command(commands, "verify", text, example="raysim verify runs/quickstart-dplora")
    if chosen == "verify":
        from raysim.results import verify  # dp-accounting and scipy

        verify.add_arguments(command)
        command.set_defaults(command=verify.main, writes=False)


def _add_budget(commands: Any, chosen: str) -> None:
    text = "from an epsilon to the noise it needs, or from noise to epsilon"
    example = "raysim budget --target-epsilon 2 --delta 1e-6 --rounds 1000 --clients 1000000 --per-round 5000"
    command = _command(commands, "budget", text, example=example)
    if chosen == "budget":
        from raysim.commands import budget  # dp-accounting, scipy and matplotlib

        budget.add_arguments(command)
        command.set_defaults(command=budget.main)


def _add_plan(commands: Any, chosen: str) -> None:
    text = "memory, clients at once, seconds and bytes a round, before anything runs"
    command = _command(commands, "plan", text, example="raysim plan quickstart model.quantization=nf4 --gpus 8 --gpu-memory 80")
    if chosen == "plan":
        with uncollected():
            from raysim.commands import plan  # torch and transformers

        plan.add_arguments(command)
        command.set_defaults(command=plan.main)


def _add_rules(commands: Any, chosen: str) -> None:
    text = "list the rules for combining adapters: what each trains, sends, loses and protects"
    command = _command(commands, "rules", text, example="raysim rules")
    if chosen == "rules":
        from raysim.commands import rules  # torch and scipy

        rules.add_arguments(command)
        command.set_defaults(command=rules.main)


def _command(commands: Any, name: str, text: str, *, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _load(arguments: argparse.Namespace) -> Config:
    """The configuration of what is to be run.

    Errors: ValueError if it is named by nothing, or the folder would go the way of a job's working directory.
    """
    if not arguments.config.strip():
        raise ValueError("config='' names no configuration; give a YAML file, or the name of a shipped one, such as quickstart")
    config = load(arguments.config, arguments.overrides)
    job = _job()
    if "working_dir" in job.get("runtime_env", {}) and not (is_url(config.out) or Path(config.out).is_absolute()):
        raise ValueError(
            f"out={config.out!r} is not an absolute path: a job's working directory is removed after the job;"
            " name a folder on storage that every node sees, such as out=/mnt/runs/mine"
        )
    return config


def _job() -> dict[str, Any]:
    """What Ray tells of the job that this process is; empty for none."""
    try:
        job = json.loads(os.environ.get(JOB_VARIABLE, "{}"))
    except ValueError:
        raise ValueError(f"{JOB_VARIABLE} is not JSON; unset it, or submit the job with Ray") from None
    return job if isinstance(job, dict) else {}


def _check_folder(folder: str) -> None:
    """Refuses a folder that is named by nothing, which would be the one that the user stands in, or that no file system has.

    Errors: ValueError saying which.
    """
    if not folder.strip():
        raise ValueError("folder='' names no folder; give that of a run, such as runs/quickstart/fedit")
    check_path(folder, key="folder")


@contextlib.contextmanager
def _reached(arguments: argparse.Namespace) -> Iterator[str]:
    """The folder of a command on this machine: itself, or a copy of one in a bucket, which goes back there if the command writes."""
    if not is_url(arguments.folder):
        yield arguments.folder
        return
    reach = worked_on if arguments.writes else copied
    with reach(arguments.folder, key="folder") as copy:
        yield str(copy)


def _run(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    with uncollected():
        from raysim.reports.tables import comparison_rows
        from raysim.results.folders import RunFolder
        from raysim.runs import run as runner  # torch, transformers and Ray: seconds to import, for which no refusal should wait

    done = runner.run(config, display=False if arguments.quiet else None)
    print_comparison(comparison_rows([RunFolder(done.out).summary]))
    print(f"{done.summary['guarantee']}\nadapter sha256: {done.summary['adapter_sha256']}\nreport: {origin(done.page)}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    with uncollected():
        from raysim.claims import page as claims_report
        from raysim.reports.tables import comparison_rows
        from raysim.results import files
        from raysim.results.folders import RunFolder
        from raysim.runs.compare import compare  # as in _run

    runs = compare(config, display=False if arguments.quiet else None)
    out = runs[0].out.parent
    if config.claims:
        print(claims_report.in_short(out))
        print(f"claims: {origin(out / files.CLAIMS_TABLE)}")
    else:
        print_comparison(comparison_rows([RunFolder(folder).summary for folder in dict.fromkeys(run.out for run in runs)]))
    print(f"report: {origin(out / files.REPORT)}")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    check_sweep(config)
    check_points(config, grid_points(config) if config.sweep.search == "grid" else probe_points(config))
    with uncollected():
        from raysim.sweeps import sweep  # torch, transformers and Ray: seconds to import, for which no refusal should wait

    return sweep.main(arguments)


def _report(arguments: argparse.Namespace) -> int:
    from raysim.claims import page as claims_report
    from raysim.reports import page as report
    from raysim.results import files
    from raysim.results.folders import kind_of, runs_below
    from raysim.sweeps import page as sweep_report  # matplotlib: seconds to import

    folder = Path(arguments.folder)
    writers: dict[str, Callable[[Path], Path]] = {
        "run": report.write_run_report,
        "sweep": sweep_report.rewrite_sweep_report,
        "claims": claims_report.write_claims_report,
        "comparison": lambda folder: report.write_comparison_report(folder, runs_below(folder, with_file=files.ROUNDS)),
    }
    kind = kind_of(folder)
    if not kind:
        raise ValueError(
            f"{arguments.folder!r} is neither the folder of a run (no {files.ROUNDS}) nor of a comparison (no runs below it) or sweep"
        )
    with held(folder):
        page = writers[kind](folder)
    print(origin(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
