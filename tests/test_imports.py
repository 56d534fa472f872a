"""What a process that is to work imports: without the collector at work, and not what it never needs."""

import gc
import subprocess
import sys

from raysim.imports import uncollected
from tests.small_runs import environment

SERVER = """
import gc, sys
import raysim  # light
gc.collect()  # so that none is due from what was made before
passes = []
gc.callbacks.append(lambda phase, info: passes.append(info["generation"]))
import raysim.federation.on_ray.server
assert gc.isenabled()
assert gc.get_freeze_count() > 100_000, "what torch makes"
print(sorted({"torch", "ray", "transformers", "peft", "matplotlib"} & set(sys.modules)), passes.count(0), passes.count(1))
"""


def python(script: str) -> str:
    """What a new interpreter that runs the script prints."""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_process_of_a_server_loads_no_language_model_and_collects_nothing_while_it_imports() -> None:
    loaded, young, middle = python(SERVER).rsplit(" ", 2)
    assert loaded == "['torch']"
    assert (int(young), int(middle)) == (0, 0), "every import walked what those before it had made"


def test_the_collector_is_afterwards_as_it_was_before() -> None:
    script = """
import gc
from raysim.imports import uncollected
def grow(): return [[i] for i in range(10_000)]
passes = []
gc.callbacks.append(lambda phase, info: passes.append(phase))
kept = grow()
assert passes, "ten thousand lists are collected on the way"
with uncollected():
    del passes[:]
    more = grow()
    with uncollected():
        assert not gc.isenabled()
    assert not gc.isenabled(), "the inner one leaves it to the outer one"
    assert not passes
assert gc.isenabled() and gc.get_freeze_count() > 20_000
try:
    with uncollected():
        raise KeyError
except KeyError:
    assert gc.isenabled()
gc.disable()
with uncollected():
    pass
assert not gc.isenabled(), "who had switched it off finds it so"
"""
    python(script)


def test_nothing_is_frozen_where_all_is_imported_already() -> None:
    import peft  # noqa: F401  # what the rest of the suite has loaded

    before = gc.get_freeze_count()
    with uncollected():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
