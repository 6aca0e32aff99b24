"""Federated evaluation: clients score the global model on held-out examples of their own and send sums.

Of each task's metric, a (weighted) mean over examples, a client sends Σ w·x and Σ w over its examples, as
whole numbers in units of 2⁻²⁰, and how many examples there are. The server adds them up: the score is
Σ Σ w·x / Σ Σ w over all clients, whatever their order, and the same under secure aggregation, where nothing
but the sums over all clients can be read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedtune.core.cohort import Cohort
from fedtune.core.robust import Updates
from fedtune.core.settings import Settings
from fedtune.core.state import for_scoring, from_payload, to_payload
from fedtune.core.types import (
    ArrivalOrder,
    ClientEnv,
    ClientError,
    ClientResult,
    Method,
    Order,
    Payload,
    Reply,
    Scalar,
    ServerEnv,
    Summed,
    TensorSpec,
)
from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.evaluation.better import LOWER
from fedtune.evaluation.clients import spread_of
from fedtune.evaluation.peaks import Peaks
from fedtune.evaluation.registry import TASKS, mean_of
from fedtune.evaluation.tasks import score
from fedtune.evaluation.types import EvalSettings, Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("fedtune")

UNIT = 2.0**-20  # what 1 in a sum of scores or weights stands for
LIMIT = 2.0**50  # of a client's sums, so that those of 8,192 clients fit int64
SUMS, WEIGHTS, EXAMPLES = "sums", "weights", "examples"


@dataclass(frozen=True)
class State:
    """What is scored, and what came of it.

    Attributes:
        content, said: Tensors and scalars that the global model is made of: the method's state.
        sums: Over all clients: `sums` and `weights` int64 (tasks), in units; `examples` int64 (1).
        single: Of each client, by "client/name", where the server sees them.
    """

    content: Mapping[str, Tensor]
    said: Mapping[str, Scalar]
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    single: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """What a client scores with.

    Attributes:
        tokenizer: The model's.
        settings: How examples are put to it.
        examples: Each client's held-out ones.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: EvalSettings
    examples: Mapping[int, Sequence[Example]]


class FederatedEvaluation:
    """The evaluation of one method's global model, as a method of its own with one round a score.

    Args:
        method: The run's.
        kind: The class of its state.
        tasks: Names of tasks whose metric is a mean over held-out examples.
        classifier: Whether the model is one; of others the loss has a perplexity.
        scorer: At a client; None: at a server, which has no examples.
    """

    rounds = 0
    arrival: ArrivalOrder = "any-order"
    pools_data = False
    uses_wire = True
    saves_merged = False
    sends_model = False
    unit = UNIT

    def __init__(
        self,
        method: Method[Any],
        kind: type[Any],
        tasks: Sequence[str],
        *,
        classifier: bool,
        scorer: Scorer | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self._method, self._kind = method, kind
        self._classifier, self._scorer = classifier, scorer

    @property
    def config(self) -> Settings:
        """The method's settings."""
        return self._method.config

    def prepare(self, server: ServerEnv) -> None:
        """Nothing is needed."""

    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The method's own."""
        return self._method.client_model(build)

    def init(self, model: nn.Module) -> State:
        """Of the model as training begins it."""
        return self.of(self._method.init(model))

    def of(self, state: Any) -> State:
        """What clients are sent to score the result of a method's state."""
        payload = to_payload(for_scoring(state))
        return State(payload.tensors, payload.scalars)

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterator[Order]:
        """Everyone gets the same."""
        payload = Payload(state.content, state.said)
        count = {SUMS: len(self.tasks), WEIGHTS: len(self.tasks), EXAMPLES: 1}
        least = {SUMS: -math.inf, WEIGHTS: 0.0, EXAMPLES: 0.0}
        expects = {name: TensorSpec(torch.int64, (n,), LIMIT, least[name]) for name, n in count.items()}
        for client in cohort.clients:
            yield Order(client, payload, expects)

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """Scores the model that the order stands for.

        Raises:
            ClientError: The order stands for no model, or the examples cannot be scored.
        """
        assert self._scorer is not None
        examples, peaks = self._scorer.examples.get(env.client, ()), Peaks(env.device, env.memory)
        if not examples:
            raise ClientError("it has no held-out examples")
        try:
            state = from_payload(self._kind, job)
        except ValueError as error:
            raise ClientError(str(error)) from None
        outcomes: dict[str, Outcome] = {}
        models = self._method.export(state, env.model)
        try:
            for name, model in models:
                if name == "global":
                    outcomes = self._scored(model, examples, peaks)
        except InputError as error:  # what it says may be of the examples, which stay here
            log.warning("client %d cannot score its held-out examples: %s", env.client, error)
            raise ClientError("its held-out examples cannot be scored; its own log says why") from None
        finally:  # whatever came: the model is as it was
            getattr(models, "close", lambda: None)()
        if not outcomes:
            raise ClientError(f"{self.config.name} makes no global model that it could score")  # type: ignore[attr-defined]
        return ClientResult(self._sums(outcomes, len(examples)), {})

    def _scored(self, model: nn.Module, examples: Sequence[Example], peaks: Peaks) -> dict[str, Outcome]:
        assert self._scorer is not None
        model.eval()
        return score(model, self._scorer.tokenizer, examples, self.tasks, self._scorer.settings, peaks)

    def _sums(self, outcomes: Mapping[str, Outcome], examples: int) -> Payload:
        sums, weights = list[int](), list[int]()
        for task in self.tasks:
            metric = mean_of(task)
            found = outcomes[task].metrics.get(str(metric))
            if found is None or found.aggregate is not None:
                raise ClientError(f"task {task} gave no mean over examples, which sums could be made of")
            of_each = found.weights if found.weights is not None else [1.0] * len(found.items)
            total = math.fsum(w * x for w, x in zip(of_each, found.items, strict=True))
            if not math.isfinite(total):
                raise ClientError(f"the {metric} of its held-out examples is {total}")
            sums.append(round(total / UNIT))
            weights.append(round(math.fsum(of_each) / UNIT))
        if max(map(abs, [*sums, *weights])) >= LIMIT:
            raise ClientError(f"its scores add up to {LIMIT * UNIT:,.0f} or more; hold fewer examples out")
        tensors = {SUMS: torch.tensor(sums), WEIGHTS: torch.tensor(weights)}
        return Payload({**tensors, EXAMPLES: torch.tensor([examples])})

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        """Adds the clients' sums up, and keeps each client's."""
        sums = {name: torch.zeros(n, dtype=torch.int64) for name, (n,) in self.sum_shapes(state).items()}
        single = dict[str, Tensor]()
        for reply in replies:
            for name, tensor in reply.payload.tensors.items():
                sums[name] += tensor
                single[f"{reply.client}/{name}"] = tensor
        return replace(state, sums=sums, single=single)

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The model that is scored."""
        content = Payload(state.content, state.said)
        return self._method.export(from_payload(self._kind, content), model)

    def updates(self) -> Updates:
        """Nothing of a reply changes the model."""
        return Updates(belongs=lambda name: "")

    def sum_refusal(self, *, privacy: bool) -> str | None:
        """Sums are all that is needed; with noise on them they would be no score."""
        return "a score with noise on it is not one" if privacy else None

    def sum_shapes(self, state: State) -> dict[str, tuple[int, ...]]:
        """The three tensors."""
        return {SUMS: (len(self.tasks),), WEIGHTS: (len(self.tasks),), EXAMPLES: (1,)}

    def summand(
        self,
        payload: Payload,
        *,
        weight: int,
        total: int,
        population: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Tensor]:
        """A client's sums as they are, whatever it weighs in training."""
        return dict(payload.tensors)

    def sum_step(self, state: State, total: Summed) -> State:
        """The sums over all clients, and of no client its own."""
        return replace(state, sums=total.sums)

    def scores(self, sums: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """`{task: {metric: value, ...}}` of sums; a task without weight has no score.

        Beside each mean how many examples there are; of a language model's loss also perplexity and tokens.
        """
        found: dict[str, dict[str, float]] = {}
        (examples,) = sums[EXAMPLES].tolist()
        for task, total, weight in zip(self.tasks, sums[SUMS].tolist(), sums[WEIGHTS].tolist(), strict=True):
            if weight <= 0:
                continue
            value = total / weight
            found[task] = {str(mean_of(task)): value, "examples": examples}
            if task == "loss" and not self._classifier:
                perplexity = math.exp(value) if value < 700 else math.inf
                found[task] |= {"perplexity": perplexity, "tokens": round(weight * UNIT)}
        return found

    def spread(self, state: State) -> dict[str, dict[str, dict[str, Any]]]:
        """How each metric is spread over the clients, as `clients.spread`; empty where no client is seen."""
        clients = sorted({int(name.partition("/")[0]) for name in state.single})
        names, each = (SUMS, WEIGHTS, EXAMPLES), dict[int, dict[str, dict[str, float]]]()
        for client in clients:
            each[client] = self.scores({name: state.single[f"{client}/{name}"] for name in names})
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for task in self.tasks:
            metric = str(mean_of(task))
            values = {client: scores[task][metric] for client, scores in each.items() if task in scores}
            if values:
                lower = metric in LOWER or bool(TASKS[task].lower_is_better)
                found[task] = {metric: spread_of(values, lower_is_better=lower)}
        return found
