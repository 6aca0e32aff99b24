#!/bin/sh
# The numbers of docs/theory.md: about twenty minutes on one core, beside what scripts/results.sh has made before (it calls this).
# What is done is taken over. The parts that need the real models and data of ../shared are left out without them.
set -eu
cd "$(dirname "$0")/.."
fedtune=.venv/bin/fedtune
python=.venv/bin/python
results=runs/results
out=$results/theory
insert() { "$python" scripts/insert_result.py docs/theory.md "$1"; }
mkdir -p $out

# SIZE is width x layers; 400 steps each, from the same corpus as the bundled model, which had 3400
sizes="32x2 64x3 128x4"
for size in $sizes; do
    [ -d "runs/sizes/$size" ] || OMP_NUM_THREADS=1 "$python" scripts/pretrain_bundled.py --width "${size%x*}" \
        --layers "${size#*x}" --steps 400 --every 400 --threads 1 --out "runs/sizes/$size"
done

diagnosed() { # NAME.json OPTIONS CONFIG SETTING...
    [ -s "$out/$1.json" ] && return
    file=$out/$1 options=$2 # the functions share their variables: no name stands in two of them
    shift 2
    # shellcheck disable=SC2086
    $fedtune diagnose "$@" $options --json --quiet >"$file.new"
    mv "$file.new" "$file.json"
}
whole() { # NAME SETTING...: the whole run in both schemes
    measured="$measured $out/$1-whole.json" run=$1-whole
    shift
    diagnosed "$run" --whole configs/bundled_multi_round.yaml "$@"
}
compared() { # NAME CONFIGS SETTING...
    folder=$out/$1 configs=$2
    shift 2
    for setting; do
        shift
        set -- "$@" --set "$setting"
    done
    # shellcheck disable=SC2086
    $fedtune compare $configs "$@" --seeds 0 --no-references --quiet --out "$folder" >/dev/null
}
pair() { # NAME STEPS SETTING...: a probe, and what compare says
    both=$1 steps=$2
    shift 2
    diagnosed "$both-probe" "--steps $steps" configs/bundled_multi_round.yaml "$@"
    compared "$both" "configs/bundled_multi_round.yaml configs/bundled_one_shot.yaml" "$@"
}

# the pairs on which the prediction's form was chosen: results.sh has compared them, here they are probed
chosen=""
for split in by-field iid; do
    for trained in lora full; do
        for initial in pretrained scratch; do
            name=$split-$trained-$initial before=one-shot-$split end=""
            [ $initial = pretrained ] || end=_scratch
            set -- configs/bundled_multi_round.yaml data.partition.name=$split model.initial=$initial
            if [ $trained = full ]; then
                set -- "$@" method.trainable=full method.lora=null method.lr=2e-3
                before=one-shot-full-$split
            fi
            diagnosed "$name-probe" "" "$@"
            chosen="$chosen $name=$out/$name-probe.json:$results/$before:bundled_multi_round$end:bundled_one_shot$end"
        done
    done
done

fresh="" measured=""
full="data.max_examples=400 method.trainable=full method.lora=null method.lr=2e-3 evaluation.tasks=[loss] evaluation.bootstrap=0"
add() { fresh="$fresh $1=$out/$1-probe.json:$out/$1:bundled_multi_round:bundled_one_shot"; }
for initial in pretrained scratch; do
    for size in $sizes; do
        # shellcheck disable=SC2086
        set -- model.name="runs/sizes/$size" data.template=plain model.initial=$initial $full
        pair "$size-$initial" 6 "$@"
        whole "$size-$initial" "$@"
        add "$size-$initial"
    done
done
# shellcheck disable=SC2086
set -- $full
pair bundled-pretrained 6 "$@"
whole bundled-pretrained "$@"
add bundled-pretrained
if [ -d ../shared ]; then
    dolly='train: ../shared/data/dolly15k/databricks-dolly-15k.jsonl, clients: 8, max_length: 96, holdout: {fraction: 0.1},
        fields: {instruction: instruction, input: context, output: response, category: category}'
    loss='evaluation={tasks: [loss], every: 0, max_examples: 64, batch_size: 32, bootstrap: 0}'
    for split in by-field iid; do
        set -- model.name=../shared/models/stories260K-hf "$loss" method.trainable=full method.lora=null \
            method.lr=1e-3 "data={$dolly, max_examples: 320, template: plain, partition: {name: $split}}"
        pair stories260K-$split 6 "$@"
        whole stories260K-$split "$@"
        add stories260K-$split
    done
    pair instruct-7m 6 model.name=../shared/models/instruct-7m "$loss" \
        "data={$dolly, max_examples: 160, template: alpaca, partition: {name: by-field}}"
    add instruct-7m
fi
# shellcheck disable=SC2086
$python scripts/theory_results.py quantities $measured | insert quantities
# shellcheck disable=SC2086
$python scripts/theory_results.py pairs $chosen | insert chosen
# shellcheck disable=SC2086
$python scripts/theory_results.py pairs $fresh | insert fresh
# shellcheck disable=SC2086
$python scripts/theory_results.py correlations $chosen -- $fresh | insert correlations

# six epochs in 1, 2, 3 and 6 rounds, for the law by which rounds are recommended
for initial in pretrained scratch; do
    for rounds in 1 2 3 6; do
        # shellcheck disable=SC2086
        compared "rounds-$initial-$rounds" configs/bundled_multi_round.yaml $full model.initial=$initial \
            method.rounds=$rounds method.local_epochs=$((6 / rounds))
    done
done
series="$out/rounds-pretrained $out/rounds-scratch"
if [ -d ../shared ]; then
    for rounds in 1 2 3 6; do
        compared "rounds-stories260K-$rounds" configs/bundled_multi_round.yaml \
            model.name=../shared/models/stories260K-hf "$loss" method.trainable=full method.lora=null method.lr=1e-3 \
            "data={$dolly, max_examples: 320, template: plain, partition: {name: by-field}}" \
            method.rounds=$rounds method.local_epochs=$((6 / rounds))
    done
    series="$series $out/rounds-stories260K"
fi
# shellcheck disable=SC2086
$python scripts/theory_results.py rounds $series -- 1 2 3 6 | insert rounds
