#!/bin/sh
# What compose.yaml's clients need before they start: keys, and a third of the bundled data each. Done once; what is
# there stays. Outside a container: KEYS=FOLDER WORK=FOLDER SERVER=NAME sh prepare.sh
set -eu
unset CDPATH
keys=${KEYS:-/etc/fedtune}
work=${WORK:-/srv/fedtune}
fedtune keys "$keys" --server "${SERVER:-server}" --clients north,south,west
train=$(python -c 'from importlib.resources import files; print(files("fedtune.data") / "bundled_train.jsonl")')
awk -v work="$work" 'BEGIN { split("north south west", names, " ") } { print > (work "/" names[NR % 3 + 1] ".jsonl") }' "$train"
