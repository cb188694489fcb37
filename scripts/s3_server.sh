#!/usr/bin/env bash
# s3_server.sh VENV: an S3 server for tests (moto) in an environment of its own: its clients want older packages than ours.
set -euo pipefail
venv=$1
mkdir -p "$(dirname "$venv")"
exec 9> "$venv.lock"
flock 9  # tests run in several processes
if [ -e "$venv/ready" ]; then exit 0; fi
python=${PYTHON:-python3}
[ -x "$venv/bin/python" ] || "$python" -m venv --without-pip "$venv"
"$python" -m pip --python "$venv/bin/python" --disable-pip-version-check \
    install --quiet --quiet --no-compile --no-deps --requirement scripts/s3_server.txt
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c 'import moto.server, moto.s3.models, moto.s3.urls'  # compiles what it needs
touch "$venv/ready"
