"""The bundled model: what it can do, the demo, and what the program takes beside training.

make_bundled_data.py and pretrain_bundled.py make the data and the model themselves.

Table:   accuracy before any fine-tuning; docs/bundled.md, block zero-shot
Command: python reproduce/bundled.py zero-shot
Time:    half a minute
Needs:   nothing
Result:  42.8% of all answers are right, 100.0% of last and 0.0% of opposite

Table:   the demo; README.md, block demo
Command: python reproduce/bundled.py demo
Time:    half a minute
Needs:   nothing
Result:  accuracy rises from 0.4278 to 0.5389, the loss falls from 2.5737 to 0.7831, in 27.6 seconds

Table:   where the time goes; docs/results.md, block overhead
Command: python reproduce/bundled.py overhead
Time:    half a minute
Needs:   nothing
Result:  of 19.6 seconds training takes 16.3 and evaluation 2.9

Table:   rounds of twenty clients against the same written by hand; docs/results.md, block bench-federation
Command: python reproduce/bundled.py bench-federation
Time:    8 minutes
Needs:   nothing
Result:  of LoRA a round takes 1.7 of the loop's time on the bundled model and 0.965 on one of 19 M, of all
         weights 1.74 and 1.21

Table:   the server's exact sum against a list and its mean; docs/results.md, block bench-aggregation
Command: python reproduce/bundled.py bench-aggregation
Time:    20 seconds
Needs:   nothing
Result:  1,000 clients in 5,600,000 bytes for 803,200,000, and 0.469 of the time

Table:   memory of simulated clients; docs/results.md, block bench-simulation
Command: python reproduce/bundled.py bench-simulation
Time:    under three minutes
Needs:   nothing
Result:  100 clients take 3.55 times the memory of 1, and 0.0461 of that of 100 models

Table:   encoding beside the tokenizer alone; docs/data.md, block bench-encoding
Command: python reproduce/bundled.py bench-encoding
Time:    not measured; more than a minute of one core
Needs:   nothing
Result:  20,000 examples take 1.39 times the tokenizer's CPU time, from disk 0.129, and 0.265 of its bytes
"""

from __future__ import annotations

from common import RESULTS, Entry, Printed, bench, main, run


def federation(name: str, columns: int) -> Entry:
    """What a run prints at its end."""
    out = RESULTS / name
    again = ("fedtune", "run", f"configs/{name}.yaml", "--resume", str(out), "--quiet")
    return Entry(Printed(again, columns), [run(name, out)])


ENTRIES = {
    "zero-shot": Entry(Printed(("python", "reproduce/pretrain_bundled.py", "--evaluate"), fenced=False)),
    "demo": federation("demo", columns=90),
    "overhead": federation("overhead", columns=80),
    "bench-aggregation": bench("aggregation", columns=110),
    "bench-federation": bench("federation", columns=110),
    "bench-simulation": bench("simulation", columns=110),
    "bench-encoding": bench("encoding", columns=110),
}

if __name__ == "__main__":
    main(__doc__, ENTRIES)
