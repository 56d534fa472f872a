"""From a method's name to its function, which is imported when it is asked for: a new method is its file and its entry in `spec`."""

import pkgutil

from raysim.methods.call import Method
from raysim.methods.spec import METHODS


def method_of(name: str) -> Method:
    """The function that does a client's work in a round (`base` has none)."""
    spec = METHODS[name]
    assert spec.trains, f"{name} trains nothing, so that no client is ever asked"
    function: Method = pkgutil.resolve_name(f"raysim.methods.{spec.function or f'{name}:{name}'}")
    return function
