#!/usr/bin/env bash
# Versions: ray 2.60.0; Python 3.11. Seen since 2026-11-28.
#
# What happens: ray.init() that starts a cluster of its own on this machine writes ~/.ray/auth_token if there is none, and sets
# RAY_AUTH_MODE=token in the environment of its process. ray.shutdown() takes neither back: the file stays for good, and programs that the
# process starts afterwards inherit the mode. Ray logs the first two. Where HOME is no folder that can hold the file, ray.init() fails.
# With RAY_AUTH_MODE=disabled none of this happens.
#
# Seen:
#   first time:     before: no file, mode None; running: file, mode token; after shutdown: file, mode token
#   once more:      before: file, mode None; running: file, mode token; after shutdown: file, mode token; the file is the same: True
#   disabled:       before: no file, mode disabled; running: no file, mode disabled; after shutdown: no file, mode disabled
#   no home:        before: no file, mode None; NotADirectoryError
#
# Why it matters: one local run of a simulation leaves a file in the user's home and changes what its later child processes do; in a container
# whose user has no home it does not start.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q ray==2.60.0

cd "$work"
unset RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH RAY_ADDRESS
export RAY_USAGE_STATS_ENABLED=0
mkdir home other
touch none
cat >once.py <<'PYTHON'
import logging
import os
import sys
from pathlib import Path

import ray

file = Path.home() / ".ray" / "auth_token"


def state():
    return f"{'file' if Path.home().is_dir() and file.exists() else 'no file'}, mode {os.environ.get('RAY_AUTH_MODE')}"


before = file.read_bytes() if Path.home().is_dir() and file.exists() else None
said = [f"before: {state()}"]
try:
    ray.init(num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, _temp_dir=sys.argv[1])
    said.append(f"running: {state()}")
    ray.shutdown()
    said.append(f"after shutdown: {state()}")
except OSError as error:
    said.append(type(error).__name__)
if before:
    said.append(f"the file is the same: {file.read_bytes() == before}")
print("; ".join(said))
PYTHON

run() { venv/bin/python once.py "$work/r"; }
{
  echo "first time:     $(HOME=$work/home run)"
  echo "once more:      $(HOME=$work/home run)"
  echo "disabled:       $(HOME=$work/other RAY_AUTH_MODE=disabled run)"
  echo "no home:        $(HOME=$work/none run)"
} | tee seen

cat >expected <<'END'
first time:     before: no file, mode None; running: file, mode token; after shutdown: file, mode token
once more:      before: file, mode None; running: file, mode token; after shutdown: file, mode token; the file is the same: True
disabled:       before: no file, mode disabled; running: no file, mode disabled; after shutdown: no file, mode disabled
no home:        before: no file, mode None; NotADirectoryError
END
diff expected seen || { echo "the behaviour has changed" >&2; exit 1; }
