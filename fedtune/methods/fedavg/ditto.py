"""Ditto: beside the global model each client has one of its own, tied to it (`ditto: λ`).

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization" (2021), Algorithm 1:

    w_k ← local training from w(t)                          the global model's update, as without Ditto
    v_k ← v_k − η (∇F_k(v_k) + λ (v_k − w(t)))              s steps, from where v_k was; v_k = w(0) at first

λ = 0 is training alone, a large λ the global model. v_k takes as many steps (s) as w_k, by the same
optimiser and at the same rates, over batches in an order of its own. It is never sent.

A client that is asked late begins at the w(t) that it is sent first. One that was not asked yet has no model
of its own and uses the global one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from fedtune.core.types import ClientEnv
from fedtune.measure.memory import Resident
from fedtune.methods.fedavg.own_parts import moved
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.loading import load
from fedtune.methods.local_training import Trained, train


def own_model(
    env: ClientEnv,
    parameters: Mapping[str, nn.Parameter],
    config: Config,
    *,
    received: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    beside: Sequence[Resident],
) -> tuple[dict[str, Tensor], Trained]:
    """Trains a client's own model.

    Args:
        env: The client.
        parameters: What is trained; holds the result afterwards.
        config: The method's settings.
        received: w(t) by name.
        before: v_k as it was kept, float32.
        beside: What else is in memory meanwhile.

    Returns:
        v_k, float32 on the host, and what training it was.
    """
    assert config.ditto is not None
    load(parameters, before)
    own = replace(env, seed=env.derive_seed("own model"), state=None)
    trained = train(
        own, parameters, config, proximal=config.ditto, towards=received, beside=[before, *beside]
    )
    return moved(before, trained.weights, parameters), trained
