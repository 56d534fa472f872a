"""What the process that `warm` forks from has imported, and its collector never touches: else each fork would copy all of it."""

from raysim.imports import uncollected

with uncollected():  # raysim for what the commands import, and tests.warm for who is forked
    import raysim.claims.page
    import raysim.cli
    import raysim.commands.audit
    import raysim.runs.compare
    import raysim.sweeps.sweep  # noqa: F401
    import tests.warm  # noqa: F401
