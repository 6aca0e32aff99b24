#!/bin/sh
# Makes every number of README.md and docs/ anew: about an hour on two cores. Runs that are done are taken over.
# The Dolly comparison needs the data and the model that configs/dolly_*.yaml name; without them it is left out.
set -eu
cd "$(dirname "$0")/.."
fedtune=.venv/bin/fedtune
python=.venv/bin/python
insert() { "$python" scripts/insert_result.py "$1" "$2"; }
fenced() { printf '```text\n'; cat; printf '```\n'; }
bundled="configs/bundled_multi_round.yaml configs/bundled_one_shot.yaml
configs/bundled_multi_round_scratch.yaml configs/bundled_one_shot_scratch.yaml"

mkdir -p runs/results
$python scripts/pretrain_bundled.py --evaluate | insert docs/bundled.md zero-shot
[ -d runs/results/demo ] || $fedtune run configs/demo.yaml --out runs/results/demo --quiet >/dev/null
COLUMNS=90 $fedtune run configs/demo.yaml --resume runs/results/demo --quiet | grep -v '^Run folder' | fenced | insert README.md demo

for split in by-field iid; do
    # shellcheck disable=SC2086
    $fedtune compare $bundled --seeds 0,1,2 --set data.partition.name=$split --out runs/results/one-shot-$split
    insert docs/results.md one-shot-$split <runs/results/one-shot-$split/table.md
    # shellcheck disable=SC2086
    $fedtune compare $bundled --seeds 0,1,2 --set data.partition.name=$split --set method.trainable=full \
        --set method.lora=null --set method.lr=2e-3 --out runs/results/one-shot-full-$split
    insert docs/results.md one-shot-full-$split <runs/results/one-shot-full-$split/table.md
done

if $fedtune compare configs/dolly_multi_round.yaml configs/dolly_one_shot.yaml --seeds 0,1,2 --out runs/results/dolly; then
    insert docs/results.md dolly <runs/results/dolly/table.md
fi

$fedtune run configs/overhead.yaml --out runs/results/overhead --quiet | grep -v '^Run folder' | fenced | insert docs/results.md overhead
COLUMNS=110 $fedtune bench zo-step | fenced | insert docs/fedkseed.md bench-zo-step
for bench in aggregation simulation; do
    COLUMNS=110 $fedtune bench $bench | fenced | insert docs/results.md bench-$bench
done
