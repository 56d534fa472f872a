"""Installs what the lock files pin, and then this tree, for the Python that runs it: `.venv/bin/python -m tools.install`.

uv does it in seconds; where uv cannot be had, or with INSTALLER=pip in the environment, pip does it in minutes. Either takes
nothing that the lock files do not name, and checks every file that it fetches against their hashes. What was interrupted is
finished by the next call. Left out: making the environment, which is the Makefile's.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
UV = (sys.executable, "-m", "uv")
INSTALL = ("--no-deps", "--no-build-isolation")
"""The lists are complete, and what builds from source does it with a build backend that they pin."""
FROM_PIP = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
"""What tells uv what an option of pip tells pip: a mirror or a folder of wheels is seldom set up for uv as well."""


UNFINISHED = Path(sys.prefix) / ".unfinished"
"""There while this works. A package that was being installed when it was stopped looks whole to either installer."""


def main() -> None:
    """Installs everything, and says in one line each by what and which build of torch."""
    os.chdir(ROOT)
    if again := UNFINISHED.exists():
        print("the set-up before this one did not end: everything is installed once more", flush=True)
    UNFINISHED.touch()
    install, environment = installer(again=again)
    build = "cpu" if is_offered(pinned("tools/torch-cpu.lock", "torch"), install, environment) else "cuda"
    print(f"torch: the {build.upper()} build", flush=True)
    # rouge-score is published as source only; its build backend has to be there before it.
    run([*install, "--require-hashes", "-r", "/dev/stdin"], environment, stdin=pinned("requirements.lock", "setuptools"))
    run([*install, "--require-hashes", "-r", "requirements.lock", "-r", f"tools/torch-{build}.lock"], environment)
    # It is built against torch; its kernels are compiled where they are used, or not at all.
    run([*install, "--require-hashes", "-r", "tools/deepspeed.lock"], {**environment, "DS_BUILD_OPS": "0"})
    run([*install, "--editable", "."], environment)
    UNFINISHED.unlink()


def installer(*, again: bool) -> tuple[list[str], dict[str, str]]:
    """The command that installs, and its environment: uv's, fetched by pip, or pip's own where uv cannot be had or is not wanted."""
    wanted = os.environ.get("INSTALLER", "uv")
    if wanted not in ("uv", "pip"):
        sys.exit(f"INSTALLER={wanted} is neither uv nor pip")
    by_pip = [*PIP, "install", "-qq", *INSTALL, *(["--force-reinstall"] if again else [])], dict(os.environ)
    if wanted == "pip":
        print("pip installs, which takes minutes; each file is checked against its hash", flush=True)
        return by_pip
    fetched = subprocess.run([*by_pip[0], "--require-hashes", "-r", "tools/installer.lock"], capture_output=True, text=True)
    if fetched.returncode != 0:
        reason = (fetched.stderr.strip().splitlines() or ["pip does not say why"])[-1]
        print(
            f"uv cannot be had here ({reason}): pip installs instead, which takes minutes; each file is checked against its hash",
            flush=True,
        )
        return by_pip
    settings = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    print("uv installs; each file is checked against its hash", flush=True)
    by_uv = [*UV, "pip", "install", "-q", "--compile-bytecode", "--python", sys.executable, *INSTALL, *(["--reinstall"] if again else [])]
    return by_uv, {**sources(settings), **os.environ}


def sources(settings: str) -> dict[str, str]:
    """uv's variables for what `pip config list` printed: for each option the environment's value, else [install]'s, else [global]'s."""
    lines = dict(line.split("=", 1) for line in settings.splitlines() if "=" in line)
    # As pip does it: the best version at any index. What is taken of it is decided by the hashes, not by where it lies.
    variables = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for option, variable in FROM_PIP.items():
        values = [lines[key] for key in (f":env:.{option}", f"install.{option}", f"global.{option}") if key in lines]
        if values:
            separator = "," if variable == "UV_FIND_LINKS" else " "
            variables[variable] = separator.join(values[0].strip("'\"").replace("\\n", " ").split())
    return variables


def is_offered(requirement: str, install: list[str], environment: Mapping[str, str]) -> bool:
    """Whether the release that is pinned is there already, or at the configured sources, for this platform and Python.

    Its hash is checked when it is installed.
    """
    name = requirement.split()[0]
    return subprocess.run([*install, "--dry-run", name], env=dict(environment), capture_output=True).returncode == 0


def pinned(path: str, name: str) -> str:
    """The lines by which the lock file at `path` pins the package `name`."""
    (block,) = [block for block in blocks((ROOT / path).read_text()) if block.startswith(f"{name}==")]
    return block


def blocks(lock: str) -> list[str]:
    """The lines of each package of a lock file: the one that pins it, and those of its hashes."""
    return re.findall(r"^[a-z0-9](?:[^\n]*\\\n)*[^\n]*\n", lock, re.MULTILINE)


def run(command: list[str], environment: Mapping[str, str], *, stdin: str | None = None) -> None:
    """Runs a command that says itself what it fails of; this program then ends."""
    done = subprocess.run(command, env=dict(environment), input=stdin, text=True)
    if done.returncode != 0:
        sys.exit("not set up: see above; the same command goes on from here, and INSTALLER=pip tries it with pip")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
