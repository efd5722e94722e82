#!/usr/bin/env bash
# Trains the models in the box, exports them into runs/box/models and measures them on IMAGES.
# First models of 64 filters: a long run at the highest lambda on small patches, so that a step sees many images; then
# each lambda starts from the next higher one, on larger patches: small ones consist mostly of borders for h_a and h_s
# (configs/README.md). The models for MS-SSIM start from these. q5 is trained further, widened to 96 filters and trained
# again, and q4 and q3 follow it. With q1 and q2 as wide, the package would be larger than 30 MB. All five go on with a
# low rate, then with a logistic density of y, and once more at a high rate.
# The models in the box differ in two points: their first round had no photographs of BSDS500, and up to the low rates
# rounding was to the nearest integers.
#
#   ./launch/box.sh TRAIN VAL IMAGES [SECTION.KEY=VALUE ...]
#
# TRAIN and VAL are shards, several with commas between them. Started again, it continues. Further settings hold for all
# runs: train.steps=20 tries it out. To ship the models, copy each runs/box/models/NAME/model.npz to
# hyperprior/codec/box/NAME.npz and runs/box/gate/summary.json to kodak.json there, and add their fingerprints to
# released.json.
# HYPERPRIOR names an installed command; without it the script makes .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
if [ $# -lt 3 ]; then
    echo "usage: $0 TRAIN VAL IMAGES [SECTION.KEY=VALUE ...]" >&2
    exit 2
fi
settings=("data.train=[$1]" "data.val=[$2]" "${@:4}")
images="$3"
find_hyperprior || exit

train() {  # run, where it starts, lambda, steps, peak rate, further settings
    "$hyperprior" train configs/box.yaml "train.start_from=$2" "loss.lambda=$3" "train.steps=$4" "train.learning_rate=$5" \
        "${@:6}" "${settings[@]}" --run "runs/box/$1"
}
export_model() {  # run, name
    "$hyperprior" export "runs/box/$1" --out "runs/box/models/$2" --force
}

lambdas=("" 0.0035 0.0067 0.013 0.025 0.0483)  # of q1 to q5

train start null "${lambdas[5]}" 13000 1e-3 data.patch_size=128 train.batch_size=8
before=start
for quality in 5 4 3 2 1; do
    train "narrow-$quality" "runs/box/$before" "${lambdas[quality]}" 4000 5e-4
    before="narrow-$quality"
done
for point in "5 60.5" "4 31.73" "3 16.64" "2 8.73" "1 4.58"; do
    read -r quality lmbda <<< "$point"
    train "ms-ssim-$quality" "runs/box/narrow-$quality" "$lmbda" 1500 3e-4 loss.metric=ms-ssim train.validate_every=250
    export_model "ms-ssim-$quality" "q$quality-ms-ssim"
done
train longer-5 runs/box/narrow-5 "${lambdas[5]}" 5000 4e-4
before=longer-5
for point in "5 6000 5e-4" "4 3000 3e-4" "3 1600 2.5e-4"; do
    read -r quality steps rate <<< "$point"
    train "wide-$quality" "runs/box/$before" "${lambdas[quality]}" "$steps" "$rate" model.num_filters=96
    before="wide-$quality"
done
train longer-2 runs/box/narrow-2 "${lambdas[2]}" 2400 3e-4
for point in "5 wide-5 96 1200 2e-4" "4 wide-4 96 600 1e-4" "3 wide-3 96 1200 2e-4" "2 longer-2 64 600 1e-4" \
    "1 narrow-1 64 600 1e-4"; do
    read -r quality before filters steps rate <<< "$point"
    train "low-$quality" "runs/box/$before" "${lambdas[quality]}" 600 1e-4 "model.num_filters=$filters" \
        train.validate_every=600
    train "logistic-$quality" "runs/box/low-$quality" "${lambdas[quality]}" "$steps" "$rate" "model.num_filters=$filters" \
        model.density=logistic train.validate_every=300
done
for point in "5 96 4000" "4 96 4000" "3 96 6000" "2 64 6000" "1 64 6000"; do
    read -r quality filters steps <<< "$point"
    train "last-$quality" "runs/box/logistic-$quality" "${lambdas[quality]}" "$steps" 4e-4 "model.num_filters=$filters" \
        model.density=logistic
    export_model "last-$quality" "q$quality"
done
models=(runs/box/models/q{1..5} runs/box/models/q{1..5}-ms-ssim)
"$hyperprior" evaluate "${models[@]}" --images "$images" --out runs/box/results
"$hyperprior" evaluate "${models[@]}" --images "$images" --out runs/box/gate --baselines none --published none
