#!/usr/bin/env bash
# Trains a small model in minutes. It makes .venv if needed, packs the photographs that ship with scikit-image into tar shards,
# and trains on them. Started again, it resumes, or says that it is done.
#
#   ./launch/quickstart.sh [SECTION.KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment quickstart

photos="$("$venv/bin/python" -c 'import os, skimage; print(os.path.join(os.path.dirname(skimage.__file__), "data"))')"
pack() {  # split, photographs
    local split="$1"
    shift
    "$venv/bin/hyperprior" pack "${@/#/$photos/}" --out "runs/quickstart-data/$split"
}
pack train astronaut.png brick.png camera.png clock_motion.png coins.png grass.png gravel.png \
    hubble_deep_field.jpg ihc.png moon.png retina.jpg
pack val chelsea.png motorcycle_left.png
pack test coffee.png rocket.jpg

exec "$venv/bin/hyperprior" train configs/quickstart.yaml "$@"
