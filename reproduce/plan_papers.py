"""What the papers print of bytes, parameters and operations, beside the plan of their configurations.

Table:   FedKSeed's Table 3, FedBiOT's Table 5, FedCyBGD's Tables 1 and 6, section 5 of the one-shot paper;
         docs/planning.md, block plan-papers
Command: python reproduce/plan_papers.py plan-papers
Time:    half a minute
Needs:   nothing; shapes of the models are in configs/papers/shapes
Result:  FedKSeed on 1,345,423,360 weights 17,988 B, as printed; FedBiOT with s = 2 and β = 0.2 14.68 MB,
         as printed; Llama-13b in three rounds 3,124 GB, where 3000 GB are printed
"""

from __future__ import annotations

from typing import Any

import torch
from common import ROOT, Entry, main, table

from fedtune.config.file import load_config
from fedtune.planning.plan import plan

SHAPES = ROOT / "configs" / "papers" / "shapes"
ALPACA = "fedcybgd_llama2_alpaca"


def paper(name: str, shape: str, *settings: str) -> dict[str, Any]:
    """The plan of a configuration of a paper on the shape of its model, for one client and round."""
    one = ["data.clients=1", "data.partition={name: iid}", "federation.clients_per_round=null"]
    path = SHAPES.parent / f"{name}.yaml"
    config = load_config(path, [f"model.name={SHAPES / shape}", *one, *settings])
    if "rounds" in type(config.method).model_fields:
        config = config.model_copy(update={"method": config.method.model_copy(update={"rounds": 1})})
    return plan(config, steps=False).document


def papers() -> str:
    """What the papers print, and what is planned."""
    torch.set_num_threads(1)
    lines: list[list[str]] = []

    def row(where: str, what: str, printed: str, planned: str) -> None:
        lines.append([where, what, printed, planned])

    for shape, hidden, printed in (
        (
            "datajuicer-1.3b",
            2048,
            ("12.63 M, 96.36 MiB", "40.96 K, 320.0 KiB", "1.57 M, 12.00 MiB", "1.35 B, 17,988 B"),
        ),
        (
            "llama-3b",
            3200,
            ("30.79 M, 234.94 MiB", "64.00 K, 500.0 KiB", "2.66 M, 20.31 MiB", "3.43 B, 17,988 B"),
        ),
    ):
        rows = {
            "FedPTuning": ("fedptuning", f"method.p_tuning.hidden={hidden}"),
            "FedPrompt": ("fedprompt", "seed=0"),
            "FedIT-SGD": ("fedit_sgd", "seed=0"),
            "FedIT": ("fedit", "seed=0"),
            "FedKSeed": ("fedkseed_ni_1b", "seed=0"),
            "FedKSeed-Pro": ("fedkseed_pro_ni_1b", f"method.seeds={1024 if hidden == 2048 else 2048}"),
        }
        pro = f"{printed[3].split(',')[0]}, {'9,796' if hidden == 2048 else '17,988'} B"
        shown = dict(zip(rows, (*printed[:3], printed[2], printed[3], pro), strict=True))
        for name, (config, setting) in rows.items():
            document = paper(config, shape, setting)
            count = document["published"].get("bytes_per_client_round", document["payload_bytes"]["total"])
            row(
                "FedKSeed, Table 3",
                f"{name}, {shape}",
                shown[name],
                f"{document['trainable_parameters']:,}, {count:,} B ({count / 2**20:.2f} MiB)",
            )
    for dropout, adapter, method, printed_row in (
        (0.2, 4, "fedot", "0.524 M, 10.33 GFLOP, 4.19 MB"),
        (0.2, 2, "fedbiot", "0.262 M, 5.47 GFLOP, 14.68 MB"),
        (0.2, 4, "fedbiot", "0.524 M, 5.87 GFLOP, 15.73 MB"),
        (0.5, 4, "fedot", "0.524 M, 7.09 GFLOP, 4.19 MB"),
        (0.5, 2, "fedbiot", "0.262 M, 3.65 GFLOP, 9.96 MB"),
        (0.5, 4, "fedbiot", "0.524 M, 4.25 GFLOP, 11.53 MB"),
    ):
        document = fedbiot(method, adapter, dropout)
        found = document["published"]
        row(
            "FedBiOT, Table 5",
            f"{method}, s = {adapter}, β = {dropout}",
            printed_row,
            f"{document['trainable_parameters'] / 1e6:.3f} M, {found['flops_per_token'] / 1e9:.2f} GFLOP, "
            f"{found['bytes_per_client_round'] / 1e6:.2f} MB",
        )
    for number, name, label, printed_row in (
        (1, "fed_full", "Fed-full", "12.48 GB, 12.48 GB"),
        (1, "fedlora", "FedLoRA", "24.96 GB, 32.03 MB"),
        (1, ALPACA, "FedCyBGD, no compression (Table 6: 13.23 GB)", "12.48 GB, 770.37 MB"),
        (
            1,
            f"{ALPACA}_layer_drop",
            "FedCyBGD, half of the blocks (Table 6, i: 6.99 GB)",
            "6.24 GB, 770.37 MB",
        ),
        (6, f"{ALPACA}_lora", "ii, LoRA of rank 16 in the block", "together 12.49 GB"),
        (6, f"{ALPACA}_adapter", "iii, an adapter in the block, half of the blocks", "together 6.30 GB"),
    ):
        first = paper(name, "llama-2-7b")["payload_bytes"]["first_time"]
        row(
            f"FedCyBGD, Table {number}",
            label,
            printed_row,
            f"{first['down'] / 2**30:.2f} GiB, {first['up'] / 2**20:.2f} MiB "
            f"(together {(first['down'] + first['up']) / 2**30:.2f} GiB)",
        )
    for rounds, printed_row in ((3, "3000 GB"), (1, "1000 GB")):
        total = one_shot(rounds)["payload_bytes"]["total"]
        row("one-shot, section 5", f"Llama-13b, m = 10, T = {rounds}", printed_row, f"{total / 1e9:,.0f} GB")
    return table(["paper", "row", "printed", "planned"], lines, numbers=False)


def fedbiot(method: str, adapter: int, dropout: float) -> dict[str, Any]:
    """A row of FedBiOT's Table 5: LLaMA-2-7B."""
    settings = [
        f"method.name={method}",
        f"method.adapter_layers={adapter}",
        f"method.layer_dropout={dropout}",
    ]
    if method == "fedot":
        settings += ["method.both_ends=true", "method.alignment.steps=0"]
    return paper("fedbiot_gsm8k_s2_0.2", "llama-2-7b", *settings)


def one_shot(rounds: int) -> dict[str, Any]:
    """Section 5 of the one-shot paper: full weights of Llama-13b in float32, ten clients, T rounds."""
    path = SHAPES.parent / "multi_round_full.yaml"
    settings = [f"model.name={SHAPES / 'llama-13b'}", "model.dtype=float32", f"method.rounds={rounds}"]
    return plan(load_config(path, settings), steps=False).document


ENTRIES = {"plan-papers": Entry(papers)}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
