#!/usr/bin/env bash
# Trains on all GPUs of this machine, or on its CPU, in one process.
#
#   ./launch/local.sh CONFIG [SECTION.KEY=VALUE ...] [--run DIR]
#
# HYPERPRIOR names an installed command; without it the script makes .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
find_hyperprior
unset TF_CONFIG
exec "$hyperprior" train "$@"
