#!/bin/sh
# Makes every number of README.md and docs/ anew: about three hours on two cores. Runs that are done are taken over.
# What needs the data and models that configs/*dolly*.yaml name is left out without them.
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

several() { $fedtune compare "$@" --seeds 0,1,2 --no-references --quiet; }
noises="configs/fedkseed_gaussian.yaml configs/fedkseed_rademacher.yaml configs/fedkseed_binomial32.yaml
configs/fedkseed_hadamard4.yaml"
# shellcheck disable=SC2086
several $noises --out runs/results/noise-bundled
$python scripts/fedkseed_results.py curves runs/results/noise-bundled | insert docs/results.md noise-bundled
# shellcheck disable=SC2086
if several $noises --out runs/results/noise-stories --set model.name=../shared/models/stories260K-hf \
    --set method.lr=2e-5 --set method.batch_size=1 --set evaluation.max_examples=100 \
    --set 'data={train: ../shared/data/dolly15k/databricks-dolly-15k.jsonl, fields: {input: context, output: response},
        template: plain, max_length: 96, max_examples: 2000, clients: 1, holdout: {fraction: 0.02}}'; then
    $python scripts/fedkseed_results.py curves runs/results/noise-stories | insert docs/results.md noise-stories
    $python scripts/fedkseed_results.py plot docs/noise_curves.svg runs/results/noise-bundled runs/results/noise-stories
fi
for data in bundled dolly; do
    if several configs/fedptuning_${data}_0.5.yaml configs/fedprompt_${data}_0.5.yaml configs/fedit_sgd_${data}_0.5.yaml \
        configs/fedit_${data}_0.5.yaml configs/fedkseed_${data}_0.5.yaml configs/fedkseed_pro_${data}_0.5.yaml \
        --out runs/results/methods-$data; then
        $python scripts/fedkseed_results.py methods runs/results/methods-$data | insert docs/results.md methods-$data
    fi
done
for seeds in 64 256 1024 4096 8192; do
    several configs/fedkseed.yaml configs/fedkseed_pro.yaml --out runs/results/seeds-$seeds --set method.seeds=$seeds \
        --set method.rounds=4 --set method.local_steps=200 --set method.batch_size=4 --set method.lr=5e-5 \
        --set 'data.partition={name: iid}' --set federation.clients_per_round=1 --set evaluation.every=0 --set 'evaluation.tasks=[loss]'
done
$python scripts/fedkseed_results.py seeds runs/results/seeds-64 runs/results/seeds-256 runs/results/seeds-1024 \
    runs/results/seeds-4096 runs/results/seeds-8192 | insert docs/results.md seeds

tried() { # NAME CONFIG SETTING...: a short run of the search for rates
    out=runs/results/fedbiot-sweep/$1 config=configs/$2.yaml
    shift 2
    [ -d "$out" ] || $fedtune run "$config" seed=7 evaluation.bootstrap=0 "$@" --out "$out" --quiet >/dev/null
}
names=""
for try in 3e-3,1e-3,60,0,1 1e-2,1e-3,60,0,1 1e-2,3e-4,60,0,1 1e-2,3e-3,60,0,1 1e-2,1e-2,60,0,1 1e-2,3e-3,300,0,1 \
    3e-2,3e-3,60,0,1 3e-2,3e-3,60,1e-2,1 3e-2,3e-3,60,0,10 1e-1,3e-3,60,0,1; do
    IFS=, read -r lr align before proximal distill <<END
$try
END
    tried "$try" fedbiot method.rounds=4 method.local_steps=10 method.lr="$lr" method.alignment.lr="$align" \
        method.alignment.steps_before="$before" method.proximal="$proximal" method.distill_weight="$distill"
    names="$names runs/results/fedbiot-sweep/$try"
done
for lr in 1e-2 3e-2; do
    tried fedavg-$lr fedbiot_fedavg method.rounds=4 method.local_steps=10 method.lr=$lr 'method.betas=[0.9, 0.999]'
    names="$names runs/results/fedbiot-sweep/fedavg-$lr"
done
# shellcheck disable=SC2086
$python scripts/fedbiot_results.py sweep $names | insert docs/results.md fedbiot-sweep
if [ -d ../shared ]; then
    longer="method.rounds=3 evaluation.max_examples=100"
    # shellcheck disable=SC2086
    tried dolly-1e-2 fedbiot_dolly_0.2 $longer method.lr=1e-2 method.alignment.lr=1e-3
    # shellcheck disable=SC2086
    tried dolly-3e-2 fedbiot_dolly_0.2 $longer method.lr=3e-2 method.alignment.lr=3e-3
    $python scripts/fedbiot_results.py sweep runs/results/fedbiot-sweep/dolly-* | insert docs/results.md fedbiot-sweep-dolly
fi

fedbiot_rows() { # names of configurations without the dropout rate at their end
    for dropout in 0.2 0.5; do
        for name in "$@"; do printf 'configs/%s_%s.yaml ' "$name" $dropout; done
    done
}
# shellcheck disable=SC2046
$fedtune compare configs/fedbiot_fedavg.yaml configs/fedbiot.yaml \
    $(fedbiot_rows fedbiot_pruning fedot_pruning offsite_pruning) --seeds 0,1,2 --quiet \
    --out runs/results/fedbiot-bundled
$python scripts/fedbiot_results.py compare runs/results/fedbiot-bundled | insert docs/results.md fedbiot-bundled
# shellcheck disable=SC2046
if $fedtune compare configs/fedbiot_fedavg_dolly.yaml \
    $(fedbiot_rows fedbiot_dolly fedbiot_dolly_s4 fedot_dolly offsite_dolly) --seeds 0,1,2 --quiet --out runs/results/fedbiot-dolly; then
    for page in fedbiot results; do
        $python scripts/fedbiot_results.py compare runs/results/fedbiot-dolly | insert docs/$page.md fedbiot-dolly
    done
    $fedtune compare configs/fedbiot_fedavg_dolly.yaml configs/fedbiot_dolly_0.2.yaml configs/fedbiot_dolly_s4_0.2.yaml \
        configs/fedot_dolly_0.2.yaml --seeds 0,1,2 --quiet --set method.rounds=8 --set method.local_steps=10 \
        --out runs/results/fedbiot-dolly-long
    $python scripts/fedbiot_results.py compare runs/results/fedbiot-dolly-long | insert docs/results.md fedbiot-dolly-long
fi

$fedtune eval bundled --tasks loss,accuracy,rouge-l | fenced | insert docs/evaluation.md eval-bundled
if [ -d ../shared ]; then
    model=../shared/models/instruct-7m data=../shared/data
    $fedtune eval $model --tasks arc_easy_local,openbookqa_local,glue_local evaluation.data_folder=$data \
        evaluation.limit=50 | fenced | insert docs/evaluation.md eval-local
    $python scripts/check_evaluation.py $model $data | insert docs/evaluation.md eval-all
    $python scripts/check_humaneval_x.py $data/humaneval_x | insert docs/evaluation.md humaneval-x-check
    $fedtune compare configs/gsm8k_multi_round.yaml configs/gsm8k_one_shot.yaml --seeds 0,1,2 --out runs/results/gsm8k
    insert docs/results.md gsm8k <runs/results/gsm8k/table.md
fi

page() { # BENCH PAGE
    COLUMNS=118 $fedtune bench "$1" | sed 's/ *$//' | fenced | insert "docs/$2.md" "bench-$1"
}
page rebuild noise
for bench in zo-step synchronize; do page $bench fedkseed; done
for bench in emulator proximal; do page $bench fedbiot; done
page generation evaluation

one="evaluation.every=0 evaluation.tasks=[loss]"
for bits in 64 48; do
    # shellcheck disable=SC2086
    [ -d runs/results/secure-fedavg-$bits ] || $fedtune run configs/secure_aggregation.yaml $one method.rounds=2 \
        method.local_epochs=null method.local_steps=1 federation.simulate.dropout=0 \
        federation.secure_aggregation.bits=$bits --out runs/results/secure-fedavg-$bits --quiet >/dev/null
    # shellcheck disable=SC2086
    [ -d runs/results/secure-fedkseed-$bits ] || $fedtune run configs/fedkseed.yaml $one method.rounds=2 method.local_steps=5 \
        federation.clients_per_round=null "federation.secure_aggregation={bits: $bits}" \
        --out runs/results/secure-fedkseed-$bits --quiet >/dev/null
done
$python scripts/privacy_results.py bytes runs/results/secure-fedavg-64 runs/results/secure-fedavg-48 \
    runs/results/secure-fedkseed-64 runs/results/secure-fedkseed-48 | insert docs/privacy.md secure-bytes
$python scripts/privacy_results.py seconds | insert docs/privacy.md secure-seconds
private() { # NAME SETTING: the same federation with another noise
    several configs/privacy.yaml --out runs/results/privacy-$1 --set evaluation.every=0 --set evaluation.bootstrap=0 --set "$2"
}
private none federation.privacy=null
private clip federation.privacy.noise_multiplier=0
names="runs/results/privacy-none runs/results/privacy-clip"
for noise in 0.5 1.0 2.0 4.0; do
    private $noise federation.privacy.noise_multiplier=$noise
    names="$names runs/results/privacy-$noise"
done
# shellcheck disable=SC2086
$python scripts/privacy_results.py utility $names | insert docs/privacy.md privacy-utility

$fedtune bench memory --json >runs/results/memory.json
$python scripts/fedkseed_results.py memory runs/results/memory.json | insert docs/fedkseed.md bench-memory
$python scripts/fedcybgd_results.py memory runs/results/memory.json | insert docs/fedcybgd.md bench-memory
$python scripts/fedcybgd_results.py bytes | insert docs/fedcybgd.md bytes

blocks() { # FOLDER NAME...: configurations
    folder=$1
    shift
    for name in fed_full fedlora fedadapter fedbavg badam fedcybgd "$@"; do printf '%s/%s.yaml ' "$folder" $name; done
}
# shellcheck disable=SC2046
$python scripts/search_rates.py runs/results/blocks-rates-bundled $(blocks configs) | insert docs/results.md blocks-rates-bundled
# shellcheck disable=SC2046
several $(blocks configs fedcybgd_layer_drop fedcybgd_hybrid) --out runs/results/blocks-bundled
insert docs/results.md blocks-bundled <runs/results/blocks-bundled/table.md
exact=runs/results/exact # the bundled model in numbers that bfloat16 has too
[ -d $exact ] || $python scripts/fedcybgd_results.py narrow $exact
for dtype in bfloat16 float32; do
    [ -d runs/results/small-rate-$dtype ] || $fedtune run configs/fedcybgd.yaml model.name=$exact model.dtype=$dtype method.lr=1e-6 \
        method.rounds=1 'evaluation.tasks=[loss]' --out runs/results/small-rate-$dtype --quiet >/dev/null
done
$python scripts/fedcybgd_results.py moved $exact runs/results/small-rate-bfloat16 runs/results/small-rate-float32 |
    insert docs/fedcybgd.md small-rate
if [ -d ../shared ]; then
    # shellcheck disable=SC2046
    several $(blocks configs/sst2 fedcybgd_layer_drop fedcybgd_hybrid) --out runs/results/blocks-sst2
    insert docs/results.md blocks-sst2 <runs/results/blocks-sst2/table.md
    # shellcheck disable=SC2046
    several $(blocks configs fedcybgd_layer_drop fedcybgd_hybrid) --out runs/results/blocks-dolly \
        --set model.name=../shared/models/stories260K-hf \
        --set 'evaluation={tasks: [loss], every: 0, max_examples: 100, batch_size: 32}' \
        --set 'data={train: ../shared/data/dolly15k/databricks-dolly-15k.jsonl, fields: {instruction: instruction, input: context,
            output: response}, template: plain, max_length: 96, max_examples: 660, clients: 8, partition: {name: iid},
            holdout: {fraction: 0.1}}'
    insert docs/results.md blocks-dolly <runs/results/blocks-dolly/table.md
    data=../shared/data questions=runs/results/questions names=""
    [ -d runs/encoder ] || $python scripts/pretrain_encoder.py --text $data/wikitext2/valid.txt $data/wikitext2/test.txt \
        $data/tinystories/stories.jsonl --steps 200 --threads 1
    [ -d $questions ] || $python scripts/fedcybgd_results.py split $data/squad/xquad_en.jsonl $questions
    for name in encoder_sst2 encoder_rte encoder_mrpc squad alpaca; do
        out=runs/results/fedcybgd_$name more="method.rounds=2 data.max_examples=400"
        case $name in alpaca | squad) more="method.rounds=1 data.max_examples=160" ;; esac
        [ $name != squad ] || more="$more data.train=$questions/train.jsonl data.holdout.source=$questions/test.jsonl
            evaluation.tasks=[loss,squad] evaluation.files.squad=$questions/test.jsonl evaluation.limit=50"
        # shellcheck disable=SC2086
        [ -d $out ] || $fedtune run configs/fedcybgd_$name.yaml $more --out $out --quiet >/dev/null
        names="$names $out"
    done
    # shellcheck disable=SC2086
    $python scripts/fedcybgd_results.py runs $names | insert docs/results.md fedcybgd-runs
fi

sh scripts/theory.sh

if $python -c 'import flwr' 2>/dev/null; then
    $python scripts/network_cost.py bytes | insert docs/deployment.md network-bytes
    $python scripts/network_cost.py seconds | insert docs/deployment.md network-seconds
    $python scripts/network_memory.py 1000 | insert docs/deployment.md network-memory
fi

$fedtune run configs/overhead.yaml --out runs/results/overhead --quiet | grep -v '^Run folder' | fenced | insert docs/results.md overhead
for bench in aggregation simulation; do
    COLUMNS=110 $fedtune bench $bench | fenced | insert docs/results.md bench-$bench
done

$python scripts/plan_results.py papers | insert docs/planning.md plan-papers
if [ -d ../shared ]; then
    $python scripts/plan_results.py measured bundled ../shared/models/stories260K-hf ../shared/models/babyllama105-hf |
        insert docs/planning.md plan-measured
fi
