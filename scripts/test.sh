#!/bin/sh
# Sets up .venv where needed, then lints, type-checks and tests. Arguments are passed to pytest: sh scripts/test.sh -k partition
set -eu
unset CDPATH
cd "$(dirname "$0")/.."
sh scripts/setup.sh

failed=
check() {
    printf '== %s\n' "$*"
    "$@" || failed="$failed
    $*"
}
check .venv/bin/ruff check .
check .venv/bin/ruff format --check .
check .venv/bin/mypy
# Three processes of one thread each on two cores, because some tests mostly wait for servers and clients; who has
# nothing left takes tests from another. More threads in each only wait for one another. No test may reach a model hub.
check env OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
    .venv/bin/python -m pytest -n 3 --dist worksteal "$@"

if [ -n "$failed" ]; then
    printf 'failed:%s\n' "$failed" >&2
    exit 1
fi
