"""The model card of a run: what it was made with, what it scores, what it cost and what it keeps private.

It says what the run's files say and leaves out what is not known. Nothing of the data is in it: no example,
no name of a client, a file or a category, no place of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.errors import InputError
from fedtune.evaluation.bootstrap import metrics_of
from fedtune.federation.files import read_json
from fedtune.federation.folder import RunFolder
from fedtune.federation.publishing import on_hub
from fedtune.models.names import BUNDLED
from fedtune.report.tables import interval, number, size
from fedtune.version import __version__

PIPELINES = {
    "causal-lm": "text-generation",
    "classification": "text-classification",
    "text-to-image": "text-to-image",
}
PACKAGES = ("fedtune", "torch", "transformers", "peft", "diffusers", "flwr")


def card(run: Path, config: RunConfig, *, library: str) -> str:
    """The text of a README.md for the hub.

    Args:
        run: The run's folder.
        config: Its configuration.
        library: Which loads it; `peft` and `fedtune` say that it is an adapter, for which the base is needed.

    Raises:
        InputError: The run has not ended.
    """
    summary = RunFolder(run).summary()
    if summary is None or summary.get("status") != "done":
        raise InputError(f"{run} has not ended, so there is nothing to say of it; fedtune run --resume {run}")
    environment = read_json(run / "environment.json")
    partition = read_json(run / "partition.json")
    base, data = config.model.name.partition("@")[0], str(config.data.train)
    known, adapter = on_hub(base), library in ("peft", "fedtune")
    head = [
        "---",
        *([f"base_model: {base}"] if known else []),
        *([f"base_model_relation: {'adapter' if adapter else 'finetune'}"] if known else []),
        f"library_name: {library}",
        f"pipeline_tag: {PIPELINES[config.model.task]}",
        *(["datasets:", f"- {data}"] if on_hub(data) else []),
        "tags:",
        *(f"- {tag}" for tag in ("federated-learning", "fedtune", config.method_name)),
        "---",
    ]
    name = f"[{base}](https://huggingface.co/{base})" if known else _base(base)
    title = f"# {base.rpartition('/')[2] if known else 'A model'}, tuned by {config.method_name}"
    parts = [
        "\n".join(head),
        title,
        f"{name[0].upper()}{name[1:]} was tuned with fedtune {environment['packages'].get('fedtune', '')}"
        f"{', on data that stayed with its owners' if _federated(summary) else ''}. "
        + ("This is an adapter; it needs that base model." if adapter else "This is a whole model."),
        _section("How it was made", ("", ""), _made(config, summary, partition, data)),
        _scores(summary),
        _section("What it cost", ("", ""), _costs(summary)),
        f"## What it keeps private\n\n{_privacy(config, summary)}",
        _section("Versions", ("package", "version"), _versions(environment)),
        "Licence and permitted use are those of the base model and of the data; none is given here.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(name: str) -> str:
    return "the small model that comes with fedtune" if name == BUNDLED else "a base model that is not public"


def _made(
    config: RunConfig, summary: Mapping[str, Any], partition: Mapping[str, Any], data: str
) -> list[tuple[str, str]]:
    method = config.method.model_dump(mode="json")
    examples = [client["examples"] for client in partition["clients"]]
    rows = [
        ("method", config.method_name),
        ("rounds", str(summary["rounds"])),
        ("clients", f"{summary['clients']}, {_asked(config)}"),
        ("data", _data(data)),
        ("split", f"{partition['name']}; {min(examples)} to {max(examples)} examples a client"),
        ("trained parameters", f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,}"),
        *(
            (key.replace("_", " "), text)
            for key, value in method.items()
            if (text := _plain(value)) is not None
        ),
        ("seed", str(summary["seed"])),
    ]
    return [row for row in dict(rows).items() if row[0] != "name"]


def _asked(config: RunConfig) -> str:
    share = config.federation.clients_per_round
    if share is None:
        return "all in each round"
    return f"{share:.0%} of them a round" if isinstance(share, float) else f"{share} of them a round"


def _data(name: str) -> str:
    if name == BUNDLED:
        return "made examples that come with fedtune"
    return f"[{name}](https://huggingface.co/datasets/{name})" if on_hub(name) else "not public"


def _plain(value: Any) -> str | None:
    """A setting that can be shown: a number, a switch, a word; of several their line. None for all else."""
    if isinstance(value, dict):
        inner = {key: text for key, each in value.items() if (text := _plain(each)) is not None}
        return ", ".join(f"{key.replace('_', ' ')} {text}" for key, text in inner.items()) or None
    if isinstance(value, bool):
        return "yes" if value else None
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return value if isinstance(value, str) and value.replace("-", "").replace("_", "").isalnum() else None


def _scores(summary: Mapping[str, Any]) -> str:
    rows = []
    for task, after in summary["evaluation"].items():
        before = summary["zero_shot"].get(task, {})
        for metric in metrics_of(after):
            if "/" in metric or metric == "tokens":  # of a category, whose name is the data's; a count
                continue
            value = number(after[metric]) + interval(after, metric)
            rows.append((task, metric, number(before[metric]) if metric in before else "", value))
    if not rows:
        return ""
    examples = (summary.get("examples") or {}).get("held_out") or {}
    count = examples.get("examples")
    said = f"On {count:,} examples that no client trained on. " if count else ""
    if scored := summary.get("scored"):
        own = max(after["examples"] for after in summary["evaluation"].values())
        said = (
            f"By {len(scored['clients'])} clients, each on examples of its own that it did not train on, "
            f"{own:,} in all. "
        )
    table = _table(("task", "metric", "before", "after, with its 95 % interval"), rows)
    return f"## Scores\n\n{said}Before: the base model as the run began with it.\n\n{table}"


def _costs(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    payload, framed, peaks = (summary[key] for key in ("payload_bytes", "framed_bytes", "peak_memory_bytes"))
    each = summary.get("payload_bytes_per_client_round")
    return [
        ("payload down, up", f"{size(payload['down'])}, {size(payload['up'])}"),
        ("on the wire down, up", f"{size(framed['down'])}, {size(framed['up'])}"),
        *([("payload a client and round", size(each))] if each is not None else []),
        ("peak memory client, server", f"{size(peaks['client'])}, {size(peaks['server'])}"),
        ("seconds", f"{summary['seconds']['total']:.1f}"),
    ]


def _privacy(config: RunConfig, summary: Mapping[str, Any]) -> str:
    if not _federated(summary):
        return "Nothing: this is a reference run, for which all examples were in one place."
    said = ["Examples stayed with the clients; what they trained was sent to the server."]
    if config.federation.secure_aggregation is not None:
        said.append("Secure aggregation: the server saw sums of updates and no single one.")
    else:
        said.append("No secure aggregation: the server saw each client's update.")
    spent = summary.get("privacy")
    if spent is None:
        said.append(
            "No differential privacy: there is no bound on what the model tells of its training examples."
        )
    elif spent["epsilon"] is None:
        said.append("Differential privacy was set without noise that bounds anything: ε is infinite.")
    else:
        said.append(f"Differential privacy spent: ε = {spent['epsilon']:.4g} at δ = {spent['delta']:g}.")
    return " ".join(said)


def _federated(summary: Mapping[str, Any]) -> bool:
    """Whether anything crossed a wire: nothing does of the rows that others are held against."""
    return sum(summary["payload_bytes"].values()) > 0


def _versions(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    packages = {"fedtune": __version__} | dict(environment.get("packages", {}))
    rows = [(name, str(packages[name])) for name in PACKAGES if packages.get(name)]
    return [*rows, ("python", str(environment.get("python", "")))]


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"## {title}\n\n{_table(header, rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
