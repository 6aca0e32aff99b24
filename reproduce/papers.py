"""Every table and figure of the four papers: where its full form is, where its small one, what came out.

The full forms that belong to no claim are here: `--full` runs them on a card with models and data of a hub,
`--full --dry-run` shows them. A file that no hub has in this form is named as it is to be written before.

Table:   one-shot, all tables and figures; docs/papers.md, block papers-one-shot
Command: python reproduce/papers.py papers-one-shot
Time:    seconds; reads the blocks of other pages
Needs:   nothing
Result:  1

Table:   FedKSeed, all tables and figures; docs/papers.md, block papers-fedkseed
Command: python reproduce/papers.py papers-fedkseed
Time:    seconds; reads the blocks of other pages
Needs:   nothing
Result:  1

Table:   FedBiOT, all tables and figures; docs/papers.md, block papers-fedbiot
Command: python reproduce/papers.py papers-fedbiot
Time:    seconds; reads the blocks of other pages
Needs:   nothing
Result:  1

Table:   FedCyBGD, all tables and figures; docs/papers.md, block papers-fedcybgd
Command: python reproduce/papers.py papers-fedcybgd
Time:    seconds; reads the blocks of other pages
Needs:   nothing
Result:  1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from claims import PAGE, decided
from common import RESULTS, Entry, Head, Step, compare, main, table
from contents import files, link

SEEDS = "0,1,2"
OUT = RESULTS / "full"


@dataclass(frozen=True)
class Item:
    """A table or figure of a paper."""

    where: str
    shows: str
    small: tuple[str, ...] = ()  # entries that make it in small
    full_of: tuple[str, ...] = ()  # entries whose full form is its
    full: tuple[Step, ...] = ()  # or its own commands
    no_small: str = ""  # why there is none, or what the small form lacks
    no_full: str = ""


def grid(name: str, configs: Sequence[str], *settings: str, references: bool = False) -> Step:
    """Configurations of configs/papers beside one another."""
    files = [f"papers/{config}" for config in configs]
    return compare(files, OUT / name, *settings, seeds=SEEDS, references=references)


# --- one-shot ---------------------------------------------------------------------------------------

MODELS = {
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "gemma-2b": "google/gemma-2b",
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
}
SETS = {  # settings of the data; both sets together are written to a file, with the set's name in each row
    "mmlu": (
        "data.train=cais/mmlu:all",
        "data.split=auxiliary_train",
        "data.fields={instruction: question, output: answer}",
    ),
    "wizard": ("data.train=WizardLMTeam/WizardLM_evol_instruct_70k",),
    "both": (
        "data.train=mmlu_and_wizard.jsonl",
        "data.fields={category: set}",
        "data.clients=20",
        "data.partition={name: by-field}",
    ),
}
TWO_EPOCHS = {("tinyllama", "wizard"), ("gemma-2b", "wizard"), ("llama-7b", "mmlu")}  # Table 3; the others 1
JUDGED = (
    "evaluation={tasks: [loss, mmlu, arc_challenge, mt-bench], files: {mt-bench: mt_bench_question.jsonl, "
    "mt-bench-references: mt_bench_reference_answer_gpt-4.jsonl, mt-bench-prompts: judge_prompts.jsonl}, "
    "judge: {url: 'http://localhost:8000/v1', model: the-judge}}"
)


def both_schemes(model: str, data: str) -> tuple[Step, Step]:
    """Three rounds, and one of as many epochs: LoRA and all weights, scored as Tables 1 and 2 do."""
    name, epochs = f"one-shot-{model}-{data}", 2 if (model, data) in TWO_EPOCHS else 1
    same = (f"model.name={MODELS[model]}", *SETS[data], JUDGED)
    several = ("multi_round_lora", "multi_round_full")
    return (
        grid(f"{name}/several", several, *same, f"method.local_epochs={epochs}", references=True),
        grid(f"{name}/one", ("one_shot_lora", "one_shot_full"), *same, f"method.local_epochs={3 * epochs}"),
    )


TABLES_1_2 = tuple(step for model in MODELS for data in SETS for step in both_schemes(model, data))


def diagnosed(model: str, name: str) -> Step:
    """L, τ and the bound of both schemes, measured."""
    out = OUT / f"one-shot-theory-{model}.json"
    config = "configs/papers/multi_round_full.yaml"
    return Step(("fedtune", "diagnose", config, f"model.name={name}", "--whole", "--json"), out, kept=True)


ONE_SHOT = (
    Item(
        "Figure 1",
        "small models and large ones, one round over several",
        ("figure1",),
        ("figure1",),
        tuple(
            grid(
                f"one-shot-figure1-gpt2/{config}",
                (config,),
                "model.name=openai-community/gpt2",
                "data.max_length=1024",
                f"method.rounds={rounds}",
                f"method.local_epochs={5 // rounds}",
            )
            for config, rounds in (("multi_round_full", 5), ("one_shot_full", 1))
        ),
        no_full="ResNet-18 and the LSTM are no models of a hub that fedtune loads: small form alone",
    ),
    Item(
        "Figure 2",
        "L, τ and the norm of the weights by model",
        ("quantities",),
        full=tuple(diagnosed(model, name) for model, name in MODELS.items()),
        no_full="ResNet-18 and BERT are left out",
    ),
    Item("Figure 3", "the bound's logarithm by model", ("quantities",), no_full="the commands of Figure 2"),
    Item(
        "Table 1",
        "MMLU and ARC: LoRA and all weights, three data sets, four models",
        ("lora", "lora-own-rates", "one-shot-by-field", "one-shot-full-by-field"),
        full=TABLES_1_2,
        no_small="no MMLU, no ARC: the small models are at chance there",
    ),
    Item(
        "Table 2",
        "MT-bench with a judge",
        ("chat-methods",),
        no_full="the runs of Table 1, which are judged too",
        no_small="a ruler in the judge's place",
    ),
    Item("Figure 4", "pictures by Stable Diffusion", ("text-to-image",), ("text-to-image",)),
    Item(
        "Figure 5",
        "MT-bench after each arrival",
        ("figure5",),
        full=(grid("one-shot-figure5", ("one_shot_async",), JUDGED, "evaluation.arrivals=true"),),
        no_small="accuracy in place of MT-bench",
    ),
    Item(
        "Figure 6",
        "MT-bench after one to five rounds",
        ("figure6", "rounds"),
        full=(
            grid("one-shot-figure6", ("multi_round_lora",), JUDGED, "method.rounds=5", "evaluation.every=1"),
        ),
        no_small="accuracy in place of MT-bench",
    ),
    Item("Table 3", "rounds and epochs", no_full="settings of Table 1's commands", no_small="settings"),
    Item("Table 4", "steps T·k", no_full="settings of Table 1's commands", no_small="settings"),
    Item(
        "Table 5",
        "zero-shot on MMLU and ARC",
        ("eval-all",),
        full=tuple(
            Step(("fedtune", "eval", name, "--tasks", "mmlu,arc_challenge")) for name in MODELS.values()
        ),
        no_small="one small model, ten examples a task",
    ),
    Item(
        "Table 6",
        "clients alone, ARC",
        ("table6",),
        full=(
            grid(
                "one-shot-table6",
                ("one_shot_lora",),
                "evaluation.tasks=[loss, arc_challenge]",
                references=True,
            ),
        ),
        no_small="SST-2 in place of ARC",
    ),
)

# --- FedKSeed ---------------------------------------------------------------------------------------

RATES, SCALES = ("3e-8", "1e-7", "3e-7", "1e-6", "3e-6"), ("5e-5", "5e-4", "5e-3", "5e-2")
FEDKSEED = (
    Item(
        "Table 1",
        "costs of kinds of methods, as formulas",
        ("bench-memory", "bench-synchronize"),
        no_full="formulas",
    ),
    Item(
        "Figure 1",
        "overview, and time to the newest model",
        ("bench-synchronize",),
        no_full="the small form has the paper's K and steps",
    ),
    Item(
        "Table 2",
        "Rouge-L in six scenarios",
        ("fedkseed-moves", "fedkseed-table2", "fedkseed-pro", "methods-dolly"),
        ("fedkseed-table2",),
        no_small="loss in place of Rouge-L, SST-2 and Dolly",
    ),
    Item("Figure 2", "the number of seeds", ("fedkseed-figure2", "seeds"), ("fedkseed-figure2",)),
    Item(
        "Table 3",
        "weights, bytes, memory, time",
        ("plan-papers", "bench-memory", "bench-zo-step"),
        ("fedkseed-table2",),
        no_full="memory and time stand in the summaries of Table 2's runs",
    ),
    Item("Figure 3", "probabilities of the seeds", ("fedkseed-pro",), ("fedkseed-pro",)),
    Item(
        "Figure 4",
        "time to the newest model",
        ("bench-synchronize", "bench-rebuild"),
        no_full="the small form has the paper's K and steps",
    ),
    Item(
        "Figure 5",
        "η and ε",
        full=tuple(
            grid(
                f"fedkseed-figure5/{rate}-{scale}",
                ("fedkseed_pro_dolly_0.5_3b",),
                f"method.lr={rate}",
                f"method.epsilon={scale}",
            )
            for rate in RATES
            for scale in SCALES
        ),
        no_small="none was run: twenty points of some CPU minutes each",
        no_full="the figure's own values are not printed",
    ),
)

# --- FedBiOT ----------------------------------------------------------------------------------------

CODE = "these models write no program that passes a test"
FEDBIOT = (
    Item("Figure 1", "workflow", no_full="no numbers", no_small="no numbers"),
    Item("Table 1", "data sets", no_full="settings of Table 2's commands", no_small="settings"),
    Item(
        "Table 2",
        "GSM8K, AdapEmu and AdapFu",
        ("fedbiot-table2", "fedbiot-compression", "fedbiot-dolly"),
        ("fedbiot-table2",),
        no_small="Dolly's loss in place of GSM8K, where the small models are at nought",
    ),
    Item("Table 3", "programs at β = 0.2", full_of=("fedbiot-table2",), no_small=CODE),
    Item("Table 4", "programs at β = 0.5", full_of=("fedbiot-table2",), no_small=CODE),
    Item(
        "Figure 2",
        "eight question-answering tasks after Dolly",
        ("fedbiot-table2",),
        ("fedbiot-table2",),
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

# --- FedCyBGD ---------------------------------------------------------------------------------------

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
        ("table3-sst2", "blocks-sst2"),
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

PAPERS = {"one-shot": ONE_SHOT, "fedkseed": FEDKSEED, "fedbiot": FEDBIOT, "fedcybgd": FEDCYBGD}


def heads_by_name() -> dict[str, tuple[str, Head]]:
    """All entries of this folder: name -> file and head."""
    return {name: (file.name, head) for file, some in files().items() for name, head in some.items()}


def full_cell(paper: str, item: Item, known: dict[str, tuple[str, Head]]) -> str:
    """Where the full form is."""
    found = [f"`{known[name][0]} {name} --full`" for name in item.full_of]
    if item.full:
        count = f"{len(item.full)} command{'s' * (len(item.full) > 1)}"
        found.append(f"`papers.py papers-{paper} --full`, {count}")
    if item.no_full:
        found.append(item.no_full)
    return "; ".join(found)


def small_cell(item: Item, known: dict[str, tuple[str, Head]]) -> tuple[str, str]:
    """Where the small form is, and what came out."""
    found, verdicts = [], []
    for name in item.small:
        file, head = known[name]
        found.append(f"`{file} {name}`: {link(*head.places[0])}")
        if head.places[0][0] == PAGE:
            verdicts.append(f"{decided(name, head)[1].verdict} (`{name}`)")
    if item.no_small:
        found.append(item.no_small if item.small else f"no small form: {item.no_small}")
    shown = "shown, no rule" if item.small else "—"
    return "; ".join(found), "; ".join(verdicts) or shown


def listed(paper: str) -> str:
    """A line for each table and figure of a paper."""
    known, rows = heads_by_name(), []
    for item in PAPERS[paper]:
        small, came_out = small_cell(item, known)
        rows.append([item.where, item.shows, full_cell(paper, item, known), small, came_out])
    has_small = sum(bool(item.small) for item in PAPERS[paper])
    has_full = sum(bool(item.full or item.full_of) for item in PAPERS[paper])
    counts = f"{len(rows)} tables and figures: {has_full} with commands at full size, {has_small} in small."
    header = ["", "what", "full form", "small form", "came out"]
    return f"{counts}\n\n{table(header, rows, numbers=False)}"


ENTRIES = {
    f"papers-{paper}": Entry(
        partial(listed, paper), full=tuple(dict.fromkeys(step for item in items for step in item.full))
    )
    for paper, items in PAPERS.items()
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
