"""τ of LoRA counted on its factors and on what they add to the model, beside τ of all weights.

‖ΔW‖ is of what training adds to the model's weights: for LoRA the product (alpha / rank) · B · A, while the
factors themselves begin at a drawn A and B = 0. The bundled model on its own data, and instruct-7m on Dolly;
eight or ten clients alike, three rounds of one epoch, at the rates of docs/theory.md's tables.

Table:   τ by what is counted, and T·k as the paper counts it; docs/theory.md, block tau
Command: python reproduce/tau.py tau
Time:    4 CPU minutes
Needs:   for the last two rows ../shared/models/instruct-7m, ../shared/data/dolly15k
Result:  of the bundled model LoRA's factors move by 0.157 of their norm, what they add is 0.00669 of the
         model's; all weights move by 0.0233
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import DOLLY, MODELS, RESULTS, ROOT, SHARED, Entry, Prepared, main, table
from one_shot import ALL_WEIGHTS, held_out, real, small
from safetensors.torch import load_file
from torch import Tensor

from fedtune.config.file import load_config
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods import registry
from fedtune.models.load import load_model
from fedtune.models.save import load_result

SEEDS, ROUNDS, BATCH = (0, 1, 2), 3, 8
BUNDLED = (10, small(10, 400, name="iid"))  # clients, settings
INSTRUCT = (
    8,
    (
        f"model.name={MODELS / 'instruct-7m'}",
        held_out(64),
        real(DOLLY, 8, 160, template="alpaca", name="iid"),
    ),
)
SETS = {"bundled": BUNDLED} | ({"instruct-7m": INSTRUCT} if (ROOT / SHARED).is_dir() else {})
KINDS = {"LoRA": (), "all weights": ALL_WEIGHTS}
RATES = {
    ("bundled", "LoRA"): 3e-3,
    ("bundled", "all weights"): 2e-3,
    ("instruct-7m", "LoRA"): 3e-3,
    ("instruct-7m", "all weights"): 1e-3,
}


def norm(weights: Mapping[str, Tensor]) -> float:
    """‖w‖ over all tensors, in float64."""
    return math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))


def moved(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What training added, by name, in float64. Raises KeyError where the two have not the same tensors."""
    if after.keys() != before.keys():
        raise KeyError(f"not in both: {sorted(after.keys() ^ before.keys())[:3]}")
    return {name: after[name].double() - w.double() for name, w in before.items()}


def relative(before: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ of the tensors that change, and of the whole model."""
    touched = {name: w for name, w in before.items() if bool(added[name].any())}
    return {"touched": norm(added) / norm(touched), "model": norm(added) / norm(before)}


def steps(clients: int, examples: int) -> tuple[int, int]:
    """T·k as a client makes its steps, and as the paper counts it: over the data of all clients."""
    return ROUNDS * math.ceil(examples / (clients * BATCH)), ROUNDS * math.ceil(examples / BATCH)


def measure(out: Path, *, model: str, kind: str, seed: int) -> None:
    """Trains once, and writes the norms."""
    _, settings = SETS[model]
    config = load_config(
        ROOT / "configs/bundled_multi_round.yaml",
        [
            *settings,
            *KINDS[kind],
            f"method.lr={RATES[model, kind]}",
            f"seed={seed}",
            "evaluation.tasks=[loss]",
        ],
    )

    def base(name: str) -> Any:
        return load_model(name, dtype="float32", initial="pretrained", seed=seed, base=ROOT)

    method: Any = registry.build(config.method, config.seed)
    first = method.init(method.client_model(lambda: base(config.model.name).model)).weights
    before = {name: w.detach() for name, w in base(config.model.name).model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        run(config, Path(folder) / "run", Silent())
        summary = json.loads((Path(folder) / "run/summary.json").read_text(encoding="utf-8"))
        final = Path(folder) / "run/final"
        result: Any = load_result(final, base).model
        whole = result.merge_and_unload() if kind == "LoRA" else result
        added = moved({name: w.detach() for name, w in whole.named_parameters()}, before)
        found = relative(before, added)
        if kind == "LoRA":
            last = load_file(final / "adapter_model.safetensors")
            found["trained"] = factors(last, first)
        else:
            found["trained"] = found["model"]
    found["examples"] = summary["examples"]["train"]["examples"]
    out.write_text(json.dumps(found), encoding="utf-8")


def factors(last: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> float:
    """τ of the factors, A and B of every layer taken as one vector, as `fedtune diagnose` has it."""
    begun, ended = ({_plain(name): w for name, w in some.items()} for some in (first, last))
    return norm(moved(ended, begun)) / norm(begun)


def _plain(name: str) -> str:
    """The name of a factor without what PEFT and the adapter's own name add to it."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def cell(model: str, kind: str, seed: int) -> Prepared:
    """A measured run."""
    out = RESULTS / "tau" / f"{model}-{kind.replace(' ', '-')}-{seed}.json"
    work = partial(measure, model=model, kind=kind, seed=seed)
    return Prepared(f"τ of {model}, {kind}, seed {seed}", out, work)


def shown(values: list[float]) -> str:
    """Mean ± standard deviation at three digits."""
    return f"{statistics.fmean(values):.3g} ± {statistics.stdev(values):.1g}"


def taus() -> str:
    """A row a model and way to train, mean and deviation over the seeds."""
    rows = []
    for model, (clients, _) in SETS.items():
        for kind in KINDS:
            made = [
                json.loads((ROOT / cell(model, kind, seed).made).read_text(encoding="utf-8"))
                for seed in SEEDS
            ]
            counts = [str(count) for count in steps(clients, int(made[0]["examples"]))]
            taus = [shown([row[key] for row in made]) for key in ("trained", "touched", "model")]
            rows.append([f"{model}, {kind}", *taus, *counts])
    header = ["trained", "τ of what is trained", "‖ΔW‖ / ‖W‖ of the tensors it changes", "of the whole model"]
    return table([*header, "T·k of a client", "as the paper counts it"], rows)


ENTRIES = {
    "tau": Entry(
        taus, [cell(model, kind, seed) for model in SETS for kind in KINDS for seed in SEEDS], partly=True
    )
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
