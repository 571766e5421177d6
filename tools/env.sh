# Sourced by the scripts beside it: makes .venv when it is missing, half made or older than pyproject.toml, constraints.txt and the lock
# files; says what it does.
#
#   in   REPO (the repository, set here); first argument of make_env: "" or "dev"
#   out  .venv with the project installed in place, and a stamp in it, written last: a second run takes no time
#   surprising: three installations. What is locked comes first, every file checked against its hash; then torch, pinned by version, with
#   what its build for this machine brings (nothing for CPUs, NVIDIA's libraries for CUDA; see tools/lock); then this folder, without
#   anything else. So pip's resolver chooses nothing but what torch asks for.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$REPO/.venv
CONSTRAINTS=$REPO/tools/constraints.txt
LOCK=$REPO/tools/lock.txt
LOCK_DEV=$REPO/tools/lock-dev.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

say() { printf '%s\n' "$*" >&2; }

find_python() { # prints the first Python >= 3.10 that runs
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    say "needs Python 3.10 or newer with its venv module; none was found (set PYTHON=/path/to/python3)"
    return 2
}

quietly() { # WHAT COMMAND...: output to a log, shown only when the command fails
    local what=$1 log=$VENV/setup.log begin=$SECONDS
    shift
    printf '  %s ...' "$what" >&2
    if ! "$@" >>"$log" 2>&1 </dev/null; then
        say " failed after $((SECONDS - begin)) s. The end of $log:"
        tail -n 40 "$log" >&2
        return 1
    fi
    say " $((SECONDS - begin)) s"
}

install_locked() { # FILE: exactly its versions, and no file that has another hash than those in it; wheels only, which run nothing
    quietly "pip install -r ${1#"$REPO/"}" "$VENV/bin/python" -m pip install --require-hashes --no-deps --only-binary :all: -r "$1"
}

make_env() { # "" or "dev"
    local extra=${1:-} wanted begin=$SECONDS python torch
    wanted="$(cat "$REPO/pyproject.toml" "$CONSTRAINTS" "$LOCK" "$LOCK_DEV" | cksum) at $REPO"
    if [ -x "$VENV/bin/python" ] && { [ "$(cat "$VENV/stamp-dev" 2>/dev/null)" = "$wanted" ] ||
        { [ -z "$extra" ] && [ "$(cat "$VENV/stamp" 2>/dev/null)" = "$wanted" ]; }; }; then
        say "environment: .venv is up to date"
        return
    fi
    say "environment: making .venv (torch and friends, about 1 GB on disk with a CPU build; once)"
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || return
        rm -rf "$VENV"
        "$python" -m venv "$VENV" || return
    fi
    rm -f "$VENV/stamp" "$VENV/stamp-dev" "$VENV/setup.log"
    torch=$(grep '^torch==' "$CONSTRAINTS")
    install_locked "$LOCK" || return
    [ -z "$extra" ] || install_locked "$LOCK_DEV" || return
    quietly "pip install $torch" "$VENV/bin/python" -m pip install "$torch" || return
    quietly "pip install -e ." "$VENV/bin/python" -m pip install --no-deps --no-build-isolation -e "$REPO" || return
    printf '%s\n' "$wanted" >"$VENV/stamp${extra:+-$extra}"
    say "environment: ready after $((SECONDS - begin)) s"
}

tool_env() { # NAME VERSION: prints the path of a tool that only developers use, in an environment of its own in the cache
    local folder=${QLORA_LITE_HOME:-$HOME/.cache/qlora_lite}/tools/$1-$2 python
    if ! [ -x "$folder/bin/$1" ]; then
        python=$(find_python) || return
        say "$1 $2: installing it into $folder"
        rm -rf "$folder"
        "$python" -m venv "$folder" && "$folder/bin/python" -m pip install -qq "$1==$2" >&2 ||
            { rm -rf "$folder"; say "$1 $2: cannot be installed; it takes a connection to a package index"; return 1; }
    fi
    printf '%s' "$folder/bin/$1"
}

bring_model() { # the small real model of the quickstart and of the slow tests; 93 MB, once
    "$VENV/bin/python" -m qlora_lite.base.shipped smollm2-135m
}
