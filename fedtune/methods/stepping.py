"""The optimiser's step of one client: after the backward pass or inside it, with float32 masters or without.

A weight narrower than float32 cannot take a fine-tuning step by itself: most steps are less than half the
distance to the next bfloat16 number, and would be lost. `method.masters` says what is done about that.

* float32: a copy of it that the optimiser moves, 4 bytes a weight.
* kahan: what rounding left over, 2 bytes a weight. Kahan's sum for weights, as in Zamirai et al., "Revisiting
  BFloat16 Training" (2021): each weight is w + r, both bfloat16, which is about 16 significant bits. A step
  moves float32(w) + r; then w is that number rounded and r what the rounding took away, rounded. Beside
  float32 masters with the same steps a weight that never exceeds W is off by at most 2⁻¹⁶ W a step.
* stochastic: nothing. The same paper's other remedy: float32(w) is moved and rounded up or down with
  probabilities that give its value in the mean (`stochastically`). A single run is noisier, not biased.

Without masters one tensor at a time is widened, moved and rounded. With `optimizer_in_backward` that happens
as soon as its gradient is there, which then goes: never are all gradients in memory together. Each weight
takes the same step either way, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fedtune.core.rounding import stochastically
from fedtune.core.seeds import derive_seed
from fedtune.core.types import ClientError, Payload
from fedtune.measure.memory import Resident
from fedtune.methods.eight_bit import AdamW8bit
from fedtune.methods.settings import Training

Filter = Callable[[Mapping[str, Tensor]], None]


class Stepper:
    """Takes a client's steps, from the gradients that a backward pass leaves in `parameters`.

        stepper = Stepper(parameters, settings)
        with stepper.arriving(rate):
            loss.backward()
        stepper.step()

    Args:
        parameters: What is trained, by name.
        settings: Optimiser, masters, clipping, and whether a step is taken inside the backward pass.
        seed: Where random rounding begins.
        proximal: μ of FedProx; its term pulls towards `start`.
        start: The round's weights, where `proximal` is not 0.
        correction: What SCAFFOLD adds to each gradient.
        filter: Changes the gradients (`.grad` of a mapping's tensors) behind all that; for float32 masters
            after the backward pass.

    Attributes:
        optimizers: One over all that is trained, or one for each.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: Training,
        *,
        seed: int = 0,
        proximal: float = 0.0,
        start: Mapping[str, Tensor] | None = None,
        correction: Mapping[str, Tensor] | None = None,
        filter: Filter | None = None,
    ) -> None:
        self.parameters, self._settings, self._seed = parameters, settings, seed
        self._proximal, self._start = proximal, start or {}
        # copied once a round, and not once a step
        self._correction = {n: c.to(parameters[n].device) for n, c in (correction or {}).items()}
        self._filter = filter
        narrow = {n: p for n, p in parameters.items() if p.dtype != torch.float32}
        kept = {"float32": {}, "kahan": narrow, "stochastic": narrow}[settings.masters]
        self._masters: dict[str, Tensor] = {
            name: _float32_master(parameter) for name, parameter in parameters.items() if name not in kept
        }
        self._remainders = {n: torch.zeros_like(p) for n, p in kept.items() if settings.masters == "kahan"}
        self._one_by_one = settings.optimizer_in_backward or bool(kept)
        moved = [self._masters.get(name, parameter) for name, parameter in parameters.items()]
        groups = [[each] for each in moved] if self._one_by_one else [moved]
        self.optimizers = [build_optimizer(group, settings) for group in groups]
        self._own = dict(zip(parameters, self.optimizers, strict=False)) if self._one_by_one else {}
        self._steps = 0
        self._moved: set[str] = set()

    def resident(self) -> list[Resident]:
        """What is in memory beside the model."""
        return [
            *self.optimizers,
            self._masters,
            {"optimizer": self._remainders},
            dict(self._start),
            dict(self._correction),
        ]

    def kept(self) -> Payload:
        """What the optimiser has gathered of each weight, by "what:name", on the host: for the next round."""
        return Payload(
            {
                f"{what}:{name}": value.detach().to("cpu", copy=True)
                for name in self.parameters
                for what, value in self._optimizer_of(name).state.get(self._moved_tensor(name), {}).items()
            }
        )

    def go_on(self, kept: Payload) -> None:
        """Begins with what `kept` gave after an earlier round.

        Raises:
            ClientError: It is of other weights, or of an optimiser with other settings.
        """
        for key, value in kept.tensors.items():
            what, _, name = key.partition(":")
            if name not in self.parameters:
                raise ClientError(f"kept from an earlier round is {key}, and {name} is not trained any more")
            optimizer, moved = self._optimizer_of(name), self._moved_tensor(name)
            if what in ("exp_avg", "exp_avg_sq", "momentum_buffer") and value.numel() != moved.numel():
                raise ClientError(
                    f"kept from an earlier round is {key} of {value.numel()} numbers, and the weight has "
                    f"{moved.numel()}"
                )
            on_host = what == "step" and not optimizer.param_groups[0].get("fused")
            optimizer.state[moved][what] = value.to("cpu" if on_host else moved.device, copy=True)

    def _optimizer_of(self, name: str) -> torch.optim.Optimizer:
        return self._own[name] if self._one_by_one else self.optimizers[0]

    def _moved_tensor(self, name: str) -> Tensor:
        return self._masters.get(name, self.parameters[name])

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """What is trained, by name, float32; what has no master is widened when it is asked for."""
        return _Wide(self)

    def value(self, name: str) -> Tensor:
        """One weight in float32: the master itself where there is one."""
        if name in self._masters:
            return self._masters[name].detach()
        wide = self.parameters[name].detach().to(torch.float32)
        return wide.add_(self._remainders[name]) if name in self._remainders else wide

    @contextmanager
    def arriving(self, rate: float) -> Iterator[None]:
        """Around the backward pass of a step at this rate: where it is set so, weights move inside."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        self._moved.clear()
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))
            for name, parameter in (self.parameters.items() if self._settings.optimizer_in_backward else ())
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def step(self) -> None:
        """Moves what has not moved yet, and takes the gradients away.

        A parameter that the batch did not touch has a gradient of 0, and still feels the other terms.
        """
        with torch.no_grad():
            if self._one_by_one:
                scale = self._scale()
                for name in self.parameters:
                    if name not in self._moved:
                        self._move(name, scale)
            else:
                self._move_all()
        self._steps += 1

    def _arrived(self, name: str, _: Tensor) -> None:
        with torch.no_grad():
            self._move(name, None)
        self._moved.add(name)

    def _move_all(self) -> None:
        for name, master in self._masters.items():
            gradient = self._gradient(name, master)
            self.parameters[name].grad, master.grad = None, gradient
        limit = self._settings.max_grad_norm
        if limit is not None:
            nn.utils.clip_grad_norm_(list(self._masters.values()), limit)
        if self._filter is not None:
            self._filter(self._masters)
        (optimizer,) = self.optimizers
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, parameter in self.parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])

    def _move(self, name: str, scale: Tensor | None) -> None:
        """A step of one weight from its gradient, which it takes away."""
        parameter, optimizer, master = self.parameters[name], self._own[name], self._masters.get(name)
        moved = self.value(name).requires_grad_() if master is None else master
        gradient = self._gradient(name, moved)
        parameter.grad, moved.grad = None, gradient if scale is None else gradient.mul_(scale)
        del gradient
        if master is None:
            _lend(optimizer, parameter, moved)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if master is None:
            _lend(optimizer, moved, parameter)
        if moved is not parameter:
            self._round(name, parameter, moved.detach())

    def _round(self, name: str, parameter: nn.Parameter, wide: Tensor) -> None:
        if name not in self._masters and self._settings.masters == "stochastic":
            generator = torch.Generator(wide.device)
            generator.manual_seed(derive_seed(self._seed, "rounding", self._steps, name))
            parameter.copy_(stochastically(wide, parameter.dtype, generator))
            return
        parameter.copy_(wide)
        if name in self._remainders:
            self._remainders[name].copy_(wide.sub_(parameter))

    def _gradient(self, name: str, master: Tensor, *, copy: bool = False) -> Tensor:
        """The whole gradient of one weight, float32: a copy, or where its own is if that is float32."""
        parameter = self.parameters[name]
        found = parameter.grad
        gradient = (torch.zeros_like(parameter) if found is None else found).to(torch.float32, copy=copy)
        if self._proximal:
            gradient.add_(master.detach() - self._start[name], alpha=self._proximal)
        if name in self._correction:
            gradient.add_(self._correction[name])
        return gradient

    def _scale(self) -> Tensor | None:
        """What clipping multiplies all gradients with, as `clip_grad_norm_` does; None without clipping."""
        limit = self._settings.max_grad_norm
        if limit is None:
            return None
        norms = []
        for name, parameter in self.parameters.items():
            master = self._masters.get(name)
            if master is None:
                master = self.value(name) if self._proximal else parameter
            norms.append(torch.linalg.vector_norm(self._gradient(name, master, copy=True)))
        return torch.clamp(limit / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6), max=1.0)


def build_optimizer(parameters: list[Tensor], settings: Training) -> torch.optim.Optimizer:
    """The optimiser of the settings, at their first rate, over float32 tensors or what will be lent some."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    betas = (settings.betas[0], settings.betas[1])
    if settings.optimizer == "adamw-8bit":
        return AdamW8bit(parameters, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=betas,
        weight_decay=settings.weight_decay,
        fused=True,  # one kernel a tensor on CPUs too: a small model's step is otherwise mostly Python
    )


class _Wide(Mapping[str, Tensor]):
    """The weights of a stepper, float32, one at a time."""

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper

    def __getitem__(self, name: str) -> Tensor:
        return self._stepper.value(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stepper.parameters)

    def __len__(self) -> int:
        return len(self._stepper.parameters)


def _float32_master(parameter: nn.Parameter) -> Tensor:
    """What the optimiser changes: the parameter itself, or a float32 copy of one that is narrower."""
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().to(torch.float32).requires_grad_()


def _lend(optimizer: torch.optim.Optimizer, before: Tensor, now: Tensor) -> None:
    """Has an optimiser of one tensor move another in its place, with the state that it has."""
    optimizer.param_groups[0]["params"] = [now]
    if before in optimizer.state:
        optimizer.state[now] = optimizer.state.pop(before)
