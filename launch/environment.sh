# The other scripts source this file.

# Makes .venv with a Python that TensorFlow 2.14 supports, and installs the project into it with the extra $1. Does
# nothing if this is done already.
make_environment() {
    local extras="$1" stamp python candidate
    stamp=".venv/installed-$extras-$(cksum < pyproject.toml | cut -d' ' -f1)"
    if [ -e "$stamp" ]; then return; fi
    if [ ! -x .venv/bin/python ]; then
        python=""
        for candidate in "${PYTHON:-}" python3.11 python3.10 python3.9 python3 python; do
            if [ -z "$candidate" ]; then continue; fi
            if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 11))' \
                > /dev/null 2>&1; then
                python="$candidate"
                break
            fi
        done
        if [ -z "$python" ]; then
            cat >&2 <<'MESSAGE'
No Python 3.9, 3.10 or 3.11 with its venv module was found; TensorFlow 2.14 needs one of them. Ways to get it:
  Debian 12, Ubuntu 22.04   apt-get install python3 python3-venv
  conda                     conda create -n hyperprior python=3.11 && conda activate hyperprior
  uv                        uv python install 3.11
  macOS                     brew install python@3.11
Then start this script again. Add PYTHON=/path/to/python3.11 if that Python is not on the PATH.
MESSAGE
            exit 2
        fi
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv || return
    fi
    echo "installing hyperprior${extras:+[$extras]} into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" || return
    touch "$stamp"
}

# Sets `hyperprior` to the command: $HYPERPRIOR if it is set, else the command in .venv.
find_hyperprior() {
    hyperprior="${HYPERPRIOR:-}"
    if [ -z "$hyperprior" ]; then
        make_environment "$(command -v nvidia-smi > /dev/null 2>&1 && echo cuda)" || return
        hyperprior="$PWD/.venv/bin/hyperprior"
    fi
}
