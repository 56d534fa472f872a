"""Federated LoRA fine-tuning of language models, simulated on Ray with privacy that can be checked.

`raysim.run(raysim.load("quickstart", ["method.name=fedpit", "lora.rank=16"]))` runs a simulation and returns its records;
`raysim.compare` runs several side by side.
"""

import logging
from typing import TYPE_CHECKING, Any

from raysim.config import Config, load
from raysim.imports import uncollected

if TYPE_CHECKING:
    from raysim.runs.compare import compare
    from raysim.runs.run import Run, run

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it where it is installed, and it then says what it lacks
__version__ = "0.1.0"
__all__ = ["Config", "Run", "__version__", "compare", "load", "run"]


def __getattr__(name: str) -> Any:
    """Imports the runner when it is first asked for: with torch and Ray it takes seconds that checking a config need not."""
    if name not in ("Run", "compare", "run"):
        raise AttributeError(f"module 'raysim' has no attribute {name!r}")
    with uncollected():
        from raysim.runs import compare, run  # heavy, and not needed by who only reads configurations

    return {"Run": run.Run, "compare": compare.compare, "run": run.run}[name]
