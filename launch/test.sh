#!/usr/bin/env bash
# Makes .venv and runs the linters and the tests. Arguments go to pytest:
#
#   ./launch/test.sh              the default suite, which takes minutes
#   ./launch/test.sh -m ''        all tests, including those marked slow
#
# HYPERPRIOR_SAMPLES names a folder with imagenet_train_sample.tar and imagenet_val_sample.tar in ImageNet's
# layout, and kodak/ with the Kodak images. If it is not set, the tests that need real photographs are skipped
# and say so.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment dev
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
exec "$venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
