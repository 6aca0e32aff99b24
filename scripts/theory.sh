#!/bin/sh
# The numbers of docs/theory.md: about half an hour on one core, beside what scripts/results.sh has made before (it calls this).
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
seeds=0
compared() { # NAME CONFIGS SETTING...
    folder=$out/$1 configs=$2
    shift 2
    for setting; do
        shift
        set -- "$@" --set "$setting"
    done
    # shellcheck disable=SC2086
    $fedtune compare $configs "$@" --seeds $seeds --no-references --quiet --out "$folder" >/dev/null
}
pair() { # NAME SETTING...: a probe, and what compare says
    both=$1
    shift
    diagnosed "$both-probe" "" configs/bundled_multi_round.yaml "$@"
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

fresh="" measured="" fewer=""
four() { # NAME SETTING...: a probe of fewer clients
    small=$1
    shift
    diagnosed "$small-four" "--clients 4" configs/bundled_multi_round.yaml "$@"
    fewer="$fewer $small=$out/$small-four.json:$out/$small:bundled_multi_round:bundled_one_shot"
}
full="data.max_examples=400 method.trainable=full method.lora=null method.lr=2e-3 evaluation.tasks=[loss] evaluation.bootstrap=0"
add() { fresh="$fresh $1=$out/$1-probe.json:$out/$1:bundled_multi_round:bundled_one_shot"; }
for initial in pretrained scratch; do
    for size in $sizes; do
        # shellcheck disable=SC2086
        set -- model.name="runs/sizes/$size" data.template=plain model.initial=$initial $full
        pair "$size-$initial" "$@"
        four "$size-$initial" "$@"
        whole "$size-$initial" "$@"
        add "$size-$initial"
    done
done
# shellcheck disable=SC2086
set -- $full
pair bundled-pretrained "$@"
four bundled-pretrained "$@"
whole bundled-pretrained "$@"
add bundled-pretrained
if [ -d ../shared ]; then
    dolly='train: ../shared/data/dolly15k/databricks-dolly-15k.jsonl, clients: 8, max_length: 96, holdout: {fraction: 0.1},
        fields: {instruction: instruction, input: context, output: response, category: category}'
    loss='evaluation={tasks: [loss], every: 0, max_examples: 64, batch_size: 32, bootstrap: 0}'
    for split in by-field iid; do
        set -- model.name=../shared/models/stories260K-hf "$loss" method.trainable=full method.lora=null \
            method.lr=1e-3 "data={$dolly, max_examples: 320, template: plain, partition: {name: $split}}"
        pair stories260K-$split "$@"
        whole stories260K-$split "$@"
        add stories260K-$split
    done
    set -- model.name=../shared/models/instruct-7m "$loss" \
        "data={$dolly, max_examples: 160, template: alpaca, partition: {name: by-field}}"
    compared instruct-7m "configs/bundled_multi_round.yaml configs/bundled_one_shot.yaml" "$@"
    whole instruct-7m "$@" # of eight clients and nine steps: a probe would be the same
    fresh="$fresh instruct-7m=$out/instruct-7m-whole.json:$out/instruct-7m:bundled_multi_round:bundled_one_shot"
fi
# the pairs on which the prediction was tested once it was fixed: two seeds, of the last three one
test=""
last() { # NAME SETTING...
    pair "$@"
    test="$test $1=$out/$1-probe.json:$out/$1:bundled_multi_round:bundled_one_shot"
}
few='evaluation={tasks: [loss], every: 0, max_examples: 128, batch_size: 32, bootstrap: 0}'
whole_model="method.trainable=full method.lora=null"
seeds=0,1
last 64x3-dirichlet-lora model.name=runs/sizes/64x3 data.template=plain "$few" data.clients=12 data.max_examples=480 \
    'data.partition={name: dirichlet, alpha: 0.1, minimum: 8}' method.lr=5e-3
# shellcheck disable=SC2086
last 32x2-iid-full model.name=runs/sizes/32x2 data.template=plain "$few" data.clients=5 data.max_examples=800 \
    'data.partition={name: iid}' method.lr=5e-3 $whole_model
# shellcheck disable=SC2086
last bundled-dirichlet-full "$few" data.clients=3 data.max_examples=480 \
    'data.partition={name: dirichlet, alpha: 0.5, minimum: 8}' method.lr=5e-4 $whole_model
last bundled-iid-lora-scratch model.initial=scratch "$few" data.clients=6 data.max_examples=480 \
    'data.partition={name: iid}' method.lr=1e-2
if [ -d ../shared ]; then
    held='max_length: 96, holdout: {fraction: 0.1}, template: plain'
    alpaca="train: ../shared/data/alpaca/alpaca_subset.jsonl, $held"
    dolly15k="train: ../shared/data/dolly15k/databricks-dolly-15k.jsonl, $held,
        fields: {instruction: instruction, input: context, output: response, category: category}"
    last babyllama-alpaca-iid-lora model.name=../shared/models/babyllama105-hf "$few" \
        "data={$alpaca, clients: 4, max_examples: 320, partition: {name: iid}}" method.lr=1e-2
    seeds=0
    # shellcheck disable=SC2086
    last babyllama-dolly-dirichlet-full model.name=../shared/models/babyllama105-hf "$few" \
        "data={$dolly15k, clients: 12, max_examples: 480, partition: {name: dirichlet, alpha: 0.3, minimum: 8}}" \
        method.lr=5e-4 $whole_model
    # shellcheck disable=SC2086
    last stories-alpaca-iid-full model.name=../shared/models/stories260K-hf "$few" \
        "data={$alpaca, clients: 6, max_examples: 480, partition: {name: iid}}" method.lr=3e-3 $whole_model
    last stories-dolly-by-field-lora model.name=../shared/models/stories260K-hf "$few" \
        "data={$dolly15k, clients: 8, max_examples: 800, partition: {name: by-field}}" method.lr=1e-2
fi
seeds=0

# shellcheck disable=SC2086
$python scripts/theory_results.py quantities $measured | insert quantities
for list in fewer chosen fresh test; do
    eval "some=\$$list"
    # shellcheck disable=SC2086,SC2154
    $python scripts/theory_results.py pairs $some | insert $list
done
# shellcheck disable=SC2086
$python scripts/theory_results.py correlations chosen $chosen -- fresh $fresh -- test $test | insert correlations

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
