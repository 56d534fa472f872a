"""`python -m raysim` in processes forked from one that has imported all a command may need, which saves each of them seconds.

Such a process has a session, a folder, an environment and files of output of its own, and ends as an interpreter does. Left out: how the
interpreter starts and what is imported when, so that tests of those, of terminals and of pipes start one (`small_runs.command`).
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.pictures import undrawn

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = ["tests.warm_imports"]
PATIENCE_S = 240


@dataclass(frozen=True)
class Command:
    """A command that was started: its process, and the files that take what it prints."""

    process: BaseProcess
    stdout: Path
    stderr: Path

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self.process.exitcode

    def kill(self) -> None:
        """Ends it at once with all that it started."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL, self.stderr.read_text()


def _nothing() -> None: ...


def start(*arguments: str, cwd: Path, env: dict[str, str], said: Path, first: Callable[[], None] = _nothing) -> Command:
    """The command `raysim ARGUMENTS`, started in the folder `cwd`; what it prints goes into files of the new folder `said`.

    Pages that it writes itself are without figures. Its process does `first` before (a function that can be pickled).
    """
    said.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_be_command, args=(arguments, str(cwd), env, str(said / "stdout"), str(said / "stderr"), first))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # for the process that is forked from, which the first of these starts, in whatever folder
        process.start()
    return Command(process, said / "stdout", said / "stderr")


def raysim(*arguments: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The finished command `raysim ARGUMENTS`, run in the folder `cwd`."""
    with tempfile.TemporaryDirectory() as folder:
        started = start(*arguments, cwd=cwd, env=env, said=Path(folder) / "said")
        started.process.join(PATIENCE_S)
        status = started.poll()
        if status is None:
            started.kill()
            raise TimeoutError(f"raysim {' '.join(arguments)}\n{started.stderr.read_text()}")
        return subprocess.CompletedProcess(list(arguments), status, started.stdout.read_text(), started.stderr.read_text())


def _be_command(arguments: tuple[str, ...], cwd: str, env: dict[str, str], stdout: str, stderr: str, first: Callable[[], None]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, stdout, os.O_WRONLY | os.O_CREAT), (2, stderr, os.O_WRONLY | os.O_CREAT)):
        os.dup2(os.open(path, flags), number)
    sys.argv = ["raysim", *arguments]
    first()
    try:
        with undrawn():
            runpy.run_module("raysim", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without, and Ray's processes with it
