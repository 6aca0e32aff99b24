"""Small models from random weights, as Figure 1 of the one-shot paper has them: a ResNet and an LSTM.

A ResNet of the basic form with three stages on MNIST's pictures, with group norms, since running means of
batch norms are no weights; and an LSTM that predicts the next character of TinyStories.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from by_hand import federated
from common import DATA, ROOT
from search_rates import SEED, search
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from fedtune.core.seeds import numpy_generator, torch_generator
from fedtune.data.encoded import Encoded
from fedtune.methods.fedavg.method import FedAvg
from fedtune.methods.fedavg.settings import Config

MNIST, STORIES = DATA / "mnist-t10k", DATA / "tinystories/stories.jsonl"
HELD_OUT, WINDOW = 1000, 64  # examples a part; characters


def pictures() -> tuple[Tensor, Tensor]:
    """MNIST's 10,000 pictures, scaled to mean 0 and deviation 1 (10000, 1, 28, 28), and their classes."""
    with gzip.open(ROOT / MNIST / "t10k-images-idx3-ubyte.gz") as file:
        pixels = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8)
    with gzip.open(ROOT / MNIST / "t10k-labels-idx1-ubyte.gz") as file:
        right = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8).long()
    return (pixels.reshape(-1, 1, 28, 28).float() / 255 - 0.1307) / 0.3081, right


class Pictures(nn.Module):
    """MNIST's 10,000 pictures of 28 x 28, and a ResNet with a head of ten classes: 95,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        scaled, self.right = pictures()
        self.register_buffer("pictures", scaled, persistent=False)
        config = ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32, 64],
            depths=[1, 1, 1],
            layer_type="basic",
        )
        self.net, self.head = ResNetModel(config), nn.Linear(64, 10)
        for module in list(self.net.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(8, child.num_features))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        """Loss and hits of a batch."""
        pooled = self.net(self.pictures[input_ids[:, 0]]).pooler_output.flatten(1)  # type: ignore[index]
        logits, right = self.head(pooled), self.right[input_ids[:, 0]]
        hits = (logits.argmax(1) == right).float()
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, right), logits=logits, hits=hits)


class Characters(nn.Module):
    """Windows of TinyStories, and an LSTM of width 128 that predicts their next characters."""

    def __init__(self) -> None:
        super().__init__()
        lines = (ROOT / STORIES).read_text(encoding="utf-8").splitlines()
        text = "\n".join(json.loads(line)["text"] for line in lines)
        known = {character: i for i, character in enumerate(sorted(set(text)))}
        count = len(text) // (WINDOW + 1)
        numbers = torch.tensor([known[character] for character in text[: count * (WINDOW + 1)]])
        self.register_buffer("windows", numbers.reshape(count, WINDOW + 1), persistent=False)
        self.embedding = nn.Embedding(len(known), 64)
        self.lstm, self.head = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, len(known))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        """Loss and hits of a batch."""
        windows = self.windows[input_ids[:, 0]]  # type: ignore[index]
        logits = self.head(self.lstm(self.embedding(windows[:, :-1]))[0])
        right = windows[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), right.flatten())
        return SimpleNamespace(loss=loss, logits=logits, hits=(logits.argmax(-1) == right).float().mean(1))

    @property
    def right(self) -> Tensor:
        """A row for every window, as `Pictures` has classes."""
        return torch.zeros(len(self.windows), dtype=torch.long)  # type: ignore[arg-type]


KINDS: dict[str, Callable[[], nn.Module]] = {"ResNet": Pictures, "LSTM": Characters}


def started(kind: str, seed: int) -> nn.Module:
    """The model with weights drawn from the seed; the process's stream is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_generator(seed, "weights").initial_seed())
        return KINDS[kind]()


def scores(
    kind: str,
    clients: int,
    examples: int,
    settings: Mapping[str, Any],
    seed: int,
    part: str,
) -> dict[str, float]:
    """Loss and accuracy of a federation on the `validation` or the `test` part, which no client has.

    Args:
        kind: Of KINDS.
        clients: How many; all in every round.
        examples: Of each.
        settings: Of the method, beside all weights and batches of 16.
        seed: Of weights, split and batches.
        part: What is scored.
    """
    logging.getLogger("fedtune").setLevel(logging.ERROR)
    model = started(kind, seed)
    order = numpy_generator(0, "parts").permutation(len(model.right)).tolist()  # type: ignore[arg-type]
    parts = {"test": order[:HELD_OUT], "validation": order[HELD_OUT : 2 * HELD_OUT]}
    drawn = numpy_generator(seed, "split").permutation(order[2 * HELD_OUT :]).tolist()
    data = {
        client: [Encoded((row,), (0,)) for row in drawn[client * examples : (client + 1) * examples]]
        for client in range(clients)
    }
    config = Config.model_validate({"trainable": "full", "batch_size": 16, **settings})
    method = FedAvg(config, seed)
    client_model = method.client_model(lambda: model)
    state, *_ = federated(method, client_model, data, config.rounds, seed)
    (_, tuned), *_ = method.export(state, model)
    rows = torch.tensor(parts[part])[:, None]
    with torch.no_grad():
        found = tuned(rows, rows, rows[:, 0])
    return {"loss": float(found.loss), "accuracy": float(found.hits.mean())}


def both(kind: str, clients: int, examples: int, epochs: int, seeds: Sequence[int], path: Path) -> None:
    """Writes the scores of as many rounds as epochs and of one round, at a rate searched for the former."""
    tried: dict[float, float] = {}

    def loss(lr: float) -> float:
        settings = {"rounds": epochs, "local_epochs": 1, "lr": lr}
        tried[lr] = scores(kind, clients, examples, settings, SEED, "validation")["loss"]
        return tried[lr]

    search(loss, 3e-3)
    best = min(tried, key=lambda lr: tried[lr])
    found: dict[str, Any] = {"rate": best}
    for name, rounds in (("multi", epochs), ("one", 1)):
        settings = {"rounds": rounds, "local_epochs": epochs // rounds, "lr": best}
        found[name] = [scores(kind, clients, examples, settings, seed, "test") for seed in seeds]
    (ROOT / path).write_text(json.dumps(found, indent=1), encoding="utf-8")
