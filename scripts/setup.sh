# Sourced by run.sh and test.sh: creates .venv, or updates it if the requirements have changed.
# Usage: source scripts/setup.sh run|test; sets $root, and sets $python to the interpreter of .venv.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
purpose=$1
python=$root/.venv/bin/python

fail() {
    echo "error: $*" >&2
    exit 2
}

if ! "$python" -c '' 2>/dev/null; then
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    [ -n "${found:-}" ] || fail "no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python"
    echo "setting up $root/.venv with $("$found" --version)" >&2
    "$found" -m venv --clear "$root/.venv" || fail "$found can't make a virtual environment; on Debian: apt install python3-venv"
fi

# Record the checksum only after pip succeeds, so that an interrupted installation is repeated.
files=(requirements.txt)
if nvidia-smi --list-gpus >/dev/null 2>&1; then files+=(requirements-gpu.txt); fi
if [ "$purpose" = test ]; then files+=(requirements-dev.txt); fi
installed=$root/.venv/installed
for file in "${files[@]}"; do
    checksum=$(cd "$root" && cat "$file" constraints.txt pyproject.toml | cksum)
    if [ "$(cat "$installed/$file" 2>/dev/null)" != "$checksum" ]; then
        echo "installing $file" >&2
        (cd "$root" && "$python" -m pip install --quiet --disable-pip-version-check \
            --requirement "$file" --constraint constraints.txt >&2) ||
            fail "pip could not install $file; see its lines above"
        mkdir -p "$installed"
        echo "$checksum" >"$installed/$file"
    fi
done
