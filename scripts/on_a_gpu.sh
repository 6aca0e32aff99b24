#!/bin/sh
# What a machine with a GPU says: first whether it computes what it should, then how fast. Under eight minutes once set up.
#   sh scripts/on_a_gpu.sh           two tables, with the ratios below them
#   sh scripts/on_a_gpu.sh --json    two JSON documents, one behind the other
# FEDTUNE=... is another command to call in the place of .venv/bin/fedtune.
set -eu
unset CDPATH
root=$(cd "$(dirname "$0")/.." && pwd -P)
if [ -z "${FEDTUNE:-}" ]; then
    sh "$root/scripts/setup.sh" >&2
    FEDTUNE=$root/.venv/bin/fedtune
fi

status=0
"$FEDTUNE" bench gpu-checks "$@" || status=$?
# 2: there is no GPU, or an argument is wrong
[ "$status" = 2 ] || "$FEDTUNE" bench gpu-speed "$@" || status=$?
exit "$status"
