#!/bin/sh
# Writes requirements/py3*.txt anew, one file for each minor version of Python: the newest versions of everything
# that pyproject.toml's bounds allow, and the torch that is named below. scripts/setup.sh installs these. Run the tests before you commit them.
set -eu
unset CDPATH
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet uv

# lm-eval takes any pytablewriter. Without this, uv keeps the newest python-dateutil by going back to one of 2019.
echo 'pytablewriter>=1' >"$work/constraints.txt"
# The last whose CPU build is at hand wherever the tests are run. Newer ones of the bounds are tried with FEDTUNE_NEWEST=1.
echo 'torch==2.13.0' >>"$work/constraints.txt"

mkdir -p requirements
for python in 3.11 3.12 3.13 3.14; do
    file=requirements/py$(echo "$python" | tr -d .).txt
    "$work/venv/bin/uv" pip compile pyproject.toml --extra all --extra dev --constraint "$work/constraints.txt" \
        --python-version "$python" --python-platform linux \
        --no-header --no-annotate --no-emit-index-url --quiet --output-file "$work/resolved.txt" --upgrade
    {
        echo "# What scripts/setup.sh installs under Python $python. Made by: sh scripts/lock.sh"
        grep -Ev '^(cuda|nvidia)-' "$work/resolved.txt" # torch names their versions itself, and its CPU build has none
    } >"$work/lock.txt"
    mv "$work/lock.txt" "$file"
    echo "$file: $(grep -c == "$file") packages"
done
