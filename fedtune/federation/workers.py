"""How many processes of this machine train clients at the same time, and how many threads each has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from fedtune.config.schema import RunConfig
from fedtune.core.cohort import sample_cohort
from fedtune.federation.assembly import Assembly
from fedtune.federation.devices import cards_of
from fedtune.models.tuning import count_parameters

PROCESS_BYTES = 600 << 20  # of Python and the libraries, in each process
TRAINED_BYTES = 20  # of a trained parameter: gradient, float32 master, two moments, and the reply
LOGITS = 3  # times a batch's logits: they, their gradient, and what the loss takes


@dataclass(frozen=True)
class Workers:
    """Processes in which clients train.

    Attributes:
        count: How many; 1: the run's own, one client after another.
        threads: PyTorch's, of each.
        note: What a person is told of them; empty for nothing.
    """

    count: int
    threads: int
    note: str = ""


def workers_of(config: RunConfig, assembly: Assembly) -> Workers:
    """The processes of a run, as `transport.workers` says; `auto` is as many as there is use and room for.

    Args:
        config: The run's configuration.
        assembly: What it is assembled from, once the method's part is attached to the model.
    """
    cores, asked = cores_here(), _asked(config, assembly)
    given = config.transport.workers
    in_turn = assembly.method.arrival == "in-turn"
    if given == "auto":
        limits = {f"{cores} cores": cores, f"a round asks {asked} clients": asked}
        if gpus := len(cards_of(config.model.device)):
            limits = {f"{gpus} GPUs": gpus, f"a round asks {asked} clients": asked}
        elif (free := free_bytes()) is not None:
            each = bytes_of_one(config, assembly)
            said = (
                f"{free / 1e9:.1f} GB of memory are free and a process is taken to need {each / 1e9:.1f} GB"
            )
            limits[said] = free // each
        if in_turn:
            limits = {f"{config.method_name} asks one client after another": 1}
        why = min(limits, key=lambda limit: limits[limit])
        count = max(1, limits[why])
    else:
        count, why = given, ""
        if in_turn and count > 1:
            why = f"{config.method_name} asks one client after another: more than one has nothing to do"
    threads = threads_of(count, cores)
    if given == 1:
        return Workers(count, threads)
    many = "1 process trains" if count == 1 else f"{count} processes train"
    note = f"{many} clients, with {threads} thread{'s' if threads > 1 else ''} each{why and f' ({why})'}"
    return Workers(count, threads, note)


def threads_of(workers: int, cores: int) -> int:
    """PyTorch's threads of one of several processes: no more than here, and together no more than cores.

    With one process they are this one's. A sum that is shared out among threads rounds differently with other
    threads: where OMP_NUM_THREADS is `cores // workers` already, not even a large model's bits change.
    """
    here = torch.get_num_threads()
    return here if workers == 1 else max(1, min(here, cores // workers))


def cores_here() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bytes_of_one(config: RunConfig, assembly: Assembly) -> int:
    """Memory that a process of clients is taken to need, from sizes alone; `fedtune plan` knows better."""
    model = assembly.loaded.model
    trainable = count_parameters(model).trainable
    batch = getattr(config.method, "batch_size", 1)
    vocabulary = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    logits = batch * assembly.room.tokens * vocabulary * 4
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return int(PROCESS_BYTES + weights + TRAINED_BYTES * trainable + LOGITS * logits)


def free_bytes() -> int | None:
    """Memory of this machine, or of this container, that can be had; None where that is not known."""
    found = []
    try:
        about = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(about["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        pass  # another system, or no such container
    return max(0, min(found)) if found else None


def _asked(config: RunConfig, assembly: Assembly) -> int:
    asked = config.federation.clients_per_round if assembly.method.uses_wire else None
    return len(sample_cohort(assembly.client_examples, asked, seed=config.seed, round=1).clients)
