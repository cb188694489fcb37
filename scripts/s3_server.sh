#!/usr/bin/env bash
# s3_server.sh VENV: an S3 server for tests (moto) in an environment of its own: its clients want older packages than ours.
set -euo pipefail
venv=$1
mkdir -p "$(dirname "$venv")"
exec 9> "$venv.lock"
flock 9  # tests run in several processes
if [ -e "$venv/ready" ]; then exit 0; fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --quiet --no-deps --requirement scripts/s3_server.txt
"$venv/bin/python" -c 'import moto.server'
touch "$venv/ready"
