#!/bin/sh
# Sets up .venv where needed and runs the bundled demo. Arguments are passed on: sh scripts/demo.sh method.rounds=5
set -eu
unset CDPATH
root=$(cd "$(dirname "$0")/.." && pwd -P)
sh "$root/scripts/setup.sh"
exec "$root/.venv/bin/fedtune" run "$root/configs/demo.yaml" "$@"
