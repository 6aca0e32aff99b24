"""Methods of forward passes alone beside each other, at as many passes: directions, pools, graphs, noise.

All weights of a layer of width 384 and a head of four classes on sentence features of MiniLM, which stay as
they are (neighbours.py): ten clients of 100 examples of AG News, alike or with classes drawn from a Dirichlet
distribution of 0.1. Everyone has 64 forward passes a round, on batches of 25 examples, for four rounds. The
rate of each row is the best of three on the split of another seed, clients alike; mean and standard deviation
of the held-out loss over three seeds, of the clients' models where there is no global one, and of the worst
of them. Bytes are a client's in a round.

Table:   held-out loss, bytes and memory by method; docs/neighbours.md, block forward-only
Command: python reproduce/forward_only.py forward-only
Time:    some eight minutes (420 CPU seconds)
Needs:   ../shared
Result:  loss, clients alike and unlike: FedKSeed 1.1153 and 1.2115, with four directions a step 1.0916 and
         1.2115, with LOZO's noise 1.0956 and 1.2729, DeComFL 1.0683 and 1.2026, on a ring without a server
         1.1099 and 1.4266, where all are neighbours FedKSeed's own numbers
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from by_hand import federated
from common import RESULTS, ROOT, Entry, Prepared, main, spread, table
from neighbours import SPLITS, Classifier
from poisoning import CLIENTS, FEATURES, MODEL, NEWS, features, split
from torch import Tensor, nn

from fedtune.core.cohort import QuorumError
from fedtune.core.personal import result_models
from fedtune.methods import registry
from fedtune.report.tables import size

MADE = RESULTS / "forward-only.json"
PAIRS, ROUNDS, SEEDS, SEARCHED = 32, 4, (0, 1, 2), 9
RATES = (1e-2, 2e-2, 4e-2)
KSEED: dict[str, Any] = {"name": "fedkseed", "seeds": 1024}
ENDLESS: dict[str, Any] = {"name": "infinite-pool"}
# by name: settings, directions a step, and the files that are its own
FORMS: dict[str, tuple[dict[str, Any], int, Sequence[str]]] = {
    "FedKSeed": (KSEED, 1, ()),
    "FedKSeed, 4 directions a step": (KSEED, 4, ()),
    "FedKSeed, Gaussian noise": ({**KSEED, "noise": "gaussian"}, 1, ()),
    "FedKSeed, SubZero's subspaces": ({**KSEED, "noise": "subzero"}, 1, ("zeroth/subspace.py",)),
    "FedKSeed, LOZO's subspaces": ({**KSEED, "noise": "lozo"}, 1, ("zeroth/subspace.py",)),
    "no server, all neighbours": ({**KSEED, "graph": "full"}, 1, ("methods/fedkseed/gossip.py",)),
    "no server, random graph": ({**KSEED, "graph": "random"}, 1, ("methods/fedkseed/gossip.py",)),
    "no server, ring": ({**KSEED, "graph": "ring"}, 1, ("methods/fedkseed/gossip.py",)),
    "DeComFL": ({**ENDLESS, "download": "means"}, 1, ("methods/fedkseed/decomfl.py",)),
    "DeComFL, 4 directions a step": ({**ENDLESS, "download": "means"}, 4, ("methods/fedkseed/decomfl.py",)),
}


def federate(known: Mapping[str, Tensor], name: str, alpha: float, seed: int, lr: float) -> dict[str, float]:
    """One federation: held-out losses, bytes a client and round, peaks of memory."""
    settings, directions, _ = FORMS[name]
    clients, items = split(known["labels"], seed, alpha)
    steps = {"local_steps": PAIRS // directions, "perturbations": directions, "batch_size": 25}
    document = {"rounds": ROUNDS, "epsilon": 1e-3, "lr": lr, **steps, **settings}
    method = registry.build(registry.config_class(settings["name"]).model_validate(document), seed)
    model: nn.Module = method.client_model(lambda: Classifier(known["features"], seed))
    state, ledger, kept = federated(method, model, clients, ROUNDS, seed)
    rows, losses = torch.tensor([item.input_ids[0] for item in items]), list[float]()
    for _, exported in result_models(method, state, kept, model):
        with torch.no_grad():
            logits = exported(rows[:, None], rows[:, None], known["labels"][rows]).logits
        losses.append(float(nn.functional.cross_entropy(logits, known["labels"][rows])))
    peak, exchanged = ledger.peak_memory_bytes, CLIENTS * ROUNDS
    return {
        "loss": sum(losses) / len(losses),
        "worst": max(losses),
        **{way: ledger.payload_bytes[way] / exchanged for way in ("down", "up")},
        **{where: peak[where] for where in ("client", "server")},
    }


def searched(known: Mapping[str, Tensor], name: str, lr: float) -> float:
    """The loss on the split that rates are chosen on; infinite where slopes grew beyond all bounds."""
    try:
        return federate(known, name, SPLITS["alike"], SEARCHED, lr)["loss"]
    except QuorumError:
        return math.inf


def measure(path: Path) -> None:
    """All cells; what is there of an interrupted measurement is kept."""
    from safetensors.torch import load_file

    logging.getLogger("fedtune").setLevel(logging.ERROR)
    part = (ROOT / path).with_suffix(".part")
    known = load_file(ROOT / FEATURES)
    found: dict[str, Any] = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
    for name in FORMS:
        if name in found:
            continue
        tried = {lr: searched(known, name, lr) for lr in RATES}
        best = min(tried, key=lambda lr: tried[lr])
        runs = {how: [federate(known, name, a, seed, best) for seed in SEEDS] for how, a in SPLITS.items()}
        found[name] = {"rate": best, **runs}
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    part.replace(ROOT / path)


def rows() -> str:
    """A row for each form."""
    found = json.loads((ROOT / MADE).read_text(encoding="utf-8"))
    first, lines = next(iter(FORMS)), []
    for name, (_, _, files) in FORMS.items():
        cells = [f"{found[name]['rate']:.0e}".replace("e-0", "e-")]
        for how in SPLITS:
            runs, others = found[name][how], found[first][how]
            off = [run["loss"] - other["loss"] for run, other in zip(runs, others, strict=True)]
            cells += [spread([run["loss"] for run in runs]), "" if name == first else spread(off, "+")]
            cells += [spread([run["worst"] for run in runs])]
        one = found[name]["alike"][0]
        own = sum(len((ROOT / "fedtune" / file).read_text(encoding="utf-8").splitlines()) for file in files)
        sizes = [size(one[key]) for key in ("down", "up", "client", "server")]
        lines.append([name, *cells, *sizes, str(own) if own else ""])
    header = ["method", "rate"]
    for how in SPLITS:
        header += [f"loss, {how}", "against the first", "worst model"]
    return table([*header, "down", "up", "client memory", "server memory", "lines of its own"], lines)


STEPS = [Prepared("features of AG News", FEATURES, features), Prepared("federations", MADE, measure)]
ENTRIES = {"forward-only": Entry(rows, STEPS, [MODEL, NEWS])}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
