#!/usr/bin/env bash
# Measures the training step on this machine's GPUs with and without TF32, mixed precision and XLA. Each combination
# gives one JSON file in DIR.
#
#   ./launch/bench_gpu.sh CONFIG DIR [SECTION.KEY=VALUE ...]
#
# Not run on a GPU yet.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG DIR [SECTION.KEY=VALUE ...]" >&2
    exit 2
fi
find_hyperprior
config="$1"
out="$2"
shift 2
mkdir -p "$out"
for tf32 in 0 1; do
    for precision in float32 mixed_bfloat16 mixed_float16; do
        for xla in false true; do
            echo "== TF32 $tf32, $precision, XLA $xla"
            NVIDIA_TF32_OVERRIDE="$tf32" "$hyperprior" bench "$config" step "train.precision=$precision" \
                "train.xla=$xla" "$@" --out "$out/tf32-$tf32-$precision-xla-$xla.json" || echo "failed: exit code $?"
        done
    done
done
