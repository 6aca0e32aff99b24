"""The configuration of a run: one YAML, strictly typed, no unknown key, every default in its class."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    model_validator,
)

from fedtune.config import pictures
from fedtune.config.computing import Computing
from fedtune.config.data import CLIENTS, OBJECTS, DataSettings
from fedtune.config.evaluation import Evaluation
from fedtune.config.federated_evaluation import refusal as federated_refusal
from fedtune.config.model import ONE_GPU, ModelSettings
from fedtune.config.partitions import Given, Iid
from fedtune.config.peers import refusal as peers_refusal
from fedtune.config.picture_rules import refusal as picture_refusal
from fedtune.config.selection import (
    AtRandom,
    Count,
    SelectionSettings,
    Share,
    selection_refusal,
    simulated_refusal,
)
from fedtune.config.tracking import Tracker
from fedtune.config.wire import Wire
from fedtune.core.cohort import quorum_of, sample_cohort
from fedtune.core.settings import Settings
from fedtune.core.types import SumMethod
from fedtune.data.batching import batching_refusal
from fedtune.data.reading import Reading
from fedtune.errors import InputError
from fedtune.evaluation.registry import TASKS, certain, classifies, looks_at_pictures
from fedtune.methods import registry
from fedtune.methods.objective import Preferring, pairs_refusal
from fedtune.protection.robust import Robust, Weights, check_replies, robust_refusal, weights_refusal
from fedtune.protection.settings import Privacy, SecureAggregation, check_scale, refusal


class Simulate(Settings):
    """What goes wrong on purpose, in process."""

    dropout: float = Field(0.0, ge=0, lt=1)
    delay_s: float = Field(0.0, ge=0)


Jump = Annotated[float, Field(gt=0)] | Literal["auto"] | None
LOSS_JUMP = 3.0  # nats; honest rounds add up to 0.23 (docs/poisoning.md)


class Federation(Settings):
    """Who is asked in a round, and what a round may do without."""

    clients_per_round: Count | Share | None = None  # a count, a fraction, or everyone
    selection: SelectionSettings = AtRandom()  # who they are
    quorum: Count | Share = 0.5  # replies a round needs: a count, or a fraction of those asked
    deadline_s: float | None = Field(None, gt=0)
    simulate: Simulate = Simulate()
    secure_aggregation: SecureAggregation | None = None  # the server learns the sum of the updates alone
    privacy: Privacy | None = None  # differential privacy of whole clients
    robust: Robust | None = None  # means that a few bad clients cannot move as far as they like
    weights: Weights = "examples"  # of a client in a mean; capped: at most the median of what all registered
    max_examples: int | None = Field(None, ge=1)  # a client that registers more counts as so many
    wire: Wire = Wire()  # how updates travel
    max_norm_ratio: float | None = Field(100.0, gt=1)  # of an update to the others' median, in a plain mean
    max_loss_jump: Jump = "auto"  # nats of held-out loss that a round may add; auto: 3, any with privacy

    @property
    def loss_jump(self) -> float | None:
        """Nats of held-out loss that a round may add; None: any. Noise alone can add as many as it likes."""
        if self.max_loss_jump != "auto":
            return self.max_loss_jump
        return None if self.privacy is not None else LOSS_JUMP

    @property
    def refusal_of_weights(self) -> str | None:
        """Why clients cannot be weighed so."""
        secure, privacy = self.secure_aggregation is not None, self.privacy is not None
        return weights_refusal(self.weights, self.max_examples, secure=secure, privacy=privacy)


class Transport(Settings):
    """How orders reach the clients."""

    name: Literal["in-process", "flower-simulation", "flower"] = "in-process"
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    wait_s: float | None = Field(None, gt=0)  # flower: for clients to join; null: until all have, or refused

    @model_validator(mode="after")
    def _own(self) -> Self:
        if self.workers != 1 and self.name == "flower":
            raise ValueError("workers are for simulated clients (name: in-process), got flower")
        if self.wait_s is not None and self.name != "flower":
            raise ValueError(f"wait_s belongs to name: flower, got {self.name}")
        return self


class Checkpoints(Settings):
    """What a run keeps on the way."""

    keep: int | None = Field(2, ge=1)  # newest rounds; None: all
    best: str | None = None  # task.metric, as loss.loss: the result is the round with the best of it
    rollback: int | None = Field(None, ge=1)  # with --resume: back to this round; later ones are moved aside
    journal: Literal["auto", "always", "never"] = "auto"


class RunConfig(Settings):
    """The whole configuration. Defaults live here and nowhere else."""

    seed: int = Field(0, ge=0)
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    method: SerializeAsAny[Settings]
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()
    transport: Transport = Transport()
    checkpoints: Checkpoints = Checkpoints()
    run: Computing = Computing()
    tracking: list[Tracker] = Field([])  # who else is told of each round: settings, scores, bytes

    @model_validator(mode="wrap")
    @classmethod
    def _bundled(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """The bundled model knows the plain template, and the bundled data bring their own test part."""
        model, data = (values.get(key, {}) if isinstance(values, dict) else None for key in ("model", "data"))
        if not isinstance(values, dict) or not isinstance(model, dict) or not isinstance(data, dict):
            return handler(values)
        values = pictures.filled(values)
        data, given = dict(values.get("data", {})), "holdout" in data
        if model.get("name", "bundled") == "bundled":
            data.setdefault("template", "plain")
        if data.get("train", "bundled") == "bundled":
            data.setdefault("holdout", {"source": "bundled"})
        config = handler({**values, "data": data})
        if not given:
            config.data.model_fields_set.discard("holdout")  # filled in, and not asked for
        return config

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if reason := picture_refusal(self.model, self.data, self.evaluation, self.method):
            raise ValueError(reason)
        if self.model.dtype == "float16" and not self.method.float16:
            raise ValueError(
                "model.dtype: float16 is for methods that move no weights in it, such as fedkseed; "
                f"{self.method_name} would lose small gradients and steps. Set model.dtype: bfloat16 or "
                "float32"
            )
        if self.model.cards and self.transport.name == "flower-simulation":
            raise ValueError(
                f"model.device: {self.model.device} does not go with flower-simulation, where Ray "
                "hands GPUs out; set it to cuda, and CUDA_VISIBLE_DEVICES to the GPUs that are meant"
            )
        if len(self.model.cards) > 1 and (self.transport.name == "flower" or self.transport.workers == 1):
            raise ValueError(
                f"model.device: {self.model.device} is for clients that train at the same time, each on "
                f"one GPU; set transport.workers to auto or to as many, or name one GPU. {ONE_GPU}"
            )
        if self.model.adapter is not None and (why := self.method.adapter_refusal):
            raise ValueError(f"model.adapter does not go with {self.method_name}: {why}")
        if self.model.quantization != "none" and (why := self.method.quantized_refusal):
            raise ValueError(
                f"model.quantization: {self.model.quantization} does not go with {self.method_name}: {why}"
            )
        prompt = any(getattr(self.method, form, None) for form in ("prompt", "p_tuning", "prefix"))
        if reason := batching_refusal(self.data.batching, task=self.model.task, prompt=prompt):
            raise ValueError(f"data.batching: {reason}")
        masters = getattr(self.method, "masters", "float32")
        trains = getattr(self.method, "trainable", "full")
        if masters != "float32" and (self.model.dtype != "bfloat16" or trains != "full"):
            raise ValueError(
                f"method.masters: {masters} is for bfloat16 weights that are trained; model.dtype is "
                f"{self.model.dtype} and method.trainable {trains}, so that float32 weights are. Set "
                "model.dtype: bfloat16 and method.trainable: full, or leave it out"
            )
        if self.of_pairs:
            reason = pairs_refusal(
                format=self.data.format,
                task=self.model.task,
                batching=self.data.batching,
                too_long=self.data.too_long,
                adapter=self.model.adapter is not None,
            )
            if reason:
                raise ValueError(f"method.objective: {reason}")
        if self.data.labels is not None and self.model.task != "classification":
            raise ValueError(f"data.labels are for model.task: classification, got {self.model.task}")
        if self.data.format not in ("auto", "instruction") and self.model.task == "classification":
            raise ValueError(
                f"data.format: {self.data.format} is for model.task: causal-lm; a classifier reads the "
                "fields instruction and input, and output is its class"
            )
        for name in ("secure_aggregation", "privacy"):
            if getattr(self.federation, name) is not None:
                reason = refusal(self._built(), privacy=name == "privacy")
                if reason:
                    raise ValueError(f"federation.{name} does not go with {self.method_name}: {reason}")
        if self.federation.robust is not None:
            reason = robust_refusal(
                self.federation.robust,
                self._built(),
                secure=self.federation.secure_aggregation is not None,
                privacy=self.federation.privacy is not None,
            )
            if reason:
                raise ValueError(f"federation.robust: {reason}")
            if isinstance(self.data.clients, int):  # else it is known when the data are
                self._enough_replies(self.federation.robust, self.data.clients)
        if self.federation.wire.compresses:
            reason = self.federation.wire.refusal(
                self._built(),
                secure=self.federation.secure_aggregation is not None,
                privacy=self.federation.privacy is not None,
            )
            if reason:
                raise ValueError(f"federation.wire: {reason}")
        network = self.transport.name == "flower"
        evenly = isinstance(self.federation.selection, AtRandom)
        if not evenly and (reason := selection_refusal(self.federation, self._built(), network=network)):
            raise ValueError(f"federation.selection: {reason}")
        if reason := self.federation.refusal_of_weights:
            raise ValueError(f"federation.weights: {reason}")
        if self.federation.privacy is not None:
            check_scale(self.federation.privacy, cast(SumMethod[Any], self._built()).unit)
        if reason := simulated_refusal(self.method, self.federation.clients_per_round, network=network):
            raise ValueError(reason)
        if self.evaluation.arrivals and getattr(self.method, "arrival", "") != "asynchronous":
            raise ValueError("evaluation.arrivals needs method.arrival: asynchronous")
        for task in certain(self.evaluation.tasks):
            if looks_at_pictures(task) != (self.model.task == pictures.TASK):
                if looks_at_pictures(task):
                    raise ValueError(f"task {task} is for model.task: {pictures.TASK}, got {self.model.task}")
                raise ValueError(
                    f"task {task} is not for pictures; take denoising-loss, clip-score, pixel-check"
                )
            if self.model.task == "classification" and not classifies(task):
                raise ValueError(f"task {task} needs generated text; model.task is classification")
        clients, often = self.data.clients, self.federation.clients_per_round
        if isinstance(clients, int) and (reason := peers_refusal(self.method, often, clients)):
            raise ValueError(reason)
        return self

    def _built(self) -> Any:  # imports PyTorch, which most files can be checked without
        return registry.build(self.method, self.seed)

    def _enough_replies(self, robust: Robust, clients: int) -> None:
        everyone, asked = dict.fromkeys(range(clients), 1), self.federation.clients_per_round
        cohort = sample_cohort(everyone, asked, seed=self.seed, round=1)
        try:
            check_replies(robust, quorum_of(len(cohort.clients), self.federation.quorum))
        except InputError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _each_tracker_once(self) -> Self:
        if len(set(self.tracking)) < len(self.tracking):
            raise ValueError(f"tracking names one twice: {', '.join(self.tracking)}")
        return self

    @model_validator(mode="after")
    def _loadable(self) -> Self:
        """Tasks that packages bring can be imported; the method and the partitioner have been by now."""
        for task in certain(self.evaluation.tasks):
            if task in TASKS:
                try:
                    TASKS.part(task)
                except InputError as error:
                    raise ValueError(f"evaluation.tasks: {error}") from None
        return self

    @model_validator(mode="after")
    def _chosen_by_what_is_scored(self) -> Self:
        """A round is chosen, or the last one, by a task that is scored in more than the last round."""
        stop = self.evaluation.stop
        for setting, metric in (
            ("checkpoints.best", self.checkpoints.best),
            ("evaluation.stop.metric", None if stop is None else stop.metric),
        ):
            if metric is None:
                continue
            task, dot, name = metric.partition(".")
            if not dot or not name or task not in certain(self.evaluation.tasks):
                raise ValueError(
                    f"{setting} is {metric}; it takes task.metric of one of evaluation.tasks, "
                    f"{', '.join(certain(self.evaluation.tasks))}, as loss.loss"
                )
            if getattr(self.method, "fine_tune", None) is not None:
                raise ValueError(
                    f"{setting} chooses a round, and method.fine_tune is of the last; leave one of them out"
                )
            if self.evaluation.every == 0:
                raise ValueError(
                    f"{setting} needs scores of more rounds than the last; set evaluation.every to 1"
                )
        return self

    @model_validator(mode="after")
    def _where_data_are(self) -> Self:
        """Over a network the server has no training examples; on one machine nobody else has them."""
        data, network = self.data, self.transport.name == "flower"
        if self.evaluation.where == "clients":
            private, best = self.federation.privacy is not None, self.checkpoints.best
            if why := federated_refusal(
                self.evaluation, data, self._built(), task=self.model.task, private=private, best=best
            ):
                raise ValueError(f"evaluation.where: clients does not go with {why}")
        if (data.train == CLIENTS) != network:
            raise ValueError(
                f"data.train is {data.train} and transport.name {self.transport.name}; over a network "
                f"(flower), and only there, each client has a file of its own (data.train: {CLIENTS})"
            )
        if not network:
            return self
        if data.holdout.source is None and self.evaluation.where == "server":
            raise ValueError(
                "data.holdout.source is missing: the server evaluates on examples of its own. Else set "
                "evaluation.where: clients and data.holdout.client_fraction"
            )
        if data.holdout.validation is not None:
            raise ValueError(
                "data.holdout.validation is a share of training examples, and the server has none"
            )
        if data.partition != Iid() or data.max_examples is not None:
            raise ValueError("data.partition and data.max_examples are for examples that the server has")
        if self.federation.simulate != Simulate():
            raise ValueError("federation.simulate is for one machine; elsewhere clients fail by themselves")
        if self.model.task == "classification" and data.labels is None:
            raise ValueError("data.labels is missing: no side of a network knows all the classes by itself")
        return self

    @property
    def reading(self) -> Reading:
        """How records are to be read; a new one each time, in which a source says what it took them for."""
        classifies = self.model.task == "classification"
        form = "instruction" if classifies else self.data.format
        judged = isinstance(self.method, Preferring) and self.method.objective.name == "kto"
        skip = self.data.bad_rows == "skip"
        return Reading(form, self.data.trees, skip, pairs=self.of_pairs, judged=judged)

    @property
    def of_pairs(self) -> bool:
        """Whether clients train on pairs of answers, of which one is preferred."""
        return isinstance(self.method, Preferring) and self.method.objective.of_pairs

    @property
    def method_name(self) -> str:
        """Name of the method."""
        return str(self.method.name)  # type: ignore[attr-defined]

    def for_objects(self, clients: int | None) -> dict[str, Any]:
        """The configuration as plain values for examples that are Python objects, in place of `data.train`.

        Args:
            clients: How many clients they are given for; None: they are to be split by `data.partition`.

        Raises:
            InputError: They come client by client, and the configuration splits them otherwise too.
        """
        document = self.given()
        data = document["data"]
        data["train"] = OBJECTS
        if clients is not None:
            if not isinstance(self.data.partition, Iid | Given):
                raise InputError(
                    f"the data are given client by client, and data.partition is {self.data.partition_name}; "
                    "leave the partition out, or give all rows in one list"
                )
            data |= {"partition": {"name": "given"}, "clients": clients}
        return document

    def given(self) -> dict[str, Any]:
        """As `resolved`, without the bundled data's hold-out where the configuration did not ask for it."""
        document = self.resolved()
        if "holdout" not in self.data.model_fields_set:
            del document["data"]["holdout"]
        return document

    def resolved(self) -> dict[str, Any]:
        """The whole configuration as plain values, defaults included; reading it back gives an equal one.

        Without `checkpoints.rollback`, which is done once and is no property of the run.
        """
        return self.model_dump(mode="json", exclude={"checkpoints": {"rollback"}})

    def sha256(self) -> str:
        """Identifies the resolved configuration."""
        return document_sha256(self.resolved())


def document_sha256(document: dict[str, Any]) -> str:
    """Identifies a configuration written out in full, as `RunConfig.resolved` gives it."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
