"""Where planned memory lies: with a GPU in the machine, and where one machine simulates all roles.

Clients' steps and evaluation are on the GPU, and on the host their batch. A server adds up on the host; what
it computes with a model (FedBiOT's alignment) is on the GPU, while its models stay on the host as well. In a
simulation the roles take turns: the GPU holds one of them at a time (models/at_work.py), the host the
server's side throughout. On a CPU a client trains while the server holds its sums, or its model.

A model that clients have is on the GPU from the moment it is loaded, before a step can leave parts of it on
disk: that is less than a step needs, but with `offload_params`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedtune.data.batches import collate
from fedtune.data.encoded import Encoded
from fedtune.measure.memory import COLUMNS
from fedtune.planning.memory import PartsMeter

DEVICE, HOST = COLUMNS


def by_device(
    method: Any,
    client: PartsMeter,
    server: PartsMeter,
    evaluation: PartsMeter,
    items: Sequence[Encoded],
    offloaded: int = 0,
    loaded: int = 0,
) -> dict[str, dict[str, int]]:
    """The document's `memory_by_device`: of each role, and of a simulation, the columns in bytes.

    Args:
        method: Of the run.
        client: Planned, as are the next two.
        server: Its step.
        evaluation: Its largest batch.
        items: A client's largest batch.
        offloaded: Bytes of the largest weight that passes through the host on its way from disk to a GPU.
        loaded: Bytes of the model; the server's alone stays on the host until it is used.
    """
    batch = sum(tensor.nbytes for tensor in collate(items, 0).values()) if items else 0
    batch += offloaded
    aligns = getattr(method.config, "aligns", False)
    at_rest = sum(server.parts[part] for part in ("weights", "other")) if aligns else server.peak_bytes
    roles = {
        "client": {DEVICE: client.on_gpu or client.peak_bytes, HOST: batch if client.peak_bytes else 0},
        "server": {DEVICE: server.peak_bytes if aligns else 0, HOST: at_rest},
        "evaluation": {DEVICE: evaluation.peak_bytes, HOST: 0},
        "loading": {DEVICE: 0 if method.sends_model else loaded, HOST: 0},
    }
    together = {
        DEVICE: max(role[DEVICE] for role in roles.values()),
        HOST: at_rest + (client.parts["weights"] if method.sends_model else batch),
        "cpu_bytes": max(client.peak_bytes + at_rest, server.peak_bytes, evaluation.peak_bytes),
    }
    return {**roles, "simulation": together}
