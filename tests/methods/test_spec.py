"""The table of methods: it is complete, its words and colours are there, and who asks for a trait asks the same of every method."""

import inspect
import pkgutil

import pytest

import raysim.methods
from raysim.config import KEYS, Config, MethodConfig, load
from raysim.methods.registry import method_of
from raysim.methods.spec import METHODS, MethodSpec, named, spec_of
from raysim.reports.figures import COLOURS, SPARE_COLOURS, colours_of

SEAMS = {"call", "registry", "spec", "synthesis"}
"""What lies in `raysim/methods/` and is no method."""


def test_every_file_of_a_method_is_in_the_table_and_every_entry_has_its_function() -> None:
    functions = [method_of(name) for name, spec in METHODS.items() if spec.trains]
    of_one, of_a_group = ["lm", "call"], ["lm", "calls"]
    assert all(list(inspect.signature(function).parameters) in (of_one, of_a_group) for function in functions)
    files = {module.name for module in pkgutil.iter_modules(raysim.methods.__path__)}
    assert {function.__module__.rpartition(".")[2] for function in functions} == files - SEAMS


def test_a_name_is_a_method_of_its_own() -> None:
    assert [spec.name for spec in METHODS.values()] == list(METHODS)
    assert len({spec.label for spec in METHODS.values()}) == len(METHODS)
    with pytest.raises(AssertionError, match="base trains nothing"):
        method_of("base")


@pytest.mark.parametrize("spec", METHODS.values(), ids=list(METHODS))
def test_an_entry_is_whole(spec: MethodSpec) -> None:
    assert MethodConfig(spec.name).spec is spec
    assert load("", [f"method.name={spec.name}"]).privacy.unit == spec.units[0]
    assert bool(spec.no_guarantee) == ("none" in spec.units), "a run without privacy says so"
    assert set(spec.sections) <= set(vars(Config()))
    assert spec.colour in {"", *COLOURS}
    assert spec.summary
    assert f"`{spec.name}`: {spec.summary}" in KEYS["method.name"].doc
    assert not (spec.separates and (spec.pools or spec.has_private_adapter)), "its only adapter is the client's own"


def test_every_method_has_a_colour_of_its_own_and_a_stranger_a_spare_one() -> None:
    own = [name for name, spec in METHODS.items() if spec.colour]
    colours = colours_of([*own, "stranger", "another"])
    assert colours[-2:] == [light for light, _ in SPARE_COLOURS[:2]]
    assert len(set(colours)) == len(own) + 2


def test_a_stranger_is_called_by_its_name() -> None:
    assert spec_of("stranger") == MethodSpec("stranger", label="stranger")
    assert spec_of("fedit") is METHODS["fedit"]


def test_methods_are_listed_as_a_refusal_names_them() -> None:
    assert named(lambda spec: "example" in spec.units) == "'dplora' or 'fedpit'"
    assert named(lambda spec: spec.steps_privately) == "'dplora'"
    assert named(lambda spec: spec.writes_privately) == "'fedpit'"
    assert named(lambda spec: not spec.trains_together) == "'base' or 'locit' or 'locit_synthetic'"
