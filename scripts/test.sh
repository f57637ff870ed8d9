#!/usr/bin/env bash
# Sets up the environment and runs the tests: scripts/test.sh [--all] [PYTEST FLAGS]
# Without --all, only the tests that are not marked long, slow or gpu run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$root"
if [ "${1:-}" = --all ]; then
    shift
    # By file: the commands of the documentation build on each other.
    set -- -m "not slow and not gpu" --dist loadfile --no-loadscope-reorder "$@"
fi
exec "$python" -m pytest "$@"
