"""The command `raysim` on a disk with room for so many files, each of which is noted, written or refused.

python benchmarks/disk.py ROOM LOG run CONFIG [key=value ...]      ROOM is -1 for a disk that is never full
"""

import errno
import sys
from pathlib import Path

from raysim import storage

WRITTEN, REFUSED = b".", b"x"
"""What the log holds of each file, in order."""


def limit(room: int, log: Path) -> None:
    """Lets this process write `room` files of results, as many as it likes if that is negative; of the next one half reaches the disk, then none."""
    left, write = [room], storage._write

    def on_this_disk(path: Path, content: bytes, *, mode: int) -> None:
        full = left[0] == 0
        left[0] -= 0 if full else 1
        with log.open("ab", buffering=0) as file:
            file.write(REFUSED if full else WRITTEN)
        write(path, content[: len(content) // 2] if full else content, mode=mode)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    storage._write = on_this_disk


if __name__ == "__main__":
    from raysim.cli import main

    limit(int(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
