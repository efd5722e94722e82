#!/usr/bin/env bash
# Trains the paper's curve for one metric, eight models at the published lambdas, and evaluates them on IMAGES.
#
#   ./launch/paper.sh mse|ms-ssim IMAGES [--jobs GPUS] [SECTION.KEY=VALUE ...]
#
# The five lower rates use N=128, M=192, the three higher rates N=192, M=320. Each takes 2,000,000 steps. The models go
# into runs/paper-METRIC. Started again, it continues. Not measured, because it takes GPU-weeks.
# HYPERPRIOR names an installed command; without it the script makes .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

case "${1:-}" in
    mse) config=configs/imagenet_mse.yaml low=0.0018,0.0035,0.0067,0.013,0.025 high=0.0483,0.0932,0.18 ;;
    ms-ssim) config=configs/imagenet_ms_ssim.yaml low=2.4,4.58,8.73,16.64,31.73 high=60.5,115.37,220 ;;
    *) config="" ;;
esac
if [ -z "$config" ] || [ $# -lt 2 ]; then
    echo "usage: $0 mse|ms-ssim IMAGES [--jobs GPUS] [SECTION.KEY=VALUE ...]" >&2
    exit 2
fi
out="runs/paper-$1" images="$2"
shift 2
find_hyperprior || exit

"$hyperprior" sweep "$config" "$@" --lambdas "$low" --out "$out"
"$hyperprior" sweep "$config" "$@" model.num_filters=192 model.latent_channels=320 model.hyper_channels=192 \
    --lambdas "$high" --out "$out"
exec "$hyperprior" evaluate "$out"/lambda-* --images "$images" --out "$out/results"
