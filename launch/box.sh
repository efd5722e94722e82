#!/usr/bin/env bash
# Trains the models in the box (hyperprior/codec/box), exports them with float16 weights and measures them on IMAGES.
# The first run uses the highest lambda and small patches, so that a step sees many images. Then each lambda starts from
# the next higher one, on larger patches: small ones consist mostly of borders for h_a and h_s (configs/README.md). The
# models for MS-SSIM start from those for MSE.
#
#   ./launch/box.sh TRAIN VAL IMAGES [SECTION.KEY=VALUE ...]
#
# Started again, it continues. STEPS is the length of the first run (13000), TUNE that of each other run for MSE (4000),
# TUNE_MS_SSIM that of each run for MS-SSIM (1500).
# HYPERPRIOR names an installed command; without it the script makes .venv.
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
steps="${STEPS:-13000}" tune="${TUNE:-4000}" tune_ms_ssim="${TUNE_MS_SSIM:-1500}"
find_hyperprior || exit

train() {  # run, lambda, steps, further settings
    "$hyperprior" train configs/box.yaml "${data[@]}" "loss.lambda=$2" "train.steps=$3" "${@:4}" --run "runs/box/$1"
}
train start 0.0483 "$steps" train.start_from=null data.patch_size=128 train.batch_size=8 train.learning_rate=1e-3 "$@"
before=start quality=5
for lmbda in 0.0483 0.025 0.013 0.0067 0.0035; do
    train "lambda-$lmbda" "$lmbda" "$tune" "train.start_from=runs/box/$before" "$@"
    "$hyperprior" export "runs/box/lambda-$lmbda" --out "hyperprior/codec/box/q$quality.npz" --force
    before="lambda-$lmbda" quality=$((quality - 1))
done
quality=5
for lmbda in 60.5 31.73 16.64 8.73 4.58; do
    train "ms-ssim-$lmbda" "$lmbda" "$tune_ms_ssim" "train.start_from=hyperprior/codec/box/q$quality.npz" \
        loss.metric=ms-ssim train.learning_rate=3e-4 train.validate_every=250 "$@"
    "$hyperprior" export "runs/box/ms-ssim-$lmbda" --out "hyperprior/codec/box/q$quality-ms-ssim.npz" --force
    quality=$((quality - 1))
done
models=(q{1..5} q{1..5}-ms-ssim)
"$hyperprior" evaluate "${models[@]}" --images "$images" --out runs/box/results
"$hyperprior" evaluate "${models[@]}" --images "$images" --out runs/box/gate --baselines none --published none
cp runs/box/gate/summary.json hyperprior/codec/box/kodak.json
