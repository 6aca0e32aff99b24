"""FedBiOT, FedOT and Offsite-tuning: clients tune an adapter on an emulator and never see the model.

Wu et al., "FedBiOT: LLM Local Fine-tuning in Federated Learning without Full Model" (KDD 2024), Algorithm 2.

    E, A          = cut and compress M                                 Algorithm 1   `client_model`
    w_E          ← argmin ‖E(x) − E*(x)‖² + λ KL, on public data       Eq. 7         `init`, `server_step`
    w_A,m        ← K steps on F_m + ε/2 ‖ŵ_A,m − ŵ_A(t)‖²              Eq. 9, 10     `client_step`
    w_A          ← Σ p_m w_A,m                                         Eq. 11        `server_step`
    AdapFu = E* ∘ A,  AdapEmu = E ∘ A                                                `export`

What is trained of A and E is LoRA. A client is sent the adapter's and the emulator's weights once, then the
LoRA of both each round, and answers with the adapter's. What pre-alignment learnt is merged into the emulator
before anyone gets it, so that its tuned layers are not the model's own.

`fedot` has the first and the last blocks as adapter and no alignment between rounds (Kuang et al. 2024);
`offsite-tuning` is that with one client who holds all data (Xiao et al. 2023).

Deviations: at β = 0 there is nothing to align and nothing is; the optimiser of the alignment starts anew in
every round. Clients send what their LoRA changed by, as in FedAvg.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune.core.aggregate import LIMIT, WeightedSum
from fedtune.core.cohort import Cohort
from fedtune.core.faults import faults
from fedtune.core.robust import MeanName, Updates
from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.core.types import (
    MODEL,
    ArrivalOrder,
    ClientEnv,
    ClientError,
    ClientResult,
    Order,
    Payload,
    Reply,
    ServerEnv,
    TensorSpec,
)
from fedtune.data.batches import endless_batches
from fedtune.errors import InputError
from fedtune.methods.fedavg.lora_aggregation import A
from fedtune.methods.fedbiot.server import ADAPTER, EMULATOR, Server, copied, factors, partner
from fedtune.methods.fedbiot.settings import Config
from fedtune.methods.fedbiot.state import State
from fedtune.methods.loading import load
from fedtune.methods.local_training import train
from fedtune.models.alignment import align
from fedtune.models.at_work import at_work
from fedtune.models.blocks import find_blocks
from fedtune.models.boundary import usable
from fedtune.models.emulator import EMULATORS, Cut, build, cut, submodel, take
from fedtune.models.heads import is_classifier
from fedtune.models.lora import LoraForm, attach_lora
from fedtune.models.memory_efficient import release_memory
from fedtune.models.proximal import moved_squared
from fedtune.models.pruning import find_mlp

log = logging.getLogger("fedtune")


class FedBiOT:
    """FedBiOT, FedOT and Offsite-tuning; see the module's text."""

    arrival: ArrivalOrder = "any-order"
    uses_wire = True
    saves_merged = False
    sends_model = True

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self._seed = config, seed
        self.rounds = config.rounds
        self.pools_data = config.name == "offsite-tuning"
        self._server: Server | None = None
        self._env: ServerEnv | None = None

    def prepare(self, server: ServerEnv) -> None:
        """Public examples, wherever the emulator is to be aligned on them."""
        alignment = self.config.alignment
        needed = self.config.layer_dropout > 0 and (alignment.steps_before or alignment.steps)
        if needed and not any(example.trained for example in server.public):
            none = "none of it has an answer" if server.public else "there is none"
            raise InputError(
                f"{self.config.name} aligns its emulator on public data and {none}; set data.public."
                "source, or method.alignment.steps_before=0 and method.alignment.steps=0"
            )
        if not needed:
            server.refuse_public(f"{self.config.name} without alignment")
        self._env = server

    @usable("the model cannot be divided into adapter and emulator")
    def client_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The server's model, AdapFu: the whole of it with LoRA on the adapter's blocks."""
        model = cast(PreTrainedModel, build())
        if is_classifier(model):
            raise InputError(
                f"{self.config.name} needs a model that generates text, got {type(model).__name__}, which "
                "classifies; set model.task: causal-lm"
            )
        blocks = len(find_blocks(model).modules)
        places = cut(blocks, self.config.adapter_layers, both_ends=self.config.both_ends)
        compressed = EMULATORS[self.config.emulator](model, places.middle, self.config.layer_dropout)
        parts = (take(model, places.front), compressed, take(model, places.back))
        submodel(model, [block for some in parts for block in some])  # refused here if it is to be refused
        modules = [find_blocks(model).modules[index] for index in places.middle]
        pruned = (
            {
                path: None
                for mlp in (find_mlp(block, experts=True) for block in modules)
                for path in (*mlp.ups, mlp.down)
            }
            if self.config.emulator == "channel-pruning"
            else {}
        )
        full = self._attach(model, places.adapter)
        if pruned:
            tuned = {name.partition(".")[2].removesuffix(A) for name in factors(full, places.adapter, "")}
            if tuned & pruned.keys():
                raise InputError(
                    "method.emulator channel-pruning takes channels out of the MLP; LoRA must be elsewhere: "
                    f"leave {', '.join(pruned)} out of method.lora.targets"
                )
        scaling = self.config.lora.scale
        room = self.config.alignment.keep_mb * 1_000_000
        self._server = Server(model, full, places, parts, self._attach, scaling, room, bool(pruned))
        return full

    def init(self, model: nn.Module) -> State:
        """The adapter as it is, and an emulator aligned before anyone gets it."""
        server, config = self.at_server(), self.config
        adapter = copied(factors(server.full, server.places.adapter, ADAPTER))
        state = State(adapter)
        if config.layer_dropout > 0 and config.alignment.steps_before:
            log.info("aligning the emulator in %d steps", config.alignment.steps_before)
            server.emulate(state.merged)
            drawn = copied(server.emulator_factors())
            merged = self.tune_emulator(state, drawn, config.alignment.steps_before, "before")
            server.emulated = None
            state = replace(state, merged=merged)
        if config.aligns:
            server.emulate(state.merged)
            state = replace(state, emulator=copied(server.emulator_factors()))
        return state

    def plan(self, state: State, round: int, cohort: Cohort) -> Iterator[Order]:
        """The LoRA of adapter and emulator; to who does not have them yet, also the weights below it."""
        lora = state.adapter | state.emulator
        expects = {n: TensorSpec(t.dtype, tuple(t.shape), LIMIT) for n, t in state.adapter.items()}
        short, whole = Payload(lora), None
        for client in cohort.clients:
            if str(client) in state.holders:
                yield Order(client, short, expects)
                continue
            if whole is None:
                held = self.at_server().client_tensors(state.merged)
                whole = Payload(lora | {MODEL + name: tensor for name, tensor in held.items()})
            yield Order(client, whole, expects)

    def client_step(self, job: Payload, env: ClientEnv) -> ClientResult:
        """K local steps on the adapter's LoRA, on top of the emulator; sends what they changed."""
        sent = {n.removeprefix(MODEL): t for n, t in job.tensors.items() if n.startswith(MODEL)}
        if sent:
            key = env.store.put(Payload(sent))
            if env.store.on_disk:
                job.let_go(MODEL + name for name in sent)
                del sent
        else:
            key = str(env.state.scalars["model"]) if env.state else ""
        held = env.store.get(key)
        if held is None:
            raise ClientError("it does not have the emulator any more; it will be sent again")
        model = env.store.built(key, lambda: self._client(held))
        with at_work([model], env.device):  # it stays with the client, and leaves the device to the server
            result = self._trained(job, replace(env, model=model), key)
        env.store.unread(key)  # and memory too
        return result

    def _trained(self, job: Payload, env: ClientEnv, key: str) -> ClientResult:
        """The client's step on its model, which is there."""
        model = env.model
        places = self.division(model)
        lora = {n: t for n, t in job.tensors.items() if not n.startswith(MODEL)}
        parameters = factors(model, places.adapter, ADAPTER)
        load(parameters | factors(model, places.middle, EMULATOR), lora)
        start = {name: lora[name].to(env.device, torch.float32) for name in parameters}
        scaling = self.config.lora.scale

        def proximal() -> Tensor:  # ε/2 ‖ŵ − ŵ(t)‖², ŵ = s B A
            moved = [
                moved_squared(a, parameters[partner(name)], start[name], start[partner(name)], scaling)
                for name, a in parameters.items()
                if name.endswith(A)
            ]
            return self.config.proximal / 2 * torch.stack(moved).sum()

        trained = train(
            env,
            parameters,
            self.config,
            penalty=proximal if self.config.proximal else None,
        )
        update = {name: (trained.weights[name] - start[name]).cpu() for name in parameters}
        return ClientResult(Payload(update), trained.metrics, state=Payload(scalars={"model": key}))

    def server_step(self, state: State, replies: Iterable[Reply]) -> State:
        """Averages the adapters, and aligns the emulator with the new one."""
        total: WeightedSum | None = None
        holders = dict(state.holders)
        replied = []
        for reply in replies:
            if total is None:
                total = WeightedSum.empty(reply.cohort.total_examples)
                for client in reply.cohort.clients:  # who does not answer may have lost what it held
                    holders.pop(str(client), None)
            total = total.add(reply.payload.tensors, reply.examples)
            replied.append(reply.client)
        if total is None:
            raise ValueError("no client replied: there is nothing to average")
        adapter = {name: weight + total.mean(name) for name, weight in state.adapter.items()}
        holders |= {str(client): True for client in sorted(replied)}
        state = replace(state, adapter=adapter, holders=holders, round=state.round + 1)
        if self.config.aligns:
            self.at_server().emulate(state.merged)
            emulator = self.tune_emulator(state, state.emulator, self.config.alignment.steps, state.round)
            state = replace(state, emulator=emulator)
        return state

    def mean_refusal(self, mean: MeanName) -> str | None:
        """Everyone's adapter has the same start, so that each of its numbers means the same."""
        return "one client holds all data" if self.pools_data else None

    def bound_refusal(self, *, quantile: bool) -> str | None:
        """A single client has nobody to be compared with."""
        return "one client holds all data" if self.pools_data else None

    def updates(self) -> Updates:
        """What a reply holds is the change of the adapter's LoRA."""
        return Updates()

    def compression_refusal(self, *, sparse: bool, feedback: bool) -> str | None:
        """The same tensors change in every round."""
        return None

    def export(self, state: State, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """AdapFu, the result, and AdapEmu beside it."""
        server = self.at_server()
        load(factors(server.full, server.places.adapter, ADAPTER), state.adapter)
        yield "global", server.full
        emulated = server.emulate(state.merged)
        places = self.division(emulated)
        load(factors(emulated, places.adapter, ADAPTER), state.adapter)
        load(factors(emulated, places.middle, EMULATOR), state.emulator)
        yield "adapemu", emulated

    def _attach(self, model: nn.Module, layers: Sequence[int]) -> nn.Module:
        """LoRA on some blocks; the adapter's factors have the same start wherever they are attached."""
        lora, seed = self.config.lora, derive_seed(self._seed, "adapter")
        return attach_lora(
            cast(PreTrainedModel, model),
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            targets=lora.targets,
            seed=seed,
            layers=layers,
            form=LoraForm(rslora=lora.use_rslora),
        )

    def division(self, model: nn.Module) -> Cut:
        """The division of an emulated model, whose E is as long as it is."""
        blocks = len(find_blocks(model).modules)
        return cut(blocks, self.config.adapter_layers, both_ends=self.config.both_ends)

    def _client(self, held: Payload) -> nn.Module:
        """A client's model, from what it was sent and nothing else, on the host."""
        model = build(held.tensors)
        places = self.division(model)
        emulator = places.middle if self.config.aligns else ()
        attached = self._attach(model, sorted((*places.adapter, *emulator)))
        for parameter in factors(attached, places.middle, EMULATOR).values():
            parameter.requires_grad_(False)
        return attached

    def tune_emulator(
        self, state: State, emulator: Mapping[str, Tensor], steps: int, when: str | int
    ) -> dict[str, Tensor]:
        """The emulator's LoRA after so many steps of Eq. 7 on public data, with the state's adapter.

        Args:
            state: Holds the adapter.
            emulator: The LoRA to start from.
            steps: How many.
            when: The round, or "before": which batches are drawn.
        """
        server, alignment, env = self.at_server(), self.config.alignment, self._env
        assert env is not None and server.emulated is not None
        student = server.emulated
        places = self.division(student)
        teacher = server.teacher()
        load(factors(server.full, server.places.adapter, ADAPTER), state.adapter)
        tail = server.tail_factors()
        load(tail, {name: state.adapter[name] for name in tail})
        if places.front:
            teacher.forget()
        load(factors(student, places.adapter, ADAPTER), state.adapter)
        parameters = server.emulator_factors()
        load(parameters, emulator)
        student.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        # the same rows throughout: what E* makes of one is kept by its place
        public = env.batching.rows(env.public, torch_generator(self._seed, "alignment-rows"))
        batches = endless_batches(
            len(public),
            alignment.batch_size,
            torch_generator(self._seed, "alignment", when),
            env.batching.lengths(public),
        )
        part = f"alignment {'before round 1' if when == 'before' else f'after round {when}'}"
        models = [server.full, student, teacher.tail]
        release_memory()
        with faults(part, lambda: alignment.batch(public)), at_work(models, env.device):
            loss = align(
                student.eval(),
                find_blocks(student).modules[places.back[0]],
                list(parameters.values()),
                teacher,
                batches,
                public,
                pad_id=env.pad_id,
                steps=steps,
                lr=alignment.lr,
                betas=(self.config.betas[0], self.config.betas[1]),
                distill_weight=self.config.distill_weight,
                form=alignment.form,
            )
            tuned = copied(parameters)
        log.info("alignment: mean loss %.4g over %d steps", loss, steps)
        return tuned

    def at_server(self) -> Server:
        """The models that the server holds; there once `client_model` was called."""
        assert self._server is not None, "client_model comes first"
        return self._server
