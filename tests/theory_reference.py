"""The theory's quantities by the book: every step's weights and gradient are kept, sums come at the end."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.data.batches import collate, endless_batches, epoch_batches
from fedtune.data.encoded import Encoded
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config
from fedtune.models.tuning import trainable


@dataclass
class Path:
    """A trajectory: weights before each step and after the last, and the gradient of each step."""

    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


class Plain:
    """Both schemes with plain averages. Settings: SGD or AdamW, schedule, decay, proximal, clipping."""

    def __init__(
        self, config: Config, model: nn.Module, data: Mapping[int, Sequence[Encoded]], seed: int
    ) -> None:
        self.config, self.data, self.seed = config, data, seed
        self.model = FedAvg(config, seed).client_model(lambda: copy.deepcopy(model))
        self.parameters = trainable(self.model)
        self.start = self.now()

    def now(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters.values()])

    def set(self, flat: Tensor) -> None:
        at = 0
        with torch.no_grad():
            for p in self.parameters.values():
                p.copy_(flat[at : at + p.numel()].view_as(p))
                at += p.numel()

    def batches(self, client: int, round: int) -> list[list[dict[str, Tensor]]]:
        c, items = self.config, self.data[client]
        generator = torch_generator(derive_seed(self.seed, "client", client, round), "batches")
        if c.local_steps is not None:
            endless = endless_batches(len(items), c.batch_size, generator)
            groups = [[next(endless) for _ in range(c.gradient_accumulation)] for _ in range(c.local_steps)]
        else:
            groups = []
            for _ in range(c.local_epochs or 0):
                epoch = list(epoch_batches(len(items), c.batch_size, generator))
                n = c.gradient_accumulation
                groups += [epoch[at : at + n] for at in range(0, len(epoch), n)]
        return [[collate([items[i] for i in part], 0) for part in group] for group in groups]

    def gradient(self, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
        loss = sum(n * self.model(**b).loss for n, b in zip(counts, batches, strict=True)) / sum(counts)
        grads = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        pairs = zip(self.parameters.values(), grads, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])

    def train(self, start: Tensor, groups: list[list[dict[str, Tensor]]]) -> Path:
        c = self.config
        self.set(start)
        parameters = list(self.parameters.values())
        optimizer: Any = (
            torch.optim.SGD(parameters, momentum=c.momentum, weight_decay=c.weight_decay)
            if c.optimizer == "sgd"
            else torch.optim.AdamW(parameters, betas=(c.betas[0], c.betas[1]), weight_decay=c.weight_decay)
        )
        path = Path([self.now()])
        for step, group in enumerate(groups):
            rate = c.lr * (1 - step / len(groups) if c.lr_schedule == "linear" else 1.0)
            path.rates.append(rate)
            path.gradients.append(self.gradient(group))
            whole = path.gradients[-1] + c.proximal * (path.weights[-1] - start)
            at = 0
            for p in parameters:
                p.grad = whole[at : at + p.numel()].view_as(p).clone()
                at += p.numel()
            if c.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, c.max_grad_norm)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            path.weights.append(self.now())
        return path

    def measure(self) -> dict[str, Any]:
        c, clients = self.config, sorted(self.data)
        total = sum(len(items) for items in self.data.values())
        share = {client: len(self.data[client]) / total for client in clients}
        batches = {
            client: [self.batches(client, round) for round in range(1, c.rounds + 1)] for client in clients
        }
        many: dict[int, list[Path]] = {client: [] for client in clients}
        globals_ = [self.start]
        for round in range(c.rounds):
            for client in clients:
                many[client].append(self.train(globals_[-1], batches[client][round]))
            updates = [share[i] * (many[i][-1].weights[-1] - globals_[-1]) for i in clients]
            globals_.append(globals_[-1] + torch.stack(updates).sum(0))
        one = {i: self.train(self.start, [g for groups in batches[i] for g in groups]) for i in clients}

        errors, free, ratios, moves = {}, {}, [], []
        differences, distances = 0.0, 0.0
        for i in clients:
            w = [weights for path in many[i] for weights in path.weights[:-1]]
            g = [gradient for path in many[i] for gradient in path.gradients]
            apart = [a - b for a, b in zip(one[i].weights[:-1], w, strict=True)]
            unlike = [a - b for a, b in zip(one[i].gradients, g, strict=True)]
            errors[i] = torch.stack([r * u for r, u in zip(one[i].rates, unlike, strict=True)]).sum(0)
            free[i] = torch.stack(unlike).sum(0)
            ratios += [float(u.norm() / a.norm()) for u, a in zip(unlike, apart, strict=True) if a.norm() > 0]
            differences += sum(float(u.norm()) for u in unlike)
            distances += sum(float(a.norm()) for a in apart)
            on_the_way = one[i].weights[1:] + [w for path in many[i] for w in path.weights[1:]]
            moves += [float((w - self.start).norm()) for w in on_the_way]
        ends = []
        for round in range(1, c.rounds + 1):
            taken = {i: sum(len(path.gradients) for path in many[i][:round]) for i in clients}
            mean = torch.stack([share[i] * one[i].weights[taken[i]] for i in clients]).sum(0)
            at = globals_[round]
            ends.append((float((mean - at).norm()), float((at - self.start).norm())))
        return {
            "norm": float(self.start.norm()),
            "moved": float((globals_[-1] - self.start).norm()),
            "largest_move": max(moves),
            "largest_smoothness": max(ratios) if ratios else None,
            "error": float(torch.stack([share[i] * errors[i] for i in clients]).sum(0).norm()),
            "error_without_rates": float(torch.stack([share[i] * free[i] for i in clients]).sum(0).norm()),
            "local_errors": [float(errors[i].norm()) for i in clients],
            "local_errors_without_rates": [float(free[i].norm()) for i in clients],
            "gradient_differences": differences,
            "distances": distances,
            "ends": ends,
            "multi_round": globals_[-1],
        }
