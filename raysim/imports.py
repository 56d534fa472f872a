"""Importing torch, transformers and PEFT without Python's collector, which walks all that they make again and again: a fifth of the time.

Left out: what runs afterwards, which is collected as ever.
"""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While open, nothing is collected; what was made by then, which stays as long as the process, is never looked at again.

    Guarantees: whether the collector runs is afterwards as it was before. Does nothing within another one, and where all is there already.
    """
    if not gc.isenabled() or "peft" in sys.modules:
        yield
        return
    gc.collect()  # of a program that was at work before, only what lives is kept
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
