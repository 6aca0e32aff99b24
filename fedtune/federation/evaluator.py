"""How a configuration has models scored: the settings of evaluation, and a client's own half of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import RunConfig
from fedtune.core.client import Evaluator
from fedtune.core.cohort import weights_of
from fedtune.core.types import ClientProtection, Method
from fedtune.data.examples import Example
from fedtune.data.shapes import SUBJECTS, backgrounds
from fedtune.evaluation.federated import FederatedEvaluation, Scorer
from fedtune.evaluation.picture_settings import PicturePrompt, PictureSettings
from fedtune.evaluation.registry import certain
from fedtune.evaluation.types import EvalSettings
from fedtune.federation.room import reserved_tokens
from fedtune.methods import registry
from fedtune.protection.settings import SecureAggregation

if TYPE_CHECKING:
    from fedtune.protection.identity import Identity


def asks_clients(config: RunConfig, method: Method[Any]) -> bool:
    """Whether clients score the result; those of reference rows send nothing, and all is in this process."""
    return config.evaluation.where == "clients" and method.uses_wire


def federated(config: RunConfig, method: Method[Any], scorer: Scorer | None = None) -> FederatedEvaluation:
    """The evaluation of a run whose clients score the result; `scorer` of a client."""
    return FederatedEvaluation(
        method,
        registry.state_class(config.method_name),
        certain(config.evaluation.tasks),
        classifier=config.model.task == "classification",
        scorer=scorer,
    )


def evaluator_of(
    config: RunConfig,
    method: Method[Any],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    examples: Mapping[int, Sequence[Example]],
    identity: Identity | None = None,
    settings: bytes = b"",
) -> Evaluator | None:
    """A client's half of federated evaluation, where the run has it.

    Args:
        config: The run's configuration.
        method: Its method.
        tokenizer: The model's.
        labels: The classes of a classifier, in order; else empty.
        examples: Held-out ones of each client that is here.
        identity: Over a network: what the client signs with under secure aggregation.
        settings: Over a network: digest of the settings as this client was told them.
    """
    if not asks_clients(config, method):
        return None
    evaluation = federated(config, method, Scorer(tokenizer, eval_settings(config, labels), examples))
    federation, secure = config.federation, config.federation.secure_aggregation
    protection: ClientProtection | None = None
    if secure is not None:
        from fedtune.protection.secure_client import SecureClient  # cryptography only where it is used

        protection = SecureClient(
            evaluation,
            SecureAggregation().bits,  # whatever training has: these are few numbers
            identity=identity,
            threshold=secure.threshold,
            settings=hashlib.sha256(b"evaluation" + settings).digest(),  # no share of training opens here
            weigh=lambda count: weights_of({0: count}, federation.weights, federation.max_examples)[0],
        )
    return Evaluator(evaluation, protection)


def eval_settings(config: RunConfig, labels: Sequence[str]) -> EvalSettings:
    """The evaluation layer's settings of a configuration."""
    data, evaluation = config.data, config.evaluation
    return EvalSettings(
        template=data.template,
        loss_on=data.loss_on,
        max_length=data.max_length,
        labels=tuple(labels) or None,
        seed=config.seed,
        reserved=reserved_tokens(config),
        judge=evaluation.judge,
        code=evaluation.code,
        memory=evaluation.memory_bytes,
        pictures=picture_settings(config),
        **evaluation.model_dump(
            exclude={
                "tasks",
                "every",
                "stop",
                "where",
                "arrivals",
                "max_examples",
                "judge",
                "code",
                "memory",
                "pictures",
            }
        ),
    )


def picture_settings(config: RunConfig) -> PictureSettings | None:
    """What a text-to-image model is asked for: of the bundled pictures their subjects, without prompts."""
    drawn, pictures = config.evaluation.pictures, config.data.pictures
    if drawn is None or pictures is None:
        return None
    prompts = [PicturePrompt(one.text, one.says, one.subject) for one in drawn.prompts]
    if not prompts and config.data.train == "bundled":
        prompts = [
            PicturePrompt(subject.caption(colour), subject.before(colour).caption(), subject.name)
            for subject in SUBJECTS
            for colour in backgrounds(subject)[-1:]
        ]
    return PictureSettings(
        tuple(prompts),
        drawn.clip,
        drawn.steps,
        drawn.guidance,
        drawn.each,
        pictures.side,
        pictures.crop,
    )
