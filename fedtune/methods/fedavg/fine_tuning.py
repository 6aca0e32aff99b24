"""Local fine-tuning after the last round: each client makes the final model its own (`fine_tune`).

Yu, Bagdasaryan and Shmatikov, "Salvaging Federated Learning by Local Adaptation" (2020), section 2, and the
second half of many a paper's comparison of personal models:

    v_i = local training from w(T) on client i's examples

One more round, in which every client is asked, whatever `clients_per_round` says: it is sent the final
model, sends nothing back but its loss, and keeps v_i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from fedtune.core.types import ClientEnv
from fedtune.methods.fedavg.own_parts import copied, moved
from fedtune.methods.fedavg.settings import Config
from fedtune.methods.loading import load
from fedtune.methods.local_training import Trained, train


def fine_tuned(
    env: ClientEnv, parameters: Mapping[str, nn.Parameter], config: Config, start: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Trained]:
    """Trains a client's model from the final one.

    Args:
        env: The client.
        parameters: What is trained; holds the result afterwards.
        config: The method's settings, `fine_tune` among them.
        start: The final weights, and a client's own parts.

    Returns:
        v_i, float32 on the host, and what training it was.
    """
    tune = config.fine_tune
    assert tune is not None
    rate = config.lr if tune.lr is None else tune.lr
    settings = config.model_copy(
        update={
            "local_epochs": tune.local_epochs,
            "local_steps": tune.local_steps,
            "lr": rate,
            "lr_over": "round",
        }
    )
    before = copied(start)
    load(parameters, before)
    trained = train(replace(env, state=None), parameters, settings, beside=[before])
    return moved(before, trained.weights, parameters), trained
