#!/usr/bin/env bash
# Makes .venv: a virtual environment with exactly what requirements.lock says, and this project in
# editable form. Does nothing when nothing has changed. Two terminals may call it at once.
set -euo pipefail
cd "$(dirname "$0")/.."

# What .venv depends on: where it lies, what is locked, how the project is packaged, and which
# packages there are (an editable installation lists them).
wanted() {
  {
    pwd
    cat pyproject.toml requirements.lock setup.py
    printf '%s\n' */__init__.py generated/aither/*/*/
  } | cksum
}
ready() { [ "$(cat .venv/.ready 2>/dev/null)" = "$(wanted)" ] && [ -x .venv/bin/python ]; }

fits='import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))'

if ready; then exit 0; fi

# .venv is never made from itself.
PATH=":$PATH:"
while [[ $PATH == *":$PWD/.venv/bin:"* ]]; do PATH=${PATH//:"$PWD/.venv/bin":/:}; done
PATH=${PATH#:}
PATH=${PATH%:}

python=
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
  if path=$(command -v "$candidate") && "$path" -c "$fits" >/dev/null 2>&1; then
    python=$path
    break
  fi
  if [ -n "${PYTHON:-}" ]; then break; fi
done
if [ -z "$python" ]; then
  {
    if [ -n "${PYTHON:-}" ]; then echo "PYTHON=$PYTHON is not a Python 3.11 or later with venv and pip."; fi
    echo "Aither needs Python 3.11 or later with its venv module. Install it, for example:"
    echo "  Debian, Ubuntu   apt install python3 python3-venv"
    echo "  Fedora           dnf install python3"
    echo "  macOS            brew install python"
    echo "or name one: make setup PYTHON=/path/to/python3.12"
  } >&2
  exit 1
fi

# The lock is held by this shell's descriptor and ends with it.
mkdir -p .build
exec 9>.build/setup.lock
if ! "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
  echo "waiting for another make that is setting up .venv"
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
fi
if ready; then exit 0; fi

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
# Made anew when the folder was moved or the lock has changed: pip would leave behind what is no
# longer wanted.
base=$(pwd; cksum <requirements.lock)
if [ "$(cat .venv/.base 2>/dev/null)" != "$base" ] || ! .venv/bin/python -c "$fits" 2>/dev/null; then
  echo "setting up .venv with $("$python" -V); it takes a minute or two, once"
  rm -rf .venv
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --require-hashes --requirement requirements.lock
  printf '%s\n' "$base" >.venv/.base
fi
rm -f .venv/.ready
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
wanted >.venv/.ready
