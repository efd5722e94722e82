#!/usr/bin/env bash
# Trains with N processes on this machine. Each has one GPU, or a share of the cores if there are no GPUs. If one dies
# or they stop resumably (exit code 75), all are started again together.
#
#   ./launch/workers.sh [--max-restarts R] [--max-pause S] N CONFIG [SECTION.KEY=VALUE ...] [--run DIR]
#
# There are at most R restarts (10 by default), after pauses of 1, 2, 4 … seconds, at most S (30 by default). SIGTERM
# and Ctrl-C stop all processes with a checkpoint; the exit code is then 75.
# HYPERPRIOR names an installed command; without it the script makes .venv.
set -uo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

max_restarts=10
max_pause=30
while [ $# -ge 2 ]; do
    case "$1" in
        --max-restarts) max_restarts="$2" ;;
        --max-pause) max_pause="$2" ;;
        *) break ;;
    esac
    shift 2
done
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ && "$max_restarts" =~ ^[0-9]+$ && "$max_pause" =~ ^[0-9]+$ && $# -ge 2 ]]; then
    echo "usage: $0 [--max-restarts R] [--max-pause S] N CONFIG [SECTION.KEY=VALUE ...] [--run DIR]" >&2
    exit 2
fi
count="$1"
shift
find_hyperprior || exit

settle=60 # seconds that the other workers have to end by themselves after one failed
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES/#-1*/}"
else
    # Without a driver, nvidia-smi writes a sentence instead of numbers.
    gpus=($(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | grep -xE '[0-9]+'))
fi
if [ ${#gpus[@]} -gt 0 ] && [ ${#gpus[@]} -lt "$count" ]; then
    echo "$0: $count workers need one GPU each, there are ${#gpus[@]}; CUDA_VISIBLE_DEVICES= trains on the CPU" >&2
    exit 2
fi
threads=$(($(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN) / count))
python="$(dirname "$hyperprior")/python"
if [ ! -x "$python" ]; then python=python3; fi
pids=()
stopping=""

stop() {
    stopping=yes
    kill -TERM ${pids[@]+"${pids[@]}"} 2> /dev/null
}
trap stop TERM INT

start() {
    local ports cluster i
    pids=()
    ports="$("$python" -c '
import socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(", ".join("\"127.0.0.1:%d\"" % s.getsockname()[1] for s in sockets))' "$count")" || [ -n "$stopping" ] || exit 2
    for ((i = 0; i < count; i++)); do
        if [ -n "$stopping" ]; then break; fi
        (
            trap - TERM INT
            export TF_CONFIG="{\"cluster\": {\"worker\": [$ports]}, \"task\": {\"type\": \"worker\", \"index\": $i}}"
            if [ ${#gpus[@]} -gt 0 ]; then
                export CUDA_VISIBLE_DEVICES="${gpus[i]}"
            else
                export TF_NUM_INTRAOP_THREADS="${TF_NUM_INTRAOP_THREADS:-$((threads > 0 ? threads : 1))}"
            fi
            exec "$hyperprior" train "$@" 2> >(sed -u "s/^/[$i] /" >&2)
        ) &
        pids+=($!)
    done
    if [ -n "$stopping" ]; then stop; fi # the signal may have come before a worker was in `pids`
}

# Waits for all workers. `verdict` is then the exit code, or 75 if all should be started again. Bash writes the source of
# a killed worker to stderr, so lines for the user go to 3.
wait_all() {
    local code pid deadline="" left=("${pids[@]}")
    verdict=0
    while [ ${#left[@]} -gt 0 ]; do
        local still=()
        for pid in "${left[@]}"; do
            if kill -0 "$pid" 2> /dev/null; then
                still+=("$pid")
                continue
            fi
            wait "$pid"
            code=$?
            if [ "$code" -gt 128 ]; then echo "$0: process $pid was killed by signal $((code - 128))" >&3; fi
            if [ "$code" -ne 0 ] && [ -z "$deadline" ]; then
                deadline=$((SECONDS + settle))
                kill -TERM "${pids[@]}" 2> /dev/null # without it the others may wait for the one that ended
            fi
            if [ "$code" -gt 0 ] && [ "$code" -lt 75 ]; then
                verdict="$code" # 1 to 4: a restart would not help
            elif [ "$code" -ne 0 ] && [ "$verdict" -eq 0 ]; then
                verdict=75 # it was asked to stop, or killed
            fi
        done
        left=(${still[@]+"${still[@]}"})
        if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ] && [ ${#left[@]} -gt 0 ]; then
            echo "$0: killing ${#left[@]} workers that did not end in $settle s" >&3
            kill -CONT "${left[@]}" 2> /dev/null
            kill -KILL "${left[@]}" 2> /dev/null
            deadline=$((SECONDS + settle))
        fi
        sleep 0.2 &
        wait $!
    done
}

for ((restarts = 0; ; restarts++)); do
    start "$@"
    if [ ${#pids[@]} -eq 0 ]; then exit 75; fi # a signal came before a worker was started
    wait_all 3>&2 2> /dev/null
    if [ "$verdict" -ne 75 ] || [ -n "$stopping" ]; then exit "$verdict"; fi
    if [ "$restarts" -ge "$max_restarts" ]; then
        echo "$0: stopped again after $restarts restarts; start the same command again to go on" >&2
        exit 75
    fi
    pause=$((restarts < 20 ? 2 ** restarts : max_pause))
    if [ "$pause" -gt "$max_pause" ]; then pause="$max_pause"; fi
    echo "$0: all workers start again in $pause s (restart $((restarts + 1)) of at most $max_restarts)" >&2
    sleep "$pause" &
    wait $!
    if [ -n "$stopping" ]; then exit 75; fi
done
