#!/usr/bin/env bash
# Sets up and runs the tests: scripts/test.sh [--all] [PYTEST FLAGS]
# Without --all, those of a few minutes, which check each promise once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$root"
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "not slow and not gpu" "$@"
fi
exec "$python" -m pytest "$@"
