"""A client's turn in FedCyBGD and FedBAvg: take up what came, train its own blocks, answer with their change.

    θ_πi(k+1) ← θ_πi(k) − η_l g, K steps on C(θ)_i           Algorithm 1, lines 5 to 7   `train_blocks`
    Δ_i = θ_πi(K) − θ_πi(0)                                   lines 8 and 9               `client_turn`

A client keeps what it was sent and is sent only what it does not have in the version and shape it needs. Its
own blocks, as it got them, stay on disk while they are trained, where its store has a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fedtune.core.types import ClientEnv, ClientError, ClientResult, Payload, Scalar
from fedtune.data.batches import collate
from fedtune.methods.fedcybgd.settings import Config
from fedtune.methods.fedcybgd.training import train_blocks
from fedtune.methods.step_loss import StepBatches, TokenMean, add_gradient
from fedtune.models.blocks import find_blocks
from fedtune.models.compression import assemble
from fedtune.models.emulator import ARCHITECTURE
from fedtune.models.heads import mark_drawn
from fedtune.models.memory_efficient import memory_efficient, release_memory
from fedtune.models.offload import lies, offloaded
from fedtune.models.parts import ADDED, CLASSIFIER, block_of, full_name, named_tensors
from fedtune.models.pruning import group_scores

HEADS, CHANNELS = "heads", "channels"  # on the wire beside "part:name"


@dataclass(frozen=True)
class Turn:
    """What a client has in its turn.

    Attributes:
        model: The model that it was sent, frozen.
        own: The parts that it trains, and with each of them its parameters by "part:name".
        first: The values with which those began.
        kept: What it holds from now on: version and digest by part.
        resident: What of `first` is in memory.
    """

    model: nn.Module
    own: Mapping[str, Mapping[str, nn.Parameter]]
    first: Mapping[str, Tensor]
    kept: Mapping[str, Scalar]
    resident: Mapping[str, Tensor]


def client_turn(job: Payload, env: ClientEnv, config: Config) -> ClientResult:
    """Trains the client's own parts on the model that it was sent.

    Raises:
        ClientError: It does not have what the server says it has, or the loss became NaN or infinite.
    """
    turn = begin_turn(job, env, config)
    env = replace(env, model=turn.model)
    first = dict(turn.first)
    update: dict[str, Tensor] = {}
    loss, steps = TokenMean(), 0
    for part, block in turn.own.items():
        trained = train_blocks(
            replace(env, seed=env.derive_seed("block", part)),
            iter([block]),
            config,
            checkpointing=config.gradient_checkpointing,
            powersgd=config.powersgd,
            resident=[turn.resident],
        )
        for name, weight in trained.weights.items():
            delta = weight.cpu() - first[name].to(torch.float32)
            update[name] = update[name] + delta if name in update else delta
            if name.startswith(f"{CLASSIFIER}:"):  # trains with every part: the next begins where this ended
                first[name] = weight.cpu().clone()
        loss.join(trained.loss)
        steps += trained.steps
    scores = _importance(turn.own, _blocks_in(job), env, config) if config.compression == "hybrid" else {}
    metrics = loss.metrics | {"steps": steps}
    return ClientResult(Payload(update | scores), metrics, state=Payload(scalars=turn.kept))


def begin_turn(job: Payload, env: ClientEnv, config: Config) -> Turn:
    """Takes up what came and builds the client's model of it.

    Raises:
        ClientError: It does not have what the server says it has.
    """
    release_memory()
    forms: dict[str, str] = json.loads(str(job.scalars["forms"]))
    own, path = str(job.scalars["own"]).split(","), str(job.scalars["path"])
    kept, held, came = _take_up(job, forms, env)
    always = [CLASSIFIER] if CLASSIFIER in forms else []
    parts: dict[str, Mapping[str, Tensor]] = {}
    resident: dict[str, Tensor] = {}
    for part in forms:
        if part in came and env.store.on_disk:
            parts[part] = came[part]  # memory of its own: what is kept of it is on disk
        elif part in (*own, *always):
            parts[part] = {name: tensor.clone() for name, tensor in held[part].items()}
            if not env.store.on_disk:
                resident |= {f"{part}:{name}": tensor for name, tensor in held[part].items()}
        else:
            parts[part] = held[part]
    blocks = _blocks_in(job)
    plain = {part: tensors for part, tensors in parts.items() if not part.endswith(ADDED)}
    if config.trainable != "full" and always:  # attached to, the head becomes float32 by itself
        dtype = next(iter(parts[str(blocks[0])].values())).dtype
        plain[CLASSIFIER] = {name: tensor.to(dtype) for name, tensor in parts[CLASSIFIER].items()}
    built = assemble(job.tensors[ARCHITECTURE], path, plain)
    mark_drawn(built, parts.get(CLASSIFIER, {}))
    model: nn.Module = built
    if config.trainable != "full":
        model = config.attach(model, seed=0)  # what is drawn here is overwritten below
        model.requires_grad_(False)
    model.to(env.device)
    known, _ = named_tensors(model)

    def of(part: str) -> dict[str, nn.Parameter]:
        block = block_of(part)
        index = 0 if block is None else blocks.index(block)
        named = {inner: full_name(part, inner, path, index) for inner in parts[part]}
        return {f"{part}:{inner}": known[name] for inner, name in named.items() if name in known}

    if config.trainable != "full":
        with torch.no_grad():
            for part in forms:
                if part.endswith(ADDED) or part in always:
                    for name, parameter in of(part).items():
                        parameter.copy_(parts[part][name.partition(":")[2]])
    for part in set(forms) - {*own, *always} if env.store.on_disk else ():
        for name, parameter in of(part).items():
            inner, key = name.partition(":")[2], str(kept[part]).partition(" ")[2]
            if parameter.device.type == "cpu" and parameter.dtype == held[part][inner].dtype:
                lies(parameter, partial(env.store.read, key, inner))
    chosen = {part: of(part) | {n: p for also in always for n, p in of(also).items()} for part in own}
    start = {f"{part}:{inner}": tensor for part, named in held.items() for inner, tensor in named.items()}
    first = {name: start[name] for named in chosen.values() for name in named}
    return Turn(model, chosen, first, kept, resident)


def _take_up(
    job: Payload, forms: Mapping[str, str], env: ClientEnv
) -> tuple[dict[str, Scalar], dict[str, Mapping[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Version and digest of what the client holds from now on; what it needs of that now; what came of it.

    Raises:
        ClientError: It does not have what the server says it has.
    """
    came: dict[str, dict[str, Tensor]] = {}
    for name, tensor in job.tensors.items():
        part, colon, inner = name.partition(":")
        if colon:
            came.setdefault(part, {})[inner] = tensor
    kept = dict(env.state.scalars) if env.state else {}
    held: dict[str, Mapping[str, Tensor]] = {}
    for part, form in forms.items():
        if part in came:
            kept[part] = f"{form} {env.store.put(Payload(came[part]))}"
        version, _, key = str(kept.get(part, "")).partition(" ")
        payload = env.store.get(key) if version == form else None
        if payload is None:
            raise ClientError(f"it does not have part {part} any more; all parts will be sent again")
        held[part] = payload.tensors
    return kept, held, came


def _blocks_in(job: Payload) -> list[int]:
    """The blocks of the client's model by their index in the whole one."""
    return [int(part) for part in json.loads(str(job.scalars["forms"])) if part.isdigit()]


def _importance(
    own: Iterable[str], blocks: Sequence[int], env: ClientEnv, config: Config
) -> dict[str, Tensor]:
    """First-order importance of heads and channels of the blocks just trained, on some own examples."""
    count = min(config.importance_examples, len(env.items))
    drawn = torch.randperm(len(env.items), generator=env.generator("importance"))[:count].tolist()
    modules = find_blocks(env.model).modules
    scores: dict[str, Tensor] = {}
    for part in filter(str.isdigit, own):
        block = modules[blocks.index(int(part))].requires_grad_(True)
        with (
            memory_efficient(env.model, checkpointing="none"),  # in eval mode nothing is computed again
            offloaded(env.model, config.offload_params),
        ):
            # one by one, so that this needs less memory than training did
            batches = StepBatches.of(env.model, (collate([env.items[i]], env.pad_id) for i in drawn))
            with env.memory.step(batches.size, [env.model], like=batches.form):
                add_gradient(env.model, batches, env.device)
        weights = {name: p.detach() for name, p in block.named_parameters()}
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in block.named_parameters()
        }
        found = group_scores(block, weights, gradients)
        scores[f"{HEADS}:{part}"], scores[f"{CHANNELS}:{part}"] = (s.cpu() for s in found)
        block.requires_grad_(False)
        block.zero_grad(set_to_none=True)
    return scores
