"""Local training one step at a time: a trajectory that can stop, lie on disk, and go on with the same bits.

`local_training.train` runs a client's round from end to end. To compare two trajectories on the same
mini-batches, both have to move in step, and a client's one-shot trajectory has to wait while the other
clients have their turn. The steps are those of `train`; a test holds both to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedtune.errors import InputError
from fedtune.methods.settings import Training
from fedtune.methods.step_loss import StepBatches, add_gradient
from fedtune.methods.stepping import Stepper

Weights = Mapping[str, Tensor]


class Diverged(Exception):
    """A loss or a weight became NaN or infinite; the message says which and after how many steps."""


class Trajectory:
    """Weights on their way through `total_steps` steps of local training, float32, with their optimiser.

    Args:
        start: The weights of step 0, by name; copied.
        settings: Optimiser, rate, schedule.
        total_steps: Steps of the whole trajectory; a schedule of one round ends with them.
        round: Which round's it is, for a schedule over all.
        proximal: μ of FedProx, towards `start`.
        device: Where the weights lie.
    """

    def __init__(
        self,
        start: Weights,
        settings: Training,
        total_steps: int,
        *,
        round: int = 1,
        proximal: float = 0.0,
        device: torch.device,
    ) -> None:
        self.weights = {
            name: nn.Parameter(w.to(device, torch.float32, copy=True)) for name, w in start.items()
        }
        self.taken = 0
        self._settings, self._total, self._round = settings, total_steps, round
        self._stepper = Stepper(
            self.weights,
            settings.model_copy(update={"optimizer_in_backward": False}),  # the same bits, from all gradients
            proximal=proximal,
            start={n: w.detach().clone() for n, w in self.weights.items()} if proximal else {},
        )
        (self._optimizer,) = self._stepper.optimizers

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self._settings.rate(self.taken, self._total, self._round)

    def step(self, gradient: Weights) -> None:
        """One optimiser step with the loss's gradient, which is used up."""
        with self._stepper.arriving(self.rate):
            for name, weight in self.weights.items():
                weight.grad = gradient[name]
        self._stepper.step()
        self.taken += 1

    def save(self, path: Path, beside: Mapping[str, Weights]) -> None:
        """Writes weights, optimiser state and what goes `beside` them, by a name without a slash.

        Raises:
            InputError: The file cannot be written, for instance for a full disk.
        """
        groups: dict[str, Weights] = {"weights": self.weights, **beside}
        for name, weight in self.weights.items():
            for key, value in self._optimizer.state[weight].items():
                if value is not None:  # SGD without momentum
                    groups[f"state:{key}"] = {**groups.get(f"state:{key}", {}), name: value}
        tensors = {
            f"{group}/{name}": value.detach().cpu().contiguous()
            for group, values in groups.items()
            for name, value in values.items()
        }
        try:
            save_file(tensors, path, metadata={"taken": str(self.taken)})
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"a client's one-shot weights cannot be put aside in {path.parent}: {error}. Free some space "
                "there, or set TMPDIR to a folder that has it"
            ) from None

    def restore(self, path: Path, taken: int) -> dict[str, dict[str, Tensor]]:
        """Takes over what `save` wrote after `taken` steps; returns what was put beside it."""
        beside: dict[str, dict[str, Tensor]] = {}
        for key, value in load_file(path).items():
            group, _, name = key.partition("/")
            weight = self.weights[name]
            if group == "weights":
                weight.data = value.to(weight.device)
            elif group.startswith("state:"):
                self._optimizer.state[weight][group.removeprefix("state:")] = value.to(weight.device)
            else:
                beside.setdefault(group, {})[name] = value.to(weight.device)
        self.taken = taken
        return beside


@contextmanager
def lent(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters may be made to hold any weights (`put`); after it they are as they were."""
    before = {name: parameter.data for name, parameter in parameters.items()}
    copies = {name: data.clone() for name, data in before.items() if data.dtype != torch.float32}
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = before[name], None
            if name in copies:
                parameter.data.copy_(copies[name])


def put(parameters: Mapping[str, nn.Parameter], weights: Weights) -> None:
    """Makes the parameters hold `weights`: the same memory where dtype and device agree, else rounded."""
    for name, parameter in parameters.items():
        weight = weights[name].detach()
        if weight.dtype == parameter.dtype and weight.device == parameter.device:
            parameter.data = weight
        else:
            parameter.data.copy_(weight)


def gradient(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], step: StepBatches, device: torch.device
) -> dict[str, Tensor]:
    """The gradient of a step's mean loss over its trained tokens where `parameters` stand, float32.

    Raises:
        Diverged: The loss is NaN or infinite.
    """
    for parameter in parameters.values():
        parameter.grad = None
    loss = add_gradient(model, step, device)
    if not math.isfinite(loss.total):
        raise Diverged(f"the loss became {loss.total}")
    found = {}
    for name, parameter in parameters.items():
        grad, parameter.grad = parameter.grad, None
        found[name] = torch.zeros_like(parameter, dtype=torch.float32) if grad is None else grad.float()
    return found


def norm(weights: Weights) -> float:
    """The Euclidean norm over all tensors together, summed in float64."""
    return math.sqrt(sum(float(_square(w.detach())) for w in weights.values()))


def distance(one: Weights, other: Weights) -> float:
    """‖one − other‖ over all tensors together; nothing larger than a tensor is made on the way."""
    squares = [_square(w.detach() - other[name].detach().to(w.device)) for name, w in one.items()]
    return math.sqrt(sum(float(square) for square in squares))


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def saved(path: Path, group: str) -> dict[str, Tensor]:
    """One group of what `Trajectory.save` wrote, `weights` or a name put beside them, on the CPU."""
    with safe_open(path, "pt") as file:
        names = [key for key in file.keys() if key.startswith(f"{group}/")]  # noqa: SIM118  # no mapping
        return {key.partition("/")[2]: file.get_tensor(key) for key in names}
