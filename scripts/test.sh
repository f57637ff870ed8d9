#!/usr/bin/env bash
# Sets up the environment and runs the tests: scripts/test.sh [--all] [PYTEST FLAGS]
# Without --all, only the tests that are not marked long, slow or gpu run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$root"
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "not slow and not gpu" "$@"
fi
exec "$python" -m pytest "$@"
