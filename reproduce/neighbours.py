"""What the aggregations of LoRA factors and fewer bytes come to: loss, worst client, bytes, memory, lines.

Ten clients train LoRA of rank 4 on a layer of width 384, and the head of four classes behind it, on sentence
features of MiniLM, which stay as they are: 100 examples of AG News a client, four rounds of two epochs with
AdamW, alike or with classes drawn from a Dirichlet distribution of 0.1. A client's loss is that of 500
held-out examples, weighed as its own classes are, with its own model where it has one; mean and standard
deviation over three seeds. The loss before it is the global model's on all 500, or where there is none the
mean of the clients' models'.

Table:   loss, worst client, bytes and memory by method; docs/neighbours.md, block neighbours
Command: python reproduce/neighbours.py neighbours
Time:    some two minutes (112 CPU seconds)
Needs:   ../shared
Result:  against FedIT's loss, clients alike and unlike: FlexLoRA -0.0195 ± 0.0186 and -0.2317 ± 0.0885,
         LoRA-FAIR -0.0015 ± 0.0012 and +0.0587 ± 0.1353, FLoRA +0.0805 ± 0.0143 and -0.0866 ± 0.0538;
         clients' own loss where they are unlike, mean and worst: FedIT 0.7439 ± 0.0220 and 1.7279 ± 0.7276,
         FedPer 0.1839 ± 0.0597 and 0.4284 ± 0.0360, Ditto (λ = 0.01) 0.1904 ± 0.0789 and 0.4629 ± 0.0399;
         int4 costs nothing that is seen, a tenth of the entries +0.5030 ± 0.0288 without the errors and
         +0.1782 ± 0.0173 with them
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from by_hand import federated
from common import RESULTS, ROOT, Entry, Prepared, main, spread, table
from peft import LoraConfig, get_peft_model
from poisoning import CLIENTS, FEATURES, MODEL, NEWS, features, split
from torch import Tensor, nn

from fedtune.config.wire import Wire
from fedtune.core.personal import result_models
from fedtune.core.seeds import torch_generator
from fedtune.methods.fedavg.lora_aggregation import A
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.models.tuning import trainable
from fedtune.report.tables import size

MADE = RESULTS / "neighbours.json"
ROUNDS, SEEDS, RANK = 4, (0, 1, 2), 4
SPLITS = {"alike": 1e6, "unlike": 0.1}  # α of the clients' classes
PLACE = Path("fedtune/methods/fedavg")
# by name: the method's settings, the wire's, and the files that are its own
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], Sequence[str]]] = {
    "FedIT (`mean`)": ({}, {}, ()),
    "FFA-LoRA (`freeze-a`)": ({"aggregation": "freeze-a"}, {}, ()),
    "RoLoRA (`alternate`)": ({"aggregation": "alternate"}, {}, ("rolora.py",)),
    "LoRA-FAIR (`refine`)": ({"aggregation": "refine"}, {}, ("lora_fair.py",)),
    "FlexLoRA (`svd`)": ({"aggregation": "svd"}, {}, ("flexlora.py",)),
    "FlexLoRA, ranks 1, 2, 4": ({"aggregation": "svd", "ranks": [1, 2, 4]}, {}, ("flexlora.py",)),
    "averaged, ranks 1, 2, 4": ({"ranks": [1, 2, 4]}, {}, ()),
    "HetLoRA, ranks 1, 2, 4": ({"aggregation": "sparsity", "ranks": [1, 2, 4]}, {}, ("hetlora.py",)),
    "HetLoRA, ranks 1, 2, 4, pruned": (
        {"aggregation": "sparsity", "ranks": [1, 2, 4], "prune": {"decay": 0.75, "penalty": 1.0}},
        {},
        ("hetlora.py",),
    ),
    "FedEx-LoRA (`residual`)": ({"aggregation": "residual"}, {}, ("fedex_lora.py",)),
    "FLoRA (`stack`)": ({"aggregation": "stack"}, {}, ("lora_aggregation.py",)),
    "FedSA-LoRA (`own: [lora_B]`)": ({"own": ["lora_B"]}, {}, ("own_parts.py",)),
    "FedPer (`own: [head]`)": ({"own": ["head"]}, {}, ("own_parts.py",)),
    "Ditto, λ = 0.01": ({"ditto": 0.01}, {}, ("ditto.py",)),
    "Ditto, λ = 1": ({"ditto": 1.0}, {}, ("ditto.py",)),
    "FedIT, then one epoch each (`fine_tune`)": (
        {"fine_tune": {"local_epochs": 1}},
        {},
        ("fine_tuning.py",),
    ),
    "FedIT, bfloat16": ({}, {"dtype": "bfloat16"}, ()),
    "FedIT, int8": ({}, {"dtype": "int8"}, ()),
    "FedIT, int4": ({}, {"dtype": "int4"}, ()),
    "FedIT, int4, errors kept": ({}, {"dtype": "int4", "error_feedback": True}, ()),
    "FedIT, a tenth": ({}, {"top_k": 0.1}, ()),
    "FedIT, a tenth, errors kept": ({}, {"top_k": 0.1, "error_feedback": True}, ()),
    "FedIT, a tenth in int4, errors kept": (
        {},
        {"dtype": "int4", "top_k": 0.1, "error_feedback": True},
        (),
    ),
    "FlexLoRA, int4, errors kept": ({"aggregation": "svd"}, {"dtype": "int4", "error_feedback": True}, ()),
}


class Classifier(nn.Module):
    """A layer and a head on features; an example's token is its feature's row."""

    def __init__(self, known: Tensor, seed: int) -> None:
        super().__init__()
        draw, width = torch_generator(seed, "head"), known.shape[1]
        self.register_buffer("features", known, persistent=False)
        self.layer, self.head = nn.Linear(width, width, bias=False), nn.Linear(width, 4)
        for linear in (self.layer, self.head):
            linear.weight.data = torch.randn(linear.weight.shape, generator=draw) * width**-0.5
        self.head.bias.data.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        """Loss and logits of a batch."""
        hidden = self.features[input_ids[:, 0]]  # type: ignore[index]
        logits = self.head(hidden + torch.relu(self.layer(hidden)))
        return _Output(nn.functional.cross_entropy(logits, labels), logits)


class _Output:
    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.loss, self.logits = loss, logits


def attached(config: Config, known: Tensor, seed: int) -> nn.Module:
    """A `Classifier` with PEFT's LoRA on its layer, as `FedAvg.client_model` would have it."""
    settings = config.lora
    assert settings is not None
    torch.manual_seed(seed)  # PEFT draws A from the process's stream
    lora = LoraConfig(r=settings.rank, lora_alpha=int(settings.alpha), target_modules=["layer"])
    classifier = Classifier(known, seed)
    model: nn.Module = get_peft_model(classifier, lora)
    classifier.head.requires_grad_(True)
    if config.aggregation == "freeze-a":
        for name, parameter in trainable(model).items():
            parameter.requires_grad_(not name.endswith(A))
    return model


def federate(known: Mapping[str, Tensor], name: str, alpha: float, seed: int) -> dict[str, float]:
    """One federation: held-out losses, bytes a client and round, peaks of memory."""
    settings, wire, _ = FORMS[name]
    clients, items = split(known["labels"], seed, alpha)
    held = [item.input_ids[0] for item in items]
    settings = dict(settings)
    lora = {"rank": RANK, "alpha": 2.0 * RANK, "client_ranks": settings.pop("ranks", None)}
    config = Config.model_validate(
        {"rounds": ROUNDS, "local_epochs": 2, "batch_size": 25, "lr": 1e-2, "lora": lora, **settings}
    )
    method = FedAvg(config, seed)
    compression = Wire.model_validate(wire).compression(method)
    model = attached(config, known["features"], seed)
    state, ledger, kept = federated(method, model, clients, method.rounds, seed, compression)
    rows, right, losses = torch.tensor(held)[:, None], known["labels"][held], dict[str, Tensor]()
    for result, exported in result_models(method, state, kept, model):
        with torch.no_grad():
            logits = exported(rows, rows, right).logits
            losses[result] = nn.functional.cross_entropy(logits, right, reduction="none")
    shared, own = losses.pop("global", None), []
    for client, items in clients.items():
        each = losses[f"client-{client:04d}"] if losses else shared
        assert each is not None
        counts = Counter(item.labels[0] for item in items)
        parts = [float(each[right == label].mean()) * n for label, n in counts.items()]
        own.append(sum(parts) / len(items))
    overall = torch.stack(list(losses.values())).mean() if shared is None else shared.mean()
    peak = ledger.peak_memory_bytes
    exchanged = CLIENTS * method.rounds
    return {
        "loss": float(overall),
        "mean": sum(own) / len(own),
        "worst": max(own),
        "down": ledger.payload_bytes["down"] / exchanged,
        "up": ledger.payload_bytes["up"] / exchanged,
        "client": peak["client"],
        "server": peak["server"],
    }


def measure(path: Path) -> None:
    """All cells."""
    from safetensors.torch import load_file

    logging.getLogger("fedtune").setLevel(logging.ERROR)
    known = load_file(ROOT / FEATURES)
    found = {
        f"{how}/{name}": [federate(known, name, alpha, seed) for seed in SEEDS]
        for how, alpha in SPLITS.items()
        for name in FORMS
    }
    (ROOT / path).write_text(json.dumps(found, indent=1), encoding="utf-8")


def rows() -> str:
    """A row for each form."""
    found = json.loads((ROOT / MADE).read_text(encoding="utf-8"))
    lines = []
    for name, (_, _, files) in FORMS.items():
        cells = []
        for how in SPLITS:
            runs, first = found[f"{how}/{name}"], found[f"{how}/{next(iter(FORMS))}"]
            off = [run["loss"] - other["loss"] for run, other in zip(runs, first, strict=True)]
            cells += [spread([run["loss"] for run in runs]), "" if runs is first else spread(off, "+")]
            cells += [spread([run[which] for run in runs]) for which in ("mean", "worst")]
        one = found[f"alike/{name}"][0]
        own = sum(len((ROOT / PLACE / file).read_text(encoding="utf-8").splitlines()) for file in files)
        sizes = [size(one[key]) for key in ("down", "up", "client", "server")]
        lines.append([name, *cells, *sizes, str(own) if own else ""])
    header = ["method"]
    for how in SPLITS:
        header += [f"loss, {how}", "against the first", "mean client", "worst client"]
    return table([*header, "down", "up", "client memory", "server memory", "lines of its own"], lines)


STEPS = [Prepared("features of AG News", FEATURES, features), Prepared("federations", MADE, measure)]
ENTRIES = {"neighbours": Entry(rows, STEPS, [MODEL, NEWS])}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
