#!/usr/bin/env bash
# Sets up the environment and runs a recipe: scripts/run.sh NAME [FLAGS]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=${1:-}
recipe=${recipe%.py}
if [ "$recipe" = --help ] || [ "$recipe" = -h ]; then
    echo "scripts/run.sh NAME [FLAGS]: sets up and trains; scripts/run.sh NAME --help lists the flags. Names:" \
        $(cd "$here/../recipes" && ls -- *.py | sed 's/\.py$//')
    exit
fi
if [[ $recipe == */* || ! -f "$here/../recipes/$recipe.py" ]]; then
    echo "error: no recipe${recipe:+ '$recipe'}; choose one of:" $(cd "$here/../recipes" && ls -- *.py | sed 's/\.py$//') >&2
    exit 2
fi
shift
source "$here/setup.sh" run
exec "$python" "$root/recipes/$recipe.py" "$@"
