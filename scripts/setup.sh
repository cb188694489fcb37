#!/usr/bin/env bash
# setup.sh VENV WHAT: a virtual environment with WHAT (say ".[dev]") at the versions of constraints.txt.
set -euo pipefail
venv=$1 what=$2
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# torch first and by exact version: asked for later, the newest build with CUDA comes along.
pip install --quiet --no-compile "$(grep '^torch==' constraints.txt)"
# With all extras, every line of constraints.txt is wanted, and nothing has to be resolved.
case $what in *dev*) pip install --quiet --no-compile --no-deps --requirement constraints.txt ;; esac
pip install --quiet --no-compile --constraint constraints.txt --editable "$what"
# pip compiles in one process, and this in one a core; some packages carry files for other versions of Python.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
