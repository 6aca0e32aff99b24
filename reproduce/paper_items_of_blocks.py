"""Tables and figures of FedBiOT and FedCyBGD, with the commands of their full forms."""

from __future__ import annotations

from common import Step
from paper_items import Item, grid

CODE = "these models write no program that passes a test"
PLAIN = ("method.distill_weight=0", "method.proximal=0")  # both terms are FedBiOT's
AS_FEDOT = ("method.adapter_layers=4", "method.both_ends=true", "method.alignment.steps=0", *PLAIN)


def emulated(task: str) -> tuple[Step, ...]:
    """FedBiOT with two and four blocks, FedOT and Offsite-tuning by β; 0 is without an emulator."""
    steps = []
    for beta in ("0", "0.2", "0.5"):
        name, own = f"fedbiot-{task}-{beta}", f"method.layer_dropout={beta}"
        files = [f"fedbiot_{task}_s{s}_0.5" for s in (2, 4)]
        steps.append(grid(f"{name}/fedbiot", files, own, references=True))
        for method in ("fedot", "offsite-tuning"):
            steps.append(grid(f"{name}/{method}", files[1:], f"method.name={method}", *AS_FEDOT, own))
    return tuple(steps)


ROSETTA = emulated("rosetta")
FEDBIOT = (
    Item("Figure 1", "workflow", no_full="no numbers", no_small="no numbers"),
    Item("Table 1", "data sets", no_full="settings of Table 2's commands", no_small="settings"),
    Item(
        "Table 2",
        "GSM8K, AdapEmu and AdapFu",
        ("fedbiot-table2", "fedbiot-compression", "fedbiot-dolly", "fedbiot-bundled"),
        full=emulated("gsm8k"),
        no_small="Dolly's loss in place of GSM8K, where the small models are at nought; β = 0 and 0.5",
    ),
    Item("Table 3", "programs at β = 0.2", full=ROSETTA, no_small=CODE),
    Item("Table 4", "programs at β = 0.5", no_full="the commands of Table 3", no_small=CODE),
    Item(
        "Figure 2",
        "eight question-answering tasks after Dolly",
        ("fedbiot-dolly",),
        full=emulated("dolly"),
        no_small="Dolly's own held-out loss",
        no_full="of HELM's tasks those of the harness, as the configurations say",
    ),
    Item(
        "Table 5",
        "weights, operations, bytes",
        ("plan-papers", "bench-emulator"),
        no_full="the plans are of the paper's own model",
    ),
)

LLAMA = "fedcybgd_llama2_alpaca"
METHODS = ("fed_full", "fedcybgd_badam_llama2_alpaca", "fedlora", "fedadapter", f"{LLAMA}_powersgd", LLAMA)
TASKS = {
    "alpaca": ("data.train=vicgalle/alpaca-gpt4",),
    "oasst1": ("data.train=oasst1_pairs.jsonl",),  # its pairs of prompt and answer, see docs/data.md
}
FAMILIES = {"llama2": "meta-llama/Llama-2-7b-hf", "bloom": "bigscience/bloom-1b1"}
GLM = (
    "ChatGLM-6B needs code of its repository, which is not run; BLOOM of 1.1 billion is the nearest published"
)
TABLE4 = tuple(
    grid(f"fedcybgd-table4/{family}-{task}", METHODS, f"model.name={model}", *data, references=True)
    for family, model in FAMILIES.items()
    for task, data in TASKS.items()
)
ROBERTA = ("fed_full", "fedlora", "fedadapter", "fedcybgd_roberta_mrpc")
GPT2 = "model={name: openai-community/gpt2, dtype: float32}"
SQUAD = (
    "data={train: rajpurkar/squad, fields: {instruction: question, input: context, output: answers.text.0}, "
    "template: alpaca, max_length: 1024, clients: 32, holdout: {source: rajpurkar/squad, split: validation}}"
)


def planned(config: str, batch: int) -> Step:
    """Memory of a client on MRPC with RoBERTa."""
    settings = (
        "model={name: FacebookAI/roberta-base, task: classification, dtype: float32}",
        'data.train="nyu-mll/glue:mrpc"',
        "data.fields={instruction: sentence1, input: sentence2, output: label}",
        "data.template=plain",
        "data.max_length=512",
        'data.holdout={source: "nyu-mll/glue:mrpc", split: validation}',
        "evaluation.tasks=[loss, accuracy]",
    )
    return Step(("fedtune", "plan", f"configs/papers/{config}.yaml", *settings, f"method.batch_size={batch}"))


FEDCYBGD = (
    Item(
        "Figure 1",
        "memory, and loss of aggregating and of cyclic updates",
        ("table3-sst2", "memory-parts"),
        full=(TABLE4[0],),
    ),
    Item("Figure 2", "overview", no_full="no numbers", no_small="no numbers"),
    Item(
        "Table 1",
        "memory and bytes",
        ("plan-papers", "bytes", "bench-memory"),
        no_full="memory and bytes stand in the summaries of Table 4's runs",
    ),
    Item(
        "Table 2",
        "time of a step and of a round",
        ("bench-memory",),
        no_full="time stands in the summaries of Table 4's runs",
        no_small="the backward pass alone",
    ),
    Item(
        "Table 3",
        "GLUE",
        ("table3-sst2", "table3-sst2-again", "blocks-sst2"),
        ("table3-sst2",),
        no_full="STS-B is left out: a classifier has no head for numbers",
        no_small="SST-2 alone",
    ),
    Item("Table 4", "two data sets, three models", ("blocks-dolly",), full=TABLE4, no_full=GLM),
    Item(
        "Table 5",
        "SQuAD by GPT-2",
        ("fedcybgd-runs",),
        full=(
            grid(
                "fedcybgd-table5",
                ("fed_full", "fedcybgd_badam_llama2_alpaca", "fedadapter", "fedcybgd_gpt2_squad"),
                GPT2,
                SQUAD,
                "method.batch_size=24",
                "method.gradient_accumulation=1",
                "method.lr=3e-5",
                "evaluation.tasks=[loss, squad]",
                "evaluation.files={squad: squad_dev.json}",
                references=True,
            ),
        ),
    ),
    Item("Table 6", "compression, LoRA and adapters", ("table6-compression",), ("table6-compression",)),
    Item("Table 7", "settings", no_full="settings of the configurations", no_small="settings"),
    Item(
        "Table 8",
        "time of a round",
        no_full="time stands in the summaries of Table 4's runs",
        no_small="seconds of a shared machine say little; `blocks-dolly` has them in a column",
    ),
    Item(
        "Figure 3",
        "order of the blocks",
        full=tuple(
            grid(f"fedcybgd-figure3/{order}", (LLAMA,), f"method.block_order={order}")
            for order in ("random", "ascending", "descending")
        ),
        no_small="none was run",
    ),
    Item(
        "Table 9",
        "32 and 64 clients",
        full=tuple(
            grid(f"fedcybgd-table9/{count}", ("fed_full", LLAMA), f"data.clients={count}")
            for count in (32, 64)
        ),
        no_small="none was run",
    ),
    Item(
        "Figure 4",
        "convergence from beginning to end",
        no_full="`rounds.jsonl` of Table 4's runs",
        no_small="`rounds.jsonl` of Table 3's runs",
    ),
    Item(
        "Table 10",
        "memory by batch size, MRPC",
        ("bench-memory",),
        full=tuple(planned(config, batch) for batch in (32, 64) for config in ROBERTA),
        no_full="plans: the architecture is read and nothing trained",
    ),
)
