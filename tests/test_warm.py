"""Commands of `warm` begin with all imported: else each of them takes seconds more, and no other test says so."""

import sys
from functools import partial
from pathlib import Path

from tests import warm
from tests.small_runs import environment


def note_modules(path: Path) -> None:
    """Writes the names of what this process has imported."""
    path.write_text("\n".join(sys.modules))


def test_a_command_begins_with_all_that_a_run_imports(tmp_path: Path) -> None:
    names = tmp_path / "names"
    command = warm.start("--version", cwd=tmp_path, env=environment(), said=tmp_path / "said", first=partial(note_modules, names))
    command.process.join(warm.PATIENCE_S)
    assert command.poll() == 0, command.stderr.read_text()
    assert {"torch", "ray", "transformers", "raysim.runs.run", "raysim.sweeps.sweep"} <= set(names.read_text().split("\n"))
