"""What the process that `warm` forks from has imported, and its collector never touches: else each fork would copy all of it."""

from raysim.imports import uncollected

with uncollected():
    import tests.warm  # noqa: F401  # imported for who is forked
