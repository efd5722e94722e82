#!/usr/bin/env bash
# Makes .venv and runs the linters and the tests. Arguments go to pytest:
#
#   ./launch/test.sh              the default suite, minutes
#   ./launch/test.sh -m ''        everything, also what is marked slow
#
# HYPERPRIOR_SAMPLES names a folder with imagenet_train_sample.tar and imagenet_val_sample.tar in ImageNet's
# own layout, and kodak/ with the Kodak images; the tests that want real photographs say that they are skipped
# where it is not set.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 "$@"
