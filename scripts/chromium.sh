#!/usr/bin/env bash
# chromium.sh FOLDER: a browser and its driver for tests (Debian's packages), and axe-core in FOLDER.
set -euo pipefail
folder=$1
mkdir -p "$(dirname "$folder")"
exec 9> "$folder.lock"
flock 9  # tests run in several processes
if [ -e "$folder/ready" ]; then exit 0; fi
if ! command -v chromium > /dev/null || ! command -v chromedriver > /dev/null; then
  apt-get update --quiet --quiet
  apt-get install --quiet --quiet --yes --no-install-recommends chromium chromium-driver fonts-liberation fonts-dejavu-core
fi
# The wheel is wanted for the JavaScript file in it alone.
"${PYTHON:-python3}" -m pip --disable-pip-version-check install --quiet --quiet --no-deps --upgrade --target "$folder" \
  axe-playwright-python==0.1.8
test -e "$folder/axe_playwright_python/axe.min.js"
touch "$folder/ready"
