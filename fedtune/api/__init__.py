"""fedtune in Python: `import fedtune`. The command line is a reader of these functions.

config = fedtune.load("mine.yaml", "method.lr=1e-4")
run = fedtune.run(config, out="runs/mine")
run.scores, run.rounds.to_pandas(), run.generate(["Add 2 and 3."])
"""

from fedtune.report.notebook import import_bars_quietly

import_bars_quietly()  # before anything that imports tqdm
