#!/usr/bin/env bash
# Trains the models in the box (hyperprior/models): the highest lambda first, then each from the one above
# it; exports them with float16 weights and measures them on IMAGES.
#
#   ./launch/box.sh TRAIN VAL IMAGES [SECTION.KEY=VALUE ...]
#
# Started again it goes on. STEPS=13000 of the first run, half as many of the others.
# HYPERPRIOR names an installed command to use; without it .venv is made.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
if [ $# -lt 3 ]; then
    echo "usage: $0 TRAIN VAL IMAGES [SECTION.KEY=VALUE ...]" >&2
    exit 2
fi
data=("data.train=[$1]" "data.val=[$2]")
images="$3"
shift 3
steps="${STEPS:-13000}"
find_hyperprior || exit

train() {  # lambda, steps, what to start from
    "$hyperprior" train configs/box.yaml "${data[@]}" "loss.lambda=$1" "train.steps=$2" ${3:+"train.start_from=$3"} \
        "${@:4}" --run "runs/box/lambda-$1"
}
train 0.0483 "$steps" "" "$@"
train 0.025 $((steps / 2)) runs/box/lambda-0.0483 "$@"
train 0.013 $((steps / 2)) runs/box/lambda-0.025 "$@"
train 0.0067 $((steps / 2)) runs/box/lambda-0.013 "$@"
train 0.0035 $((steps / 2)) runs/box/lambda-0.0067 "$@"

quality=0
for lmbda in 0.0035 0.0067 0.013 0.025 0.0483; do
    quality=$((quality + 1))
    "$hyperprior" export "runs/box/lambda-$lmbda" --out "hyperprior/models/q$quality.npz"
done
"$hyperprior" evaluate q1 q2 q3 q4 q5 --images "$images" --out runs/box/results
"$hyperprior" evaluate q1 q2 q3 q4 q5 --images "$images" --out runs/box/gate --baselines none --published none
cp runs/box/gate/summary.json hyperprior/models/kodak.json
