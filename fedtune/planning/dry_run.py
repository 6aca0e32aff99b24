"""A client's and the server's step without values: the method's own code, for its peak memory and operations.

Two local steps are enough: the optimizer has its state from the second on. Where steps differ in what they
need (methods that train one block at a time), it is the step that needs most: the lowest block's, whose
activations reach through the whole model, and those of parts around the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedtune.core.state import to_payload
from fedtune.core.store import Store
from fedtune.core.types import ClientEnv, Cohort, Order, Payload, Reply
from fedtune.data.batches import collate
from fedtune.data.encode import Encoded
from fedtune.measure.flops import FlopCounter
from fedtune.measure.memory import Resident
from fedtune.methods.local_training import Training
from fedtune.models.blocks import find_blocks
from fedtune.models.just_in_time import Formed
from fedtune.models.tuning import trainable
from fedtune.planning.fake import Fakes, values
from fedtune.planning.memory import PartsMeter
from fedtune.planning.traffic import CPU, first_state, reply_to

STEPS = 2
ZEROTH = ("fedkseed", "fedkseed-pro", "infinite-pool")


class Held(Store):
    """Keeps fake tensors, which have no bytes to take a digest of, as if on disk."""

    @property
    def on_disk(self) -> bool:
        """A run keeps what clients hold in its folder."""
        return True

    def put(self, payload: Payload) -> str:
        """Keeps `payload` under a number."""
        key = str(len(self._payloads))
        self._payloads[key] = payload
        return key


def client_step(
    method: Any, model: nn.Module, fakes: Fakes, items: Sequence[Encoded], steps: int | None, cohort: Cohort
) -> tuple[PartsMeter, float]:
    """The local steps that need most.

    Args:
        method: Prepared, with the model that its `client_model` gave.
        model: That model, of fake tensors.
        fakes: Where it comes from.
        items: The largest batch.
        steps: Local steps of a client that has most; None: not known.
        cohort: The first round's.

    Returns:
        The meter with the highest peak, and the tokens of the step whose operations it counted.
    """
    if method.config.name == "zero-shot":
        return PartsMeter(), 1.0
    if method.config.name in ZEROTH:
        return _zeroth_step(method, model, items)
    found = []
    for settings, turns in _hardest(method.config, STEPS if steps is None else min(STEPS, steps), model, cohort):
        probe, meter = copy(method), PartsMeter()
        probe.config = settings
        with values():
            state = first_state(probe, model)
            for _ in range(turns):
                ordered = next(iter(probe.plan(state, 1, cohort)))
                reply = reply_to(probe, ordered, cohort, fakes, round=1, seed=0)
                state = probe.server_step(state, iter([reply]))
            order = next(iter(probe.plan(replace(state, held={}) if turns else state, 1, cohort)))
            env = ClientEnv(
                client=order.client,
                round=1,
                seed=0,
                model=nn.Module() if method.sends_model else model,
                items=items,
                pad_id=0,
                state=None,
                memory=meter,
                device=CPU,
                store=Held(),
            )
            probe.client_step(order.payload, env)
        batches = min(settings.gradient_accumulation, STEPS)
        found.append((meter, float(batches * collate(items, 0)["input_ids"].numel())))
    return max(found, key=lambda pair: pair[0].peak_bytes)


def server_steps(method: Any, model: nn.Module, fakes: Fakes, cohort: Cohort, seed: int) -> PartsMeter:
    """The server's first two steps, for its optimizer has its state from the second on.

    Two replies each, one after the other, or all of them where it holds a cohort's together. A method whose
    server trains (alignment) takes two steps of that.

    Args:
        method: Prepared, with the model that its `client_model` gave.
        model: That model, of fake tensors.
        fakes: Where it comes from.
        cohort: The first round's.
        seed: The run's.
    """
    config = method.config
    aligns = hasattr(config, "alignment")
    meter = PartsMeter("activations" if aligns else "other", "weights")
    probe = copy(method)
    if aligns:
        fewer = config.alignment.model_copy(
            update={"steps": min(STEPS, config.alignment.steps), "steps_before": 0}
        )
        probe.config = config.model_copy(update={"alignment": fewer})
    single = method.arrival in ("one-by-one", "in-turn")
    unlike = config.name == "fedavg" and config.lora is not None and config.lora.client_ranks is not None
    enough = len(cohort.clients) if method.arrival == "plan-order" or unlike else 2
    with values():
        state = first_state(probe, model)
        if config.name == "infinite-pool" and config.download == "model":
            with meter.whole(_resident(state)):  # replaying needs noise, and noise weights with content
                _ = [weight.clone() for weight in state.weights.values()]
            return meter
        for round in range(1, min(STEPS, method.rounds * (enough if single else 1)) + 1):
            orders = list(probe.plan(state, 1 if single else round, cohort))[: 1 if single else enough]
            if method.arrival == "one-by-one":
                orders = orders if round == 1 else list(probe.plan(state, 1, cohort))[1:2]

            def replies(orders: Sequence[Order] = orders, round: int = round) -> Iterator[Reply]:
                for order in orders:
                    with meter.paused():
                        reply = reply_to(probe, order, cohort, fakes, round=round, seed=seed)
                    yield reply

            resident = _resident(state) + ([model] if method.sends_model else [])
            with meter.whole(resident):
                state = probe.server_step(state, replies())
    return meter


def _hardest(config: Any, steps: int, model: nn.Module, cohort: Cohort) -> Iterator[tuple[Any, int]]:
    """Settings, and turns to let pass, after which the first local steps are those that need most."""
    assert isinstance(config, Training)
    few: dict[str, Any] = {"gradient_accumulation": min(STEPS, config.gradient_accumulation)}
    few |= {"local_steps": steps, "local_epochs": None}
    fields = type(config).model_fields
    if "block_order" not in fields:
        yield config.model_copy(update=few), 0
        return
    few |= {"switch_interval": steps} if "switch_interval" in fields else {}
    ascending = config.model_copy(update={**few, "block_order": "ascending"})
    yield ascending, 0
    if getattr(config, "compression", "none") == "hybrid":  # with every other block there, pruned
        yield ascending, min(len(cohort.clients), len(find_blocks(model).modules) // config.blocks_per_client) - 1
    alone = {"blocks_per_client": 1} if "blocks_per_client" in fields else {}
    for part in config.extra_blocks:  # the last of a pass, so the first of a descending one
        update = {**few, **alone, "block_order": "descending", "extra_blocks": [part]}
        yield config.model_copy(update=update), 0


def _resident(state: Any) -> list[Resident]:
    """A state's tensors; moments of a server's optimizer apart."""
    tensors = to_payload(state).tensors
    moments = [t for name, t in tensors.items() if name.startswith("moments/")]
    rest = [t for name, t in tensors.items() if not name.startswith("moments/")]
    return [{"weights": rest, "optimizer": moments}]


def _zeroth_step(method: Any, model: nn.Module, items: Sequence[Encoded]) -> tuple[PartsMeter, float]:
    """Two forward passes; weights are formed just in time where the method does that (zeroth_step.py)."""
    config, meter, counter = method.config, PartsMeter(), FlopCounter()
    batch = collate(items, 0)
    parameters = trainable(model)
    narrow = any(p.dtype != torch.float32 for p in parameters.values())
    formed = config.name != "infinite-pool" and (config.noise == "hadamard4" or narrow)
    with values(), torch.no_grad():
        with counter:
            model(**batch)
        with meter.whole([model]):
            if formed:
                with Formed(parameters, _unwritten):
                    float(cast(Any, model(**batch)).loss)
            else:
                float(cast(Any, model(**batch)).loss)
    meter.forward, meter.backward = 2 * getattr(config, "perturbations", 1) * counter.forward, 0
    return meter, float(batch["input_ids"].numel())


def _unwritten(name: str, w0: Tensor, out: Tensor, first: int) -> None:
    """Weights formed of fake ones have no values to write."""
