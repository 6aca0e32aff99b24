"""Tables and figures of the one-shot and the FedKSeed paper, with the commands of their full forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common import RESULTS, Step, compare

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
        ("quantities", "tau"),
        full=tuple(diagnosed(model, name) for model, name in MODELS.items()),
        no_full="ResNet-18 and BERT are left out",
    ),
    Item(
        "Figure 3",
        "the bound's logarithm by model",
        ("quantities",),
        no_full="the commands of Figure 2",
    ),
    Item(
        "Table 1",
        "MMLU and ARC: LoRA and all weights, three data sets, four models",
        (
            *("lora", "lora-own-rates", "lora-stack", "two-sets"),
            *("one-shot-by-field", "one-shot-full-by-field"),
        ),
        full=TABLES_1_2,
        no_small="SST-2 and AG News in place of MMLU, where the small models are at chance, and of ARC",
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
    Item(
        "Figure 2",
        "the number of seeds, with Theorem 1",
        ("fedkseed-figure2", "fedkseed-theorem", "seeds"),
        ("fedkseed-figure2",),
    ),
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
        ("fedkseed-figure5",),
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
        no_small="a network of 3,322 weights on MNIST in place of LLaMA-3B on Dolly",
        no_full="the figure's own values are not printed",
    ),
)
