# The other scripts source this file.

# Makes a virtual environment and installs the project into it with the extra $1. Does nothing if this is done already.
# Sets `venv`: .venv, or .venv-3.12 if PYTHON names a Python 3.12 and .venv has another version.
make_environment() {
    local status=0
    # Scripts that start together wait here for each other: pip must not replace libraries that the other one has loaded.
    if command -v flock > /dev/null && mkdir -p .venv && { exec 9> .venv/lock; } 2> /dev/null; then flock 9; fi
    make_environment_alone "$1" || status=$?
    exec 9>&-
    return $status
}

make_environment_alone() {
    local extras="$1" stamp python="" version candidate candidates
    venv=.venv
    if [ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ]; then
        # 3.12 first: it gets the newest TensorFlow that has a range coder in C++.
        read -ra candidates <<< "python3.12 python3.11 python3.10 python3.9 python3.13 python3 python"
        if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
        for candidate in "${candidates[@]}"; do
            if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 13))' \
                > /dev/null 2>&1; then
                python="$candidate"
                break
            fi
        done
        if [ -z "$python" ]; then
            cat >&2 <<MESSAGE
No Python 3.9 to 3.13 with its venv module was found; tried ${candidates[*]}. Ways to get one:
  Debian, Ubuntu   apt-get install python3 python3-venv
  conda            conda create -n hyperprior python=3.12 && conda activate hyperprior
  uv               uv python install 3.12
  macOS            brew install python@3.12
Then start this script again. Add PYTHON=/path/to/python3.12 if that Python is not on the PATH.
MESSAGE
            exit 2
        fi
        version="$(python_version "$python")"
        if [ -x .venv/bin/python ] && [ "$(python_version .venv/bin/python)" != "$version" ]; then venv=".venv-$version"; fi
    fi
    stamp="$venv/installed-$extras-$(cksum < pyproject.toml | cut -d' ' -f1)"
    if [ -e "$stamp" ]; then return; fi
    if [ ! -x "$venv/bin/python" ]; then
        echo "making $venv with $("$python" --version)"
        "$python" -m venv "$venv" || return
    fi
    echo "installing hyperprior${extras:+[$extras]} into $venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" || return
    touch "$stamp"
}

python_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

# Sets `hyperprior` to the command: $HYPERPRIOR if it is set, else the command in the virtual environment.
find_hyperprior() {
    hyperprior="${HYPERPRIOR:-}"
    if [ -z "$hyperprior" ]; then
        make_environment "$(command -v nvidia-smi > /dev/null 2>&1 && echo cuda)" || return
        hyperprior="$PWD/$venv/bin/hyperprior"
    fi
}
