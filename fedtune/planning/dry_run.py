"""A client's and the server's step without values: the method's own code, for its peak memory and operations.

One local step of a client is enough, as `PartsMeter` knows what a second one finds left behind. Where steps
differ in what they need (methods that train one block at a time), it is the step that needs most: the lowest
block's, whose activations reach through the whole model, and those of parts around the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fedtune.core.asking import asked
from fedtune.core.cohort import Cohort
from fedtune.core.compression import Compression
from fedtune.core.gathered import InMemory
from fedtune.core.robust import RobustMean
from fedtune.core.state import to_payload
from fedtune.core.store import Store
from fedtune.core.types import ClientEnv, Order, Payload, Reply
from fedtune.data.batches import collate
from fedtune.data.encoded import Encoded
from fedtune.measure.flops import FlopCounter
from fedtune.measure.memory import Resident
from fedtune.methods.fedcybgd.order import turns
from fedtune.models.blocks import find_blocks
from fedtune.models.just_in_time import JustInTimeWeights
from fedtune.models.lean_loss import batch_loss
from fedtune.models.offload import blank
from fedtune.models.tuning import trainable
from fedtune.planning.block_turns import Cost, Turn, mean_cost, ordered
from fedtune.planning.fake import Fakes, values
from fedtune.planning.memory import PartsMeter
from fedtune.planning.traffic import CPU, as_restored, first_state, reply_to

STEPS = 2
ZEROTH = ("fedkseed", "fedkseed-pro", "infinite-pool")


class FakeStore(Store):
    """Keeps fake tensors, which have no bytes to take a digest of, as if on disk."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = count()

    @property
    def on_disk(self) -> bool:
        """A run keeps what clients hold in its folder."""
        return True

    def key_of(self, payload: Payload) -> str:
        """A number of its own."""
        return str(next(self._numbers))

    def read(self, key: str, name: str) -> Tensor:
        """Another such tensor."""
        found = self.get(key)
        assert found is not None
        return blank(found.tensors[name])


def client_step(
    method: Any,
    model: nn.Module,
    fakes: Fakes,
    items: Sequence[Encoded],
    steps: int | None,
    cohort: Cohort,
    seed: int,
    taken: Sequence[Turn],
    together: int,
    compression: Compression | None = None,
) -> tuple[PartsMeter, float]:
    """The local steps that need most.

    Args:
        method: Prepared, with the model that its `client_model` gave.
        model: That model, of fake tensors.
        fakes: Where it comes from.
        items: The largest batch.
        steps: Local steps of a client that has most; None: not known.
        cohort: The first round's.
        seed: The run's.
        taken: All turns of the run, where blocks are trained in turns over the network.
        together: Batches of the largest step.
        compression: How updates travel; None: as they are.

    Returns:
        The meter with the highest peak, and the tokens of the step whose operations it counted. Where blocks
        are trained in turn the operations are a mean over the turns of the run.
    """
    if method.config.name in ZEROTH:
        return _zeroth_step(method, model, items)
    config, blocks = method.config, 0
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if "block_order" in type(config).model_fields:
        blocks = len(find_blocks(model).modules)
    found, costs = [], []
    for case in _cases(config, blocks, cohort, together, steps):
        probe = copy(method)
        probe.config = settings = case.settings
        if blocks and not method.sends_model:
            model.requires_grad_(False)  # an earlier case may have left a part that this one does not train
        with values():
            state = first_state(probe, model)
            for _ in range(case.passed):
                earlier = next(iter(probe.plan(state, 1, cohort)))
                reply = reply_to(probe, as_restored(earlier, compression), cohort, fakes, round=1, seed=seed)
                state = probe.server_step(state, iter([reply]))
            if case.turn:  # of a client that has nothing yet
                state = replace(state, turns=case.turn, held={})
            order = next(iter(probe.plan(state, case.turn // len(cohort.clients) + case.round, cohort)))
            errors = compression.empty_errors(order.expects, fakes.empty) if compression else {}
            repeats = _repeats(config) and (steps is None or steps > 1)
            meter = PartsMeter(repeats=repeats, beside=[errors])
            env = ClientEnv(
                client=order.client,
                round=case.round,
                seed=0,
                model=nn.Module() if method.sends_model else model,
                items=items,
                pad_id=0,
                state=None,
                memory=meter,
                device=CPU,
                store=FakeStore(),
            )
            result = probe.client_step(order.payload, env)
            if compression is not None:
                at_the_end = PartsMeter("other", beside=[errors])
                with at_the_end.whole([env.model, dict(result.payload.tensors)]):
                    compression.compress(result.payload.tensors, errors, env.generator)
                meter.highest(at_the_end)
        if blocks:
            own = ordered(order.payload.scalars) or _places(settings, blocks, 1, seed)
            costs.append(Cost(own[0], meter.forward, meter.backward))
        batches = settings.gradient_accumulation
        if case.in_run:
            found.append((meter, float(batches * collate(items, 0)["input_ids"].numel())))
    for parameter in asking:
        parameter.requires_grad_(True)
    meter, tokens = max(found, key=lambda pair: pair[0].peak_bytes)
    if blocks:
        meter.forward, meter.backward = mean_cost(costs, taken or _places(config, blocks, steps, seed))
    return meter, tokens


def _places(config: Any, blocks: int, steps: int | None, seed: int) -> list[Turn]:
    """The turns of a method that takes them all in one place, on the whole model."""
    parts = [*map(str, range(blocks)), *config.extra_blocks]
    count = -(-(steps or len(parts) * config.switch_interval) // config.switch_interval)
    model = dict.fromkeys(range(blocks), False)
    return [Turn.of(own, model) for (own,) in islice(turns(parts, config.block_order, 1, seed), count)]


class FakeGathered(InMemory):
    """Fake replies, as if on disk: what is read is another tensor than what came."""

    def __init__(self, fakes: Fakes) -> None:
        super().__init__()
        self._fakes = fakes
        self._dtypes: dict[str, torch.dtype] = {}
        self._fake: set[str] = set()

    def put(self, reply: Reply) -> None:
        """Keeps what is small and real, and of the rest what does not count as memory."""
        tensors = dict(reply.payload.tensors)
        self._dtypes |= {n: t.dtype for n, t in tensors.items()}
        for name, tensor in tensors.items():
            if isinstance(tensor, FakeTensor):
                tensor.detach()  # looked at, as writing it does
                self._fake.add(name)
                tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        super().put(replace(reply, payload=Payload(tensors, reply.payload.scalars)))

    def read(self, client: int, name: str, start: int, end: int) -> Tensor:
        """The numbers `start` to `end` of a tensor, in one dimension."""
        if name in self._fake:
            return self._fakes.empty((end - start,), self._dtypes[name])
        return super().read(client, name, start, end)


def exported(method: Any, model: nn.Module) -> Iterator[nn.Module]:
    """The models that a run scores, of fake tensors, each before the next is asked for.

    Args:
        method: Prepared, with the model that its `client_model` gave.
        model: That model.
    """
    probe = _sooner_aligned(method)
    with values():
        models = probe.export(first_state(probe, model), model)
    while True:
        with values():
            found = next(models, None)
        if found is None:
            return
        yield found[1].eval()


def _sooner_aligned(method: Any) -> Any:
    """The method, with as many steps of alignment as there are different ones."""
    probe, config = copy(method), method.config
    if hasattr(config, "alignment"):
        fewer = config.alignment.model_copy(update={"steps": min(STEPS, config.alignment.steps)})
        probe.config = config.model_copy(update={"alignment": fewer})
    return probe


def server_steps(
    method: Any,
    model: nn.Module,
    fakes: Fakes,
    cohort: Cohort,
    seed: int,
    robust: RobustMean | None = None,
    compression: Compression | None = None,
) -> PartsMeter:
    """The server's first two steps, for its optimizer has its state from the second on; with a buffer all.

    Two replies each, one after the other, or all of them where it holds a cohort's together. A method whose
    server trains (alignment) takes two steps of that.

    Args:
        method: Prepared, with the model that its `client_model` gave.
        model: That model, of fake tensors.
        fakes: Where it comes from.
        cohort: The first round's.
        seed: The run's.
        robust: What becomes of replies before the step.
        compression: How updates travel; None: as they are.
    """
    config = method.config
    aligns = hasattr(config, "alignment")
    meter = PartsMeter("activations" if aligns else "other", "weights")
    probe = _sooner_aligned(method)
    single = method.arrival in ("one-by-one", "in-turn")
    unlike = config.name == "fedavg" and config.lora is not None and config.lora.client_ranks is not None
    unlike = unlike or getattr(config, "regions", None) is not None  # one sum for each that is there
    together = method.arrival == "plan-order" or unlike or (robust is not None and robust.gathers)
    enough = len(cohort.clients) if together else 2
    alone: list[Reply] = []  # what the round loop holds until its step is over, if it is one alone
    with values():
        state = first_state(probe, model)
        if config.name == "infinite-pool" and config.download == "model":
            with meter.whole(_resident(state)):  # replaying needs noise, and noise weights with content
                _ = [weight.clone() for weight in state.weights.values()]
            return meter
        count = method.rounds * (enough if single else 1)
        regions = getattr(config, "regions", None)
        if getattr(config, "buffer", None) is None:  # else a step holds as many versions as it does
            count = min(STEPS * (regions.rounds if regions else 1), count)
        for round in range(1, count + 1):
            there = _chosen(method, round, cohort)
            orders = list(probe.plan(state, 1 if single else round, there))[: 1 if single else enough]
            if method.arrival == "one-by-one":
                orders = orders if round == 1 else list(probe.plan(state, 1, cohort))[1:2]

            def replies(
                orders: Sequence[Order] = orders, round: int = round, there: Cohort = there
            ) -> Iterator[Reply]:
                for order in orders:
                    with meter.paused():
                        wanted = as_restored(order, compression)
                        reply = reply_to(probe, wanted, there, fakes, round=round, seed=seed)
                    alone[:] = [reply] if single else []
                    yield reply

            resident = _resident(state) + ([model] if method.sends_model else [])
            with meter.whole(resident):
                state = probe.server_step(state, robust(replies()) if robust else replies())
    return meter


@dataclass(frozen=True)
class _Case:
    """Settings under which a client's first step is to be looked at.

    Attributes:
        settings: The method's.
        turn: Whose turn it is, counted from 0, where blocks are trained in turns over the network.
        passed: Turns that have to be over, with what they changed.
        round: From 1, where rounds differ.
        in_run: Whether such a step is one of the run's; else it is there for its operations.
    """

    settings: Any
    turn: int = 0
    passed: int = 0
    round: int = 1
    in_run: bool = True


def _repeats(config: Any) -> bool:
    """Whether a second local step needs what the first does and, from its beginning, what that left behind.

    Where weights move one by one the optimiser's state grows while something else goes, so that the second
    step has to be taken; and what reads a narrow state needs room beside all of it.
    """
    plain = (
        getattr(config, "masters", "float32") == "float32"
        and getattr(config, "optimizer", "") != "adamw-8bit"
    )
    return plain and not getattr(config, "optimizer_in_backward", False)


def _cases(config: Any, blocks: int, cohort: Cohort, together: int, most: int | None) -> list[_Case]:
    """The steps that may need most; where blocks train in turn, from the lowest block's to the highest's."""
    few: dict[str, Any] = {"gradient_accumulation": min(STEPS, together)}
    few |= {"local_steps": 1 if _repeats(config) else min(STEPS, most or STEPS), "local_epochs": None}
    fields = type(config).model_fields
    if "block_order" not in fields:
        alternates = getattr(config, "aggregation", "") == "alternate" and config.rounds > 1
        return [_Case(config.model_copy(update=few), round=r) for r in ((1, 2) if alternates else (1,))]
    if "switch_interval" in fields:  # turns in one place: the first of either order can be chosen
        alone = few | {"block_order": "descending"}
        return [
            _Case(config.model_copy(update=few | {"block_order": "ascending"})),
            *(
                _Case(config.model_copy(update=alone | {"extra_blocks": [part]}))
                for part in config.extra_blocks
            ),
            _Case(config.model_copy(update=alone | {"extra_blocks": []})),
        ]
    ascending = config.model_copy(update=few | {"block_order": "ascending"})
    single = ascending.model_copy(update={"blocks_per_client": 1})
    cases = [_Case(ascending)]
    if config.compression != "none":
        cases.append(_Case(ascending.model_copy(update={"compression": "none"}), in_run=False))
    if config.compression == "hybrid":  # with every other block there, pruned
        last = min(len(cohort.clients), blocks // config.blocks_per_client) - 1
        cases.append(_Case(ascending, last, last))
    cases += [_Case(single, blocks + place) for place in range(len(config.extra_blocks))]
    return [*cases, _Case(single, blocks - 1)]


def _chosen(method: Any, round: int, cohort: Cohort) -> Cohort:
    """A round's cohort where the method names it, else the one that is given."""
    named = asked(method, round, range(cohort.population), None)
    if not isinstance(named, tuple):
        return cohort
    return Cohort(named, dict.fromkeys(named, 1), cohort.population)


def _resident(state: Any) -> list[Resident]:
    """A state's tensors; moments of a server's optimizer apart."""
    tensors = to_payload(state).tensors
    moments = [t for name, t in tensors.items() if name.startswith("moments/")]
    rest = [t for name, t in tensors.items() if not name.startswith("moments/")]
    return [{"weights": rest, "optimizer": moments}]


def _zeroth_step(method: Any, model: nn.Module, items: Sequence[Encoded]) -> tuple[PartsMeter, float]:
    """Two forward passes; weights are formed just in time where the method does that (fedkseed/step.py)."""
    config, meter, counter = method.config, PartsMeter(), FlopCounter()
    batch = collate(items, 0)
    parameters = trainable(model)
    narrow = any(p.dtype != torch.float32 for p in parameters.values())
    formed = config.name != "infinite-pool" and (config.noise == "hadamard4" or narrow)
    with values(), torch.no_grad():
        with counter:
            batch_loss(model, batch, whole=formed)
        if not formed:
            with meter.whole([model]):
                float(batch_loss(model, batch))
        else:
            there = PartsMeter()
            for one, kind in ((there, "cuda"), (meter, "cpu")):
                # PyTorch's fake tensors are for one thread: each operation marks the mode they share as busy
                with (
                    one.whole([model]),
                    JustInTimeWeights(parameters, _unwritten, threads=1, as_on=kind),
                ):
                    float(batch_loss(model, batch, whole=True))
            meter.on_gpu = there.peak_bytes
    meter.forward, meter.backward = 2 * getattr(config, "perturbations", 1) * counter.forward, 0
    return meter, float(batch["input_ids"].numel())


def _unwritten(name: str, w0: Tensor, out: Tensor, first: int) -> None:
    """Weights formed of fake ones have no values to write."""
