#!/usr/bin/env bash
# Writes requirements.lock: every package that Aither needs to run and to be worked on, pinned and
# hashed, for every platform and Python from 3.11 on. The resolver lives apart from .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
tool=.build/lock
if [ ! -x "$tool/bin/uv" ]; then
  "$python" -m venv --clear "$tool"
  "$tool/bin/python" -m pip install --quiet --disable-pip-version-check uv
fi
# No index names: the lock is good for whichever mirror pip is set up with.
"$tool/bin/uv" pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes \
  --no-emit-index-url --no-emit-find-links --no-header "$@" --output-file requirements.lock \
  pyproject.toml >/dev/null
header='# Everything Aither needs to run and to be worked on, pinned. Written by: make lock'
printf '%s\n' "$header" | cat - requirements.lock >.build/requirements.lock
mv .build/requirements.lock requirements.lock
