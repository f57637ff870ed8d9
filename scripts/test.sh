#!/usr/bin/env bash
# Sets up and runs the tests: scripts/test.sh [PYTEST FLAGS]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$root"
exec "$python" -m pytest "$@"
