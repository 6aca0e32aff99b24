"""What stays with a client: parts of the trained model that are its own (`own`), kept between its rounds.

Arivazhagan et al., "Federated Learning with Personalization Layers" (FedPer, 2019), Algorithms 1 and 2, and
Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (FedSA-LoRA, 2024), which
is the same with LoRA's B as the part of one's own:

    (w, v_i) ← local training from (w(t), v_i) on client i's examples
    w(t+1)   = server(w(t), Σ p_i (w − w(t)))          v_i stays

`own: [lora_B]` is FedSA-LoRA, `own: [classifier]` FedPer. A client that is asked for the first time begins
with the part that the model has before any training. What a client uses and is scored with is its model,
(w(T), v_i); of the global one there is only w(T), so that the result is the clients' models.

A part is kept in float32 where the model has it narrower: what a round moved is added to it.

What clients keep here is also how ditto.py and fine_tuning.py keep whole models of theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedtune.core.types import Payload
from fedtune.errors import InputError
from fedtune.methods.loading import load
from fedtune.models.tuning import trainable

OWN = "own:"  # prefix of a part's name in what a client keeps
CLIENT = "client-{:04d}"  # a client's model among those of a run


def chosen(names: Iterable[str], patterns: Collection[str]) -> set[str]:
    """The trained tensors that stay with a client.

    Args:
        names: Of all that is trained.
        patterns: Each a run of whole parts of a name, between its dots, as `lora_B`, `layers.1` or
            `classifier`; `*`, `?` and `[...]` as in file names.

    Raises:
        InputError: One is of no trained tensor, or together they leave nothing that is shared.
    """
    names, found = list(names), set[str]()
    for pattern in patterns:
        fits = {name for name in names if fnmatchcase(f".{name}.", f"*.{pattern}.*")}
        if not fits:
            raise InputError(
                f"method.own: {pattern!r} is part of no trained tensor's name; there are "
                f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
            )
        found |= fits
    if len(found) == len(names):
        raise InputError(
            f"method.own: {', '.join(patterns)} leaves nothing that is shared; take method.name: standalone, "
            "or name fewer parts"
        )
    return found


def kept(state: Payload | None) -> dict[str, Tensor]:
    """The parts of its own in what a client keeps, float32 by name; empty where there are none yet."""
    tensors = state.tensors if state is not None else {}
    return {n.removeprefix(OWN): t for n, t in tensors.items() if n.startswith(OWN)}


def beside(state: Payload | None) -> Payload | None:
    """What a client keeps beside them; None for nothing."""
    if state is None:
        return None
    tensors = {n: t for n, t in state.tensors.items() if not n.startswith(OWN)}
    return Payload(tensors, state.scalars) if tensors or state.scalars else None


def joined(parts: Mapping[str, Tensor], rest: Payload | None) -> Payload:
    """What `kept` and `beside` take apart."""
    rest = rest or Payload()
    return Payload({**rest.tensors, **{OWN + name: tensor for name, tensor in parts.items()}}, rest.scalars)


def copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, float32."""
    return {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in values.items()}


def moved(
    before: Mapping[str, Tensor], trained: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The parts after a round: as they were trained, or where the model is narrower moved as far.

    Args:
        before: As they were kept, float32.
        trained: After training, float32, from `before` in the parameters' dtypes.
        parameters: The model's.
    """
    new = {}
    for name, was in before.items():
        now, dtype = trained[name].to("cpu", torch.float32), parameters[name].dtype
        new[name] = now.clone() if dtype == torch.float32 else was + (now - was.to(dtype).to(torch.float32))
    return new


@contextmanager
def lent(parameters: Mapping[str, nn.Parameter], names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, parameters may become a client's own; after it they have the bits before, which are given."""
    saved = {name: parameters[name].detach().clone() for name in sorted(names)}
    try:
        yield saved
    finally:
        load(parameters, saved)


def models(
    weights: Mapping[str, Tensor], clients: Mapping[int, Payload], model: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """The model of each client that has something of its own, by name, in `model`'s memory.

    Args:
        weights: The global weights.
        clients: What each client keeps.
        model: With what is trained attached.
    """
    parameters = trainable(model)
    for client in sorted(clients):
        own = kept(clients[client])
        if own:
            with lent(parameters, own.keys() - weights.keys()):
                load(parameters, {**weights, **own})
                yield CLIENT.format(client), model
