#!/usr/bin/env bash
# setup.sh VENV WHAT: a virtual environment with WHAT (say ".[dev]") at the versions of constraints.txt.
set -euo pipefail
venv=$1 what=$2
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# torch first and by exact version: asked for later, the newest build with CUDA comes along.
pip install --quiet "$(grep '^torch==' constraints.txt)"
pip install --quiet --constraint constraints.txt --editable "$what"
