"""A configuration of FedKSeed whose training shows: the rates that were tried, and what it ends at.

Table:   rates on sentences that no client has, and the run on the test part; docs/fedkseed.md, block
         fedkseed-sst2
Command: python reproduce/fedkseed_sst2.py fedkseed-sst2
Time:    not measured
Needs:   ../shared/models/instruct-7m, ../shared/data/glue
Result:  1
"""

from __future__ import annotations

from typing import Any, cast

from claims import OUT, Side, Trials, less, said
from common import DATA, MODELS, ROOT, Entry, main, spread, table

from fedtune.config.file import load_config

NAME = "fedkseed_sst2"
VALIDATED = ("data.holdout={fraction: 0.01}", "federation.max_loss_jump=null")  # a rate may fail
TRIALS = Trials(OUT / "fedkseed-sst2", (Side("FedKSeed", NAME),), (), ("evaluation.bootstrap=0",), VALIDATED)


def tried() -> str:
    """Validation loss by rate, and held-out loss before and after."""
    (side,) = TRIALS.sides
    own, best = cast(Any, load_config(ROOT / f"configs/{NAME}.yaml").method).lr, TRIALS.rate(side)
    if own != best:
        raise SystemExit(f"configs/{NAME}.yaml has a rate of {own}, and the best is {best}")
    rows = [
        [f"{lr:.0e}".replace("e-0", "e-"), f"{loss:.4f}"] for lr, loss in sorted(TRIALS.tried(side).items())
    ]
    before, after = (TRIALS.scores(side.name, "loss", which) for which in ("zero_shot", "evaluation"))
    sent = TRIALS.summary(side.name, 0)["payload_bytes_per_client_round"]
    return (
        f"{table(['rate', 'loss on sentences of nobody'], rows)}\n\nOn the test part, over {len(after)} "
        f"seeds: {spread(before)} before, {spread(after)} after, a difference of {said(less(after, before))} "
        f"nats, with {sent:,.0f} bytes a client and round."
    )


ENTRIES = {"fedkseed-sst2": Entry(tried, [TRIALS], (MODELS / "instruct-7m", DATA / "glue"))}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
