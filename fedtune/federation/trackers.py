"""The program of a tracker's process (tracking.py starts it), and the four trackers that it knows.

A line of JSON on standard input each: how it begins, then the rounds, then how the run ended. A line on
standard output each: the round that was taken, or why it failed. Where a tracker keeps or sends what it is
told its own environment variables and log-in say; without any, in its folder in the run's. What it would send
or note beside it (host, user, git, programs, packages, its own statistics) is switched off.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedtune.errors import foreign


class Tracker(Protocol):
    """What takes a run; it is made from how the run begins."""

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """A round's numbers."""

    def end(self, status: str) -> None:
        """The run has ended: `done`, `stopped`, `interrupted`, or `killed` where nobody could say."""


class TensorBoard:
    """Event files in its folder. After a resume a file more, which takes the place of what came after it."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = start["first"]
        self._writer: Any = SummaryWriter(start["folder"], purge_step=first or None)
        if first == 0:
            rows = [f"| {name} | {value} |" for name, value in start["settings"].items()]
            self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), 0)

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """Written to the file at once."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def end(self, status: str) -> None:
        """Closes the file."""
        self._writer.add_text("status", status)
        self._writer.close()


class Wandb:
    """A run of Weights & Biases: offline in its folder, unless WANDB_MODE or a log-in says otherwise."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        quiet = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="",
            program="",
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", start["project"]),
            name=start["name"],
            id=start["id"],
            resume="allow",
            config=start["settings"],
            mode=os.environ.get("WANDB_MODE", "online" if self._logged_in() else "offline"),
            dir=start["folder"],
            settings=quiet,
        )
        self._run.define_metric("*", step_metric="round")

    @staticmethod
    def _logged_in() -> bool:
        import wandb

        try:
            return bool(wandb.login(verify=False))
        except wandb.errors.UsageError:  # no key
            return False

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """A step, with its round as a number: after a rollback rounds come again, and steps never do."""
        self._run.log({"round": round, **values})

    def end(self, status: str) -> None:
        """Finished, or failed."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "done" else 1)


_MLFLOW_ENDS = {"done": "FINISHED", "interrupted": "KILLED", "killed": "KILLED"}


class Mlflow:
    """A run of MLflow: in a database in its folder, unless MLFLOW_TRACKING_URI names another place."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{start['folder']}/mlflow.db"
        self._client = client = MlflowClient(tracking_uri=place)
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", start["project"])
        known = client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else client.create_experiment(project)
        found = client.search_runs([experiment], f"tags.fedtune = '{start['id']}'")
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            return
        self._run = client.create_run(
            experiment, run_name=start["name"], tags={"fedtune": start["id"]}
        ).info.run_id
        settings = [Param(name, str(value)) for name, value in start["settings"].items()]
        for first in range(0, len(settings), 100):  # MLflow's limit of one call
            client.log_batch(self._run, params=settings[first : first + 100])

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """One call; a sign that MLflow has not in its names is `_`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = ((re.sub(r"[^\w\-. /:]", "_", name), value) for name, value in values.items())
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, round) for name, value in named])

    def end(self, status: str) -> None:
        """In MLflow's words."""
        self._client.set_tag(self._run, "status", status)
        self._client.set_terminated(self._run, _MLFLOW_ENDS.get(status, "FAILED"))


class Trackio:
    """A run of trackio: in its folder, unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", start["folder"])
        import trackio

        self._run: Any = trackio.init(
            os.environ.get("TRACKIO_PROJECT", start["project"]),
            name=f"{start['name']}-{start['id']}",  # trackio knows a run by its name alone
            config=start["settings"],
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """A step a round."""
        self._run.log(dict(values), step=round)

    def end(self, status: str) -> None:
        """Waits until all is kept."""
        self._run.finish()


KNOWN: dict[str, Callable[[Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def main(name: str) -> int:
    """Takes one run; the exit status. What the tracker prints goes to standard error, which is its log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**said: Any) -> None:
        print(json.dumps(said), file=answers, flush=True)

    status = "killed"
    try:
        tracker = KNOWN[name](json.loads(sys.stdin.readline()))
        for line in sys.stdin:
            told = json.loads(line)
            if "status" in told:
                status = told["status"]
                break
            tracker.log(told["round"], told["values"])
            answer(told=told["round"])
        tracker.end(status)
    except (Exception, SystemExit) as error:  # code that is not ours: whatever it does, the run goes on
        answer(failed=foreign(f"{type(error).__name__}: {error} ({Path.cwd() / 'log.txt'} has more)", 400))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
