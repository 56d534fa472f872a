"""How small a difference between two entries of a comparison would its seeds still tell, by each measure of memory and of utility?

    raysim compare fedpit-claims
    python benchmarks/power.py runs/fedpit-claims [--entries fedit fedpit] [--seeds 3] [--out FILE.json]

Prints the table of `raysim.claims.power_table`, and writes it as JSON if asked to.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from raysim.claims.decide import load_runs
from raysim.claims.power_table import power_markdown, power_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of a finished comparison, and writes it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a finished comparison over seeds")
    parser.add_argument("--entries", nargs=2, default=("fedit", "fedpit"), metavar=("FIRST", "SECOND"))
    parser.add_argument("--seeds", type=int, default=0, help="of the experiment that is thought of; as many as there are by default")
    parser.add_argument("--out", type=Path, help="a JSON file to write the rows into")
    given = parser.parse_args(arguments)
    first, second = given.entries
    rows = power_rows(load_runs(given.folder), first, second, num_seeds=given.seeds)
    print(power_markdown(rows, first=first, second=second))
    if given.out:
        given.out.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
