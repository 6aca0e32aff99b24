"""The quantities of the one-shot theory, as measured (`one_shot.py`), and the two schemes it compares."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.core.settings import Settings
from fedtune.errors import InputError
from fedtune.methods.fedavg.settings import Config


@dataclass(frozen=True)
class RoundEnd:
    """Both schemes after a round: T' rounds of k steps, and one round of T'·k steps.

    Attributes:
        round: T', counted from 1.
        distance: ‖w_one − w_multi‖ of the two global models.
        moved: ‖w_multi − w(0,0)‖.
        multi_round: What `watch` said of the multi-round model.
        one_shot: What it said of the one-shot model.
    """

    round: int
    distance: float
    moved: float
    multi_round: tuple[float, ...]
    one_shot: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """The theory's quantities; see `one_shot.py`.

    Attributes:
        clients: m.
        rounds: T.
        steps: T·k, the mean over clients.
        trainable: Numbers in w.
        norm: ‖w(0,0)‖.
        moved: ‖w(T,k) − w(0,0)‖.
        largest_move: The largest ‖w(t,j) − w(0,0)‖ of any client, step and scheme (Assumption 2).
        smoothnesses: L by the paper's estimate, one a mini-batch.
        largest_smoothness: The largest ‖g(w') − g(w)‖ / ‖w' − w‖ of any client and step, which is where the
            proof uses L (Eq. 10 to 11); None if the trajectories never parted.
        error: ‖Σ p_i ε_i‖.
        error_without_rates: The same with β = 1, as the proof and therefore the bound have it.
        local_errors: ‖ε_i‖ of each client.
        local_errors_without_rates: The same with β = 1; their sum is Eq. 10.
        gradient_differences: Σ_i Σ_j ‖g(w') − g(w)‖.
        distances: Σ_i Σ_j ‖w' − w‖; times L it is Eq. 11.
        start: What `watch` said of w(0,0).
        ends: The end of each round.
    """

    clients: int
    rounds: int
    steps: float
    trainable: int
    norm: float
    moved: float
    largest_move: float
    smoothnesses: tuple[float, ...]
    largest_smoothness: float | None
    error: float
    error_without_rates: float
    local_errors: tuple[float, ...]
    local_errors_without_rates: tuple[float, ...]
    gradient_differences: float
    distances: float
    start: tuple[float, ...]
    ends: tuple[RoundEnd, ...]

    @property
    def smoothness(self) -> float:
        """L: the mean over mini-batches."""
        return sum(self.smoothnesses) / len(self.smoothnesses)

    @property
    def relative_update(self) -> float | None:
        """τ; None if w(0,0) is 0, as the B factors alone are."""
        return self.moved / self.norm if self.norm else None

    @property
    def gamma(self) -> float | None:
        """Γ = L τ T k."""
        return None if self.relative_update is None else self.smoothness * self.relative_update * self.steps

    @property
    def bound(self) -> float:
        """Γ ‖w(0,0)‖ (Theorem 1, Eq. 9)."""
        return self.smoothness * self.steps * self.moved

    @property
    def bound_of_clients(self) -> float:
        """L τ T k m ‖w(0,0)‖ (Eq. 13)."""
        return self.bound * self.clients


def schemes(config: Settings) -> tuple[Config, Config]:
    """The multi-round scheme of a configuration and the one-shot one with the same steps in all.

    One round of several epochs is set against as many rounds of one epoch.

    Raises:
        InputError: The theory does not cover the method, or there is only one round of one epoch.
    """
    if not isinstance(config, Config):
        raise InputError(
            "the one-shot theory is about method.name: fedavg, where clients send the sum of their local "
            f"steps and the server adds the mean; got {config.name}"  # type: ignore[attr-defined]
        )
    if config.aggregation == "stack":
        raise InputError(
            "the one-shot theory follows the same weights through all rounds; method.aggregation: stack "
            "begins new factors every round. Use mean or freeze-a"
        )
    if config.aggregation not in ("mean", "freeze-a"):
        raise InputError(
            f"the one-shot theory has the mean of the clients' weights, and method.aggregation: "
            f"{config.aggregation} makes others of them. Use mean or freeze-a"
        )
    if config.personal:
        name = "own" if config.own else "ditto" if config.ditto is not None else "fine_tune"
        raise InputError(
            f"the one-shot theory is about one global model, and method.{name} gives clients others; leave "
            "it out"
        )
    if config.buffer is not None:
        raise InputError(
            "the one-shot theory has rounds that all clients take from the same weights, and method.buffer "
            "steps after a few of them; leave it out"
        )
    if config.regions is not None:
        raise InputError(
            "the one-shot theory has rounds that all clients take from the same weights, and clients of "
            "method.regions take them from their region's; leave it out"
        )
    if config.control_variates:
        raise InputError(
            "the one-shot theory has plain local steps (Eq. 3), and control variates correct them; "
            "set method.control_variates: false"
        )
    if config.masters != "float32":
        raise InputError(
            f"the one-shot theory follows float32 weights, and method.masters: {config.masters} keeps none; "
            "set it to float32"
        )
    rounds, epochs, steps = config.rounds, config.local_epochs, config.local_steps
    if rounds == 1 and epochs is not None and epochs > 1:
        rounds, epochs = epochs, 1
    if rounds == 1:
        what = f"local_steps: {steps}" if steps is not None else "one epoch"
        raise InputError(
            f"method.rounds is 1, with {what}: there is nothing to compare one-shot with. Set method.rounds "
            "to the number of rounds that one-shot would replace"
        )
    multi = {"arrival": "synchronous", "rounds": rounds, "local_epochs": epochs, "local_steps": steps}
    one = {
        **multi,
        "rounds": 1,
        "local_epochs": None if epochs is None else rounds * epochs,
        "local_steps": None if steps is None else rounds * steps,
    }
    values = config.model_dump()
    return Config.model_validate({**values, **multi}), Config.model_validate({**values, **one})
