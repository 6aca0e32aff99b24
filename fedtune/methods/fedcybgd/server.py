"""The server's model in FedCyBGD, by part: what turns go over, what a client is sent, what it must answer.

    C(θ)_i = own block whole, others compressed       Algorithm 1, line 4, Eq. 5 and 6    `forms`, `tensors`

A part's form says in which version and shape a client has or needs it: the turn that last changed the part,
from 1 (0: none), and whether it is pruned. A part goes out when a client does not have it in that form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedtune.core.aggregate import LIMIT
from fedtune.core.types import TensorSpec
from fedtune.errors import InputError
from fedtune.methods.fedcybgd.client import CHANNELS, HEADS
from fedtune.methods.fedcybgd.settings import Config
from fedtune.methods.fedcybgd.state import State
from fedtune.models.blocks import find_blocks
from fedtune.models.compression import architecture, check_blocks_go, check_drop, choose_blocks
from fedtune.models.emulator import ARCHITECTURE
from fedtune.models.memory_efficient import base_model
from fedtune.models.parts import ADDED, CLASSIFIER, ModelParts, block_of, check_around, find_parts
from fedtune.models.pruning import find_attention, find_mlp, prune_groups

_PRUNED = "p"  # behind a version's number


@dataclass(frozen=True)
class ServerModel:
    """The server's model by part.

    Attributes:
        model: With what is attached to it; what no turn trains is frozen.
        parts: Its tensors.
        in_turn: The parts that turns go over.
        always: Those that train with every one.
        config: The method's settings.
    """

    model: nn.Module
    parts: ModelParts
    in_turn: list[str]
    always: list[str]
    config: Config

    @staticmethod
    def of(model: nn.Module, config: Config) -> ServerModel:
        """Divides a model to which everything is attached.

        Raises:
            InputError: The settings do not go with it.
        """
        parts = find_parts(model)
        check_around(parts, config.extra_blocks, "method.extra_blocks")
        behind = ADDED if config.trainable != "full" else ""
        in_turn = [*(f"{block}{behind}" for block in range(parts.blocks)), *config.extra_blocks]
        if config.blocks_per_client > len(in_turn):
            raise InputError(
                f"method.blocks_per_client: {config.blocks_per_client}, but there are {len(in_turn)} blocks"
            )
        if config.compression != "none":
            check_drop(parts.blocks - min(config.blocks_per_client, parts.blocks), config.drop_ratio)
            check_blocks_go(base_model(model))
        if config.compression == "hybrid":
            for block in find_blocks(model).modules:  # what cannot be pruned is refused before any round
                find_attention(block)
                find_mlp(block)
        always = [CLASSIFIER] if CLASSIFIER in parts.parameters else []
        found = ServerModel(model, parts, in_turn, always, config)
        model.requires_grad_(False)
        for parameter in found.trained().values():
            parameter.requires_grad_(True)
        return found

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by "part:name"."""
        return self.parts.named([*self.in_turn, *self.always])

    def expects(self, own: Sequence[str]) -> dict[str, TensorSpec]:
        """What a client that trains these parts has to answer with."""
        expects = {
            name: TensorSpec(torch.float32, tuple(parameter.shape), LIMIT)
            for name, parameter in self.parts.named([*own, *self.always]).items()
        }
        if self.config.compression == "hybrid":
            for part in filter(str.isdigit, own):
                block = find_blocks(self.model).modules[int(part)]
                sizes = ((HEADS, find_attention(block).groups), (CHANNELS, find_mlp(block).width))
                for kind, size in sizes:
                    expects[f"{kind}:{part}"] = TensorSpec(torch.float32, (size,), at_least=0.0)
        return expects

    def forms(
        self,
        own: Sequence[str],
        updated: Collection[int],
        versions: Mapping[str, int],
        generator: torch.Generator,
    ) -> dict[str, str]:
        """The form in which a client needs each part.

        Args:
            own: The parts that it trains.
            updated: Blocks that were updated in this cycle.
            versions: The turn, from 1, that last changed a part.
            generator: Draws the blocks that are dropped.
        """
        config = self.config
        mine = {block for part in own if (block := block_of(part)) is not None}
        blocks = choose_blocks(
            self.parts.blocks, mine, updated, config.compression, config.drop_ratio, generator
        )
        wanted = {str(block): pruned for block, pruned in blocks.items()}
        for part in self.parts.parameters:  # what is added to a block goes with it, what is around always
            block = block_of(part)
            if str(block) != part and (block is None or block in blocks):
                wanted[part] = False
        return {part: f"{versions.get(part, 0)}{_PRUNED * pruned}" for part, pruned in wanted.items()}

    def tensors(self, state: State, forms: Mapping[str, str], held: Mapping[str, str]) -> dict[str, Tensor]:
        """What goes to a client that has `held` and needs `forms`: the parts, and their architecture."""
        blocks = [int(part) for part in forms if part.isdigit()]
        sent = {ARCHITECTURE: architecture(base_model(self.model), blocks)}
        for part, form in forms.items():
            if held.get(part) == form:
                continue
            found = {
                n: state.weights.get(f"{part}:{n}", t).to(t.dtype)
                for n, t in self.parts.tensors(part).items()
            }
            if form.endswith(_PRUNED):
                block = find_blocks(self.model).modules[int(part)]
                found = prune_groups(block, found, state.heads[part], state.channels[part])
            sent |= {f"{part}:{name}": tensor for name, tensor in found.items()}
        return sent
